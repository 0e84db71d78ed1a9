"""Levels whose products are taken by programs that stay: against plain PyTorch, repeated calls, CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ple_fast import ExtractionNetwork, GateSpec, MLPSpec, Topology, use_backend
from tests.helpers import compare_low_precision, draw
from tests.kernel_helpers import values
from tests.replay_helpers import KINDS, count_repeats, launch_by

pytest.importorskip("triton")

from ple_fast_kernels import launches, without_replay
from tests.persistent_helpers import HALVES, KERNELS, launched, routed, same


@pytest.fixture(autouse=True)
def _routed(device: torch.device) -> Iterator[None]:
    with routed(device), use_backend("triton"):
        yield


TOPOLOGY = Topology.ple(2, 1, 1, last=True)


def network(device: torch.device) -> ExtractionNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ExtractionNetwork(24, TOPOLOGY, experts=MLPSpec((40, 24)), gate=GateSpec()).to(device)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("form", ["one", "stacked"])
def test_a_level(form: str, dtype: torch.dtype, device: torch.device) -> None:
    module = network(device)
    leaves = [leaf.to(device) for leaf in draw(form, 40, 3, 24)]
    with launched() as found:
        compare_low_precision(module, leaves, dtype=dtype, form=form, slots=3)
    names = [name for name, _ in found]
    assert names.count(KERNELS["linear"]) == 2 and names.count(KERNELS["data_grad"]) == 1


@pytest.mark.parametrize("rows", [0, 1, 31])
def test_a_batch_below_a_tile(rows: int, device: torch.device) -> None:
    module = network(device).bfloat16()
    with launched() as found:
        y = module(torch.randn(rows, 24, device=device, dtype=torch.bfloat16))
    assert y.shape[0] == rows and not {name for name, _ in found} & set(KERNELS.values())


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_calls_load_what_they_are_given(
    kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":
        launch_by(kind, monkeypatch)
    repeats = count_repeats(monkeypatch)
    module = network(device).bfloat16()

    def step(module: ExtractionNetwork, x: Tensor) -> tuple[Tensor, Tensor]:
        y = module(x.requires_grad_())
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]

    for seed in range(3):
        x = values(40, 24, dtype=torch.bfloat16, device=device, seed=seed)
        begin = launches()
        ours = step(module, x.clone())
        made = launches() - begin
        count = len(repeats)
        with without_replay():
            theirs = step(module, x.clone())
        assert all(map(same, ours, theirs))
        assert count == len(repeats) == 2 * seed and made == (sum(repeats[-2:]) or made)


def test_a_captured_graph_loads_what_its_memory_holds(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("captures CUDA graphs: make test-gpu")
    module = network(device).bfloat16()
    x = torch.randn(300, 24, device=device, dtype=torch.bfloat16, requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            module(x).sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), launched() as found:
        y = module(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert {name for name, _ in found} >= set(KERNELS.values())
    with torch.no_grad():
        x.normal_()
    graph.replay()
    expected = module(x)
    assert same(y.detach(), expected.detach()) and same(dx, torch.autograd.grad(expected.sum(), x)[0])

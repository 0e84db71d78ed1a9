"""A level's call is repeated without deciding anew what to launch: same results, whatever changes in between."""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ple_fast import PLE, MLMMoE, use_backend
from tests.helpers import EXPERTS, GATES, TOPOLOGIES, level, randomise
from tests.replay_helpers import kind, repeats, replay

pytest.importorskip("triton")
__all__ = ["kind", "repeats"]  # fixtures
tiles = importlib.import_module("ple_fast_kernels._tiles")


@pytest.fixture(autouse=True)
def _in_kernels() -> Iterator[None]:
    with use_backend("triton"):
        yield


def step(module: nn.Module, x: Tensor, dy: Tensor | None = None) -> list[Tensor | None]:
    """Output, gradients of input and parameters, running statistics."""
    torch.manual_seed(int(x.detach().double().sum().abs() * 1e6) % 1000)  # of dropout
    leaf = x.detach().requires_grad_(x.requires_grad)
    module.zero_grad(set_to_none=True)
    y = module(leaf)
    if y.requires_grad:
        y.backward(torch.ones_like(y) if dy is None else dy)
    grads = [p.grad for p in module.parameters()]
    return [y.detach(), leaf.grad, *grads, *(b.clone() for b in module.buffers())]


def hold(module: nn.Module, call: Callable[[], list[Tensor | None]]) -> None:
    """``call`` gives the same bits and takes the same strides as one that decides everything anew."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    found = call()
    for name, buffer in module.named_buffers():
        buffer.copy_(before[name])
    with replay.without_replay():
        wanted = call()
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.stride() == theirs.stride()
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=False)


QUICK = [
    ("ple-even", "2-layers", "plain"),
    ("adatt", "1-layer", "plain"),
    ("unordered", "dropout-in-eval", "logits-norm"),
]
CASES = [
    *((topology, "1-layer", "plain") for topology in TOPOLOGIES),
    *(("ple-even", experts, "plain") for experts in EXPERTS),
    *(("ple-even", "1-layer", gate) for gate in GATES),
]


@pytest.mark.parametrize(
    ("topology", "experts", "gate"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES)]
)
def test_a_repeated_step_equals_one_that_decides_anew(
    topology: str, experts: str, gate: str, kind: str, repeats: list[int]
) -> None:
    module = level(TOPOLOGIES[topology], EXPERTS[experts], GATES[gate])
    slots = module.topology.num_slots
    assert slots is not None
    for i in range(2):
        randomise(module, i)
        x = torch.randn(5, slots, 7, dtype=torch.float64, requires_grad=True)
        if i == 0:
            step(module, x)
        else:
            hold(module, partial(step, module, x))
    assert len(repeats) == 2, "forward and backward"


def small(**options: Any) -> PLE:
    """Few launches: the interpreter takes its time."""
    given = {"num_levels": 1, "task_experts": 1, "shared_experts": 1, "expert_units": (4,), "dtype": torch.float64}
    return PLE(6, 2, **{**given, **options})


@pytest.mark.parametrize("what", ["recompute", "frozen", "listed", "inference", "frozen input", "raw gates"])
def test_a_repeated_call_of_another_kind_equals_one_that_decides_anew(what: str, kind: str, repeats: list[int]) -> None:
    ple: nn.Module = small(recompute=what == "recompute")
    if what == "raw gates":
        ple = MLMMoE(6, 2, experts=2, expert_units=(4,), dtype=torch.float64)
    if what == "frozen":
        ple.get_parameter("levels.0.blocks.0.layers.0.weight").requires_grad_(False)

    def call(x: Tensor) -> list[Tensor | None]:
        if what == "listed":
            ple.zero_grad(set_to_none=True)
            y, ((first, *_),) = ple(x, return_gates=True)
            (y.sum() + first.square().sum()).backward()
            return [y, first, *(p.grad for p in ple.parameters())]
        if what == "inference":
            with torch.inference_mode():
                return [ple(x).clone()]
        return step(ple, x)

    x, other = torch.randn(2, 3, 6, dtype=torch.float64).requires_grad_(what != "frozen input").unbind(0)
    call(x)
    hold(ple, lambda: call(other))
    assert repeats


def _freeze(ple: PLE, x: Tensor) -> None:
    ple.levels[0].get_submodule("gate").requires_grad_(False)


def _shift(ple: PLE, x: Tensor) -> None:
    x.data = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x.data)


def _turn(ple: PLE, x: Tensor) -> None:
    weight = ple.levels[0].get_parameter("blocks.0.layers.0.weight")
    weight.data = weight.data.mT.contiguous().mT


def _narrow(ple: PLE, x: Tensor) -> None:
    for parameter in ple.parameters():
        parameter.data = parameter.data.half()
    x.data = x.data.half()


def _precision(ple: PLE, x: Tensor) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def _set_norms(ple: PLE, x: Tensor, **values: Any) -> None:
    for module in ple.modules():
        if isinstance(module, nn.BatchNorm1d):
            for name, value in values.items():
                setattr(module, name, value)


def _table(ple: PLE, x: Tensor) -> None:
    tile = tiles.Tile(16, 16, 16, 4, 1)
    tiles.set_table("interpreter", {"double": (tiles.Class(0, tile),)})


CHANGES: dict[str, Callable[[PLE, Tensor], Any]] = {
    "needs": _freeze,
    "no gradient of the input": lambda ple, x: x.requires_grad_(False),
    "strides of a weight": _turn,
    "strides of the input": lambda ple, x: setattr(x, "data", x.data.t().contiguous().t()),
    "alignment of the input": _shift,
    "dtypes in place": _narrow,
    "precision of products": _precision,
    "tiles": _table,
    "mode of one layer": lambda ple, x: ple.levels[0].get_submodule("blocks.0.layers.0").eval(),
    "recompute": lambda ple, x: setattr(ple.levels[0], "recompute", True),
    "mode": lambda ple, x: ple.eval(),
    "rows": lambda ple, x: setattr(x, "data", torch.randn(9, 6, dtype=x.dtype)),
    "epsilon": partial(_set_norms, eps=1.0),
    "momentum": partial(_set_norms, momentum=None),
    "statistics are not kept": partial(_set_norms, running_mean=None, running_var=None, track_running_stats=False),
}
OF_NORMS = ("mode", "epsilon", "momentum", "statistics are not kept")


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_calls_is_seen(change: str, kind: str, repeats: list[int]) -> None:
    dtype = torch.float32 if change == "precision of products" else torch.float64
    ple = small(norm="batch" if change in OF_NORMS else None, dropout=0.2, dtype=dtype)
    randomise(ple)
    step(ple, torch.randn(5, 6, dtype=dtype, requires_grad=True))
    x = torch.randn(5, 6, dtype=dtype, requires_grad=True)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        CHANGES[change](ple, x)
        hold(ple, lambda: step(ple, x))
        assert not repeats, "nothing may be repeated of what was recorded before the change"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
        tiles.set_table("interpreter", None)


def test_autocast_between_calls_is_seen(repeats: list[int]) -> None:
    ple = small(dtype=torch.float32)
    x = torch.randn(5, 6, requires_grad=True)
    for i in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=i % 2 == 1):
            hold(ple, lambda: step(ple, x))
    assert len(repeats) == 4


def test_programs_hold_no_tensor_of_the_call_they_were_recorded_in() -> None:
    ple = small()
    seen = []
    for _ in range(2):
        x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
        y = ple(x)
        y.sum().backward()
        seen += [weakref.ref(x), weakref.ref(y)]
    assert any(isinstance(known, replay._Program) for known in replay._programs.values())
    del x, y
    gc.collect()
    assert [one() for one in seen] == [None] * 4

"""Capture and replay on a GPU: nothing in a level waits for the device. Needs ``--device cuda``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from ple_fast import PLE


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """The device under test; these tests have no meaning on a CPU, which has no graphs to capture."""
    if device.type != "cuda":
        pytest.skip("captures CUDA graphs: make test-gpu")
    return device


def build(device: torch.device) -> tuple[PLE, Tensor]:
    torch.manual_seed(0)
    return PLE(64, 2, expert_units=(64, 32), device=device), torch.randn(300, 64, device=device)


def warm_up(step: Any) -> None:
    """Compile everything on a side stream, as capture asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)


def test_inference_is_captured_and_replays(gpu: torch.device) -> None:
    ple, x = build(gpu)
    with torch.no_grad():
        warm_up(lambda: ple(x))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ple(x)
        x.normal_()
        graph.replay()
        torch.testing.assert_close(y, ple(x), rtol=0, atol=0)


def test_a_training_step_is_captured_and_replays(gpu: torch.device) -> None:
    ple, x = build(gpu)
    eager = copy.deepcopy(ple)

    def step() -> Tensor:
        y: Tensor = ple(x)
        for parameter in ple.parameters():
            parameter.grad = None
        y.square().sum().backward()
        return y

    warm_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    x.normal_()
    graph.replay()
    expected = eager(x)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    for p, q in zip(ple.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_graphed_callables(gpu: torch.device) -> None:
    ple, x = build(gpu)
    eager = copy.deepcopy(ple)
    graphed: Any = torch.cuda.make_graphed_callables(ple, (x.clone(),))
    fresh = torch.randn_like(x)
    for module in (graphed, eager):
        module(fresh).square().sum().backward()
    torch.testing.assert_close(graphed(fresh), eager(fresh))
    for p, q in zip(ple.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_reduce_overhead(gpu: torch.device) -> None:
    torch.compiler.reset()
    ple, x = build(gpu)
    run = torch.compile(copy.deepcopy(ple), mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(run(x), ple(x))


def test_a_replayed_step_drops_other_elements_and_moves_running_statistics(gpu: torch.device) -> None:
    torch.manual_seed(0)
    ple = PLE(64, 2, expert_units=(64, 32), norm="batch", dropout=0.5, device=gpu)
    x = torch.randn(300, 64, device=gpu)
    warm_up(lambda: ple(x).sum().backward())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ple(x)
        y.sum().backward()
    seen = []
    for _ in range(2):
        before = [buffer.clone() for name, buffer in ple.named_buffers() if name.endswith("running_mean")]
        graph.replay()
        after = [buffer for name, buffer in ple.named_buffers() if name.endswith("running_mean")]
        assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        seen.append(y.clone())
    assert not torch.equal(seen[0], seen[1])

"""One contestant in one mode on a GPU: its step, its step in a CUDA graph, and the clocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.configs import Mode, TrunkConfig
from benchmarks.contestants import build
from benchmarks.gradients import INPUT, OUTPUTS, PARAMETER, Places
from benchmarks.steps import inputs

SELF_GRAPHED = "loop_max_autotune"
"""Has CUDA graphs of its own."""


@dataclass
class Runner:
    """A contestant in a mode on a device, with inputs that stay where they are."""

    name: str
    trunk: nn.Module
    mode: Mode
    x: Tensor
    grads: list[Tensor]
    places: Places | None
    """Where it keeps the loop's parameters; None where nothing is trained."""

    @classmethod
    def of(
        cls,
        name: str,
        config: TrunkConfig,
        mode: Mode,
        device: torch.device,
        data: tuple[Tensor, list[Tensor]] | None = None,
    ) -> Runner:
        """A contestant of the baseline's weights; ``data``: the batch and the gradients, which others may have too."""
        x, grads = inputs(config, device=device) if data is None else data
        own = x.detach().requires_grad_(mode != "inference")
        trunk = build(name, config, device).train(mode != "inference")
        return cls(name, trunk, mode, own, grads, Places(name, config) if mode == "train" else None)

    def reset(self) -> None:
        """Without gradients, as before a step."""
        for leaf in (*self.trunk.parameters(), self.x):
            leaf.grad = None

    def step(self) -> list[Tensor]:
        """One call: outputs; in training the gradients are in the leaves."""
        if self.name == SELF_GRAPHED:
            torch.compiler.cudagraph_mark_step_begin()
        if self.mode == "inference":
            with torch.inference_mode():
                return list(self.trunk(self.x))
        if self.mode == "forward":
            return list(self.trunk(self.x))
        self.reset()
        outputs = list(self.trunk(self.x))
        torch.autograd.backward(outputs, self.grads)
        return outputs

    def results(self, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """What is compared, copied: outputs and, after a training step, every gradient."""
        found = {OUTPUTS: torch.stack([y.detach() for y in outputs]).float()}
        if self.places is not None:
            assert self.x.grad is not None
            found[INPUT] = self.x.grad.float()
            gradients = self.places.gradients(self.trunk)
            found |= {f"{PARAMETER}{name}": gradient for name, gradient in gradients.items()}
        return found


Capture = Callable[[Runner], tuple[Callable[[], object], list[Tensor]]]


def cuda_graph(runner: Runner) -> tuple[Callable[[], object], list[Tensor]]:
    """A step in a CUDA graph: what replays it, and the outputs that a replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            runner.step()
    torch.cuda.current_stream().wait_stream(stream)
    runner.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = runner.step()
    return graph.replay, outputs


def not_captured(runner: Runner) -> tuple[Callable[[], object], list[Tensor]]:
    """Stands in for ``cuda_graph`` where there is no GPU: the step itself."""
    outputs = runner.step()

    def replay() -> None:
        for kept, fresh in zip(outputs, runner.step(), strict=True):
            kept.detach().copy_(fresh.detach())

    return replay, outputs


def cuda_clock(call: Callable[[], object], repeats: int) -> float:
    """Seconds per call between two CUDA events."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3 / repeats


def cpu_clock(call: Callable[[], object], repeats: int) -> float:
    """Seconds per call on the host, for ``--device cpu``."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Precision of float32 products within a block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

"""One contestant in one mode on a GPU: its step, and its step in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.configs import Mode, TrunkConfig
from benchmarks.contestants import CONTESTANTS, build
from benchmarks.gradients import INPUT, OUTPUTS, PARAMETER, Places
from benchmarks.steps import call_of, inputs


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
    call: Callable[[], Any] = field(init=False)

    def __post_init__(self) -> None:
        self.call = call_of(self.trunk, self.mode, self.x, self.grads, frozen=CONTESTANTS[self.name].frozen)

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
        if CONTESTANTS[self.name].self_graphed:
            torch.compiler.cudagraph_mark_step_begin()
        return list(self.call())

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


def capture_of(device: torch.device) -> Capture:
    """A CUDA graph on a GPU, what stands in for it elsewhere."""
    return cuda_graph if device.type == "cuda" else not_captured


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Precision of float32 products within a block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

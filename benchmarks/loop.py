"""The baseline: a PLE as public code writes it, with a module per expert and per gate, and its seeded weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.configs import SEED, TrunkConfig


class MakeUp(NamedTuple):
    """What a loop has beside linear layers and ReLU: batch norm in experts and gates, where torch-rechub forces it, or
    layer norm in experts; biases of the gates; dropout in experts."""

    norm: Literal["batch", "layer"] | None = None
    gate_bias: bool = True
    dropout: float = 0.0


PLAIN = MakeUp()


def _expert(in_features: int, units: Sequence[int], make_up: MakeUp) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in units:
        layers.append(nn.Linear(in_features, width))
        if make_up.norm is not None:
            layers.append(nn.BatchNorm1d(width) if make_up.norm == "batch" else nn.LayerNorm(width))
        layers.append(nn.ReLU(inplace=True))
        if make_up.dropout:
            layers.append(nn.Dropout(make_up.dropout))
        in_features = width
    return nn.Sequential(*layers)


def _gate(in_features: int, experts: int, make_up: MakeUp) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(in_features, experts, bias=make_up.gate_bias)]
    if make_up.norm == "batch":
        layers.append(nn.BatchNorm1d(experts))
    return nn.Sequential(*layers, nn.Softmax(dim=1))


def _mix(weights: Tensor, experts: list[Tensor]) -> Tensor:
    """``sum_e weights[:, e] * experts[e]``: (B, A) and A times (B, H) to (B, H).

    Stack and batched product: measured level with stack + mul + sum and einsum, and the better of them more often.
    """
    return torch.bmm(weights.unsqueeze(1), torch.stack(experts, dim=1)).squeeze(1)


class LoopLevel(nn.Module):
    """One extraction network: its modules called one after the other."""

    def __init__(self, config: TrunkConfig, level: int, make_up: MakeUp) -> None:
        super().__init__()
        self.task_experts, self.shared_experts = config.task_experts, config.shared_experts
        width = config.level_inputs()[level]
        units = config.level_units()[level]
        self.experts = nn.ModuleList(_expert(width, units, make_up) for _ in range(config.num_experts))
        self.gates = nn.ModuleList(_gate(width, size, make_up) for size in config.gate_sizes(level))

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """T + 1 tensors (B, D), tasks first, to T + 1 (T at the last level) tensors (B, H)."""
        tasks = len(inputs) - 1
        slots = [x for x in inputs[:-1] for _ in range(self.task_experts)] + [inputs[-1]] * self.shared_experts
        experts = [expert(x) for expert, x in zip(self.experts, slots, strict=True)]
        shared = experts[tasks * self.task_experts :]
        read = [experts[t * self.task_experts : (t + 1) * self.task_experts] + shared for t in range(tasks)] + [experts]
        return [_mix(gate(x), hs) for gate, x, hs in zip(self.gates, inputs, read, strict=False)]


class Levels(nn.Module):
    """Levels one after the other: each takes T + 1 tensors (B, D) and gives as many (B, H), the last one T."""

    def __init__(self, tasks: int, levels: Iterable[Callable[[list[Tensor]], list[Tensor]]]) -> None:
        super().__init__()
        self.tasks, self.levels = tasks, levels

    def forward(self, x: Tensor) -> list[Tensor]:
        inputs = [x] * (self.tasks + 1)
        for level in self.levels:
            inputs = level(inputs)
        return inputs


class LoopPLE(Levels):
    """A stack of ``LoopLevel``."""

    levels: nn.ModuleList

    def __init__(self, config: TrunkConfig, make_up: MakeUp = PLAIN) -> None:
        super().__init__(
            config.num_tasks, nn.ModuleList(LoopLevel(config, level, make_up) for level in range(config.num_levels))
        )


def baseline(config: TrunkConfig, make_up: MakeUp = PLAIN) -> LoopPLE:
    """The seeded loop whose weights every contestant takes over."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return LoopPLE(config, make_up).to(config.torch_dtype)

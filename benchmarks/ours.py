"""``ple_fast`` as a contestant: built at a size, or packed from the modules of another trunk.

A trunk of ours returns ``(B, T, H)`` and is read through ``unbind(1)``, so the stacking of the T incoming gradients
counts against it.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.configs import TrunkConfig
from benchmarks.loop import LoopPLE
from benchmarks.peers import RechubTrunk, rechub_modules, stacked_layers


class UnboundTrunk(nn.Module):
    """A trunk that returns (B, T, H), read as towers read it."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y: Tensor = self.trunk(x)
        return y.unbind(1)


def _trunk(config: TrunkConfig, loop: LoopPLE, **options: Any) -> nn.Module:
    """``ple_fast.PLE`` with the loop's weights, through the names that its state dict documents."""
    ple = importlib.import_module("ple_fast").PLE(
        config.in_features, config.num_tasks, num_levels=config.num_levels, task_experts=config.task_experts,
        shared_experts=config.shared_experts, expert_units=config.level_units(), dtype=config.torch_dtype, **options,
    )  # fmt: skip
    assert isinstance(ple, nn.Module)
    state: dict[str, Tensor] = {}
    level: Any  # LoopLevel
    for index, level in enumerate(loop.levels):
        for i, (weight, bias) in enumerate(stacked_layers(level.experts)):
            state[f"levels.{index}.blocks.0.layers.{i}.weight"] = weight
            state[f"levels.{index}.blocks.0.layers.{i}.bias"] = bias
        gates = [gate[0] for gate in level.gates]
        state[f"levels.{index}.gate.weight"] = torch.cat([gate.weight.detach() for gate in gates])
        state[f"levels.{index}.gate.bias"] = torch.cat([gate.bias.detach() for gate in gates])
    ple.load_state_dict(state)
    return ple


def fast(config: TrunkConfig, loop: LoopPLE, **options: Any) -> nn.Module:
    """``ple_fast.PLE``."""
    return UnboundTrunk(_trunk(config, loop, **options))


def reference(config: TrunkConfig, loop: LoopPLE) -> nn.Module:
    """The oracle of the tests."""
    return UnboundTrunk(importlib.import_module("ple_fast.reference").PLEReference.like(_trunk(config, loop)))


def packed(config: TrunkConfig, loop: LoopPLE) -> nn.Module:
    """``ple_fast.pack`` of the loop's own modules: whatever norms and dropout they have."""
    levels: Any = loop.levels  # of LoopLevel
    return _packed(config, [([*level.experts], [*level.gates]) for level in levels])


def packed_rechub(config: TrunkConfig, loop: LoopPLE) -> nn.Module:
    """``ple_fast.pack`` of torch-rechub's own modules."""
    levels = map(rechub_modules, RechubTrunk(config, loop).levels)
    return _packed(config, [([one.mlp for one in experts], [one.mlp for one in gates]) for experts, gates in levels])


def _packed(config: TrunkConfig, levels: Iterable[tuple[list[nn.Module], list[nn.Module]]]) -> nn.Module:
    ours = importlib.import_module("ple_fast")
    made = []
    for index, (experts, gates) in enumerate(levels):
        last = index == config.num_levels - 1
        topology = ours.Topology.ple(config.num_tasks, config.task_experts, config.shared_experts, last=last)
        made.append(ours.pack(experts, [_before_softmax(gate) for gate in gates], topology))
    return UnboundTrunk(ours.PLE.from_levels(made))


def _before_softmax(gate: nn.Module) -> nn.Sequential:
    return nn.Sequential(*itertools.takewhile(lambda layer: not isinstance(layer, nn.Softmax), gate.children()))

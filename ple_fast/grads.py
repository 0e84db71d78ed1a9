"""Gradients of a level's tensors, by name, while they are gathered over blocks of rows and launches."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class LayerGrads:
    """Of the tensors of one layer, ``LayerTensors`` in ``plan.py``; None: 0, or not wanted."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    slope: Tensor | None = None


@dataclass(slots=True)
class GateGrads:
    """Of the tensors that end the gates, ``GateTensors`` in ``plan.py``; None: 0, or not wanted."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    offset: Tensor | None = None


@dataclass(slots=True)
class LevelGrads:
    """Of all layers, those of hidden gates last, and of the gates' end."""

    layers: list[LayerGrads]
    gate: GateGrads = field(default_factory=GateGrads)

    @classmethod
    def none(cls, num_layers: int) -> LevelGrads:
        """Nothing so far."""
        return cls([LayerGrads() for _ in range(num_layers)])

    def flat(self) -> list[Tensor | None]:
        """In the order of ``plan.flatten``."""
        found = []
        for row in self.layers:
            found += [row.weight, row.bias, row.norm_weight, row.norm_bias, row.slope]
        gate = self.gate
        return [*found, gate.weight, gate.bias, gate.norm_weight, gate.norm_bias, gate.offset]


def plus(before: Tensor | None, value: Tensor | None) -> Tensor | None:
    """``before + value``, in the memory of ``before`` if there is some; None stands for 0."""
    if value is None or before is None:
        return before if value is None else value
    return before.add_(value.view(before.shape))

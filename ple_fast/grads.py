"""Gradients of a level's tensors, by name, while they are gathered over blocks of rows and launches."""

from __future__ import annotations

import torch
from torch import Tensor


class RowGrads:
    """Of a weight and what belongs to it; None: 0, or not wanted."""

    # Attributes of the class: a call makes several of these, and an initialiser would take most of it.
    weight: Tensor | None = None
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None


class LayerGrads(RowGrads):
    """Of the tensors of one layer, ``LayerTensors`` in ``plan.py``."""

    slope: Tensor | None = None


class GateGrads(RowGrads):
    """Of the tensors that end the gates, ``GateTensors`` in ``plan.py``."""

    offset: Tensor | None = None


class LevelGrads:
    """Of ``num_layers`` layers, those of hidden gates last, and of the gates' end; nothing so far."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerGrads() for _ in range(num_layers)]
        self.gate = GateGrads()

    def flat(self) -> list[Tensor | None]:
        """In the order of ``plan.flatten``."""
        found = []
        for row in self.layers:
            found += [row.weight, row.bias, row.norm_weight, row.norm_bias, row.slope]
        gate = self.gate
        return [*found, gate.weight, gate.bias, gate.norm_weight, gate.norm_bias, gate.offset]


def sum_of_rows(d: Tensor) -> Tensor:
    """``d.sum(0)``; of one row the row itself, a view."""
    return d[0] if d.shape[0] == 1 else d.sum(0)


def plus(before: Tensor | None, value: Tensor | None) -> Tensor | None:
    """``before + value``, in the memory of ``before`` if there is some; None stands for 0.

    Sums are float32 at least: low precision would lose what many blocks of rows add.
    """
    if value is None or before is None:
        return before if value is None else value
    if before.dtype in (torch.bfloat16, torch.float16):
        before = before.float()
    return before.add_(value.view(before.shape))

"""One tower per task: an MLP from the task's mixture to its output."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..scalars import check_counts, check_number, is_sequence, shown

TOWER_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


def tower_options(units: Any, activation: Any, dropout: Any) -> tuple[list[int], float]:
    """Widths and dropout rate as Python's numbers.

    Raises:
        TypeError: an option of another type.
        ValueError: a width below 1, an unknown activation, a rate outside [0, 1].
    """
    if not is_sequence(units):
        raise TypeError(f"tower_units: expected the widths of the hidden layers, such as (64,), got {shown(units)}")
    widths = list(check_counts("tower_units", units))
    if not isinstance(activation, str) or activation not in TOWER_ACTIVATIONS:
        raise ValueError(f"tower_activation: expected one of {', '.join(TOWER_ACTIVATIONS)}, got {shown(activation)}")
    rate = check_number("tower_dropout", dropout)
    if not 0 <= rate <= 1:
        raise ValueError(f"tower_dropout: expected a rate from 0 to 1, got {rate}")
    return widths, rate


def build_tower(widths: Sequence[int], outputs: int, activation: str, dropout: float) -> nn.Sequential:
    """The layers of one tower; the last one is linear."""
    layers: list[nn.Module] = []
    for first, second in itertools.pairwise(widths):
        layers += [nn.Linear(first, second), TOWER_ACTIVATIONS[activation]()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))

"""One tower per task: an MLP from the task's mixture to its output."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

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


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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


def run_one_by_one(towers: nn.ModuleList, mixtures: Tensor, scales: Sequence[Tensor], factor: float) -> list[Tensor]:
    """``run_towers``, one after the other."""
    # unbind, not y[:, k]: the backward of each index would fill a tensor as large as y with zeros.
    parts = zip(*((factor * scale).unbind(1) for scale in scales), strict=True) if scales else ((),) * len(towers)
    return [
        scaled_tower(tower, mixture, own) if scales else tower(mixture)
        for tower, mixture, own in zip(towers, mixtures.unbind(1), parts, strict=True)
    ]


def scaled_tower(tower: nn.Module, x: Tensor, scales: Sequence[Tensor]) -> Tensor:
    """One tower, layer by layer: what each linear layer reads is multiplied by its own ``(B, D)``.

    Raises:
        ValueError: its layers cannot be told apart, or are more or fewer.
    """
    tower = getattr(tower, "_orig_mod", tower)  # compiled, which none of its layers is by itself
    layers = list(tower) if isinstance(tower, nn.Sequential) else []
    found = sum(isinstance(layer, nn.Linear) for layer in layers)
    if found != len(scales) or not is_bare(tower):
        raise ValueError(
            f"towers: expected an nn.Sequential of {len(scales)} nn.Linear with personal_columns, which scale what "
            f"each of them reads, and no hook of its own, got {type(tower).__name__} with {found}; put hooks on a layer"
        )
    given = iter(scales)
    for layer in layers:
        x = layer(x * next(given) if isinstance(layer, nn.Linear) else x)
    return x


def is_bare(module: nn.Module) -> bool:
    """Whether a call of the module is its class's forward, and nothing else."""
    own = module.__dict__
    return "forward" not in own and not any(own.get(name) for name in _HOOKS)

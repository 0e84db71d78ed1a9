"""A trial of the section ``swaps`` from one number: a model, what is done to it, an optimizer, and modes around."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.optim import Optimizer

from soak.swap_changes import CHANGES
from soak.swap_models import Model, draw_model

EPS = 1e-4
"""Of optimizers: a gradient that is 0 but for rounding, of a bias before a batch norm, stays a small step."""
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=EPS),
    "Adam, amsgrad, foreach": lambda p: torch.optim.Adam(
        p, lr=0.01, eps=EPS, amsgrad=True, foreach=True, weight_decay=0.01
    ),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, eps=EPS, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02, initial_accumulator_value=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.003, momentum=0.5, centered=True, eps=EPS),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.005, eps=EPS),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.005, eps=EPS, maximize=True),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.02),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}
GROUPS = ("all", "all", "all", "trunk apart", "by dimensions", "some", "two optimizers", "not passed")
AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "meta by default": lambda: torch.device("meta"),
    "half by default": lambda: _DefaultDtype(torch.float16),
    "double by default": lambda: _DefaultDtype(torch.float64),
    "swapped parameters": lambda: _Future("swap_module_params_on_conversion"),
    "overwritten parameters": lambda: _Future("overwrite_module_params_on_conversion"),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
}
REFUSALS = (
    "holds parameters that would be replaced",
    "is not known to treat every element on its own",
    "has parameters in different groups",
    "of some parameters and not of others that become one",
    "of parameters that become one; build",
    "some parameters that become one have a gradient and others have none",
    "have different penalties",
)
"""Errors of ``accelerate`` that docs/accelerate.md and docs/migration name."""


class _DefaultDtype:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


class _Future:
    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        getattr(torch.__future__, f"set_{self.name}")(True)

    def __exit__(self, *_: object) -> None:
        getattr(torch.__future__, f"set_{self.name}")(False)


@dataclass(frozen=True)
class Trial:
    """Everything about one trial; its seed gives it again."""

    seed: int
    model: Model
    changes: tuple[str, ...]
    dtype: torch.dtype
    rows: int
    optimizer: str
    groups: str
    named: bool
    """The optimizer is built of named parameters."""
    steps_before: int
    gradients: str
    """What becomes of gradients before the swap: kept, None or zeros."""
    around: str
    around_restore: str
    part: bool
    """A part of the model is accelerated, not the whole."""
    style: Any
    modes: tuple[str, ...]
    """Per step after the swap: what is called before it."""
    between: str
    """What happens to the accelerated model before it is restored."""
    again: bool
    """It is accelerated and restored for a second time."""

    def __str__(self) -> str:
        rows = ((f.name, getattr(self, f.name)) for f in fields(self))
        return ", ".join(f"{name}={value.name if isinstance(value, Model) else value!r}" for name, value in rows)


def draw_trial(seed: int) -> Trial:
    """The trial of a seed."""
    dice = random.Random(seed)
    kinds, weights = [kind.__name__ for kind in CHANGES], list(CHANGES.values())
    plain, model = dice.random() < 0.75, draw_model(dice)
    changes = dice.choices(kinds, weights, k=dice.choice((0, 1, 1, 1, 2, 2, 3, 4)))
    if model.stale:  # what is stale is told by name, which says nothing of who shares its memory
        changes = [kind for kind in changes if kind != "one_memory"]
    return Trial(
        seed=seed,
        model=model,
        changes=tuple(changes),
        dtype=torch.float64 if dice.random() < 0.75 else torch.float32,
        rows=dice.choice((2, 5, 9, 16, 40)),
        optimizer=dice.choice(
            [name for name in OPTIMIZERS if name != "Adafactor"] if dice.random() < 0.985 else ["Adafactor"]
        ),
        groups="all" if plain else dice.choice(GROUPS),
        named=dice.random() < 0.3,
        steps_before=dice.choice((0, 1, 2)),
        gradients=dice.choice(("None", "None", "kept", "zeros")),
        around=dice.choice(list(AROUND)),
        around_restore=dice.choice(list(AROUND)),
        part=dice.random() < 0.1,
        style=dice.choice(("original", "original", "original", "fused")),
        modes=tuple(dice.choice(("", "", "eval", "train")) for _ in range(3)),
        between=dice.choice(("", "", "copy", "load", "accelerate")),
        again=dice.random() < 0.3,
    )

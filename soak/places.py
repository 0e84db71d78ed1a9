"""One NaN or infinity in a random level or trunk: results have theirs where the reference has them, nowhere else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from soak.levels import Row, rows_of
from soak.make_ups import Trial, draw_trial

VALUES = (float("nan"), float("inf"), float("-inf"))
KINDS = (("NaN", torch.isnan), ("infinity", torch.isposinf), ("minus infinity", torch.isneginf))
TOLERANCE = 1e-6
"""Of what is finite, in units of the largest magnitude of each tensor, and of 1."""
SHAKES = 6
ADDS_UP = ("batched", "served")
"""Ways that add up what the reference does not, gradients or folded norms: of two infinities the sum is NaN."""


def is_low(trial: Trial) -> bool:
    """Whether half precision is at work, where what overflows in one order of operators does not in another."""
    return trial.autocast is not None or trial.dtype not in (torch.float32, torch.float64)


class Planted:
    """Plants one value in an element of a parameter or an input; with ``shake`` all else moves by units of rounding."""

    def __init__(self, trial: Trial, seed: int, shake: int | None = None) -> None:
        self.values = VALUES[:1] if trial.way in ADDS_UP or is_low(trial) else VALUES
        self.seed, self.shake = seed, shake
        self.what = "nothing"

    def __call__(self, module: nn.Module, leaves: list[Tensor], gate_leaves: list[Tensor]) -> None:
        named: dict[str, Tensor] = dict(module.named_parameters())
        named.update({f"x[{i}]": leaf for i, leaf in enumerate(leaves)})
        named.update({f"gate_input[{i}]": leaf for i, leaf in enumerate(gate_leaves)})
        if self.shake is not None:
            generator = torch.Generator().manual_seed(self.shake)
            for tensor in named.values():
                units = torch.randint(-2, 3, tensor.shape, generator=generator).to(tensor)
                tensor.mul_(1 + units * torch.finfo(tensor.dtype).eps)
        dice = random.Random(f"planted {self.seed}")
        name, tensor = dice.choice([(name, tensor) for name, tensor in named.items() if tensor.numel()])
        index, value = tuple(dice.randrange(size) for size in tensor.shape), dice.choice(self.values)
        tensor[index] = value
        self.what = f"{value} at {name}{list(index)}"


def fault(ours: Tensor | None, theirs: Tensor | None, *, places_alone: bool = False) -> str | None:
    """What differs: the places of NaN or of an infinity, or a finite value; None if nothing does."""
    if ours is None or theirs is None:
        # A backend may leave None or zeros where no gradient flows; anything else is a mistake.
        present = ours if ours is not None else theirs
        return None if present is None or not present.any() else "a gradient of one of the two alone"
    a, b = ours.detach().double(), theirs.detach().double()
    for kind, find in KINDS:
        here, there = find(a), find(b)
        if not torch.equal(here, there):
            return f"{kind} at {here.nonzero().tolist()[:4]}, the reference's at {there.nonzero().tolist()[:4]}"
    finite = torch.isfinite(b)
    if finite.any() and not places_alone:
        error = (a - b)[finite].abs().max().item()
        if error > TOLERANCE * max(1.0, b[finite].abs().max().item()):
            return f"finite values differ by {error:.3g}"
    return None


def undecided(trial: Trial, seed: int, rows: list[Row]) -> set[str]:
    """Results whose places in the reference depend on rounding: a difference that is 0 or not, times infinity."""
    moved = set()
    for shake in range(SHAKES):
        for (name, _, shaken), (_, _, still) in zip(rows_of(trial, Planted(trial, seed, shake)), rows, strict=True):
            if fault(shaken, still) is not None:
                moved.add(name)
    return moved


def check(trial: Trial, seed: int) -> bool:
    """Holds one trial to the reference. Returns whether its places depend on rounding.

    Raises:
        AssertionError: they differ; the message says where.
    """
    planted = Planted(trial, seed)
    rows = rows_of(trial, planted)
    faults = {name: fault(ours, theirs, places_alone=is_low(trial)) for name, ours, theirs in rows}
    if not any(faults.values()):
        return False
    apart = undecided(trial, seed, rows)
    for name, what in faults.items():
        assert what is None or name in apart, f"{name}: {what}; {planted.what}"
    return True


def run(seed: int, trials: int, figures: dict[str, Any]) -> Iterator[str | None]:
    """One trial per seed from ``seed`` on; yields what failed of it."""
    figures.update(undecided=0)
    for number in range(seed, seed + trials):
        trial = draw_trial(number)
        try:
            figures["undecided"] += check(trial, number)
        except Exception as error:  # whatever is raised is a failure to be told
            yield f"{type(error).__name__}: {error}\n  {trial}\n  again: python -m soak --only places --seed {number}"
        else:
            yield None

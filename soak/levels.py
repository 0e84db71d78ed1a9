"""Random levels and trunks, each against ``ple_fast.reference`` in float64: outputs, gates, gradients, statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ple_fast.reference import correspondence
from soak.make_ups import Trial, draw_trial
from soak.ways import PLAIN, Step, drop_alike, settings_of
from tests.helpers import Run, assert_close, reference_of, results

Row = tuple[str, Tensor | None, Tensor | None]
Spoil = Callable[[nn.Module, list[Tensor], list[Tensor]], None]
TOLERANCE = 1e-9
"""In float64, in units of the largest magnitude of each tensor, and of 1."""
SHAKES, AMPLIFIED = 4, 8.0
"""Where rounding is amplified beyond that: how often it is measured, and how much more than measured is allowed."""


class Sides:
    """A trial's two modules, ready to run: the fused one and the reference with its weights.

    ``spoil`` may change the module's tensors and the leaves of the inputs, in place, before the reference is made.
    """

    def __init__(self, trial: Trial, spoil: Spoil | None = None) -> None:
        self.trial, self.fused = trial, trial.module()
        self.leaves = [leaf.to(trial.dtype) for leaf in trial.leaves()]
        self.gate_leaves = [leaf.to(trial.dtype) for leaf in trial.gate_leaves() or []]
        if spoil is not None:
            with torch.no_grad():
                spoil(self.fused, self.leaves, self.gate_leaves)
        self.reference = reference_of(self.fused)
        drop_alike(self.fused, self.reference)
        for pair in correspondence(self.fused, self.reference):
            pair.reference.requires_grad_(pair.fused.requires_grad)

    def run(self) -> tuple[Run, Run]:
        """Ours and the reference's; gradients of parameters land in ``.grad``."""
        trial, leaves, gate_leaves = self.trial, self.leaves, self.gate_leaves
        with settings_of(trial):
            ours = Step(trial, self.fused, leaves, gate_leaves).run(trial.way)
            theirs = Step(trial, self.reference, leaves, gate_leaves).run(PLAIN.get(trial.way, trial.way))
        return ours, theirs

    def rows(self) -> list[Row]:
        """Name, ours and the reference's of everything that the trial yields."""
        ours, theirs = self.run()
        assert ours.y.dtype == theirs.y.dtype
        assert [gate.dtype for gate in ours.gates] == [gate.dtype for gate in theirs.gates]
        return list(results(self.fused, ours, self.reference, theirs))


def rows_of(trial: Trial, spoil: Spoil | None = None) -> list[Row]:
    """Name, ours and the reference's of outputs, gates, gradients and buffers of the trial."""
    return Sides(trial, spoil).rows()


def amplified(trial: Trial, rows: Sequence[Row]) -> dict[str, float]:
    """How far each result of the reference moves when every product of a layer is rounded otherwise.

    Norms may amplify rounding at will, and another order of summation then needs that room.
    """
    moved = dict.fromkeys((name for name, _, _ in rows), 0.0)
    for number in range(SHAKES):
        sides = Sides(trial)
        shake = partial(_shaken, torch.Generator().manual_seed(number))
        for module in sides.reference.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(shake)
        for (name, _, shaken), (_, _, still) in zip(sides.rows(), rows, strict=True):
            if shaken is not None and still is not None and still.numel():
                moved[name] = max(moved[name], (shaken - still).abs().max().item())
    return moved


def _shaken(generator: torch.Generator, module: nn.Module, arguments: Any, out: Tensor) -> Tensor:
    """A product whose every element is off by up to two units of rounding."""
    units = torch.randint(-2, 3, out.shape, generator=generator).to(out)
    return out * (1 + units * torch.finfo(out.dtype).eps)


def check(trial: Trial) -> bool:
    """Holds one trial to the reference. Returns whether rounding had to be measured for it.

    Raises:
        AssertionError: it differs; the message says where.
    """
    rows = rows_of(trial)
    try:
        for name, ours, theirs in rows:
            assert_close(name, ours, theirs, TOLERANCE)
    except AssertionError:
        moved = amplified(trial, rows)
        for name, ours, theirs in rows:
            assert_close(name, ours, theirs, TOLERANCE, scale=AMPLIFIED * moved[name] / TOLERANCE)
        return True
    return False


def run(seed: int, trials: int, figures: dict[str, Any]) -> Iterator[str | None]:
    """One trial per seed from ``seed`` on; yields what failed of it."""
    ways: dict[str, int] = {}
    figures.update(ways=ways, amplified=0)
    for number in range(seed, seed + trials):
        trial = draw_trial(number)
        ways[trial.way] = ways.get(trial.way, 0) + 1
        try:
            figures["amplified"] += check(trial)
        except Exception as error:  # whatever is raised is a failure to be told
            yield f"{type(error).__name__}: {error}\n  {trial}\n  again: python -m soak --only levels --seed {number}"
        else:
            yield None

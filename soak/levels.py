"""Random levels and trunks, each against ``ple_fast.reference`` in float64: outputs, gates, gradients, statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ple_fast.reference import Layer, correspondence
from soak.make_ups import Trial, draw_trial
from soak.ways import PLAIN, Step, drop_alike, settings_of
from tests.helpers import Run, assert_close, assert_two_sided, reference_of, results

Row = tuple[str, Tensor | None, Tensor | None]
Spoil = Callable[[nn.Module, list[Tensor], list[Tensor]], None]
TOLERANCE = 1e-9
"""In float64, in units of the largest magnitude of each tensor, and of 1."""
SHAKES, AMPLIFIED = 8, 8.0
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

    @property
    def fused_dtype(self) -> torch.dtype:
        return next(self.fused.parameters()).dtype

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
        # Under autocast the whole level has its dtype, whatever PyTorch's own activations and norms would widen.
        dtype = self.fused_dtype if self.trial.autocast is None else self.trial.autocast
        assert ours.y.dtype == dtype, f"y: expected {dtype}, got {ours.y.dtype}"
        for gate in ours.gates:
            wide = torch.promote_types(dtype, torch.float32)
            assert gate.dtype == wide, f"gates: expected {wide}, got {gate.dtype}"
        return list(results(self.fused, ours, self.reference, theirs))


def rows_of(trial: Trial, spoil: Spoil | None = None) -> list[Row]:
    """Name, ours and the reference's of outputs, gates, gradients and buffers of the trial."""
    return Sides(trial, spoil).rows()


def shaken(trial: Trial) -> Iterator[list[Row]]:
    """The rows again and again, the reference with every product and every output of a layer rounded otherwise.

    Norms may amplify rounding at will, and kinks may turn on it: how far its own results move is the room that another
    order of summation needs.
    """
    for number in range(SHAKES):
        sides = Sides(trial)
        shake = partial(_shake, torch.Generator().manual_seed(number))
        for module in sides.reference.modules():
            if isinstance(module, nn.Linear | Layer):
                module.register_forward_hook(shake)
        yield sides.rows()


def _shake(generator: torch.Generator, module: nn.Module, arguments: tuple[Tensor], out: Tensor) -> Tensor:
    """A result whose every element is off by a unit of rounding or none: in a product of the terms that it adds up,
    which half precision adds up in float32."""
    units = torch.randint(-1, 2, out.shape, generator=generator).to(out) * torch.finfo(out.dtype).eps
    if isinstance(module, nn.Linear) and out.dtype in (torch.float32, torch.float64):
        weight, *bias = (parameter.detach().abs() for parameter in module.parameters())
        return out + units * linear(arguments[0].detach().abs(), weight, *bias)
    return out * (1 + units)


def check(trial: Trial) -> bool:
    """Holds one trial to the reference. Returns whether rounding had to be measured for it.

    Raises:
        AssertionError: it differs; the message says where.
    """
    rows = rows_of(trial)
    hold = _hold if trial.dtype == torch.float64 else _hold_low_precision
    try:
        hold(trial, rows, [])
    except AssertionError:
        hold(trial, rows, list(shaken(trial)))
        return True
    return False


def _hold(trial: Trial, rows: Sequence[Row], others: Sequence[Sequence[Row]]) -> None:
    """Within ``TOLERANCE``, or ``AMPLIFIED`` times as far as the reference moves."""
    moved = dict.fromkeys((name for name, _, _ in rows), 0.0)
    for other in others:
        for (name, _, theirs), (_, _, again) in zip(rows, other, strict=True):
            if theirs is not None and again is not None and theirs.numel():
                moved[name] = max(moved[name], (theirs - again).abs().max().item())
    for name, ours, theirs in rows:
        assert_close(name, ours, theirs, TOLERANCE, scale=AMPLIFIED * moved[name] / TOLERANCE)


def _hold_low_precision(trial: Trial, rows: Sequence[Row], others: Sequence[Sequence[Row]]) -> None:
    """Twice the error of plain PyTorch in that dtype, against the reference in float64 with the same weights."""
    exact = Sides(replace(trial, autocast=None))
    for module in (exact.fused, exact.reference):
        module.double()
    exact.leaves = [leaf.double() for leaf in exact.leaves]
    exact.gate_leaves = [leaf.double() for leaf in exact.gate_leaves]
    plain = [[theirs for _, _, theirs in run] for run in (rows, *others)]
    columns = zip(rows, exact.rows(), zip(*plain, strict=True), strict=True)
    pooled = [
        (name, ours, peers, truth)
        for (name, ours, _), (_, _, truth), peers in columns
        if not any(_is_all_error(peer, truth) for peer in peers)
    ]
    assert_two_sided(pooled, trial.autocast or trial.dtype)


def _is_all_error(peer: Tensor | None, truth: Tensor | None) -> bool:
    """Whether plain PyTorch is off by more than the whole result: that bounds nothing."""
    if peer is None or truth is None or not truth.numel():
        return False
    return bool((peer.double() - truth).abs().max() > truth.abs().max())


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

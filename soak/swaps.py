"""Two equal models, tied, wrapped, hooked and frozen at random, of which one is accelerated, trains on and is restored.

The other one stays the library's own. What they compute and train must agree at every step.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from soak.swap_sides import Course, run_course
from soak.swap_trials import Trial, draw_trial

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
"""In units of the largest magnitude of its kind: outputs, gradients, tensors of a state dict, ..."""
SHAKES, AMPLIFIED = 6, 8.0
"""Where rounding is amplified beyond that: how often it is measured on the original, and how much more is allowed."""


def compare(ours: Course, theirs: Course, tolerance: float, stale: tuple[str, ...]) -> dict[str, str]:
    """What differs, by name."""
    faults: dict[str, str] = {}
    scale: dict[str, float] = {}
    for name, value in theirs.values.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            kind = _kind(name)
            scale[kind] = max(scale.get(kind, 1e-3), float(value.double().abs().nan_to_num(0, 0, 0).max()))
    for name, value in theirs.values.items():
        # The state of what nothing reads goes with the parameter, which an optimizer like Adagrad has made beforehand.
        if _is_stale(name, stale) or (name.startswith("optimizer") and _is_stale(name, ours.unread)):
            continue
        if name not in ours.values:
            faults[name] = "missing"
            continue
        why = _fault(ours.values[name], value, tolerance * scale.get(_kind(name), 1.0))
        if why:
            faults[name] = why
    for name in ours.values.keys() - theirs.values.keys():
        if not _is_stale(name, stale) and not (isinstance(ours.values[name], Tensor) and not ours.values[name].any()):
            faults[name] = "only in ours"
    return faults


def _kind(name: str) -> str:
    """Of the optimizer's state every key has magnitudes of its own."""
    kind = name.partition("|")[0]
    return f"{kind} {name.rpartition(' ')[2]}" if kind == "optimizer" else kind


def _is_stale(name: str, stale: tuple[str, ...]) -> bool:
    # What a hook has seen may be what a stale gate gives.
    return any(f": {start}" in name for start in stale) or (bool(stale) and name.startswith("log"))


def _fault(ours: Any, theirs: Any, bound: float) -> str | None:
    if not isinstance(theirs, Tensor) or not isinstance(ours, Tensor):
        if isinstance(ours, Tensor) and theirs is None and not ours.any():
            return None
        return None if type(ours) is type(theirs) and ours == theirs else f"{ours!r} instead of {theirs!r}"
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{ours.dtype} {tuple(ours.shape)} instead of {theirs.dtype} {tuple(theirs.shape)}"
    if not theirs.is_floating_point():
        return None if torch.equal(ours, theirs) else f"{ours} instead of {theirs}"
    a, b = ours.double(), theirs.double()
    if not torch.equal(a.isnan(), b.isnan()):
        return "NaN elsewhere"
    error = float((a - b).nan_to_num(0.0, torch.inf, torch.inf).abs().max()) if a.numel() else 0.0
    return f"differs by {error:.3g}, allowed {bound:.3g}" if error > bound else None


def _apart(a: Any, b: Any) -> float:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or not a.numel() or a.shape != b.shape:
        return 0.0
    return float((a.double() - b.double()).abs().nan_to_num(0.0).max())


def check(trial: Trial) -> Course:
    """Holds a trial's accelerated model to the other one.

    Raises:
        AssertionError: they differ; the message says where.
    """
    theirs, ours = run_course(trial, swap=False), run_course(trial, swap=True)
    said = f"; the report: {ours.report or ours.refused}"
    assert (ours.raised is None) == (theirs.raised is None), f"ours: {ours.raised}, theirs: {theirs.raised}{said}"
    if ours.raised and theirs.raised:
        assert ours.raised.partition(":")[0] == theirs.raised.partition(":")[0], f"{ours.raised}, not {theirs.raised}"
    faults = compare(ours, theirs, TOLERANCE[trial.dtype], trial.model.stale)
    if faults:
        ours.amplified = True
        allowed: dict[str, float] = {}
        for shake in range(SHAKES):
            for swap, still in ((False, theirs), (True, ours)):
                moved = run_course(trial, swap=swap, shake=shake)
                for name, value in still.values.items():
                    allowed[name] = max(allowed.get(name, 0.0), AMPLIFIED * _apart(value, moved.values.get(name)))
        faults = {
            name: why
            for name, why in faults.items()
            if name not in ours.values
            or name not in theirs.values
            or _fault(ours.values[name], theirs.values[name], allowed.get(name, 0.0))
        }
    first = [f"{name}: {why}" for name, why in list(faults.items())[:4]]
    assert not faults, f"{len(faults)} differ: {'; '.join(first)}{said}"
    return ours


def run(seed: int, trials: int, figures: dict[str, Any]) -> Iterator[str | None]:
    """One trial per seed from ``seed`` on; yields what failed of it."""
    figures.update(replaced=0, left=0, refused=0, amplified=0)
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # the first optimizer imports the compiler
    gc.freeze()  # every swap looks at all objects, and those of the imports are most of them
    try:
        yield from _run(seed, trials, figures)
    finally:
        gc.unfreeze()


def _run(seed: int, trials: int, figures: dict[str, Any]) -> Iterator[str | None]:
    for number in range(seed, seed + trials):
        trial = draw_trial(number)
        try:
            course = check(trial)
        except Exception as error:  # whatever is raised is a failure to be told
            yield f"{type(error).__name__}: {error}\n  {trial}\n  again: python -m soak --only swaps --seed {number}"
        else:
            figures["refused"] += course.refused is not None
            figures["amplified"] += course.amplified
            if course.report is not None:
                figures["replaced"] += len(course.report.replaced)
                figures["left"] += len(course.report.left)
            yield None

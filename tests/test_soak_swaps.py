"""The soak of swaps draws what it says, replaces much, finds faults that are put in, and finds none in the library."""

from __future__ import annotations

import gc
import importlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ple_fast.convert import fused_trunk, optimizers, plain_layers
from soak import swaps
from soak.swap_changes import CHANGES
from soak.swap_models import LIBRARIES
from soak.swap_sides import run_course
from soak.swap_trials import AROUND, GROUPS, OPTIMIZERS, Trial, draw_trial

# The names are those of their functions, too.
accelerating: Any = importlib.import_module("ple_fast.convert.accelerate")
packing: Any = importlib.import_module("ple_fast.convert.pack")


@pytest.fixture(scope="module", autouse=True)
def _the_compiler_is_imported(_what_was_there_stays: None) -> None:
    """By the first optimizer; its objects are most of those that every swap would look at."""
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    gc.freeze()


def test_trials_are_of_every_kind() -> None:
    trials = [draw_trial(seed) for seed in range(1500)]
    assert {change for trial in trials for change in trial.changes} == {change.__name__ for change in CHANGES}
    assert len({trial.model.name for trial in trials if " and " not in trial.model.name}) > len(LIBRARIES)
    assert {trial.optimizer for trial in trials} == set(OPTIMIZERS)
    assert {trial.groups for trial in trials} == set(GROUPS)
    assert {trial.around for trial in trials} == {trial.around_restore for trial in trials} == set(AROUND)
    for name in ("between", "gradients", "style", "part", "named", "again", "rows", "dtype"):
        counts = Counter(getattr(trial, name) for trial in trials)
        assert len(counts) > 1 and min(counts.values()) > 100, name


def test_a_seed_gives_the_same_trial_and_the_same_numbers_again() -> None:
    for seed in range(20):
        assert str(draw_trial(seed)) == str(draw_trial(seed))
    one, other = (run_course(draw_trial(16), swap=True) for _ in range(2))
    assert one.report is not None and one.report.replaced and one.report == other.report
    assert swaps.compare(one, other, 0.0, ()) == {}


def test_a_good_part_is_replaced_and_nothing_fails() -> None:
    figures: dict[str, Any] = {}
    assert [failure for failure in swaps.run(3000, 5, figures) if failure is not None] == []
    assert figures["replaced"] >= 3
    assert figures["left"] + figures["refused"] >= 1


@pytest.mark.slow
def test_hundreds_of_swaps_change_nothing() -> None:
    figures: dict[str, Any] = {}
    trials = 200
    assert [failure for failure in swaps.run(5000, trials, figures) if failure is not None] == []
    assert figures["replaced"] > 0.5 * trials
    assert figures["left"] > 0.2 * trials
    assert 0 < figures["refused"] < 0.3 * trials


Put = Callable[[pytest.MonkeyPatch], None]


def cut_ties(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(accelerating, "ties", lambda *arguments: {})


def lost_hooks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fused_trunk, "check_bare", lambda path, module: None)
    patch.setattr(plain_layers, "check_bare", lambda path, module: None)


def lost_settings(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(packing, "_fill_norm", lambda norm, plain: None)


def lost_state(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(optimizers, "_state", lambda optimizer, group: {})


def lost_gradients(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(accelerating, "move_gradients", lambda moves: None)


def lost_attributes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(accelerating, "move_attributes", lambda moves: None)


def lost_order(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(optimizers, "_ordered_groups", lambda given, parameters: [])


def half_refused(patch: pytest.MonkeyPatch) -> None:
    """Optimizers are looked at when the first of them has been changed."""

    def check(given: Any, found: Any) -> None:
        for optimizer in given:
            optimizer.param_groups[0]["lr"] *= 2
        optimizers.check_optimizers(given, found)

    patch.setattr(accelerating, "check_optimizers", check)


def has(*changes: str) -> Callable[[Trial], bool]:
    """Trials with that change alone."""
    return lambda trial: len(trial.changes) == 1 and trial.changes[0] in changes and trial.groups == "all"


def trains(trial: Trial) -> bool:
    return trial.steps_before > 0 and "momentum" in trial.optimizer and not trial.changes


def has_gradients(trial: Trial) -> bool:
    return trial.steps_before > 0 and trial.gradients == "kept" and trial.groups == "all" and not trial.changes


FAULTS: list[Any] = [
    pytest.param(
        cut_ties, has("a_tensor_twice", "a_module_twice"), "differ|device meta|KeyError", marks=pytest.mark.slow
    ),
    (lost_hooks, has("a_forward"), "differ|device meta"),
    pytest.param(lost_settings, has("norm_settings"), "differ", marks=pytest.mark.slow),
    (lost_state, trains, "differ"),
    (lost_gradients, has_gradients, "differ"),
    (lost_attributes, has("attributes"), "note"),
    (lost_order, lambda trial: not trial.changes and trial.groups == "all", "group|restored"),
    (half_refused, lambda trial: trial.optimizer == "Adafactor", "refused, and another optimizer"),
]


@pytest.mark.parametrize(("put_in", "fits", "says"), FAULTS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_fault_that_is_put_in_is_found_and_told(
    put_in: Put, fits: Callable[[Trial], bool], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in(monkeypatch)
    monkeypatch.setattr(swaps, "SHAKES", 1)
    seeds = [seed for seed in range(4000) if fits(draw_trial(seed))][:25]
    found = next((told for seed in seeds for told in swaps.run(seed, 1, {}) if told is not None), None)
    assert found is not None
    assert re.search(says, found)
    assert re.search(r"again: python -m soak --only swaps --seed \d+$", found)

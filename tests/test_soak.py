"""The soak draws what it says, finds faults that are put in, tells them, and finds none in the library."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch import Tensor, nn

import soak.__main__ as soak_main
from benchmarks import report
from benchmarks.environment import ROOT
from benchmarks.result_files import load
from ple_fast.model import MultiTaskModel, storage
from ple_fast.model.trunks import TRUNKS
from ple_fast.modules import layers, norms
from ple_fast.plan import LevelPlan
from ple_fast.state import NormState
from ple_fast.torch_backend import layer, mix
from ple_fast.torch_backend.dropout import keep_mask
from soak import levels, memory
from soak.make_ups import WAYS, draw_trial
from soak.sections import Section, run_section
from tests.helpers import FORMS

SECTIONS = {section.name: section for section in soak_main.SECTIONS}


def failures(section: str, seed: int, trials: int) -> list[str]:
    """What so many trials say."""
    return [failure for failure in SECTIONS[section].run(seed, trials, {}) if failure is not None]


def test_a_seed_gives_the_same_trial_and_the_same_numbers_again() -> None:
    for seed in range(20):
        trial = draw_trial(seed)
        assert trial == draw_trial(seed) and str(trial) == str(draw_trial(seed))
        one, other = trial.module(), trial.module()
        assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
        assert all(map(torch.equal, trial.leaves(), trial.leaves()))


def test_trials_are_of_every_kind() -> None:
    trials = [draw_trial(seed) for seed in range(3000)]
    assert {trial.way for trial in trials} == set(WAYS)
    assert {trial.form for trial in trials} == set(FORMS)
    assert {trial.trunk[0] for trial in trials if trial.trunk is not None} == set(TRUNKS)
    assert {len(trial.levels) for trial in trials} == {0, 1, 2, 3}
    assert {trial.autocast for trial in trials} == {None, torch.bfloat16, torch.float16}
    assert {trial.dtype for trial in trials} == {torch.float64, torch.float32, torch.bfloat16, torch.float16}
    assert {0, 1, 2, 700} <= {trial.rows for trial in trials}
    assert any(one.gate.input == "raw" for trial in trials for one in trial.levels[1:])
    assert sum(trial.dtype == torch.float64 for trial in trials) > 0.7 * len(trials)


@pytest.mark.slow
@pytest.mark.parametrize(("section", "trials"), [("levels", 300), ("places", 60), ("threads", 4), ("memory", 4000)])
def test_a_short_soak_finds_nothing(section: str, trials: int) -> None:
    """Of memory as many steps as the whole warm-up needs: until then the caches of products fill."""
    assert failures(section, 7, trials) == []


@pytest.mark.slow
def test_saves_that_are_killed_leave_a_whole_model() -> None:
    assert failures("saves", 7, 20) == []


def wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every gate, by a hundred-millionth."""
    right = mix.gate_softmax_backward

    def wrong(plan: LevelPlan, d: Tensor, weights: Tensor) -> Tensor:
        return right(plan, d, weights) * (1 + 1e-8)

    for module in ("few_rows", "mix"):
        monkeypatch.setattr(f"ple_fast.torch_backend.{module}.gate_softmax_backward", wrong)


def wrong_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norms take up half of what they should."""
    right = norms.norm_state

    def wrong(norm: nn.Module | None, batch: int) -> NormState | None:
        state = right(norm, batch)
        return state if state is None else state._replace(factor=state.factor / 2)

    monkeypatch.setattr(layers, "norm_state", wrong)


def wrong_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer drops what the next one should."""

    def wrong(seed: int, position: int, start: int, like: Tensor, p: float) -> Tensor:
        return keep_mask(seed, position + 1, start, like, p)

    monkeypatch.setattr(layer, "keep_mask", wrong)


@pytest.mark.parametrize("put_in", [wrong_gradient, wrong_statistics, wrong_mask])
def test_levels_find_a_fault_and_say_how_to_see_it_again(
    put_in: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in(monkeypatch)
    found = next((failure for failure in levels.run(0, 200, {}) if failure is not None), None)
    assert found is not None
    seed = re.search(r"again: python -m soak --only levels --seed (\d+)$", found)
    assert seed is not None
    assert failures("levels", int(seed[1]), 1) == [found]


def test_low_precision_is_held_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = [seed for seed in range(300) if draw_trial(seed).dtype == torch.bfloat16 and draw_trial(seed).rows > 5]
    for seed in seeds[:4]:
        levels.check(draw_trial(seed))
    right = mix.combine

    def wrong(plan: LevelPlan, weights: Tensor, h: Tensor, out: Tensor | None = None) -> Tensor:
        return right(plan, weights, h, out).mul_(1.05)

    monkeypatch.setattr(mix, "combine", wrong)
    found = next(failure for seed in seeds if (failure := next(levels.run(seed, 1, {}))) is not None)
    assert re.search(r"error .*, plain PyTorch .*, bound", found)


def test_threads_find_a_mode_that_is_flipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def predict(self: MultiTaskModel, *arguments: Any, **options: Any) -> Any:
        self.eval()
        return right(self, *arguments, **options)

    right = MultiTaskModel.predict
    monkeypatch.setattr(MultiTaskModel, "predict", predict)
    assert "modules of 'dropout' moved" in failures("threads", 0, 1)[0]


def test_memory_finds_a_leak_of_one_tensor_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []
    right = memory.step

    def step(*arguments: Any) -> None:
        kept.append(torch.zeros(1))
        right(*arguments)

    monkeypatch.setattr(memory, "step", step)
    found = failures("memory", 0, 80)
    assert len(found) == 1 and "tensors" in found[0]


def test_saves_find_half_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is written in place, where a kill or a reader meets a part of it."""

    def in_place(directory: Path) -> tuple[BinaryIO, Path]:
        return (directory / storage.WEIGHTS).open("wb"), directory / storage.WEIGHTS

    monkeypatch.setattr(storage, "_new_file", in_place)
    assert failures("saves", 0, 5)


def _two_of_three(seed: int, trials: int, figures: dict[str, Any]) -> Iterator[str | None]:
    figures["seen"] = 0
    for number in range(trials):
        figures["seen"] += 1
        yield None if number == 1 else f"number {number} of seed {seed}"


def test_a_run_counts_tells_and_writes_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Section("levels", "numbers", 3, _two_of_three)
    monkeypatch.setattr(soak_main, "SECTIONS", (fake, Section("saves", "other numbers", 1, _two_of_three)))
    file = tmp_path / "machine" / "soak.json"
    assert soak_main.main(["--only", "levels", "--trials", "3", "--json", str(file)]) == 1
    told = capsys.readouterr().out
    assert "FAILURE in levels: number 0 of seed 0\n" in told and "FAILURE in levels: number 2 of seed 0\n" in told
    assert re.search(r"^levels +3 +2 +0 +seen 3$", told, flags=re.MULTILINE)
    assert "other numbers" not in told
    results = load(file.parent)["soak"]["results"]
    assert [(r["section"], r["seed"], r["trials"], r["failures"], r["figures"]) for r in results] == [
        ("levels", 0, 3, 2, {"seen": 3})
    ]
    assert soak_main.main(["--only", "levels", "--seed", "5"]) == 1  # one trial
    assert "number 0 of seed 5\nlevels: 1 trials, 1 failures" in capsys.readouterr().out


def test_a_section_says_where_it_is_and_ends_when_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("soak.sections.time.perf_counter", lambda: float(next(clock)))
    ended: list[bool] = []
    said: list[str] = []

    def run(seed: int, trials: int, figures: dict[str, Any]) -> Iterator[str | None]:
        try:
            for _ in range(trials):
                yield None
        finally:
            ended.append(True)

    outcome = run_section(Section("levels", "numbers", 50, run), 0, 50, 12.0, said.append)
    assert (outcome.trials, outcome.failures, ended) == (12, 0, [True])
    assert said == [
        "levels: numbers",
        "levels: 5 trials, 0 failures, 5 s of 50",
        "levels: 10 trials, 0 failures, 10 s of 50",
        "levels: 12 trials, 0 failures, 12 s",
    ]


@pytest.mark.parametrize("options", [["--only", "level"], ["--trials", "0"], ["--minutes", "-1"]])
def test_options_that_ask_for_nothing_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        soak_main.main(options)
    assert "expected" in capsys.readouterr().err


def test_the_committed_soak_ran_every_section() -> None:
    """Nothing, as long as no soak was committed for the machine of the README."""
    machine = report.readme_source(report.README.read_text(encoding="utf-8"))
    found = load(ROOT / "benchmarks" / "results" / machine).get("soak")
    if found is not None:
        results = {entry["section"]: entry for entry in found["results"]}
        assert set(results) == set(SECTIONS)
        assert results["levels"]["trials"] >= 10_000
        assert results["levels"]["failures"] == 0

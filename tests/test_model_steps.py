"""The benchmark of whole models' steps: what it compares, and what its files hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import model_steps, report
from benchmarks.configs import KUAIRAND, MODEL_STEPS, ROUNDS, ModelConfig
from benchmarks.result_files import read, write
from benchmarks.steps import WrongResultError
from ple_fast.model import MultiTaskModel, tower_stack
from tests.test_committed_results import quoted_results

TINY = replace(KUAIRAND, fields=(("a", 9), ("b", 5), ("c", 3)), width=2, num_tasks=3, units=(6, 4), tower_units=(3,))


def test_every_model_is_timed_and_written(tmp_path: Path) -> None:
    results = model_steps.measure(TINY, (("train", 7), ("inference", 5)), rounds=2)
    for own in results:
        assert list(own["contestants"])[:2] == [model_steps.ONE_BY_ONE, model_steps.BASE]
        assert {"STEM", "HoME", "PLE with PEPNet"} < set(own["contestants"])
        assert own["contestants"][model_steps.BASE]["ratio_to_PLE"] == 1
    write(tmp_path / "model_steps.json", "model_steps", {"results": results})
    lines = report.block("model_steps", "some", read(tmp_path / "model_steps.json", "model_steps")).splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 2 + len(results[0]["contestants"])


def test_towers_are_stacked_in_one_of_both_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower_stack, "STACKED_PRODUCTS", 0)
    ran: list[str] = []
    real = tower_stack._run_level

    def run_level(*given: Any) -> Any:
        ran.append("stacked")
        return real(*given)

    monkeypatch.setattr(tower_stack, "_run_level", run_level)
    for name, step in model_steps.steps_of(TINY, "train", 7).items():
        ran.clear()
        step()
        assert bool(ran) == (name != model_steps.ONE_BY_ONE), name
    assert tower_stack.STACKED_PRODUCTS == 0


def test_nothing_is_timed_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    real = model_steps.models

    def other(config: ModelConfig) -> dict[str, MultiTaskModel]:
        made = real(config)
        with torch.no_grad():
            next(made[model_steps.BASE].towers.parameters()).add_(1.0)
        return made

    monkeypatch.setattr(model_steps, "models", other)
    with pytest.raises(WrongResultError, match="4 rows: expected one loss"):
        model_steps.steps_of(TINY, "inference", 4)


def test_the_page_quotes_the_committed_file() -> None:
    """Nothing, as long as nothing was measured."""
    for own in quoted_results("model_steps"):
        assert own["rounds"] >= ROUNDS and (own["mode"], own["batch"]) in MODEL_STEPS

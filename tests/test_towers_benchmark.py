"""The benchmark of stacked towers: what it compares, and what its files hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor, nn

from benchmarks import report, towers
from benchmarks.configs import ROUNDS, TOWER_BATCHES, TOWER_TASKS, TowerConfig
from benchmarks.result_files import read, write
from benchmarks.steps import WrongResultError
from tests.test_committed_results import quoted_results

TINY = TowerConfig(in_features=5, units=(4, 3))


def test_both_compute_the_same_and_are_written(tmp_path: Path) -> None:
    results = towers.measure([TINY], (2, 3), (7,), rounds=2)
    assert [(own["mode"], own["tasks"]) for own in results] == [(m, t) for t in (2, 3) for m in towers.MODES]
    assert [own["products"] for own in results[::2]] == [7 * t * (20 + 12 + 3) for t in (2, 3)]
    write(tmp_path / "towers.json", "towers", {"results": results})
    lines = report.block("towers", "some", read(tmp_path / "towers.json", "towers")).splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 2 + 2
    assert lines[2].startswith("| 5 to 4, 3, 1 | 2 | 7 |")


def test_nothing_is_timed_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(own: nn.ModuleList, x: Tensor) -> Sequence[Tensor]:
        return [2 * y for y in towers.stacked(own, x)]

    monkeypatch.setitem(towers.RUNS, "stacked", wrong)
    with pytest.raises(WrongResultError, match="2 tasks, 3 rows: the two differ"):
        towers.steps_of(TINY, 2, 3)


def test_the_page_quotes_the_committed_file() -> None:
    """Nothing, as long as nothing was measured."""
    for own in quoted_results("towers"):
        assert own["rounds"] >= ROUNDS and own["tasks"] in TOWER_TASKS and own["batch"] in TOWER_BATCHES

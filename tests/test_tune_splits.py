"""Weight gradients in several numbers of parts, measured without a GPU: times are made up by how many a launch has."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ple_fast import PLE, tune, tune_calls, tune_measure, tune_results, tune_table
from ple_fast.tune_splits import Asked, Split, of_parts, split_candidates
from tests.test_tune import where

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from ple_fast_kernels import Parts, Tile, reload_tables, set_table

__all__ = ["where"]
tiles: Any = importlib.import_module("ple_fast_kernels._tiles")
weight_grad: Any = importlib.import_module("ple_fast_kernels.weight_grad")
MODEL = weight_grad.row_splits
ROWS = 40
"""The interpreter's table cuts them in two parts."""


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    reload_tables()
    assert weight_grad.row_splits is MODEL


def measured(where: torch.device, launch: Callable[[int], None]) -> list[Split]:
    """What is measured of the weight gradients of a small trunk, if a part takes a microsecond; ``launch`` is told the
    number of parts after each launch."""
    seen: list[int] = []
    real = weight_grad._launch_weight_grad

    def launched(layer: Any, region: Any, *rest: Any) -> None:
        seen.append(region.splits)
        real(layer, region, *rest)
        launch(region.splits)

    def prepare(call: Callable[[], object]) -> tune_measure.Sampler:
        seen.clear()
        call()
        seconds = 1e-6 * max(seen, default=5)
        return lambda: seconds

    def of_weights(trunk: nn.Module, x: torch.Tensor) -> list[tune_calls.Call]:
        return [call for call in tune_calls.recorded(trunk, x) if call.name == "grouped_weight_grads"]

    trunk = PLE(6, 2, num_levels=1, task_experts=1, shared_experts=1, expert_units=(4,), device=where)
    x = torch.randn(ROWS, 6, device=where, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_grad, "_launch_weight_grad", launched)
        patch.setattr(tune_measure, "recorded", of_weights)
        _, found = tune.tune(trunk, x, rounds=1, prepare=prepare, choice=lambda kind: [])
    return [entry for entry in found if isinstance(entry, Split)]


def test_other_numbers_of_parts_are_measured_beside_the_models(where: torch.device, tmp_path: Path) -> None:
    if where.type != "cpu":
        pytest.skip("so few rows have one part on a GPU")
    found = measured(where, lambda parts: None)
    assert found
    for split in found:
        assert split.seconds == {2: 2e-6, 1: 1e-6}, "the model's comes first"
        assert split.rows == ROWS and split.programs > 0 and split.size > 0
        assert split.launch.startswith("grouped_weight_grads ")
    table = tune_table.table_of(found, {}, 1)
    assert table == {"weight_grad_parts": tuple(Parts(*split[:4], 1) for split in found)}
    tune.save(tmp_path / "mine.json", table, found, where, {"trunks": []})
    tuner = tune_measure.Tuner(where, tune_measure.cuda_graph_sampler, 1, print)
    assert tune_results.Results(tmp_path / "mine.json", tuner, print).measured == found
    assert "2 parts 2.0 us, best of 2 1 parts 1.0 us" in tune_measure._outcome(found[0])


def test_a_table_holds_the_parts_that_were_faster_and_launches_take_them(where: torch.device) -> None:
    block = Tile(32, 32, 32)
    faster = Split(ROWS, 3, 7, block, {2: 2e-6, 5: 1e-6, 1: 1.5e-6}, "a")
    again = faster._replace(seconds={2: 2e-6, 5: 1e-6, 1: 0.5e-6})
    noise = Split(ROWS, 4, 7, block, {2: 2e-6, 1: 1.97e-6}, "b")
    table = tune_table.table_of([faster, noise], {}, 1)
    assert table == {"weight_grad_parts": (Parts(ROWS, 3, 7, block, 5),)}
    assert tune_table.table_of([faster, again], {}, 1)["weight_grad_parts"] == (Parts(ROWS, 3, 7, block, 1),)
    assert tune_table.table_of([noise], {}, 1) == {}
    name = tiles.architecture(where)[0]
    x = torch.zeros(1, device=where)
    before = weight_grad.row_splits(x, ROWS, 3, 7, block), weight_grad.row_splits(x, ROWS, 4, 7, block)
    set_table(name, table)
    try:
        assert weight_grad.row_splits(x, ROWS, 3, 7, block) == 5
        assert weight_grad.row_splits(x, ROWS, 4, 7, block) == before[1]
    finally:
        set_table(name, None)
    assert weight_grad.row_splits(x, ROWS, 3, 7, block) == before[0]


def test_a_number_of_parts_that_does_not_fit_has_lost(where: torch.device) -> None:
    def launch(parts: int) -> None:
        if parts == 1:
            raise OutOfResources(2, 1, "shared memory")

    if where.type == "cpu":
        assert measured(where, launch) == [], "nothing is left to compare"


def test_another_result_of_another_number_of_parts_is_refused(
    where: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where.type != "cpu":
        pytest.skip("so few rows have one part on a GPU")
    views = weight_grad._views

    def wrong(layer: Any, region: Any, flat: torch.Tensor, at: int) -> Any:
        return views(layer, region, flat * region.splits, at)

    monkeypatch.setattr(weight_grad, "_views", wrong)
    with pytest.raises(RuntimeError, match="in 1 parts differs from 2: please report it"):
        measured(where, lambda parts: None)


def test_candidates_lie_around_the_models_number() -> None:
    def near(rows: int, parts: int) -> list[int]:
        return split_candidates(Asked(rows, 8, 100, Tile(64, 64, 64), parts))

    assert near(65536, 4) == [4, 2, 3, 5, 6, 8]
    assert near(65536, 1) == [1, 2]
    assert near(1024, 2) == [2, 1]
    assert near(100, 1) == [1]
    assert max(near(1 << 20, 60)) <= 64


def test_the_models_number_is_told_and_another_one_is_taken() -> None:
    x = torch.zeros(1)
    with of_parts(None) as asked:
        parts = weight_grad.row_splits(x, ROWS, 3, 7, Tile(32, 32, 32))
    assert asked == [Asked(ROWS, 3, 7, Tile(32, 32, 32), parts)] and parts == 2
    with of_parts(5):
        assert weight_grad.row_splits(x, ROWS, 3, 7, Tile(32, 32, 32)) == 5

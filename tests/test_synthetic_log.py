"""The synthetic log: its shape, its rates, its sample spaces, what leaks, and that a model learns from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from ple_fast.losses import TaskLoss
from ple_fast.model import MultiTaskModel, columns_from
from ple_fast.synthetic import synthetic_log
from ple_fast.synthetic.log import HISTORY, RATES

ROWS = 30_000


@pytest.fixture(scope="module")
def log() -> dict[str, Any]:
    return synthetic_log(ROWS, num_users=2_000, num_videos=500, seed=1)


def test_a_seed_draws_one_log(log: dict[str, Any]) -> None:
    before: Any = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002
    again = synthetic_log(ROWS, num_users=2_000, num_videos=500, seed=1)
    assert again.keys() == log.keys()
    for name, column in log.items():
        if isinstance(column, list):
            assert again[name] == column, name
        else:
            np.testing.assert_array_equal(again[name], column, name)
    assert (np.random.get_state()[1] == before[0]).all()  # type: ignore[index]  # noqa: NPY002  # is looked at
    assert torch.equal(torch.get_rng_state(), before[1])
    other = synthetic_log(ROWS, num_users=2_000, num_videos=500, seed=2)
    assert (other["video_id"] != log["video_id"]).any()


def test_its_shape_and_rates_are_those_of_the_real_one(log: dict[str, Any]) -> None:
    assert {len(column) for column in log.values()} == {ROWS}
    assert (np.diff(24 * log["day"] + log["hour"]) >= 0).all() and set(np.unique(log["day"])) == set(range(14))
    clicked = log["is_click"] == 1
    for name, rate in RATES.items():
        inside = np.ones(ROWS, dtype=bool) if name in ("is_click", "is_hate") else clicked
        label = log[name]
        assert np.isnan(label[~inside]).all() and set(np.unique(label[inside])) <= {0.0, 1.0}
        count = inside.sum()
        assert abs(label[inside].mean() - rate) < 5 * np.sqrt(rate / count), name
    assert (np.isnan(log["play_time_ms"]) == ~clicked).all() and (log["play_time_ms"][clicked] > 0).all()
    assert {1, 2, 3} == set(map(len, log["tags"]))
    often = np.bincount(log["video_id"], minlength=500)
    assert often.max() > 5 * np.median(often), "no video is popular"


def test_a_history_is_what_the_user_clicked_before(log: dict[str, Any]) -> None:
    seen: dict[int, list[int]] = {}
    for row in range(ROWS):
        past = seen.setdefault(log["user_id"][row], [])
        assert log["history"][row] == past[-HISTORY:]
        if log["is_click"][row] == 1:
            past.append(log["video_id"][row])


def test_one_column_gives_the_click_away(log: dict[str, Any]) -> None:
    clicked = log["is_click"] == 1
    assert (log["num_comments"][~clicked] == 0).all() and log["num_comments"][clicked].mean() > 1


def test_a_model_learns_from_it_and_arrow_takes_it(log: dict[str, Any]) -> None:
    table = pa.table({name: column for name, column in log.items() if name != "num_comments"})
    columns = columns_from(table, categorical=["user_id", "video_id", "tags"], pooling={"tags": "mean"}, width=8)
    torch.manual_seed(0)
    model = MultiTaskModel(
        columns, [TaskLoss("is_click"), TaskLoss("long_view")], trunk_options={"expert_units": (16,)}
    )
    train, test = table.slice(0, 24_000), table.slice(24_000)
    model.fit(train, epochs=3, batch_size=256, lr=3e-3, progress=False)
    assert model.evaluate(test, metrics="auc")["is_click"]["auc"] > 0.6  # type: ignore[operator]  # a float


@pytest.mark.parametrize("rows", [1, 2, 50])
def test_small_logs_are_drawn(rows: int) -> None:
    found = synthetic_log(rows, num_users=1, num_videos=1)
    assert all(len(column) == rows for column in found.values())


def test_sizes_are_refused_in_sentences() -> None:
    with pytest.raises(ValueError, match="num_users"):
        synthetic_log(10, num_users=0)
    with pytest.raises(TypeError, match="num_rows"):
        synthetic_log(2.5)  # type: ignore[arg-type]  # what is tested

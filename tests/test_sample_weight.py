"""Weights of rows and of rare labels in fit and in evaluate, against repeated rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

from ple_fast.losses import TaskLoss
from ple_fast.model import MultiTaskModel
from tests.fit_helpers import are_equal, model, state, table

NAN = float("nan")
PLAIN = {"options": {"expert_units": ((8,), (6,))}, "dropout": 0.0}
"""Without batch norm and dropout, where a repeated row is the same row again."""


def test_fit_with_weights_is_fit_with_repeated_rows() -> None:
    data, labels = table(24)
    times = np.arange(24) % 3
    weighted, repeated = model(**PLAIN), model(**PLAIN)  # type: ignore[arg-type]  # by name
    first = weighted.fit(data, labels, epochs=3, batch_size=100, sample_weight=times, progress=False)
    again = ({name: np.repeat(column, times) for name, column in part.items()} for part in (data, labels))
    second = repeated.fit(*again, epochs=3, batch_size=100, progress=False)
    assert [r.loss for r in first] == pytest.approx([r.loss for r in second], rel=1e-4)
    assert first[0].tasks["click"].loss == pytest.approx(second[0].tasks["click"].loss, rel=1e-4)
    assert first[0].tasks["click"].count == 16  # rows of weight 0 are outside
    for ours, theirs in zip(weighted.parameters(), repeated.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_weight_of_one_task_leaves_the_others_alone() -> None:
    data, labels = table()
    net = model(**PLAIN)  # type: ignore[arg-type]  # by name
    found = net.evaluate(data, labels, sample_weight={"click": np.linspace(0, 1, 64)})
    plain = net.evaluate(data, labels)
    assert found["click"].loss != plain["click"].loss
    assert found["click"].count == 63
    for name in ("watch", "rating"):
        assert found[name] == plain[name]
    assert plain.loss is not None and found.loss is not None
    assert found.loss - plain.loss == pytest.approx(found["click"].loss - plain["click"].loss)  # type: ignore[operator]


WEIGHTS: dict[str, Any] = {
    "list": lambda w: w.tolist(),
    "array": lambda w: w,
    "ints": lambda w: w.astype(int),
    "tensor": torch.from_numpy,
    "series": pd.Series,
    "polars": pl.Series,
    "pyarrow": pa.array,
    "dict": lambda w: dict.fromkeys(("click", "watch", "rating"), w),
    "frame": lambda w: pd.DataFrame(dict.fromkeys(("click", "watch", "rating"), w)),
    "polars frame": lambda w: pl.DataFrame(dict.fromkeys(("click", "watch", "rating"), w)),
    "pyarrow table": lambda w: pa.table(dict.fromkeys(("click", "watch", "rating"), w)),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_may_be_any_column_or_table(kind: str) -> None:
    data, labels = table()
    weight = (np.arange(64) % 4).astype(float)
    net = model(**PLAIN)  # type: ignore[arg-type]  # by name
    expected = net.evaluate(data, labels, sample_weight=weight)
    assert net.evaluate(data, labels, sample_weight=WEIGHTS[kind](weight)) == expected
    assert expected["click"].count == 48


@pytest.mark.parametrize(
    ("weight", "error", "says"),
    [
        (np.ones(63), ValueError, r"sample_weight: expected one weight per row, \(64,\), got shape \(63,\)"),
        (np.ones((64, 3)), ValueError, "sample_weight: expected one value per row"),
        (
            -np.ones(64),
            ValueError,
            r"sample_weight: expected finite weights of 0 or more, got 64 others, such as \[-1.0\]",
        ),
        (np.where(np.arange(64) == 3, NAN, 1), ValueError, r"got 1 others, such as \[nan\]"),
        (np.full(64, 1e300), ValueError, r"got 64 others, such as \[inf\]"),
        ({"buy": np.ones(64)}, ValueError, r"sample_weight: expected columns of the tasks \['click'.*got 'buy'"),
        ({"click": np.ones(3)}, ValueError, r"sample_weight\['click'\]: expected one weight per row, \(64,\)"),
        (["a"] * 64, TypeError, "sample_weight: expected numbers of 0 or more, got text"),
        (2.0, TypeError, r"sample_weight: expected one weight per row, \(64,\), got 2.0"),
    ],
)
def test_weights_of_fit_and_evaluate_are_checked(weight: Any, error: type[Exception], says: str) -> None:
    data, labels = table()
    for call in (model().fit, model().evaluate):
        with pytest.raises(error, match=says):
            call(data, labels, sample_weight=weight)
    with pytest.raises(error, match="validation " + says if says.startswith("sample") else says):
        model().fit(data, labels, validation=(data, labels, weight))


def test_a_task_whose_weights_are_all_0_is_named_as_one_without_labels() -> None:
    data, labels = table()
    with pytest.warns(UserWarning, match="none at all for 'watch'") as caught:
        history = model().fit(data, labels, batch_size=32, sample_weight={"watch": np.zeros(64)}, progress=False)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert history[0].tasks["watch"].loss is None


def test_pos_weight_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    data, labels = table()
    tasks = [TaskLoss("click", pos_weight=9.0), TaskLoss("watch", "regression")]
    plain, heavy = model(tasks=(TaskLoss("click"), tasks[1]), **PLAIN), model(tasks=tasks, **PLAIN)  # type: ignore[arg-type]
    for net in (plain, heavy):
        net.fit(data, labels, epochs=20, batch_size=16, lr=1e-2, progress=False)
    assert heavy.predict(data)["click"].mean() > plain.predict(data)["click"].mean()
    heavy.save(tmp_path)
    again = MultiTaskModel.load(tmp_path)
    assert again.tasks == heavy.tasks
    assert are_equal(state(again), state(heavy))

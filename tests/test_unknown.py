"""The warning of a column of which no value is known: when, what it says, and whom it points at."""

from __future__ import annotations

import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from ple_fast.losses import TaskLoss
from ple_fast.model import Categorical, Hashed, MultiTaskModel, Numeric, encode
from ple_fast_encoder import Column

LISTS: dict[str, Any] = {"pooling": "mean", "max_length": 2}


@pytest.mark.parametrize(
    ("column", "raw", "says"),
    [
        (
            Categorical("x", values=("de", "fr")),
            ["DE", "FR", None],
            "column 'x': expected values that it knows, such as 'de', 'fr', got none, but 'DE', 'FR'; every row gets",
        ),
        (Categorical("x", values=(1, 2, 3, 4)), [7, 7, 8], "such as 1, 2, 3, got none, but 7, 8;"),
        (Categorical("x", size=5), np.array([5, 6]), "0 to 4, got none, but 5, 6;"),
        (Categorical("x", size=5), [None, None], "expected values, got none: all of them are missing; every row gets"),
        (Categorical("x", values=("a",)), np.full(2, np.nan), "all of them are missing"),
        (
            Categorical("x", values=("a",)),
            pd.Series(["b", "b", None], dtype="category"),
            "such as 'a', got none, but 'b'",
        ),
        (Categorical("x", values=("a",)), pd.Series([None, None], dtype="category"), "all of them are missing"),
        (Categorical("x", values=(1,)), pa.array([2, None, 3]), "such as 1, got none, but 2, 3;"),
        (Categorical("x", values=()), ["b", "c"], "of which its vocabulary has none, got none, but 'b', 'c';"),
        (Hashed("x", 5), [None, None], "all of them are missing"),
        (Hashed("x", 5), [0.5, 1.5], "text and whole numbers, got none, but 0.5, 1.5;"),
        (Categorical("x", values=("a",), **LISTS), [["b"], []], "such as 'a', got none, but 'b'; every value gets"),
        (Categorical("x", values=("a",), **LISTS), [None, []], "all of them are missing; every row is pooled to zeros"),
    ],
)
def test_a_column_without_a_known_value_is_named_with_examples(column: Column, raw: Any, says: str) -> None:
    columns: list[Column] = [column, Categorical("y", size=2)]
    with pytest.warns(UserWarning, match="column 'x': expected values") as caught:
        encode({"x": raw, "y": [0] * len(raw)}, columns)
    (one,) = caught
    assert says in str(one.message)
    assert one.filename == __file__


def test_each_column_is_named_once_and_a_shared_one_by_the_vocabulary_of_its_owner() -> None:
    columns = [Categorical("item", size=3), Categorical("history", share="item", **LISTS)]
    with pytest.warns(UserWarning, match="expected values that it knows") as caught:
        encode({"item": [9, 9], "history": [[8], [7]]}, columns)
    assert [str(each.message).partition(",")[0] for each in caught] == [
        "column 'item': expected values that it knows",
        "column 'history': expected values that it knows",
    ]
    assert "0 to 2, got none, but 8, 7" in str(caught[1].message)


@pytest.mark.parametrize(
    "raw",
    [{"x": ["a", "z"], "l": [["a"], ["z"]]}, {"x": ["z"], "l": [[]]}, {"x": [], "l": []}],
    ids=["one is known", "one row", "no rows"],
)
def test_nothing_is_said_of_a_known_value_and_of_a_single_row(raw: Any) -> None:
    columns = [Categorical("x", values=("a",)), Categorical("l", values=("a",), **LISTS)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(raw, columns)


def test_every_call_of_a_model_points_at_the_user() -> None:
    torch.manual_seed(0)
    columns: list[Column] = [Categorical("x", values=("a",)), Numeric("n")]
    model = MultiTaskModel(
        columns, [TaskLoss("y")], trunk="hard_sharing", trunk_options={"expert_units": 4}, tower_units=()
    )
    data, labels = {"x": ["b", "c"], "n": [1.0, 2.0]}, {"y": [0, 1]}
    known = {"x": ["a", "a"], "n": [1.0, 2.0]}
    for call in (
        lambda: model.encode(data),
        lambda: model(data),
        lambda: model.predict(data),
        lambda: model.fit(data, labels),
        lambda: model.fit(known, labels, validation=(data, labels)),
    ):
        model.encoder().warn_anew()
        with pytest.warns(UserWarning, match="column 'x': expected values that it knows") as caught:
            call()
        assert [each.filename for each in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(known, labels)
        model.predict(model.encode(known))


def said(call: Any) -> list[str]:
    """The columns that are warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(each.message).split("'")[1] for each in caught if "expected values" in str(each.message)]


def small() -> MultiTaskModel:
    torch.manual_seed(0)
    columns: list[Column] = [Categorical("x", values=("a",)), Categorical("y", size=2)]
    options: Any = {"trunk": "hard_sharing", "trunk_options": {"expert_units": 4}, "tower_units": ()}
    return MultiTaskModel(columns, [TaskLoss("click")], **options)


def rows(count: int, x: str = "z", y: int = 0) -> dict[str, Any]:
    return {"x": [x] * count, "y": [y] * count}


def test_requests_are_warned_of_once_and_a_table_that_is_much_larger_again() -> None:
    model = small()
    assert said(lambda: model.predict(rows(3))) == ["x"]
    assert said(lambda: [model.predict(rows(count)) for count in (3, 2, 29)]) == []
    assert said(lambda: model.predict(rows(3, y=7))) == ["y"]  # each column for itself
    assert said(lambda: model.predict(rows(500, y=7))) == ["x", "y"]
    assert said(lambda: model.predict(rows(500, y=7))) == []
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert said(lambda other=other: other.predict(rows(2))) == ["x"]
    model.columns = (model.columns[0], Categorical("y", values=(0, 7)))
    assert said(lambda: model.predict(rows(2, y=7))) == ["x"]  # of other columns nothing was said


def test_fit_and_evaluate_warn_each_time_and_of_parts_once() -> None:
    model = small()
    label = {"click": [0, 1, 1]}
    for _ in range(2):
        assert said(lambda: model.fit(rows(3), label, progress=False)) == ["x"]
        assert said(lambda: model.evaluate(rows(3), label)) == ["x"]
        assert said(lambda: model.fit([(rows(3), label)] * 3, epochs=2, progress=False)) == ["x"]


def test_a_warning_that_is_an_error_is_one_each_time() -> None:
    model = small()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(UserWarning, match="column 'x': expected values"):
                model.predict(rows(3))


def test_threads_that_share_an_encoder_are_warned_once_each_at_most() -> None:
    model = small()

    def serve() -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: model.predict(rows(3)), range(100)))

    assert 1 <= len(said(serve)) <= 8

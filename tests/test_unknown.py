"""The warning of a column of which no value is known: when, what it says, and whom it points at."""

from __future__ import annotations

import warnings
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
        with pytest.warns(UserWarning, match="column 'x': expected values that it knows") as caught:
            call()
        assert [each.filename for each in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(known, labels)
        model.predict(model.encode(known))

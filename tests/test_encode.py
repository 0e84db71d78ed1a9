"""Codes and numbers of columns from every kind of table, and columns that are measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ple_fast.model import Categorical, Numeric, columns_from, encode
from ple_fast.model.embedding import FeatureEmbedding
from tests.model_helpers import COLUMNS


def test_codes_and_numbers_are_as_declared() -> None:
    rows = encode(
        {
            "country": np.array(["it", "xx", "de"]),
            "age": [50.0, 40.0, 25.0],
            "hour": np.array([0, 23, 24]),
            "amount": [math.e - 1, math.nan, 1 - math.e],
        },
        COLUMNS,
    )
    assert rows.codes.tolist() == [[3, 1], [0, 24], [1, 0]]
    assert rows.codes.dtype is torch.int32
    expected = [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [-1.5, -1.0, 0.0]]
    assert torch.allclose(rows.numbers, torch.tensor(expected))
    assert rows.numbers.dtype is torch.float32
    assert len(rows) == 3


@pytest.mark.parametrize(
    "column",
    [
        pd.Series(["b", None, "a", "z"], dtype="category"),
        pd.Series(["b", None, "a", "z"]),
        pd.Series(["b", None, "a", "z"], dtype="string"),
        pd.Categorical(["b", None, "a", "z"]),
        np.array(["b", None, "a", "z"], dtype=object),
        ["b", "", "a", "z"],
    ],
    ids=["categories", "text", "nullable text", "bare categories", "objects", "list"],
)
def test_text_has_the_same_codes_from_every_kind_of_column(column: Any) -> None:
    assert Categorical("c", values=("a", "b")).encode(column).tolist() == [2, 0, 1, 0]


@pytest.mark.parametrize(
    "column",
    [
        np.array([7, -1, 3, 8]),
        np.array([7.0, math.nan, 3.0, 3.5]),
        pd.Series([7, None, 3, 8], dtype="Int64"),
        pd.Series([7, None, 3, 8], dtype="category"),
        torch.tensor([7, -1, 3, 8], dtype=torch.int16),
        np.array([7, None, 3, 8], dtype=object),
    ],
    ids=["ints", "floats", "nullable ints", "categories", "tensor", "objects"],
)
@pytest.mark.parametrize("declared", [{"values": (3, 7)}, {"size": 8}], ids=["values", "size"])
def test_ints_have_the_same_codes_from_every_kind_of_column(column: Any, declared: dict[str, Any]) -> None:
    expected = [2, 0, 1, 0] if "values" in declared else [8, 0, 4, 0]
    assert Categorical("c", **declared).encode(column).tolist() == expected


def test_columns_from_measures_training_data() -> None:
    frame = pd.DataFrame(
        {
            "word": ["b", "a", "b", None],
            "flag": [True, False, True, True],
            "kind": pd.Categorical(["x", "x", "y", "x"], categories=["x", "y", "unused"]),
            "amount": [0.0, math.e - 1, math.nan, math.e**3 - 1],
            "constant": [0.1, 0.1, 0.1, 0.1],
        }
    )
    columns = columns_from(
        frame, categorical=["word", "flag", "kind"], numeric=["amount", "constant"], width=5, transform="log1p"
    )
    word, flag, kind, amount, constant = columns
    assert [c.values for c in (word, flag, kind) if isinstance(c, Categorical)] == [("a", "b"), (0, 1), ("x", "y")]
    assert isinstance(amount, Numeric)
    assert amount.missing == "indicator"
    assert math.isclose(amount.mean, 4 / 3)
    assert math.isclose(amount.std, np.std([0, 1, 3]))
    assert isinstance(constant, Numeric)
    assert constant.std == 1.0  # and not the rounding noise of equal numbers
    rare = columns_from(frame, categorical=["word"], min_count=2)[0]
    assert isinstance(rare, Categorical)
    assert rare.values == ("b",)
    assert encode(frame, columns).numbers.shape == (4, 3)


def test_large_numbers_are_standardised_in_double_precision() -> None:
    seconds = 1.7e9 + np.arange(10.0)
    column = columns_from({"time": seconds}, numeric=["time"])[0]
    got = column.encode(seconds)[:, 0]
    assert np.allclose(got, (np.arange(10) - 4.5) / np.std(np.arange(10)), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Categorical("c"), ValueError, "either values or size"),
        (lambda: Categorical("c", values=("a",), size=3), ValueError, "either values or size"),
        (lambda: Categorical("c", values=("a", 1)), TypeError, "int.*str"),
        (lambda: Categorical("c", values=(1.5,)), TypeError, "float"),  # type: ignore[arg-type]  # the mistake under test
        (lambda: Categorical("c", values=("a", "b", "a")), ValueError, "'a' twice"),
        (lambda: Categorical("c", size=0), ValueError, "size"),
        (lambda: Categorical("c", size=3, width=0), ValueError, "width"),
        (lambda: Numeric("n", transform="sqrt"), ValueError, "sqrt"),  # type: ignore[arg-type]  # the mistake under test
        (lambda: Numeric("n", std=0.0), ValueError, "std above 0"),
        (lambda: Numeric("n", width=-1), ValueError, "width"),
        (lambda: Categorical("c", values=("a",)).encode([1, 2]), TypeError, "'c'.*strings"),
        (lambda: Categorical("c", values=(1, 2)).encode(["a"]), TypeError, "'c'.*ints, got text"),
        (lambda: Categorical("c", size=2).encode(["a"]), TypeError, "'c'.*ints, got text"),
        (lambda: Categorical("c", size=2).encode(np.array(["2020"], "datetime64[s]")), TypeError, "datetime"),
        (lambda: Categorical("c", size=2).encode([[1]]), ValueError, "'c'.*one value per row.*list"),
        (lambda: Categorical("c", size=2).encode(np.ones((1, 1))), ValueError, r"'c'.*\(1, 1\)"),
        (lambda: Numeric("n").encode([1.0, math.nan]), ValueError, "1 of 2 missing.*indicator"),
        (lambda: Numeric("n").encode([math.inf]), ValueError, "'n'.*finite"),
        (lambda: Numeric("n").encode(["1"]), TypeError, "'n'.*numbers"),
        (lambda: Numeric("n", std=1e-20).encode([1e30]), ValueError, r"'n'.*float32.*1e\+30"),
        (lambda: columns_from({"a": [1]}, numeric=["b"]), ValueError, r"'b', got \['a'\]"),
        (lambda: columns_from({"a": [1]}, categorical=["a"], numeric=["a"]), ValueError, r"\['a'\] more than once"),
        (lambda: columns_from({"a": []}, numeric=["a"]), ValueError, "at least one row"),
        (lambda: columns_from({"a": [1.5]}, categorical=["a"]), TypeError, "float.*numeric"),
        (lambda: columns_from({"a": [1]}, categorical=["a"], min_count=0), ValueError, "min_count"),
        (lambda: encode({"a": [1], "b": [1, 2]}, [Numeric("a"), Numeric("b")]), ValueError, "'a': 1, 'b': 2"),
        (lambda: FeatureEmbedding([]), ValueError, "at least one"),
    ],
)
def test_columns_refuse_in_sentences(make: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()

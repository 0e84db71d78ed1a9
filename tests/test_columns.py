"""Columns as they are declared: codes of every dtype, missing values, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ple_fast.model import Categorical, Numeric, columns_from, encode
from ple_fast_encoder.columns import from_json, to_json

NAN = math.nan


INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("size", [1, 5, 127, 128, 255, 256, 300, 70_000])
def test_codes_of_a_size_are_the_same_for_every_integer_dtype(dtype: str, size: int) -> None:
    """No sentinel and no sum is computed in the user's dtype, whose range may end before the vocabulary or after it."""
    info = np.iinfo(dtype)
    values = [info.min, info.max, info.max - 1, -1, 0, 1, 4, 5, 126, 127, 128, 254, 255, 256, 299, 300, 69_999, 2**31]
    values = [value for value in values if info.min <= value <= info.max]
    column = Categorical("x", size=size)
    expected = [value + 1 if 0 <= value < size else 0 for value in values]
    codes = column.encode(np.array(values, dtype=dtype))
    assert codes.dtype == np.int32
    assert codes.tolist() == expected
    assert column.encode(values).tolist() == expected
    assert column.encode(np.array(values, dtype=object)).tolist() == expected
    assert column.encode(pd.Series(values, dtype=dtype).astype("category")).tolist() == expected


@pytest.mark.parametrize("dtype", INTEGERS)
def test_codes_of_a_vocabulary_are_the_same_for_every_integer_dtype(dtype: str) -> None:
    info = np.iinfo(dtype)
    known = tuple(sorted({info.min, info.max, 0, 100}))
    column = Categorical("x", values=known)
    given = [info.max, 0, 101, info.min, 100]
    expected = [1 + known.index(value) if value in known else 0 for value in given]
    assert column.encode(np.array(given, dtype=dtype)).tolist() == expected
    assert columns_from({"x": np.array(known, dtype=dtype)}, categorical=["x"]) == [column]


@pytest.mark.parametrize("declared", [{"size": 2}, {"values": (0, 1)}], ids=["size", "values"])
@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (np.array([True, False]), [2, 1]),
        (np.array([1.0, -1.0, 0.5, NAN, math.inf, -math.inf, 1e300, -0.0]), [2, 0, 0, 0, 0, 0, 0, 1]),
        (np.array([1, 2, 65504], dtype=np.float16), [2, 0, 0]),
        (np.array([1, None, -1, True, 2**70, 0.0], dtype=object), [2, 0, 0, 2, 0, 1]),
        (np.array([2**64 - 1, 1], dtype=np.uint64), [0, 2]),
    ],
    ids=["bool", "float", "float16", "object", "uint64"],
)
def test_codes_of_other_dtypes(declared: dict[str, Any], column: Any, expected: list[int]) -> None:
    assert Categorical("x", **declared).encode(column).tolist() == expected


NOTHING: dict[str, Any] = {
    "floats": np.full(4, NAN),
    "objects": [None] * 4,
    "objects with NaN": np.array([NAN] * 4, dtype=object),
    "categories": pd.Series([NAN] * 4, dtype="category"),
    "Int64": pd.Series([None] * 4, dtype="Int64"),
    "string": pd.Series([None] * 4, dtype="string"),
    "masked": np.ma.array([1, 2, 3, 4], mask=True),
}


@pytest.mark.parametrize("column", NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize(
    "declared",
    [{"values": ("a", "b")}, {"values": (1, 2)}, {"values": ()}, {"size": 3}],
    ids=["text", "ints", "", "size"],
)
def test_a_column_without_a_value_is_missing_everywhere(column: Any, declared: dict[str, Any]) -> None:
    assert Categorical("x", **declared).encode(column).tolist() == [0, 0, 0, 0]
    assert Numeric("x", missing="mean").encode(column).tolist() == [[0]] * 4
    fitted = columns_from({"c": column, "n": column}, categorical=["c"], numeric=["n"])
    assert fitted == [Categorical("c", values=()), Numeric("n", missing="indicator")]


@pytest.mark.parametrize(
    "empty", [[], np.zeros(0), np.zeros(0, "U1"), pd.DataFrame({"x": []})["x"], pd.Categorical([])]
)
def test_no_rows_are_no_rows(empty: Any) -> None:
    for column in (
        Categorical("x", values=("a",)),
        Categorical("x", values=(1,)),
        Categorical("x", size=2),
        Numeric("x"),
    ):
        assert len(column.encode(empty)) == 0
    for names in ({"categorical": ["x"]}, {"numeric": ["x"]}):
        with pytest.raises(ValueError, match="column 'x': expected at least one row, got none"):
            columns_from({"x": empty}, **names)  # type: ignore[arg-type]  # keywords of names alone


def test_columns_of_numpy_are_those_of_python_and_are_json() -> None:
    ids = np.array([3, 1, 3], dtype=np.uint16)
    categorical: Any = Categorical
    numeric: Any = Numeric
    columns: list[Any] = [
        categorical(np.str_("a"), size=ids.max() + 1, width=np.int64(4)),
        categorical("b", values=np.unique(ids)),
        categorical("c", values=np.unique(["y", "x"])),
        categorical("d", values=np.unique([2.0, 1.0])),
        categorical("e", values=range(3)),
        categorical("f", values=[np.int8(1), 2]),
        categorical("g", values=pd.Series(["v", "u"]).unique()),
        categorical("h", values=pd.Index([5, 6])),
        numeric("i", mean=np.float32(0.5), std=np.float64(2), width=np.int8(3)),
        numeric("j", mean=1, std=np.int64(2)),
    ]
    expected = [
        Categorical("a", size=4, width=4),
        Categorical("b", values=(1, 3)),
        Categorical("c", values=("x", "y")),
        Categorical("d", values=(1, 2)),
        Categorical("e", values=(0, 1, 2)),
        Categorical("f", values=(1, 2)),
        Categorical("g", values=("v", "u")),
        Categorical("h", values=(5, 6)),
        Numeric("i", mean=0.5, std=2.0, width=3),
        Numeric("j", mean=1.0, std=2.0),
    ]
    assert columns == expected
    assert [hash(column) for column in columns] == [hash(column) for column in expected]
    for column in columns:
        assert from_json(json.loads(json.dumps(to_json(column)))) == column
        fields = [getattr(column, field.name) for field in dataclasses.fields(column)]
        own = [entry for field in fields for entry in (field if isinstance(field, tuple) else (field,))]
        assert {type(entry) for entry in own} <= {str, int, float, type(None)}


def test_options_of_columns_from_may_be_numpys() -> None:
    table = pd.DataFrame({"a": ["x", "x", "y"], "b": [1.0, 2.0, 3.0]})
    fitted: Any = columns_from
    got = fitted(table, categorical=table.columns[:1], numeric=np.array(["b"]), width=np.int64(2), min_count=np.int8(2))
    assert got == columns_from(table, categorical=["a"], numeric=["b"], width=2, min_count=2)
    assert type(got[1].name) is str


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: columns_from({}, categorical="country"), TypeError, r"got the text 'country'; write \['country'\]"),
        (lambda: columns_from({}, numeric="age"), TypeError, r"numeric: expected a list, .*'age'"),
        (lambda: columns_from({}, categorical={"a", "b"}), TypeError, "categorical: expected a list, got set; sort it"),  # type: ignore[arg-type]  # the mistakes under test
        (lambda: columns_from({}, numeric=3), TypeError, "numeric: expected a list, got int"),  # type: ignore[arg-type]
        (lambda: columns_from({"a": [1]}, numeric=["a"], missing=""), ValueError, "'a'.*missing.*got ''"),  # type: ignore[arg-type]
        (lambda: columns_from({"a": [1, None]}, numeric=["a"], missing="error"), ValueError, "'a'.*1 of 2 missing"),
        (lambda: columns_from({"a": [1e200, -1e200]}, numeric=["a"]), ValueError, "'a'.*finite std.*inf"),
        (lambda: Categorical("c", values="abc"), TypeError, "'c': values: expected a list, got the text 'abc'"),  # type: ignore[arg-type]
        (lambda: Categorical("c", values={1, 2}), TypeError, "'c': values: expected a list, got set"),  # type: ignore[arg-type]
        (lambda: Categorical("c", values=(1.0, NAN)), TypeError, r"'c'.*\['float', 'int'\]"),  # type: ignore[arg-type]
        (lambda: Categorical("c", values=(1, True)), ValueError, "'c'.*1 twice"),
        (lambda: Categorical("c", size=True), TypeError, "'c': size: expected an int, got True"),
        (lambda: Categorical("c", size=np.float64(3)), TypeError, "'c': size: expected an int"),  # type: ignore[arg-type]
        (lambda: Categorical("c", size=2**31), ValueError, "'c'.*at most 2147483647 values, got 2147483648"),
        (lambda: Numeric("n", mean="0"), TypeError, "'n': mean: expected a number, got '0'"),  # type: ignore[arg-type]
        (lambda: Numeric("n", std=True), TypeError, "'n': std: expected a number, got True"),
        (lambda: encode({"a": [1]}, []), TypeError, "at least one Categorical, Hashed or Numeric, got none"),
        (lambda: encode({"a": [1]}, ["a"]), TypeError, "Categorical, Hashed or Numeric, got 'a'; columns_from"),  # type: ignore[list-item]
    ],
)
def test_declarations_are_refused_in_sentences(make: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_a_value_that_occurs_twice_is_found_at_once() -> None:
    """A count for each value would take seconds."""
    values = (*range(100_000), 99_999)
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="got 99999 twice"):
        Categorical("x", values=values)
    assert time.perf_counter() - begin < 1.0

"""Columns of lists of every library: one column has one meaning; what is no list is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import date
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

from ple_fast.model import Categorical, Hashed, columns_from, encode

NAN = math.nan


def objects(*cells: Any) -> Any:
    """An array of one axis, whatever the cells are."""
    made = np.empty(len(cells), dtype=object)
    for place, cell in enumerate(cells):
        made[place] = cell
    return made


# One column each: [3, 1], no value, a missing row, [2, 9, 3].
PLAIN: list[Any] = [[3, 1], [], None, [2, 9, 3]]
FULL: list[Any] = [[3, 1, None], [None, None, None], None, [2, 9, 3]]
FLOATS = np.array([[3, 1, NAN], [NAN] * 3, [NAN] * 3, [2, 9, 3]])
ARRAYS: list[Any] = [np.array([3, 1]), np.zeros(0, int), None, np.array([2, 9, 3])]
INTS: dict[str, Any] = {
    "lists": PLAIN,
    "tuples": [(3, 1), (), None, (2, 9, 3)],
    "a tuple of lists": tuple(PLAIN),
    "lists, NaN for a row": [[3, 1], [], NAN, [2, 9, 3]],
    "lists, NA for a row": [[3, 1], [], pd.NA, [2, 9, 3]],
    "lists, a masked row": [[3, 1], [], np.ma.masked, [2, 9, 3]],
    "lists with missing values": [[3, None, 1], [NAN], None, [2, 9, pd.NA, 3]],
    "lists of NumPy's": [[np.int8(3), np.int64(1)], [], None, [np.uint8(2), 9, 3]],
    "lists of floats": [[3.0, 1.0], [], None, [2.0, 9.0, 3.0]],
    "ranges": [range(3, 0, -2), range(0), None, [2, 9, 3]],
    "arrays": ARRAYS,
    "arrays of several dtypes": [np.array([3, 1], np.int8), np.zeros(0), None, np.array([2.0, 9.0, 3.0])],
    "arrays of objects": [objects(3, 1), objects(), None, objects(2, 9, 3)],
    "arrays with a mask": [np.ma.array([3, 7, 1], mask=[False, True, False]), np.zeros(0), None, np.array([2, 9, 3])],
    "tensors": [torch.tensor([3, 1]), torch.zeros(0), None, torch.tensor([2, 9, 3], dtype=torch.int8)],
    "objects": objects(*PLAIN),
    "objects of arrays": objects(*ARRAYS),
    "masked objects": np.ma.array(objects([3, 1], [], [7], [2, 9, 3]), mask=[False, False, True, False]),
    "padded floats": FLOATS,
    "padded float32, by columns": np.asfortranarray(FLOATS.astype(np.float32)),
    "padded objects": np.array([[3, 1, None], [None] * 3, [None] * 3, [2, 9, 3]], dtype=object),
    "padded, masked": np.ma.array(np.nan_to_num(FLOATS).astype(int), mask=np.isnan(FLOATS)),
    "padded tensor": torch.tensor(FLOATS),
    "nested tensor": torch.nested.nested_tensor(
        [torch.tensor(row or [], dtype=torch.int64) for row in PLAIN], layout=torch.jagged
    ),
    "series": pd.Series(PLAIN),
    "series of arrays": pd.Series(ARRAYS),
    "series with an index": pd.Series(PLAIN, index=[9, 9, 3, 0]),
    "pandas of arrow": pd.Series(PLAIN, dtype=pd.ArrowDtype(pa.list_(pa.int64()))),
    "bare pandas of arrow": pd.Series(PLAIN, dtype=pd.ArrowDtype(pa.large_list(pa.int16()))).array,
    "arrow": pa.array(PLAIN),
    "arrow, large": pa.array(PLAIN, pa.large_list(pa.uint8())),
    "arrow with nulls": pa.array([[3, None, 1], [None], None, [2, 9, 3]]),
    "arrow, fixed": pa.array(FULL, pa.list_(pa.int64(), 3)),
    "arrow, a view": pa.array(PLAIN, pa.list_view(pa.int32())),
    "arrow, a slice": pa.array([[7, 7], *PLAIN, [7]]).slice(1, 4),
    "arrow chunks": pa.chunked_array([pa.array([[3, 1], []]), pa.array([None, [2, 9, 3]], pa.list_(pa.int64()))]),
    "arrow dictionary": pa.ListArray.from_arrays(
        pa.array([0, 2, None, 2, 5], pa.int32()), pa.array([3, 1, 2, 9, 3]).dictionary_encode()
    ),
    "polars": pl.Series(PLAIN),
    "polars uint8": pl.Series(PLAIN, dtype=pl.List(pl.UInt8)),
    "polars with nulls": pl.Series([[3, None, 1], [None], None, [2, 9, 3]]),
    "polars arrays": pl.Series(FULL, dtype=pl.Array(pl.Int64, 3)),
}
# "arrow dictionary" has its missing row before the empty one, which is coded alike.

# One column each: ["b", "a"], no value, a missing row, ["a", "z", "b"].
WORDS: list[Any] = [["b", "a"], [], None, ["a", "z", "b"]]
TEXT: dict[str, Any] = {
    "lists": WORDS,
    "arrays": [np.array(["b", "a"]), np.zeros(0, "U1"), None, np.array(["a", "z", "b"], "U7")],
    "objects": objects(*WORDS),
    "padded objects": np.array([["b", "a", None], [None] * 3, [None] * 3, ["a", "z", "b"]], dtype=object),
    "series": pd.Series(WORDS),
    "pandas of arrow": pd.Series(WORDS, dtype=pd.ArrowDtype(pa.list_(pa.string()))),
    "arrow": pa.array(WORDS),
    "arrow, large": pa.array(WORDS, pa.large_list(pa.large_string())),
    "arrow dictionary": pa.ListArray.from_arrays(
        pa.array([0, 2, None, 2, 5], pa.int32()), pa.array(["b", "a", "a", "z", "b"]).dictionary_encode()
    ),
    "polars": pl.Series(WORDS),
    "polars categorical": pl.Series(WORDS, dtype=pl.List(pl.Categorical)),
    "polars enum": pl.Series(WORDS, dtype=pl.List(pl.Enum(["a", "b", "z"]))),
}


@pytest.mark.parametrize("column", INTS.values(), ids=INTS)
def test_lists_of_ints_mean_the_same_in_every_library(column: Any) -> None:
    known = Categorical("x", values=(1, 2, 3), pooling="mean", max_length=4)
    codes = known.encode(column)
    assert codes.dtype == np.int32
    assert codes.tolist() == [[3, 1, -1, -1], [-1] * 4, [-1] * 4, [2, 0, 3, -1]]
    sized = Categorical("x", size=4, pooling="mean", max_length=3)
    assert sized.encode(column).tolist() == [[4, 2, -1], [-1] * 3, [-1] * 3, [3, 0, 4]]
    hashed = Hashed("x", 1000, pooling="sum", max_length=3)
    assert hashed.encode(column).tolist() == hashed.encode(PLAIN).tolist()
    (fitted,) = columns_from({"x": column}, categorical=["x"], pooling={"x": "max"})
    assert fitted == Categorical("x", values=(1, 2, 3, 9), pooling="max", max_length=3)
    assert {type(value) for value in fitted.values or ()} == {int}


@pytest.mark.parametrize("column", TEXT.values(), ids=TEXT)
def test_lists_of_text_mean_the_same_in_every_library(column: Any) -> None:
    known = Categorical("x", values=("a", "b"), pooling="mean", max_length=3)
    assert known.encode(column).tolist() == [[2, 1, -1], [-1] * 3, [-1] * 3, [1, 0, 2]]
    hashed = Hashed("x", 1000, pooling="sum", max_length=3)
    assert hashed.encode(column).tolist() == hashed.encode(WORDS).tolist()
    (fitted,) = columns_from({"x": column}, categorical=["x"], pooling={"x": "max"})
    assert fitted == Categorical("x", values=("a", "b", "z"), pooling="max", max_length=3)
    assert {type(value) for value in fitted.values or ()} == {str}


ZEROS = np.array([[3, 1, 0], [0, 0, 0], [2, 0, 3]])


@pytest.mark.parametrize(
    "column",
    [
        ZEROS,
        ZEROS.astype(np.uint8),
        ZEROS.astype(float),
        ZEROS.astype(object),
        torch.tensor(ZEROS, dtype=torch.int16),
        ZEROS.tolist(),
        pd.Series(ZEROS.tolist()),
        pa.array(ZEROS.tolist()),
        pl.Series(ZEROS.tolist()),
        pa.array(ZEROS.tolist()).cast(pa.list_(pa.int8())),
    ],
    ids=lambda column: f"{type(column).__module__}.{type(column).__name__}",
)
def test_a_value_that_fills_rows_up_is_left_out(column: Any) -> None:
    (fitted,) = columns_from({"x": column}, categorical=["x"], pooling={"x": "mean"}, padding=0)
    assert fitted == Categorical("x", values=(1, 2, 3), pooling="mean", max_length=2, padding=0)
    assert fitted.encode(column).tolist() == [[3, 1], [-1, -1], [2, 3]]


@pytest.mark.parametrize(
    "column", [np.array([["b", ""], ["a", "b"]]), [["b", ""], ["a", "b"]], pa.array([["b", ""], ["a", "b"]])]
)
def test_text_that_fills_rows_up_is_left_out(column: Any) -> None:
    (fitted,) = columns_from({"x": column}, categorical=["x"], pooling={"x": "mean"}, padding={"x": np.str_("")})
    assert fitted == Categorical("x", values=("a", "b"), pooling="mean", max_length=2, padding="")
    assert fitted.encode(column).tolist() == [[2, -1], [1, 2]]


def test_padding_of_the_other_kind_leaves_everything() -> None:
    column = Categorical("x", size=3, pooling="mean", max_length=2, padding="")
    assert column.encode([[0, 1], [2]]).tolist() == [[1, 2], [3, -1]]
    text = Categorical("x", values=("a",), pooling="mean", max_length=2, padding=0)
    assert text.encode(np.array([["a", ""]])).tolist() == [[1, 0]]
    narrow = Categorical("x", size=3, pooling="mean", max_length=2, padding=-1)  # which no uint8 is
    assert narrow.encode(np.array([[0, 1]], dtype=np.uint8)).tolist() == [[1, 2]]


@pytest.mark.parametrize("keep", ["last", "first"])
@pytest.mark.parametrize("max_length", [1, 2, 3, 9])
def test_rows_that_are_too_long_are_cut(keep: Any, max_length: int) -> None:
    rows = [[1, 2, 3, 4], [], [5], [6, 7, 8], [9, 10]]
    column = Categorical("x", size=20, pooling="mean", max_length=max_length, keep=keep)
    for each in (rows, pa.array(rows), pd.Series(rows)):
        for codes, row in zip(column.encode(each).tolist(), rows, strict=True):
            kept = row[-max_length:] if keep == "last" else row[:max_length]
            assert codes == [value + 1 for value in kept] + [-1] * (max_length - len(kept))


def test_what_is_left_out_takes_no_place_of_a_row_that_is_cut() -> None:
    column = Categorical("x", size=20, pooling="mean", max_length=2)
    assert column.encode([[1, 2, None, None]]).tolist() == [[2, 3]]


LARGE = 2**60


@pytest.mark.parametrize(
    "column",
    [
        [[LARGE + 1, None], [LARGE]],
        [np.array([LARGE + 1]), np.array([LARGE])],
        [np.array([LARGE + 1]), np.array([LARGE], dtype=np.uint64)],
        pa.array([[LARGE + 1, None], [LARGE]]),
        pl.Series([[LARGE + 1, None], [LARGE]]),
        pd.Series([[LARGE + 1, None], [LARGE]], dtype=pd.ArrowDtype(pa.list_(pa.int64()))),
        np.ma.array([[LARGE + 1, 0], [LARGE, 0]], mask=[[False, True]] * 2),
    ],
    ids=["lists", "arrays", "arrays of two dtypes", "arrow", "polars", "pandas of arrow", "masked"],
)
def test_large_ids_in_lists_stay_apart(column: Any) -> None:
    (fitted,) = columns_from({"x": column}, categorical=["x"], pooling={"x": "mean"})
    assert isinstance(fitted, Categorical)
    assert fitted.values == (LARGE, LARGE + 1)
    assert fitted.encode(column).tolist() == [[2], [1]]


def test_ints_beyond_64_bits_in_lists_stay_apart() -> None:
    (fitted,) = columns_from({"x": [[2**63, -1], [2**70]]}, categorical=["x"], pooling={"x": "mean"})
    assert isinstance(fitted, Categorical)
    assert fitted.values == (-1, 2**63, 2**70)


OF_TWO = (
    Categorical("x", size=3, pooling="mean", max_length=2),
    Categorical("x", values=("a",), pooling="mean", max_length=2),
    Hashed("x", 9, pooling="mean", max_length=2),
)
"""Columns of every kind, of two values per row."""
NOTHING: dict[str, Any] = {
    "no rows": [],
    "an array without rows": np.zeros(0),
    "an array (0, 3)": np.zeros((0, 3), dtype=int),
    "arrow": pa.array([], pa.list_(pa.int64())),
    "polars": pl.Series([], dtype=pl.List(pl.Int64)),
    "series": pd.Series([], dtype=object),
}


@pytest.mark.parametrize("column", NOTHING.values(), ids=NOTHING)
def test_no_rows_are_no_rows_of_lists(column: Any) -> None:
    for made in OF_TWO:
        assert made.encode(column).shape == (0, 2)
    with pytest.raises(ValueError, match="column 'x': expected at least one row, got none"):
        columns_from({"x": column}, categorical=["x"], pooling={"x": "mean"})


EMPTY: dict[str, Any] = {
    "lists": [[], []],
    "None": [None, None],
    "NaN": np.full(2, NAN),
    "array (2, 0)": np.zeros((2, 0)),
    "array of NaN": np.full((2, 2), NAN),
    "series": pd.Series([None, None]),
    "arrow": pa.array([[], None], pa.list_(pa.string())),
    "arrow nulls": pa.nulls(2),
    "polars": pl.Series([[], None], dtype=pl.List(pl.String)),
    "polars nulls": pl.Series([None, None]),
}


@pytest.mark.parametrize("column", EMPTY.values(), ids=EMPTY)
def test_a_column_of_lists_without_a_value_has_empty_rows(column: Any) -> None:
    for made in OF_TWO:
        assert made.encode(column).tolist() == [[-1, -1]] * 2
    (fitted,) = columns_from({"x": column}, categorical=["x"], pooling={"x": "mean"})
    assert fitted == Categorical("x", values=(), pooling="mean", max_length=1)


@pytest.mark.parametrize(
    ("column", "error", "says"),
    [
        (["a|b", "c"], TypeError, r"a list of values per row, got 'a\|b' \(str\); split it"),
        (pd.Series(["a|b"]), TypeError, "split it"),
        (np.array(["a|b"]), TypeError, "split it"),
        (pa.array(["a|b"]), TypeError, "split it"),
        (pl.Series(["a|b"]), TypeError, "split it"),
        ([[1], 2], TypeError, r"got 2 \(int\); write \[value\]"),
        (np.array([1, 2]), TypeError, r"got 1 \(int\); write \[value\]"),
        (torch.tensor([1, 2]), TypeError, r"got 1 \(int\); write \[value\]"),
        (pd.Series([1.0, NAN]), TypeError, r"got 1.0 \(float\); write \[value\]"),
        ([{1, 2}], TypeError, "sort it, because a set has another order in each process"),
        ([{"a": 1}], TypeError, r"got \{'a': 1\} \(dict\)"),
        (pa.array([{"a": 1}]), TypeError, r"\(dict\)"),
        ([[[1], [2]]], ValueError, "single values per row, got lists of list; flatten them"),
        ([np.zeros((2, 2))], ValueError, "got lists of list"),
        (np.zeros((2, 2, 2)), ValueError, r"got shape \(2, 2, 2\)"),
        (torch.zeros(2, 2, 2), ValueError, r"got shape \(2, 2, 2\)"),
        (pa.array([[[1]]]), ValueError, "got lists of "),
        (pl.Series([[[1]]]), ValueError, "got lists of "),
        (pl.Series([[[1]]], dtype=pl.Array(pl.Int64, (1, 1))), ValueError, "got lists of .*flatten them"),
        (None, ValueError, "got NoneType"),
        ({1}, ValueError, "got set"),
        ("text", ValueError, "got str"),
        ((cell for cell in ([1], [2])), ValueError, "got generator"),
        (torch.zeros(2, 2, device="meta"), TypeError, "NumPy can hold, got Tensor"),
        (torch.zeros(2, 2, requires_grad=True), TypeError, r"detach\(\)"),
        ([[date(2020, 1, 1)]], TypeError, "got date"),
        (pa.array([[b"a"]]), TypeError, "got bytes"),
        ([["a", 1]], TypeError, "text"),
    ],
)
def test_what_is_no_column_of_lists_is_refused_by_name(column: Any, error: type[Exception], says: str) -> None:
    table = {"x": column}
    uses: list[Callable[[], Any]] = [
        lambda: Categorical("x", size=3, pooling="mean", max_length=2).encode(column),
        lambda: Hashed("x", 3, pooling="mean", max_length=2).encode(column),
        lambda: columns_from(table, categorical=["x"], pooling={"x": "mean"}),
        lambda: columns_from(table, categorical=["x"], pooling={"x": "mean"}, buckets={"x": 3}),
    ]
    for use in uses if not hasattr(column, "send") else uses[:1]:
        with pytest.raises(error, match=r"column 'x': .*" + says):
            use()


def test_lists_of_another_kind_than_the_vocabulary_are_refused() -> None:
    ints = Categorical("x", values=(1, 2), pooling="mean", max_length=2)
    with pytest.raises(TypeError, match="column 'x': its vocabulary holds ints, got text; convert the column"):
        ints.encode([["1"], ["2"]])
    text = Categorical("x", values=("1", "2"), pooling="mean", max_length=2)
    with pytest.raises(TypeError, match="column 'x': its vocabulary holds strings, got numbers"):
        text.encode([[1], [2]])


def test_a_column_of_lists_that_is_declared_to_have_one_value_says_how_to_declare_it() -> None:
    for column in ([[1], [2]], np.ones((2, 1)), pa.array([[1], [2]])):
        with pytest.raises(ValueError, match=r"expected one value per row, \(B,\), got .*pooling="):
            Categorical("x", size=3).encode(column)


TABLES: dict[str, Any] = {
    "mapping": lambda frame: frame,
    "pandas": pd.DataFrame,
    "polars": pl.DataFrame,
    "arrow": pa.table,
    "record batch": pa.RecordBatch.from_pydict,
}


@pytest.mark.parametrize("make", TABLES.values(), ids=TABLES)
def test_every_kind_of_table_has_columns_of_lists(make: Callable[[Any], Any]) -> None:
    frame = {"c": ["x", "y"], "tags": [["a"], ["b", "a"]], "n": [1.0, 2.0], "ids": [[1, 2, 3], []]}
    table = make(frame)
    columns = columns_from(
        table, categorical=["tags", "c", "ids"], numeric=["n"], pooling={"tags": "sum", "ids": "max"}
    )
    assert columns == columns_from(
        frame, categorical=["tags", "c", "ids"], numeric=["n"], pooling={"tags": "sum", "ids": "max"}
    )
    # One value per row first, then those of several, each in the order of the columns.
    assert encode(table, columns).codes.tolist() == [[1, 1, -1, 1, 2, 3], [2, 2, 1, -1, -1, -1]]

"""Tables and columns that have no meaning are refused by name, whoever reads them."""

from __future__ import annotations

import math
from datetime import date
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

from ple_fast.model import Numeric, columns_from, encode
from ple_fast_encoder.tables import label_values
from tests.table_helpers import readers

NAMED = r"column 'x': .*"


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pd.Series(pd.to_datetime(np.array(["2020-01-01", "NaT"]))), "datetime64"),
        (pd.Series(pd.to_datetime(np.array(["2020-01-01", "NaT"]), utc=True)), "Timestamp"),
        (pd.Series(pd.to_timedelta([1, 2], unit="s")), "timedelta64"),
        (pd.Series(pd.period_range("2020", periods=2)), "Period"),
        (np.array([date(2020, 1, 1), None], dtype=object), "date"),
        (np.array([np.datetime64("2020", "ns"), None], dtype=object), "datetime64"),
        (np.array([np.timedelta64(1, "s")], dtype=object), "timedelta64"),
        (pa.array([0, None], pa.timestamp("s", "UTC")), "datetime64"),
        (pl.Series([0, None], dtype=pl.Datetime("us", "UTC")), "datetime64"),
        (np.array([1 + 2j]), "complex128"),
        ([1j, 1], "complex"),
        (np.array([b"a"]), "bytes"),
        (pa.array([b"a"]), "bytes"),
        (np.array([1, b"a"], dtype=object), "bytes"),
        (np.array([(1, 2.0)], dtype=[("a", int), ("b", float)]), r"\[\('a'"),
        (pd.cut(pd.Series([1, 2, 3]), 2), "Interval"),
    ],
    ids=str,
)
def test_what_is_neither_text_nor_number_is_refused_everywhere(column: Any, says: str) -> None:
    for use in readers():
        with pytest.raises(TypeError, match=NAMED + says):
            use(column)


@pytest.mark.parametrize(
    "column",
    [
        [[1, 2], [3, 4]],
        [[1], [2, 3]],
        pd.Series([[1], [2, 3]]),
        [(1,), (2,)],
        pd.Series([np.zeros(2), np.zeros(2)]),
        [torch.zeros(2)],
        pd.Series([{"a": 1}]),
        np.zeros((2, 1)),
        torch.zeros(2, 1),
        pa.array([[1], [2, 3]]),
        pl.Series([[1], [2, 3]]),
        pl.Series([{"a": 1}]),
        np.array(3),
        3,
        "text",
        b"text",
        {1, 2},
        {"a": 1},
        None,
        (cell for cell in (1, 2)),
    ],
    ids=lambda column: type(column).__name__,
)
def test_a_column_that_has_no_value_for_each_row_is_refused_everywhere(column: Any) -> None:
    for use in readers(Numeric("x")):
        with pytest.raises(ValueError, match=NAMED + r"expected one value per row, \(B,\), got"):
            use(column)


@pytest.mark.parametrize(
    ("column", "error", "says"),
    [
        (torch.zeros(2, requires_grad=True), TypeError, r"requires a gradient.*detach\(\)"),
        (torch.zeros(2, device="meta"), TypeError, "expected values that NumPy can hold, got Tensor"),
        (torch.eye(2)[0].to_sparse(), TypeError, "expected values that NumPy can hold, got Tensor"),
        (pl.Series([1, None], dtype=pl.Int128), TypeError, "expected values that NumPy can hold, got Series"),
        ([10**400, 1], ValueError, "within float64"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(column: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=NAMED + says):
        Numeric("x").encode(column)


MIXED: list[Any] = [
    [1, "2", "3"],
    np.array([1, "2", "3"], dtype=object),
    pd.Series([1, "2", None]),
    np.array([None, 1.5, "3"], dtype=object),
]


@pytest.mark.parametrize("column", MIXED, ids=str)
def test_every_value_is_looked_at_and_not_the_first_alone(column: Any) -> None:
    uses = readers(ints=(1, 7), texts=("2", "3"))
    uses.append(lambda column: columns_from({"x": column}, categorical=["x"], min_count=9))
    for use in uses:
        with pytest.raises(TypeError, match=NAMED + "(text|numbers|str)"):
            use(column)


@pytest.mark.parametrize("text", [["0", "1"], np.array(["0", "1"]), pd.Series(["0", "1"], dtype="category")])
def test_text_of_digits_is_no_label(text: Any) -> None:
    with pytest.raises(TypeError, match=r"labels\['y'\]: expected numbers .*, got text"):
        label_values("labels['y']", text)


def test_labels_beyond_float32_are_infinite_without_a_warning() -> None:
    assert label_values("y", [1e300]).tolist() == [math.inf]


@pytest.mark.parametrize(
    ("table", "error", "says"),
    [
        (torch.zeros(2, 3), TypeError, "expected a table, columns by name .*, got Tensor"),
        (np.zeros((2, 3)), TypeError, "expected a table, .*, got ndarray"),
        ([{"x": 1}], TypeError, "expected a table, .*, got list"),
        ("x", TypeError, "expected a table, .*, got str"),
        ({"x"}, TypeError, "expected a table, .*, got set"),
        (None, TypeError, "expected a table, .*, got NoneType"),
        (pl.DataFrame({"x": [1]}).lazy(), TypeError, r"got LazyFrame, which has no values yet; call collect\(\)"),
        (pa.table([[1], [2]], names=["x", "x"]), ValueError, "expected to read one column 'x'"),
        (pd.DataFrame([[1, 2]], columns=["x", "x"]), ValueError, r"column 'x': .*got shape \(1, 2\)"),
        (pd.Series({"x": 1}), ValueError, "column 'x': .*one value per row.*for one row a list of one value"),
    ],
)
def test_what_is_no_table_is_refused(table: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        encode(table, [Numeric("x")])


def test_a_frame_whose_columns_have_names_of_attributes_is_a_table() -> None:
    frame = pd.DataFrame({"column_names": [1.0, 2.0], "collect": [3.0, 4.0]})
    assert encode(frame, [Numeric("collect"), Numeric("column_names")]).numbers.tolist() == [[3, 1], [4, 2]]

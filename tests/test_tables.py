"""Tables and columns of every library: one column has one meaning."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

from ple_fast.losses import TaskLoss
from ple_fast.model import Categorical, Hashed, MultiTaskModel, Numeric, columns_from, encode
from ple_fast_encoder.tables import column_of, label_values

NAN = math.nan


# One column each: 3, 1, a missing value, 3.
INTS: dict[str, Any] = {
    "list": [3, 1, None, 3],
    "list with NaN": [3, 1, NAN, 3],
    "list of NumPy's": [np.int8(3), np.int64(1), None, np.uint8(3)],
    "list of tensors": [torch.tensor(3), torch.tensor(1), None, torch.tensor(3)],
    "list with a masked one": [3, 1, np.ma.masked, 3],
    "tuple": (3, 1, None, 3),
    "objects": np.array([3, 1, None, 3], dtype=object),
    "objects with pandas.NA": np.array([3, 1, pd.NA, 3], dtype=object),
    "floats": np.array([3, 1, NAN, 3]),
    "float16": np.array([3, 1, NAN, 3], dtype=np.float16),
    "masked": np.ma.array([3, 1, 1, 3], mask=[False, False, True, False]),
    "masked objects": np.ma.array([3, 1, "x", 3], mask=[False, False, True, False], dtype=object),
    "tensor": torch.tensor([3, 1, NAN, 3]),
    "bfloat16": torch.tensor([3, 1, NAN, 3], dtype=torch.bfloat16),
    "series": pd.Series([3, 1, None, 3]),
    "index": pd.Index([3, 1, None, 3]),
    "Int64": pd.Series([3, 1, None, 3], dtype="Int64"),
    "bare Int64": pd.array([3, 1, None, 3], dtype="Int64"),
    "UInt8": pd.Series([3, 1, None, 3], dtype="UInt8"),
    "Float64": pd.Series([3, 1, None, 3], dtype="Float64"),
    "pandas of arrow": pd.Series([3, 1, None, 3], dtype="int8[pyarrow]"),
    "series of objects": pd.Series([3, 1, None, 3], dtype=object),
    "category of floats": pd.Series([3, 1, None, 3]).astype("category"),
    "category of Int64": pd.Series([3, 1, None, 3], dtype="Int64").astype("category"),
    "arrow": pa.array([3, 1, None, 3]),
    "arrow uint8": pa.array([3, 1, None, 3], pa.uint8()),
    "arrow floats": pa.array([3.0, 1.0, None, 3.0]),
    "arrow chunks": pa.chunked_array([pa.array([3]), pa.array([1, None, 3])]),
    "arrow dictionary": pa.array([3, 1, None, 3]).dictionary_encode(),
    "arrow dictionary in chunks": pa.chunked_array([pa.array([3, 1, None, 3]).dictionary_encode()]),
    "polars": pl.Series([3, 1, None, 3]),
    "polars uint8": pl.Series([3, 1, None, 3], dtype=pl.UInt8),
    "polars floats": pl.Series([3.0, 1.0, None, 3.0]),
}


# One column each: "b", a missing value, "a", "z".
TEXT: dict[str, Any] = {
    "list": ["b", None, "a", "z"],
    "list with NaN": ["b", NAN, "a", "z"],
    "objects": np.array(["b", None, "a", "z"], dtype=object),
    "objects with NaN": np.array(["b", NAN, "a", "z"], dtype=object),
    "masked": np.ma.array(["b", "a", "a", "z"], mask=[False, True, False, False]),
    "series": pd.Series(["b", None, "a", "z"]),
    "series of objects": pd.Series(["b", None, "a", "z"], dtype=object),
    "string": pd.Series(["b", None, "a", "z"], dtype="string"),
    "string of arrow": pd.Series(["b", None, "a", "z"], dtype="string[pyarrow]"),
    "category": pd.Series(["b", None, "a", "z"], dtype="category"),
    "bare category": pd.Categorical(["b", None, "a", "z"]),
    "arrow": pa.array(["b", None, "a", "z"]),
    "arrow large": pa.array(["b", None, "a", "z"], pa.large_string()),
    "arrow dictionary": pa.array(["b", None, "a", "z"]).dictionary_encode(),
    "arrow dictionaries in chunks": pa.chunked_array(
        [pa.array(["b", None]).dictionary_encode(), pa.array(["a", "z"]).dictionary_encode()]
    ),
    "polars": pl.Series(["b", None, "a", "z"]),
    "polars categorical": pl.Series(["b", None, "a", "z"], dtype=pl.Categorical),
    "polars enum": pl.Series(["b", None, "a", "z"], dtype=pl.Enum(["a", "b", "z"])),
}


# One column each: true, a missing value, false.
BOOLS: dict[str, Any] = {
    "list": [True, None, False],
    "list of NumPy's": [np.True_, None, np.False_],
    "objects with pandas.NA": np.array([True, pd.NA, False], dtype=object),
    "masked": np.ma.array([True, True, False], mask=[False, True, False]),
    "boolean": pd.Series([True, None, False], dtype="boolean"),
    "series of objects": pd.Series([True, pd.NA, False], dtype=object),
    "bool of arrow": pd.Series([True, None, False], dtype="bool[pyarrow]"),
    "arrow": pa.array([True, None, False]),
    "polars": pl.Series([True, None, False]),
    "floats": np.array([1.0, NAN, 0.0]),
    "decimals": [Decimal(1), None, Decimal(0)],
    "decimals that are none": [Decimal(1), Decimal("NaN"), Fraction(0)],
}


@pytest.mark.parametrize("column", INTS.values(), ids=INTS)
def test_ints_with_missing_ones_mean_the_same_in_every_library(column: Any) -> None:
    (fitted,) = columns_from({"x": column}, categorical=["x"])
    assert isinstance(fitted, Categorical)
    assert fitted.values == (1, 3)
    assert {type(value) for value in fitted.values} == {int}
    assert fitted.encode(column).tolist() == [2, 1, 0, 2]
    assert Categorical("x", size=4).encode(column).tolist() == [4, 2, 0, 4]
    three, one = Hashed("x", 1000).encode([3, 1]).tolist()
    assert Hashed("x", 1000).encode(column).tolist() == [three, one, 0, three]
    assert Numeric("x", missing="indicator").encode(column).tolist() == [[3, 0], [1, 0], [0, 1], [3, 0]]
    assert np.array_equal(label_values("y", column), [3, 1, NAN, 3], equal_nan=True)


@pytest.mark.parametrize("column", TEXT.values(), ids=TEXT)
def test_text_with_missing_values_means_the_same_in_every_library(column: Any) -> None:
    (fitted,) = columns_from({"x": column}, categorical=["x"])
    assert isinstance(fitted, Categorical)
    assert fitted.values == ("a", "b", "z")
    assert {type(value) for value in fitted.values} == {str}
    assert fitted.encode(column).tolist() == [2, 0, 1, 3]
    assert Categorical("x", values=("a", "b")).encode(column).tolist() == [2, 0, 1, 0]
    hashed = Hashed("x", 1000)
    assert hashed.encode(column).tolist() == hashed.encode(["b", None, "a", "z"]).tolist()


@pytest.mark.parametrize("column", BOOLS.values(), ids=BOOLS)
def test_labels_that_may_be_missing_mean_the_same_in_every_library(column: Any) -> None:
    labels = label_values("labels['y']", column)
    assert labels.dtype == np.float32
    assert np.array_equal(labels, [1, NAN, 0], equal_nan=True)


IDS = ("list", "objects with pandas.NA", "floats", "masked", "series", "Int64", "pandas of arrow", "arrow", "polars")


def test_integer_ids_with_missing_ones_train_and_predict_the_same_model() -> None:
    """Whichever way a missing id came about, a float beside NaN or a null beside ints."""
    results = []
    for name in IDS:
        data = {"a": INTS[name], "b": INTS[name], "c": INTS[name]}
        columns = columns_from(data, categorical=["a", "b"], buckets={"b": 9}, width=2)
        torch.manual_seed(0)
        net = MultiTaskModel(
            [*columns, Categorical("c", size=4, width=2)],
            [TaskLoss("y")],
            trunk="hard_sharing",
            trunk_options={"expert_units": 4},
            tower_units=(),
        )
        loss = net.fit(data, {"y": [0, 1, 1, 0]})[0].loss
        results.append((loss, net.predict(data)["y"].tolist()))
    assert len(results) == len(IDS)
    assert all(result == results[0] for result in results)


def test_bools_are_ints() -> None:
    (fitted,) = columns_from({"x": BOOLS["boolean"]}, categorical=["x"])
    assert fitted == Categorical("x", values=(0, 1))
    assert fitted == Categorical("x", values=np.unique([False, True]))  # type: ignore[arg-type]  # what users pass
    assert fitted.encode(BOOLS["polars"]).tolist() == [2, 0, 1]
    assert fitted.encode(np.array([True, False])).tolist() == [2, 1]


LARGE = 2**60


@pytest.mark.parametrize(
    "column",
    [
        [LARGE + 1, None, LARGE],
        [LARGE + 1, NAN, LARGE],
        pd.Series([LARGE + 1, None, LARGE], dtype="Int64"),
        pd.Series([LARGE + 1, None, LARGE], dtype="int64[pyarrow]"),
        pa.array([LARGE + 1, None, LARGE]),
        pa.chunked_array([[LARGE + 1], [None, LARGE]]),
        pl.Series([LARGE + 1, None, LARGE]),
        np.ma.array([LARGE + 1, 0, LARGE], mask=[False, True, False]),
    ],
    ids=["list", "list with NaN", "Int64", "int64 of arrow", "arrow", "arrow chunks", "polars", "masked"],
)
def test_large_ids_beside_missing_ones_stay_apart(column: Any) -> None:
    (fitted,) = columns_from({"x": column}, categorical=["x"])
    assert fitted == Categorical("x", values=(LARGE, LARGE + 1))
    assert fitted.encode(column).tolist() == [2, 0, 1]


def test_ints_of_both_signs_beyond_int64_stay_apart() -> None:
    column = [2**63 + 1, 2**63, -1]
    (fitted,) = columns_from({"x": column}, categorical=["x"])
    assert fitted == Categorical("x", values=(-1, 2**63, 2**63 + 1))
    assert fitted.encode(column).tolist() == [3, 2, 1]
    assert fitted.encode(np.array([2**63 + 1, 2**63], dtype=np.uint64)).tolist() == [3, 2]


FRAME = {"c": ["x", "y", "x"], "n": [1.0, 2.0, 6.0], "k": [2, 0, 7]}


TABLES: dict[str, Any] = {
    "mapping": {name: np.array(values) for name, values in FRAME.items()},
    "pandas": pd.DataFrame(FRAME),
    "polars": pl.DataFrame(FRAME),
    "arrow": pa.table(FRAME),
    "record batch": pa.RecordBatch.from_pydict(FRAME),
    "structured array": pd.DataFrame(FRAME).to_records(index=False),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_kind_of_table_is_read(table: Any) -> None:
    columns = columns_from(table, categorical=["c", "k"], numeric=["n"])
    assert columns == columns_from(FRAME, categorical=["c", "k"], numeric=["n"])
    rows = encode(table, columns)
    assert rows.codes.tolist() == [[1, 2], [2, 1], [1, 3]]
    assert torch.allclose(rows.numbers.std(correction=0), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"data: expected a column 'm', got \['c', 'n', 'k'\]"):
        column_of(table, "m")


@pytest.mark.parametrize("table", ["pandas", "polars", "arrow"])
def test_a_model_trains_on_tables_of_data_and_of_labels(table: str) -> None:
    make: Callable[[Any], Any] = {"pandas": pd.DataFrame, "polars": pl.DataFrame, "arrow": pa.table}[table]
    data, labels = make(FRAME), make({"buy": [True, None, False], "price": [1.0, 2.0, None]})
    columns = columns_from(data, categorical=["c"], numeric=["n"])
    tasks = [TaskLoss("buy"), TaskLoss("price", "regression")]
    results = []
    for each, own in ((data, labels), (FRAME, {"buy": [1.0, NAN, 0.0], "price": [1.0, 2.0, NAN]})):
        torch.manual_seed(0)
        model = MultiTaskModel(columns, tasks, trunk="hard_sharing", trunk_options={"expert_units": 4}, tower_units=())
        results.append((model.fit(each, own)[0].loss, model.predict(each)["buy"].tolist()))
    assert results[0] == results[1]

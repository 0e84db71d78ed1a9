"""A handful of rows, which are encoded cell by cell: the same bits, errors and warnings as column by column."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ple_fast_encoder import Categorical, Column, Encoder, Hashed, Numeric
from ple_fast_encoder.few_rows import FEW

COLUMNS: tuple[Column, ...] = (
    Categorical("text", values=("a", "b", "")),
    Categorical("ints", values=(3, 7, -1, 2**60)),
    Categorical("none", values=()),
    Categorical("size", size=9),
    Hashed("id", buckets=1000),
    Categorical("text too", share="text"),
    Categorical("id too", share="id"),
    Categorical("tags", values=("a", "b"), pooling="mean", max_length=2, padding="a"),
    Categorical("history", share="size", pooling="sum", max_length=3, keep="first", padding=0),
    Categorical("seen", share="id", pooling="max", max_length=2),
    Hashed("hashes", buckets=7, pooling="sum", max_length=3, padding=1),
    Numeric("plain", mean=2.5, std=3.1),
    Categorical("late", values=("a", "b", "c")),
    Numeric("log", transform="log1p", mean=0.3, std=0.7),
    Numeric("mean", missing="mean", mean=1e30, std=1e-9),
    Numeric("indicator", transform="log1p", missing="indicator", mean=-1.0, std=2.0),
    Numeric("amount", missing="indicator", width=3),
)
TEXTS = ["a", "b", "", "z", "12", "-7", "007", "\ud800", "é"]
USUAL = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(TEXTS),
    st.integers(-3, 12),
    st.sampled_from([2**31, 2**53 + 1, 2**60, 2**63 - 1, 2**63, -(2**63), 2**64 + 5, 10**400]),
    st.floats(width=64),
    st.sampled_from([3.0, 7.0, -0.0, 0.5, 2.0**70]),
)
ODD = st.sampled_from(
    [
        np.int64(3),
        np.float32(7),
        np.str_("a"),
        np.bool_(True),
        Decimal(3),
        b"a",
        [1],
        pd.NA,
        pd.NaT,
        np.datetime64(3, "s"),
    ]
)
KINDS: dict[str, Any] = {
    "text": st.sampled_from([*TEXTS, None]),
    "number": st.one_of(st.integers(-3, 12), st.floats(-1e3, 1e3), st.none(), st.booleans()),
    "usual": USUAL,
    "any": st.one_of(USUAL, ODD),
}
DEFAULTS = {column.name: 3 for column in COLUMNS} | {"text": "a", "late": "c", "text too": "b", "none": None}
LISTS = ("tags", "history", "seen", "hashes")


def outcome(call: Callable[[], Any]) -> Any:
    """Bytes of the arrays and what is unknown, or the error."""
    with np.errstate(all="raise", over="ignore"):
        try:
            codes, numbers, unknown = call()
        except Exception as error:
            return type(error).__name__, str(error)
    return codes.dtype, codes.shape, codes.tobytes(), numbers.dtype, numbers.shape, numbers.tobytes(), unknown


def agree(columns: tuple[Column, ...], table: dict[str, Any]) -> None:
    encoder = Encoder(columns)
    raws = [table[column.name] for column in columns]

    def few() -> Any:
        found = encoder._few.encode(raws, encoder._encode_one)
        return encoder._encode(raws) if found is None else found

    assert outcome(few) == outcome(lambda: encoder._encode(raws))


def cells(rows: int, several: bool) -> st.SearchStrategy[list[Any]]:
    def column(cell: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
        if several:
            row = st.lists(cell, max_size=5)
            cell = st.one_of(row, row.map(tuple), st.none(), cell)
        return st.lists(cell, min_size=rows, max_size=rows)

    return st.sampled_from(sorted(KINDS)).flatmap(lambda kind: column(KINDS[kind]))


@settings(max_examples=300)
@given(st.data())
def test_each_kind_of_column_is_encoded_alike_cell_by_cell(data: st.DataObject) -> None:
    column = data.draw(st.sampled_from(COLUMNS))
    rows = data.draw(st.integers(1, 4))
    owner = [each for each in COLUMNS if isinstance(column, Categorical) and each.name == column.share]
    table = {column.name: data.draw(cells(rows, column.name in LISTS))}
    table |= {each.name: [DEFAULTS[each.name]] * rows for each in owner}
    agree((*owner, column), table)


FORMS: dict[str, Callable[[list[Any]], Any]] = {
    "objects": lambda cells: np.fromiter(cells, dtype=object, count=len(cells)),
    "array": np.array,
    "series": pd.Series,
    "objects in a series": lambda cells: pd.Series(cells, dtype=object),
    "categories": lambda cells: pd.Series(cells).astype("category"),
    "unused categories": lambda cells: pd.Series([*cells, "a", 3]).astype("category")[: len(cells)],
    "inferred": lambda cells: pd.Series(cells).convert_dtypes(),
}


@settings(max_examples=400)
@given(st.data())
def test_each_kind_of_column_of_numpy_and_pandas_is_encoded_alike(data: st.DataObject) -> None:
    column = data.draw(st.sampled_from([column for column in COLUMNS if getattr(column, "share", None) is None]))
    rows = data.draw(st.integers(1, 4))
    cell = KINDS[data.draw(st.sampled_from(["text", "number", "usual"]))]
    cells = data.draw(st.lists(cell, min_size=rows, max_size=rows))
    try:
        raw = FORMS[data.draw(st.sampled_from(sorted(FORMS)))](cells)
    except Exception:  # what NumPy and pandas have no column for
        return
    agree((column,), {column.name: raw})


@settings(max_examples=100)
@given(st.data())
def test_a_table_of_all_columns_is_encoded_alike(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 5))
    table: dict[str, Any] = {
        column.name: [[DEFAULTS[column.name]] if column.name in LISTS else DEFAULTS[column.name]] * rows
        for column in COLUMNS
    } | {"tags": [["b"]] * rows}
    for name in data.draw(st.lists(st.sampled_from(sorted(table)), max_size=2, unique=True)):
        table[name] = data.draw(cells(data.draw(st.sampled_from([rows, rows, rows, rows + 1])), name in LISTS))
    agree(COLUMNS, table)


def full(rows: int, seed: int = 0) -> dict[str, list[Any]]:
    rng = np.random.default_rng(seed)

    def lists(values: list[Any]) -> list[Any]:
        return [[values[i] for i in rng.integers(0, len(values), rng.integers(0, 5))] for _ in range(rows)]

    texts, ints = ["a", "b", "z", None], [3, 7, 8, None]
    return {
        **{name: [texts[i] for i in rng.integers(0, 4, rows)] for name in ("text", "text too", "none", "late")},
        **{name: [ints[i] for i in rng.integers(0, 4, rows)] for name in ("ints", "size", "id", "id too")},
        "tags": lists(["a", "b", None]),
        **{name: lists([0, 1, 5, 50]) for name in ("history", "seen", "hashes")},
        **{name: (rng.exponential(9.0, rows) - 2).tolist() for name in ("plain", "log", "indicator", "amount")},
        "mean": [None] * rows,
    }


@pytest.mark.parametrize("rows", [1, 2, 3, 7, FEW, FEW + 1])
@pytest.mark.filterwarnings("ignore:column .*expected values")
def test_rows_are_the_table_and_each_row_is_alone(rows: int) -> None:
    table, encoder = full(rows), Encoder(COLUMNS)
    requests = [{name: column[row] for name, column in table.items()} | {"other": object()} for row in range(rows)]
    whole = encoder._encode([table[column.name] for column in COLUMNS])
    for found in (encoder.encode(table), encoder.rows(requests), encoder.rows(tuple(requests))):
        assert [part.tobytes() for part in found] == [part.tobytes() for part in whole[:2]]
        assert found[0].shape == (rows, encoder.num_codes) and found[0].flags.c_contiguous
        assert found[1].shape == (rows, encoder.num_numbers) and found[1].flags.c_contiguous
    alone = [encoder.rows([request]) for request in requests]
    assert np.concatenate([codes for codes, _ in alone]).tobytes() == whole[0].tobytes()
    assert np.concatenate([numbers for _, numbers in alone]).tobytes() == whole[1].tobytes()


@pytest.mark.parametrize(
    "form",
    [
        lambda column: np.array(column, dtype=object),
        pd.Series,
        lambda column: pd.Series(column, dtype="category"),
        lambda column: torch.tensor(column) if isinstance(column[0], int | float) else column,
        lambda column: np.array(column),
        lambda column: np.array(column, dtype=np.float32) if isinstance(column[0], float) else column,
    ],
    ids=["objects", "series", "categories", "tensors", "arrays", "float32"],
)
def test_columns_of_every_library_are_encoded_alike_in_few_rows(form: Callable[[Any], Any]) -> None:
    names = ("text", "ints", "size", "id", "plain", "log", "indicator")
    columns = tuple(column for column in COLUMNS if column.name in names)
    table = {"text": ["a", "z"], "ints": [7, 8], "size": [3, 0], "id": [10**12, 5]}
    table |= {"plain": [0.1, -7.5], "log": [1e-9, 1e9], "indicator": [3.3, 0.0]}
    agree(columns, {name: form(column) for name, column in table.items()})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"plain": None}, "column 'plain': expected numbers, got 1 of 1 missing"),
        ({"plain": float("inf")}, "column 'plain': expected finite numbers"),
        ({"mean": 1e300}, "column 'mean': expected numbers within float32"),
        ({"text": 3}, "column 'text': its vocabulary holds strings, got numbers"),
        ({"size": "3"}, "column 'size': its vocabulary holds ints, got text"),
        ({"id": 1.5 + 2j}, "column 'id': expected text or ints as ids, got complex"),
        ({"tags": "a|b"}, "column 'tags': expected a list of values per row"),
        ({"text": ["a"]}, "column 'text': expected one value per row"),
    ],
)
def test_a_row_is_refused_as_a_table_is(change: dict[str, Any], says: str) -> None:
    row = {name: column[0] for name, column in full(1).items()}
    with pytest.raises((TypeError, ValueError), match=f"^{says}"):
        Encoder(COLUMNS).rows([row | change])


def test_what_is_no_list_of_rows_is_refused() -> None:
    encoder = Encoder((Numeric("x"), Numeric("y")))
    with pytest.raises(TypeError, match=r"^rows: expected a list of mappings by column, got dict; write \[row\]"):
        encoder.rows({"x": 1.0, "y": 2.0})  # type: ignore[arg-type]  # the mistake under test
    with pytest.raises(ValueError, match=r"^rows\[1\]: expected a value of 'y', got \['x'\]; write None"):
        encoder.rows([{"x": 1.0, "y": 2.0}, {"x": 1.0}])
    with pytest.raises(TypeError, match=r"^rows\[0\]: expected a mapping by column, got 3"):
        encoder.rows([3])  # type: ignore[list-item]  # the mistake under test
    codes, numbers = encoder.rows([])
    assert codes.shape == (0, 0) and numbers.shape == (0, 2)


def test_two_rows_of_unknown_values_are_warned_of_as_many_are() -> None:
    encoder = Encoder((Categorical("text", values=("a",)), Hashed("tags", 9, pooling="sum", max_length=1)))
    with pytest.warns(UserWarning, match=r"^column 'text': expected values that it knows, such as 'a'.*'z'") as caught:
        encoder.rows([{"text": "z", "tags": [1]}, {"text": "y", "tags": []}])
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(UserWarning, match="^column 'tags': expected values, got none"):
        encoder.rows([{"text": "a", "tags": None}] * 2)


@settings(max_examples=200)
@example([0.0, -0.0, 1e-300, 1e300])
@given(st.lists(st.floats(-1e18, 1e18), min_size=1, max_size=8))
def test_logarithms_of_one_number_and_of_many_are_the_same(values: list[float]) -> None:
    """So that a column, a row of several columns and a column of several rows agree to the last bit."""
    columns = tuple(Numeric(f"n{place}", transform="log1p", std=0.37) for place in range(len(values)))
    row = Encoder(columns).rows([{f"n{place}": value for place, value in enumerate(values)}])[1]
    column = Numeric("n", transform="log1p", std=0.37).encode(np.repeat(values, 3))[::3]
    assert row.tobytes() == column.tobytes()

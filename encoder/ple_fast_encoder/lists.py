"""Columns of lists, whichever library keeps them: all values one after the other, and how many of them each row has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from .scalars import is_sequence, shown
from .tables import Array, Cells, Value, cells_of, is_missing, is_several, is_tensor, kinds_of


class Lists(NamedTuple):
    """A column of lists, without the places that hold no value."""

    cells: Cells
    """All values, row by row; none is missing."""
    lengths: Array
    """int64 ``(B,)``: how many values each row has."""


def lists_of(where: str, column: Any, paddings: Sequence[Value] = ()) -> Lists:
    """A column of lists, tuples or arrays, of pyarrow's or polars' lists, or an array ``(B, L)``.

    A row that is missing has no value. What is missing inside of a row (None, NaN, ``pandas.NA``, nulls, what a mask
    hides) and what is equal to one of ``paddings`` is left out.

    Raises:
        TypeError: it cannot be read; a row is no list, or a set, whose order is another one in each process.
        ValueError: it has more than two axes, or a list holds lists.
    """
    flat, lengths = _flat(where, column)
    try:
        cells = cells_of(where, flat)
    except ValueError as error:
        raise ValueError(
            f"{where}: expected a list of single values per row, got lists of several axes; flatten them"
        ) from error
    if cells.values.dtype.kind == "O":
        several = sorted(t.__name__ for t in set(map(type, cells.values.tolist())) if is_several(t))
        if several:
            raise ValueError(
                f"{where}: expected a list of single values per row, got lists of {', '.join(several)}; flatten them"
            )
    gone = _absent(cells, paddings)
    if not gone.any():
        return Lists(cells, lengths)
    rows = np.repeat(np.arange(len(lengths)), lengths)[~gone]
    return Lists(cells.only(~gone), np.bincount(rows, minlength=len(lengths)).astype(np.int64))


def _absent(cells: Cells, paddings: Sequence[Value]) -> Array:
    """bool ``(N,)``: which places hold no value."""
    values = cells.values
    kind = values.dtype.kind
    if kind == "O":
        found = (is_missing(value) or any(bool(value == padding) for padding in paddings) for value in values.tolist())
        gone = np.fromiter(found, dtype=bool, count=len(values))
    else:
        gone = np.isnan(values) if kind == "f" else np.zeros(len(values), dtype=bool)
        for padding in paddings:
            if kind in ("UT" if isinstance(padding, str) else "iufb"):
                gone |= values == padding
    return cells.by_row(gone, True)


def _flat(where: str, column: Any) -> tuple[Any, Array]:
    """All values, as a column of any library, and the lengths of the rows."""
    if is_tensor(column) and column.is_nested:
        column = column.unbind()
    if (isinstance(column, np.ndarray) or is_tensor(column)) and column.ndim == 2:
        rows, width = column.shape
        return column.reshape(-1), np.full(rows, width, dtype=np.int64)
    try:
        for read in (_of_arrow, _of_polars):
            if (found := read(column)) is not None:
                return found
    except Exception as error:  # of any library
        raise TypeError(f"{where}: expected lists that can be read, got {type(column).__name__} ({error})") from error
    return _of_rows([row if _is_list(row) else _no_list(where, row) for row in _rows(where, column)])


def _of_arrow(column: Any) -> tuple[Any, Array] | None:
    """Of a column of pyarrow's lists, also inside pandas; None of any other."""
    source = getattr(column, "array", column)
    if hasattr(getattr(source, "dtype", None), "pyarrow_dtype"):
        column = source.__arrow_array__()
    if not hasattr(column, "is_null") or "list" not in str(getattr(column, "type", "")).partition("<")[0]:
        return None
    import pyarrow.compute as pc  # where such a column is, pyarrow is

    lengths = pc.fill_null(pc.list_value_length(column), 0)
    return pc.list_flatten(column), np.asarray(lengths).astype(np.int64)


def _of_polars(column: Any) -> tuple[Any, Array] | None:
    """Of a column of polars' lists or arrays; None of any other."""
    dtype = getattr(column, "dtype", None)
    if not hasattr(dtype, "inner") or not hasattr(column, "explode"):
        return None
    if type(dtype).__name__ == "Array":
        column = column.arr.to_list()
    lengths = column.list.len().fill_null(0)
    return column.filter(lengths > 0).explode(), np.asarray(lengths).astype(np.int64)


def _rows(where: str, column: Any) -> list[Any]:
    """The cells of a column of objects."""
    if isinstance(column, Sequence) and not isinstance(column, (str, bytes)):
        return list(column)
    if isinstance(column, np.ma.MaskedArray) and column.ndim == 1:
        hidden = np.ma.getmaskarray(column).tolist()
        return [None if gone else row for gone, row in zip(hidden, np.asarray(column.data).tolist(), strict=True)]
    try:
        values = np.asarray(column.cpu() if is_tensor(column) else column)
    except Exception as error:  # of any library
        raise TypeError(f"{where}: expected lists, got {type(column).__name__} ({error})") from error
    if values.ndim != 1:
        got = f"shape {values.shape}" if values.ndim else type(column).__name__
        raise ValueError(f"{where}: expected a list of values per row, or an array (B, L), got {got}")
    if values.dtype.kind != "O" and not kinds_of(where, values):  # no row, or NaN alone
        return [None] * len(values)
    cells: list[Any] = values.tolist()
    return cells


def _is_list(row: Any) -> bool:
    return isinstance(row, (list, tuple)) or is_sequence(row)


def _no_list(where: str, row: Any) -> tuple[()]:
    """Of a row that is no list: no values, where it is missing."""
    if row is np.ma.masked or (not is_several(type(row)) and is_missing(row)):
        return ()
    mend = "write [value] for one of them"
    if isinstance(row, (str, bytes)):
        mend = "split it, as with column.str.split('|')"
    elif isinstance(row, (set, frozenset)):
        mend = "sort it, because a set has another order in each process"
    raise TypeError(f"{where}: expected a list of values per row, got {shown(row)} ({type(row).__name__}); {mend}")


def _of_rows(rows: list[Any]) -> tuple[Any, Array]:
    """Of lists, tuples and arrays."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    filled = [row for row in rows if len(row)]
    are_arrays = all(type(row) is np.ndarray and row.ndim == 1 and row.dtype.kind != "O" for row in filled)
    # Of one dtype: joined ones would be rounded, or text. Texts of several lengths have several.
    if are_arrays and len({"U" if row.dtype.kind == "U" else row.dtype for row in filled}) == 1:
        return np.concatenate(filled), lengths
    flat = list(chain.from_iterable(row if isinstance(row, (list, tuple)) else _listed(row) for row in filled))
    if set(map(type, flat)) == {int}:
        try:
            return np.array(flat, dtype=np.int64), lengths
        except OverflowError:
            pass
    return flat, lengths


def _listed(row: Any) -> list[Any]:
    """The values of an array, as Python's own."""
    values: list[Any] = list(row) if isinstance(row, Sequence) else row.tolist()
    return values

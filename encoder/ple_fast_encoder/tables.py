"""What a table is, and what its columns hold: cells as NumPy has them, whichever library keeps them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any, NamedTuple, Protocol

import numpy as np

from .scalars import as_tuple, is_sequence, own_scalar

Array = np.ndarray[Any, Any]
Value = str | int
"""Of a category or an id."""
MAX_SIZE = 2**31 - 1
"""Of a vocabulary: codes are int32."""
SEVERAL = (list, tuple, dict, set, frozenset, np.ndarray)
"""Types of several values; :func:`is_several` knows tensors too."""


class Table(Protocol):
    """Columns by name: a mapping of arrays, a data frame of pandas or polars, or a table of pyarrow."""

    def __getitem__(self, key: str, /) -> Any: ...


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor of PyTorch, which is asked only if somebody else has loaded it."""
    return _is_tensor_type(type(value))


def is_several(t: type) -> bool:
    """Whether values of a type are several in one."""
    return issubclass(t, SEVERAL) or _is_tensor_type(t)


def _is_tensor_type(t: type) -> bool:
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    return tensor is not None and issubclass(t, tensor)


def column_of(data: Table, name: str, what: str = "data") -> Any:
    """One column.

    Raises:
        TypeError: ``data`` is no table.
        ValueError: there is no such column, or two.
    """
    return _column(data, _names(data, what), name, what)


def columns_named(data: Table, names: Iterable[str]) -> list[Any]:
    """Several columns. TypeError, ValueError: as :func:`column_of`."""
    there = _names(data, "data")
    return [_column(data, there, name, "data") for name in names]


def _column(data: Table, names: Any, name: str, what: str) -> Any:
    if name not in names:
        there = f", got {list(names)[:60]}" if isinstance(names, Iterable) else ""
        raise ValueError(f"{what}: expected a column {name!r}{there}")
    try:
        return data[name]
    except Exception as error:  # of any library
        raise ValueError(f"{what}: expected to read one column {name!r}, got {error}") from error


def _names(data: Any, what: str) -> Any:
    """Where a name of a column is looked up."""
    if isinstance(data, Mapping):
        return data
    if callable(getattr(data, "collect", None)):
        raise TypeError(f"{what}: expected a table, got {type(data).__name__}, which has no values yet; call collect()")
    for attribute in ("column_names", "columns"):  # pyarrow, polars: their tables are iterated by column
        names = getattr(data, attribute, None)
        if isinstance(names, list):
            return names
    if isinstance(data, np.ndarray) and data.dtype.names:
        return data.dtype.names
    is_other = isinstance(data, (Sequence, np.ndarray, set, frozenset)) or is_tensor(data)
    if is_other or not (hasattr(data, "__contains__") and hasattr(data, "__getitem__")):
        raise TypeError(
            f"{what}: expected a table, columns by name (a mapping of arrays, a data frame), got {type(data).__name__}"
        )
    return data


def listed(what: str, values: Any) -> tuple[Any, ...]:
    """Names or values that a user lists, Python's own, in a fixed order.

    Raises:
        TypeError: one text, which would be read letter by letter; a set, which has another order in each process; or
            nothing that can be listed.
    """
    if isinstance(values, (str, bytes)):
        raise TypeError(f"{what}: expected a list, got the text {values!r}; write [{values!r}]")
    if isinstance(values, (set, frozenset)) or not (is_sequence(values) or isinstance(values, Iterable)):
        mend = "; sort it, because a set has no fixed order" if isinstance(values, (set, frozenset)) else ""
        raise TypeError(f"{what}: expected a list, got {type(values).__name__}{mend}")
    return tuple(map(own_scalar, as_tuple(values) if is_sequence(values) else values))


def check_names(names: Iterable[str]) -> None:
    """ValueError where a column is named twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"columns: expected every name once, got {twice} more than once")


class Cells(NamedTuple):
    """A column as NumPy has it."""

    where: str
    """How errors name it: ``column 'age'``."""
    values: Array
    """``(B,)``, or one for each category. None, NaN, ``pandas.NA`` and ``NaT`` in it are missing."""
    codes: Array | None = None
    """``(B,)``: the category of each row, -1 where it is missing."""
    missing: Array | None = None
    """``(B,)`` bool: rows that are missing whatever stands in ``values``."""

    def by_row(self, of_values: Array, absent: Any) -> Array:
        """``(B,)``: what was found for each value, ``absent`` for rows that are missing."""
        if self.codes is not None:
            of_values = np.append(of_values, of_values.dtype.type(absent))[self.codes]  # -1 takes the last
        return of_values if self.missing is None else np.where(self.missing, of_values.dtype.type(absent), of_values)

    def only(self, kept: Array) -> Cells:
        """The rows for which ``kept (B,)``, bool, is True; of those none may be missing."""
        if self.codes is not None:
            return Cells(self.where, self.values, codes=self.codes[kept])
        return Cells(self.where, self.values[kept])

    def kinds(self) -> set[str]:
        """``"numbers"``, ``"text"``, or the names of what is neither; nothing where all values are missing."""
        return kinds_of(self.where, self.values)

    def numbers(self, expected: str) -> Array:
        """float64 ``(B,)``, NaN where a number is missing.

        Raises:
            TypeError: it holds something else; the message says what was ``expected``.
            ValueError: it holds ints beyond float64, or several values in a row.
        """
        values = self.values
        if values.dtype.kind in "fiub":
            return self.by_row(values.astype(np.float64, copy=False), np.nan)
        kinds = self.kinds()
        if kinds - {"numbers"}:
            raise TypeError(f"{self.where}: expected {expected}, got {', '.join(sorted(kinds))}")
        if values.dtype.kind == "O":
            cells = values.tolist()
            if any(_is_marker(kind) for kind in set(map(type, cells))):
                cells = [None if _is_marker(type(cell)) else cell for cell in cells]
            try:
                floats = np.array(cells, dtype=np.float64)
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{self.where}: expected {expected} within float64, got {error}") from error
        else:
            floats = np.full(len(values), np.nan)
        return self.by_row(floats, np.nan)


def label_values(where: str, column: Any) -> Array:
    """One task's labels, float32 ``(B,)``, NaN where a label is missing.

    Raises:
        TypeError: it holds no numbers.
        ValueError: it is not one-dimensional.
    """
    values = cells_of(where, column).numbers("numbers (0 and 1, values, or classes from 0)")
    with np.errstate(over="ignore"):  # what overflows is infinite, and refused as such
        return values.astype(np.float32)


def kinds_of(where: str, values: Array) -> set[str]:
    """See :meth:`Cells.kinds`.

    Raises:
        ValueError: a value is a list, an array or a mapping.
    """
    kind = values.dtype.kind
    if len(values) == 0:
        return set()
    if kind != "O":
        is_absent = kind == "f" and bool(np.isnan(values).all())
        names = {"b": "numbers", "i": "numbers", "u": "numbers", "f": "numbers", "U": "text", "T": "text", "S": "bytes"}
        return set() if is_absent else {names.get(kind, str(values.dtype))}
    cells = values.tolist()
    types = set(map(type, cells))
    several = sorted(t.__name__ for t in types if is_several(t))
    if several:
        raise ValueError(
            f"{where}: expected one value per row, (B,), got {', '.join(several)}; take one value of each, make a "
            "column of each place, or (ids and categories) give the column pooling="
        )
    floats = {t for t in types if issubclass(t, (float, np.floating))}
    if floats and all(cell != cell for cell in cells if type(cell) in floats):
        types -= floats
    return {_kind(t) for t in types if t is not type(None) and not _is_marker(t)}


def _kind(t: type) -> str:
    if issubclass(t, str):
        return "text"
    # NumPy has time differences among its integers.
    is_number = issubclass(t, (Real, Decimal, np.bool_)) and not issubclass(t, np.timedelta64)
    return "numbers" if is_number else t.__name__


def is_missing(value: Any) -> bool:
    """Whether a cell is None, NaN, ``pandas.NA`` or ``NaT``."""
    if value is None or _is_marker(type(value)):
        return True
    try:
        return bool(value != value)
    except (TypeError, ValueError):  # of several values, or of none that can be compared
        return False


def _is_marker(t: type) -> bool:
    """The types of ``pandas.NA`` and ``pandas.NaT``, told without an import of pandas."""
    return t.__name__ in ("NAType", "NaTType")


def cells_of(where: str, column: Any) -> Cells:
    """A column of any of the libraries.

    Raises:
        TypeError: it cannot be read, or is a tensor that requires a gradient.
        ValueError: it is not one-dimensional.
    """
    if type(column) is np.ndarray and column.ndim == 1:  # at once: serving reads many short columns
        return Cells(where, column)
    for source in (column, getattr(column, "cat", None)):  # pandas: each category is looked at once
        categories, codes = getattr(source, "categories", None), getattr(source, "codes", None)
        if categories is not None and codes is not None:
            return Cells(where, np.asarray(categories), codes=np.asarray(codes))
    if isinstance(column, Sequence) and not isinstance(column, (str, bytes)):
        cells = list(column)
        types = set(map(type, cells))
        if types == {float}:
            return Cells(where, np.array(cells))
        if any(issubclass(t, np.ndarray) or _is_tensor_type(t) for t in types):  # of one number each
            cells = [None if cell is np.ma.masked else own_scalar(cell) for cell in cells]
        # One by one: NumPy would make text of numbers beside text, and round large ints beside NaN.
        return Cells(where, np.fromiter(cells, dtype=object, count=len(cells)))
    values, missing = _values(where, column)
    if values.ndim != 1:
        if values.ndim:
            got = f"shape {values.shape}; ids and categories with several values per row have pooling="
        else:
            got = f"{type(column).__name__}; for one row a list of one value"
        raise ValueError(f"{where}: expected one value per row, (B,), got {got}")
    if missing is not None and missing.all():
        return Cells(where, np.full(len(values), np.nan))
    if missing is not None and values.dtype.kind == "O":
        values = values.copy()
        values[missing] = None
        return Cells(where, values)
    return Cells(where, values, missing=missing)


def _values(where: str, column: Any) -> tuple[Array, Array | None]:
    """The values of a column, and which of them are missing where the values themselves do not say so."""
    if isinstance(column, np.ma.MaskedArray):
        return np.asarray(column.data), np.ma.getmaskarray(column)
    if is_tensor(column) and column.requires_grad:
        raise TypeError(
            f"{where}: expected values, got a tensor that requires a gradient, and none flows into a table; pass "
            "tensor.detach()"
        )
    try:
        if is_tensor(column):
            column = _readable(column)
        if hasattr(getattr(column, "type", None), "index_type"):  # pyarrow: its __array__ misreads missing codes
            column = column.cast(column.type.value_type)
        values = np.asarray(column)
        # NumPy has no missing int, so that these become floats, in which ids above 2^53 fall together.
        if values.dtype.kind in "fO" and values.ndim == 1 and not isinstance(column, np.ndarray):
            return _ints(column) or (values, None)
    except Exception as error:  # of any library
        got = type(column).__name__
        raise TypeError(f"{where}: expected values that NumPy can hold, got {got} ({error})") from error
    return values, None


def _readable(tensor: Any) -> Any:
    """A tensor that NumPy can read, equal to the given one."""
    known = ("torch.float64", "torch.float32", "torch.float16")
    return (tensor.float() if tensor.is_floating_point() and str(tensor.dtype) not in known else tensor).cpu()


def _ints(column: Any) -> tuple[Array, Array] | None:
    """Values and missing rows of a column of ints with missing ones; None for any other."""
    if hasattr(column, "isna"):  # pandas
        if getattr(column.dtype, "kind", None) not in ("i", "u"):
            return None
        return np.asarray(column.fillna(0)), np.asarray(column.isna(), dtype=bool)
    if not hasattr(column, "is_null"):
        return None
    if hasattr(column, "type"):  # pyarrow
        is_int = str(column.type).startswith(("int", "uint"))
    else:  # polars
        is_int = bool(column.dtype.is_integer())
    return (np.asarray(column.fill_null(0)), np.asarray(column.is_null())) if is_int else None

"""Columns with several values per row: how they are declared, and blocks of codes. ``lists.py`` reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from .lists import Lists, lists_of
from .scalars import check_count, own_scalar, shown
from .tables import Array, Cells, Value, cells_of

Pooling = Literal["sum", "mean", "max"]
Keep = Literal["last", "first"]
POOLINGS: tuple[Pooling, ...] = ("sum", "mean", "max")
KEEPS: tuple[Keep, ...] = ("last", "first")
PADDING = -1
"""The code of a place that holds no value."""


class Options(Protocol):
    """What a column says of its rows; ``pooling`` is None where each has one value."""

    @property
    def name(self) -> str: ...
    @property
    def pooling(self) -> Pooling | None: ...
    @property
    def max_length(self) -> int | None: ...
    @property
    def padding(self) -> Value | None: ...
    @property
    def keep(self) -> Keep: ...


def check_options(column: Options) -> None:
    """Looks at the four options of a column, and makes them Python's own.

    Raises:
        TypeError: a ``max_length`` that is no int, a ``padding`` that is neither text nor an int.
        ValueError: an unknown ``pooling`` or ``keep``, a ``max_length`` below 1, or one of them without the other.
    """
    where = f"column {column.name!r}"
    own = {field: own_scalar(getattr(column, field)) for field in ("pooling", "max_length", "padding", "keep")}
    if own["pooling"] is None:
        beside = [f"{name}={shown(own[name])}" for name in ("max_length", "padding") if own[name] is not None]
        beside += [f"keep={shown(own['keep'])}"] if not _is_one_of(own["keep"], ("last",)) else []
        if beside:
            raise ValueError(f"{where}: expected pooling with {beside[0]}, which is of rows of several values")
        return
    for field, choices in (("pooling", POOLINGS), ("keep", KEEPS)):
        if not _is_one_of(own[field], choices):
            raise ValueError(f"{where}: expected {field} to be one of {choices}, got {shown(getattr(column, field))}")
    if own["max_length"] is None:
        raise ValueError(
            f"{where}: expected max_length with pooling, how many values a row may have, got none; columns_from "
            "measures it"
        )
    own["max_length"] = check_count(f"{where}: max_length", own["max_length"])
    check_padding(where, column.padding)
    for field, value in own.items():
        object.__setattr__(column, field, value)  # of a frozen dataclass, while it is made


def check_padding(where: str, padding: Any) -> Value | None:
    """Text or an int, Python's own, or None. TypeError for anything else."""
    own: Any = own_scalar(padding)
    if own is not None and (isinstance(own, bool) or not isinstance(own, (str, int))):
        raise TypeError(f"{where}: expected padding to be text or an int, got {shown(padding)}")
    return own


def _is_one_of(value: Any, choices: tuple[str, ...]) -> bool:
    return isinstance(value, str) and value in choices


def encoded(column: Options, raw: Any, codes_of: Callable[[Cells], Array], paddings: Sequence[Value]) -> Array:
    """The codes of a column, int32: ``(B,)``, or with ``pooling`` ``(B, max_length)``, ``PADDING`` behind the last.

    Args:
        codes_of: the code of each value of some cells, 0 where it is unknown.
        paddings: what fills rows up.

    Raises:
        TypeError, ValueError: see :func:`cells_of` and :func:`lists_of`; and what ``codes_of`` raises.
    """
    where = f"column {column.name!r}"
    if column.pooling is None:
        cells = cells_of(where, raw)
        return cells.by_row(codes_of(cells), 0)
    lists = lists_of(where, raw, paddings)
    assert column.max_length is not None
    return block(lists.cells.by_row(codes_of(lists.cells), 0), lists, column.max_length, column.keep)


def block(codes: Array, lists: Lists, max_length: int, keep: Keep) -> Array:
    """Codes of all values, one after the other, as int32 ``(B, max_length)``: those of a row, then ``PADDING``.

    Of a row that is longer the ``"last"`` or ``"first"`` values are kept.
    """
    lengths = lists.lengths
    begins = np.cumsum(lengths) - lengths
    if keep == "last":
        begins += np.maximum(lengths - max_length, 0)
    places = np.arange(len(codes)) - np.repeat(begins, lengths)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    kept = (places >= 0) & (places < max_length)
    filled = np.full((len(lengths), max_length), PADDING, dtype=np.int32)
    filled[rows[kept], places[kept]] = codes[kept]
    return filled

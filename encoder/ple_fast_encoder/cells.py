"""Single cells in plain Python: for a handful of rows, where a call of NumPy per column would cost the most.

What is here takes the usual cells alone, and raises :class:`Unusual` of any other: the column's own ``encode`` then
says what it is, or what is wrong with it. So there is one place that knows what is refused, and how.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .categorical import Categorical
from .hashed import BITS, Hashed, bits_of, paddings_of
from .tables import Array

Cells = list[Any]
Coder = Callable[[Cells], list[int]]
"""From cells to their codes. Raises Unusual."""
LARGEST = 2**63
"""Of ints, beyond which NumPy has others."""


TEXT_DTYPES = ("str", "string")
"""Of pandas."""


class Unusual(Exception):
    """Cells that are for the column's own ``encode``."""


def cells_of_few(raw: Any) -> Cells:
    """The cells of a column as Python's own. Raises Unusual where it takes more than a look."""
    kind = type(raw)
    if kind is list:
        cells: Cells = raw
        return cells
    if kind is tuple:
        return list(raw)
    if kind is np.ndarray and raw.ndim == 1 and raw.dtype.kind in "iufbUO":
        listed: Cells = raw.tolist()
        return listed
    if kind.__name__ == "Series" and kind.__module__.partition(".")[0] == "pandas":
        return _of_series(raw)
    raise Unusual


def _of_series(series: Any) -> Cells:
    dtype = series.dtype
    if isinstance(dtype, np.dtype) and dtype.kind in "iufbO":
        cells: Cells = series.tolist()
        return cells
    categories = getattr(dtype, "categories", None)
    if categories is None:
        if dtype.name not in TEXT_DTYPES:
            raise Unusual
        texts: Cells = series.tolist()
        return texts
    # One kind of values: the column's own encode looks at all categories, whether a row has them or not.
    is_number = isinstance(categories.dtype, np.dtype) and categories.dtype.kind in "iufb"
    if not is_number and categories.inferred_type != "string":
        raise Unusual
    codes = series.array.codes.tolist()
    if max(codes) < 0:
        raise Unusual
    return [None if code < 0 else categories[code] for code in codes]


def coder_of(owner: Categorical | Hashed) -> Coder:
    """What gives the codes of single values, 0 for those that are missing or unknown, by the column with the table."""
    if isinstance(owner, Hashed):
        return _buckets(owner.buckets)
    if owner.size is not None:
        return _ints_below(owner.size)
    return _looked_up(owner)


def _looked_up(column: Categorical) -> Coder:
    get = column.code_by_value.get
    values = column.values
    of_text = bool(values) and isinstance(values[0], str) if values is not None else False
    own = str if of_text else int

    def codes(cells: Cells) -> list[int]:
        found = []
        for cell in cells:
            kind = type(cell)
            if kind is own:
                found.append(get(cell, 0))
            elif cell is None or (kind is float and cell != cell):
                found.append(0)
            elif not of_text and (kind is float or kind is bool):  # 7.0 and True are ints
                found.append(get(cell, 0))
            else:
                raise Unusual
        return found

    return codes


def _ints_below(size: int) -> Coder:
    def codes(cells: Cells) -> list[int]:
        found = []
        for cell in cells:
            kind = type(cell)
            if kind is int or kind is bool:
                if not -LARGEST < cell < LARGEST:
                    raise Unusual
                found.append(cell + 1 if 0 <= cell < size else 0)
            elif kind is float:
                found.append(int(cell) + 1 if 0 <= cell < size and cell == math.floor(cell) else 0)
            elif cell is None:
                found.append(0)
            else:
                raise Unusual
        return found

    return codes


def _buckets(buckets: int) -> Coder:
    def codes(cells: Cells) -> list[int]:
        found: list[int] = []
        kinds: set[type] = set()
        for cell in cells:
            kind = type(cell)
            if kind is str:
                kinds.add(str)
            elif kind is int or kind is bool or (kind is float and cell == cell):
                kinds.add(int)
            elif cell is not None and kind is not float:
                raise Unusual
            bits = None if cell is None else bits_of(cell)
            found.append(0 if bits is None else _mixed(bits) % buckets + 1)
        if len(kinds) > 1:
            raise Unusual
        return found

    return codes


def _mixed(bits: int) -> int:
    """``hashed.mixed`` of one."""
    bits = (bits + 0x9E37_79B9_7F4A_7C15) & BITS
    bits = ((bits ^ (bits >> 30)) * 0xBF58_476D_1CE4_E5B9) & BITS
    bits = ((bits ^ (bits >> 27)) * 0x94D0_49BB_1331_11EB) & BITS
    return bits ^ (bits >> 31)


def lists_coder(column: Categorical | Hashed, owner: Categorical | Hashed) -> Callable[[Cells], list[list[int]]]:
    """What gives the codes of rows of several values: ``max_length`` for each row, -1 behind the last."""
    coder, length = coder_of(owner), column.max_length
    paddings = paddings_of(column.padding, are_hashed=isinstance(owner, Hashed))
    assert length is not None
    first = column.keep == "first"

    def codes(rows: Cells) -> list[list[int]]:
        flat: Cells = []
        ends = []
        for row in rows:
            kind = type(row)
            if kind is np.ndarray and row.ndim == 1 and row.dtype.kind in "iufbU":
                row = row.tolist()
            elif row is None or (kind is float and row != row):
                row = ()
            elif kind is not list and kind is not tuple:
                raise Unusual
            for cell in row:
                if cell is None or (type(cell) is float and cell != cell):
                    continue
                if type(cell) not in PLAIN:
                    raise Unusual
                if cell not in paddings:
                    flat.append(cell)
            ends.append(len(flat))
        found, begin, every = [], 0, coder(flat)
        for end in ends:
            kept = every[begin:end]
            if len(kept) > length:
                kept = kept[:length] if first else kept[-length:]
            found.append(kept + [-1] * (length - len(kept)))
            begin = end
        return found

    return codes


PLAIN = frozenset((str, int, float, bool))


def floats_of(cells: Cells, takes_missing: bool) -> list[float]:
    """The cells of a column of numbers, NaN where one is missing. Raises Unusual."""
    found = []
    for cell in cells:
        kind = type(cell)
        if kind is int and -LARGEST < cell < LARGEST:
            found.append(float(cell))
        elif kind is float and cell - cell == 0:  # finite
            found.append(cell)
        elif takes_missing and (cell is None or (kind is float and cell != cell)):
            found.append(math.nan)
        elif kind is bool:
            found.append(float(cell))
        else:
            raise Unusual
    return found


def as_codes(single: Sequence[list[int]], several: Sequence[list[list[int]]], rows: int) -> Array:
    """int32 ``(B, C)`` out of codes by column: one for each row, and behind those several for each."""
    singles = list(zip(*single, strict=True)) if single else [()] * rows
    table = [
        [*singles[row], *(code for block in several for code in block[row])] if several else singles[row]
        for row in range(rows)
    ]
    return np.array(table, dtype=np.int32).reshape(rows, -1 if rows else 0)

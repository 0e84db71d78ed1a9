"""Columns of ids without a vocabulary: a hash gives each one of a number of buckets, the same one everywhere."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np

from .bags import Keep, Pooling, check_options, encoded
from .scalars import check_count, own_scalar
from .tables import MAX_SIZE, Array, Cells, Value, kinds_of

BITS = 0xFFFF_FFFF_FFFF_FFFF
LONGEST = 20
"""Digits (and a sign) of an int of 64 bits."""


@dataclass(frozen=True)
class Hashed:
    """A column of ids, each with the learned embedding of its bucket; ids of one bucket share it.

    An id has the same bucket in every process, on every system and with every version of NumPy: ints by SplitMix64 of
    their 64 bits, text by BLAKE2b of its UTF-8. Text that is an int, such as ``"12"``, has the bucket of the int, and
    so has a float that is whole. Row 0 of the embedding belongs to what is missing (and to floats that are not whole).

    Of n ids in b buckets, ``1 - exp(-n / b)`` share their bucket with another one: 39 % where there are twice as many
    buckets as ids, 10 % where there are ten times as many.

    Args:
        name: the column.
        buckets: how many.
        width: of the embedding.
        pooling, max_length, padding, keep: of rows of several values, as of :class:`Categorical`.

    Raises:
        TypeError: a count that is no int.
        ValueError: buckets or a width below 1, or more buckets than int32 can number; ``max_length``, ``padding`` or
            ``keep`` without ``pooling``, or the other way round.
    """

    name: str
    buckets: int
    width: int = 4
    pooling: Pooling | None = None
    max_length: int | None = None
    padding: Value | None = None
    keep: Keep = "last"

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", own_scalar(self.name))
        for field in ("buckets", "width"):
            object.__setattr__(self, field, check_count(f"column {self.name!r}: {field}", getattr(self, field)))
        if self.buckets > MAX_SIZE:
            raise ValueError(f"column {self.name!r}: expected at most {MAX_SIZE} buckets, got {self.buckets}")
        check_options(self)

    @property
    def rows(self) -> int:
        """Rows of the embedding: the buckets and the missing value."""
        return 1 + self.buckets

    def encode(self, column: Any) -> Array:
        """Codes of a column, int32 ``(B,)``, or with ``pooling`` ``(B, max_length)``: 1 + the bucket, 0 if missing.

        Raises:
            TypeError: neither text nor numbers, or both.
            ValueError: it is not one-dimensional; with ``pooling``: it has no list in each row.
        """
        return encoded(self, column, self.codes_of, paddings_of(self.padding, are_hashed=True))

    def codes_of(self, cells: Cells) -> Array:
        """int32: the code of each of the values of some cells (not: of each row).

        Raises:
            TypeError: neither text nor numbers, or both.
        """
        check_ids(cells)
        bits, is_id = _bits(cells.values)
        codes = (mixed(bits) % np.uint64(self.buckets)).astype(np.int32) + np.int32(1)
        codes[~is_id] = 0
        return codes


def paddings_of(padding: Value | None, *, are_hashed: bool) -> tuple[Value, ...]:
    """The values that are left out of a column's rows: ``padding``, and where ids are hashed what is one id with it,
    an int and its text."""
    if padding is None:
        return ()
    also: Value | None = None
    if are_hashed and not isinstance(padding, str):
        also = str(padding) if abs(padding) <= BITS else None
    elif are_hashed and len(str(padding)) <= LONGEST and str(padding).removeprefix("-").isdecimal():
        also = int(padding)
    return (padding,) if also is None or bits_of(also) != bits_of(padding) else (padding, also)


def check_ids(cells: Cells) -> None:
    """TypeError where cells hold neither text nor numbers, or both."""
    kinds = kinds_of(cells.where, cells.values)
    if kinds - {"text", "numbers"} or len(kinds) > 1:
        got = ", ".join(sorted(kinds))
        raise TypeError(f"{cells.where}: expected text or ints as ids, got {got}; convert the column")


def mixed(bits: Array) -> Array:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): uint64 of uint64."""
    bits = bits + np.uint64(0x9E37_79B9_7F4A_7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    last: Array = bits ^ (bits >> np.uint64(31))
    return last


def _bits(values: Array) -> tuple[Array, Array]:
    """64 bits of each value, uint64, and whether it is an id at all."""
    kind = values.dtype.kind
    if kind in "iub":
        return values.astype(np.uint64), np.ones(len(values), dtype=bool)
    if kind == "f":
        floats = values.astype(np.float64)
        is_whole = np.isfinite(floats) & (floats == np.floor(floats))
        is_short = is_whole & (np.abs(floats) < 2.0**63)
        bits = np.where(is_short, floats, 0.0).astype(np.int64).astype(np.uint64)
        for place in np.flatnonzero(is_whole & ~is_short):
            bits[place] = int(floats[place]) & BITS
        return bits, is_whole
    cells = values.tolist()
    by_value = {value: bits_of(value) for value in set(cells)}  # ids come again and again
    found = [by_value[value] for value in cells]
    is_id = np.fromiter((bits is not None for bits in found), dtype=bool, count=len(found))
    return np.fromiter((bits or 0 for bits in found), dtype=np.uint64, count=len(found)), is_id


def bits_of(value: Any) -> int | None:
    """64 bits of one value, None of what is no id."""
    if isinstance(value, str):
        digits = value[1:] if value.startswith("-") else value
        if len(value) <= LONGEST and digits.isascii() and digits.isdigit() and str(int(value)) == value:
            return int(value) & BITS
        # Half of a surrogate pair, which Python makes of file names that are no text, has bytes too.
        hashed = hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(hashed, "little")
    is_number = isinstance(value, (Real, Decimal, np.bool_))
    if not is_number:
        return None
    try:
        whole = int(value)
    except (ValueError, OverflowError):  # NaN and infinity
        return None
    return whole & BITS if whole == value else None

"""Columns of categories: a vocabulary, or ints below a size, or those of another column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import Any, Protocol

import numpy as np

from .bags import Keep, Pooling, check_options, encoded
from .hashed import Hashed, paddings_of
from .scalars import check_count, own_scalar, shown
from .tables import MAX_SIZE, Array, Cells, Value, kinds_of, listed

WIDTH = 4
"""Of an embedding, where no other is asked for."""


class Owner(Protocol):
    """A column whose table others may share."""

    def codes_of(self, cells: Cells, /) -> Array: ...


@dataclass(frozen=True)
class Categorical:
    """A column of categories, each with a learned embedding.

    Row 0 of the embedding belongs to the unknown value: one that is missing or not in the vocabulary. It starts as
    zeros and is trained by the rows that have it.

    With ``pooling`` each row has several values, in a list, whose embeddings are pooled. What is missing in a list is
    left out, and a list that is missing or empty is pooled to zeros; a value that is not in the vocabulary counts, with
    the embedding of the unknown value.

    Args:
        name: the column.
        values: the vocabulary, all strings or all ints (floats that are whole and bools are taken for ints); or
        size: the values are ints 0 to ``size - 1``; or
        share: the name of another :class:`Categorical` or of a :class:`Hashed`, whose vocabulary (or buckets), width
            and embedding this column has too. Exactly one of the three.
        width: of the embedding; default 4.
        pooling: ``"sum"``, ``"mean"`` or ``"max"``; ``None``: one value per row.
        max_length: with ``pooling``, how many values of a row are kept. Each row takes as many codes (4 bytes each).
        padding: with ``pooling``, a value that fills rows up and is left out, such as 0.
        keep: of a row longer than ``max_length``, the ``"last"`` of its values (the newest of a history in the order of
            time) or the ``"first"``.

    Raises:
        TypeError: the vocabulary mixes types, or holds others than strings and ints.
        ValueError: not exactly one of ``values``, ``size`` and ``share``, a value that occurs twice, a size or width
            below 1, more values than int32 can number, a width with ``share``; ``max_length``, ``padding`` or ``keep``
            without ``pooling``, or ``pooling`` without ``max_length``.
    """

    name: str
    values: tuple[Value, ...] | None = None
    size: int | None = None
    width: int | None = None
    share: str | None = None
    pooling: Pooling | None = None
    max_length: int | None = None
    padding: Value | None = None
    keep: Keep = "last"

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", own_scalar(self.name))
        where = f"column {self.name!r}"
        if sum(given is not None for given in (self.values, self.size, self.share)) != 1:
            also = "" if self.share is None else f", share={shown(self.share)}"
            raise ValueError(
                f"{where}: expected either values or size (or share, the name of another column), got "
                f"values={shown(self.values)}, size={shown(self.size)}{also}"
            )
        if self.share is not None:
            self._check_share(where)
        elif self.width is None:
            object.__setattr__(self, "width", WIDTH)
        for field in ("size", "width"):
            count = getattr(self, field)
            if count is not None:
                object.__setattr__(self, field, check_count(f"{where}: {field}", count))
        if self.values is not None:
            values = own_values(where, listed(f"{where}: values", self.values))
            object.__setattr__(self, "values", values)
            if len(set(values)) < len(values):
                twice = next(value for value, count in Counter(values).items() if count > 1)
                raise ValueError(f"{where}: expected every value once, got {twice!r} twice")
        if self.rows > MAX_SIZE + 1:
            raise ValueError(f"{where}: expected at most {MAX_SIZE} values, got {self.rows - 1}; hash them: Hashed")
        check_options(self)

    def _check_share(self, where: str) -> None:
        share = own_scalar(self.share)
        if isinstance(share, bool) or not isinstance(share, (str, int)):
            raise TypeError(f"{where}: expected share to be the name of a column, got {shown(self.share)}")
        if share == self.name:
            raise ValueError(f"{where}: expected share to name another column, got its own name")
        if self.width is not None:
            raise ValueError(
                f"{where}: expected no width with share, because the embedding is that of {share!r}, got "
                f"width={shown(self.width)}"
            )
        object.__setattr__(self, "share", share)

    @property
    def rows(self) -> int:
        """Rows of the embedding: the vocabulary and the unknown value; 0 where it is another column's."""
        if self.share is not None:
            return 0
        return 1 + (len(self.values) if self.values is not None else self.size or 0)

    @cached_property
    def code_by_value(self) -> dict[Any, int]:
        """The code of each value of the vocabulary."""
        return {value: code for code, value in enumerate(self.values or (), 1)}

    def encode(self, column: Any, owner: Owner | None = None) -> Array:
        """Codes of a column, int32 ``(B,)``: 1 + the place in the vocabulary, 0 for what is missing or unknown.

        With ``pooling`` they are ``(B, max_length)``: those of a row's values, then -1.

        Args:
            owner: with ``share``: the column whose vocabulary or buckets these are.

        Raises:
            TypeError: text where the vocabulary holds ints, the other way round, or neither of the two; with
                ``pooling``: a row that is no list.
            ValueError: it is not one-dimensional; ``share`` without ``owner``.
        """
        if self.share is not None and owner is None:
            raise ValueError(
                f"column {self.name!r}: expected the column {self.share!r} beside it, whose vocabulary it shares; "
                "encode(data, columns) reads both"
            )
        pads = paddings_of(self.padding, are_hashed=isinstance(owner, Hashed))
        return encoded(self, column, (owner or self).codes_of, pads)

    def codes_of(self, cells: Cells) -> Array:
        """int32: the code of each of the values of some cells (not: of each row), 0 where it is unknown.

        Raises:
            TypeError: text where the vocabulary holds ints, the other way round, or neither of the two.
        """
        return self._look_up(cells) if self.size is None else self._in_range(cells)

    def _check(self, cells: Cells, values: Array) -> None:
        expected = "text" if self.values is not None and isinstance(next(iter(self.values), None), str) else "numbers"
        wrong = kinds_of(cells.where, values) - {expected}
        # An empty vocabulary, of a column that was never there in training, is neither text nor numbers.
        if wrong and (self.rows > 1 or wrong - {"text"}):
            holds = "strings" if expected == "text" else "ints"
            got = ", ".join(sorted(wrong))
            raise TypeError(f"{cells.where}: its vocabulary holds {holds}, got {got}; convert the column")

    def _in_range(self, cells: Cells) -> Array:
        """Codes of ints 0 to ``size - 1``; whole floats are ints."""
        assert self.size is not None
        values = cells.values
        if values.dtype.kind not in "iu":
            self._check(cells, values)
            values = Cells(cells.where, values).numbers("ints")
        codes = np.zeros(len(values), dtype=np.int32)
        known = (values >= 0) & (values < self.size)
        if values.dtype.kind == "f":
            known &= values == np.floor(values)
        codes[known] = values[known].astype(np.int32) + np.int32(1)  # the dtype of the column may end before size
        return codes

    def _look_up(self, cells: Cells) -> Array:
        """Codes of values that stand in the vocabulary."""
        values = cells.values
        if values.dtype.kind != "O":
            self._check(cells, values)
        # One look-up per row: a hash finds 1, 1.0, True and numpy's scalars alike, and sorting text would be slower.
        try:
            codes = np.fromiter(
                map(self.code_by_value.get, values.tolist(), repeat(0)), dtype=np.int32, count=len(values)
            )
        except TypeError:  # no hash
            self._check(cells, values)
            raise
        if values.dtype.kind == "O":  # what the vocabulary holds is of the right kind
            self._check(cells, values[codes == 0])
        return codes


def own_values(where: str, values: Iterable[Any]) -> tuple[Value, ...]:
    """Values of a vocabulary: all strings, or all ints; floats that are whole, and bools, as ints.

    Raises:
        TypeError: others.
    """

    def own(value: Any) -> Any:
        if isinstance(value, str):
            return str(value)
        is_int = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return int(value) if is_int else value

    found = tuple(map(own, values))
    kinds = set(map(type, found))
    if len(kinds) > 1 or not kinds <= {str, int}:
        names = sorted(kind.__name__ for kind in kinds)
        raise TypeError(
            f"{where}: expected text or ints as categories, all of them the same, got {names}; convert it, or make it "
            "numeric"
        )
    return found

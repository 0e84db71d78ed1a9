"""Columns of a table, and how their raw values become numbers: vocabularies and statistics, no parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import repeat
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..scalars import check_count, check_number, own_scalar, shown
from .tables import Array, Cells, Table, cells_of, column_of, kinds_of, listed

Value = str | int
Missing = Literal["error", "indicator", "mean"]
MAX_SIZE = 2**31 - 1
"""Of a vocabulary: codes are int32."""


class Encoded(NamedTuple):
    """Rows as a model reads them. ``TensorDataset(*encoded)`` and a ``DataLoader`` take it as it is."""

    codes: Tensor
    """``(B, categorical columns)``, int32; 0 is the unknown value."""
    numbers: Tensor
    """``(B, numeric features)``, float32, standardised and finite."""

    def __len__(self) -> int:
        """The number of rows, not of fields."""
        return self.codes.shape[0]

    def rows(self, index: Tensor | slice) -> Encoded:
        """Some of the rows."""
        return Encoded(self.codes[index], self.numbers[index])

    def to(self, device: torch.device) -> Encoded:
        """The rows on another device."""
        return Encoded(self.codes.to(device), self.numbers.to(device))


@dataclass(frozen=True)
class Categorical:
    """A column of categories, each with a learned embedding.

    Row 0 of the embedding belongs to the unknown value: one that is missing or not in the vocabulary. It starts as
    zeros and is trained by the rows that have it.

    Args:
        name: the column.
        values: the vocabulary, all strings or all ints (floats that are whole and bools are taken for ints); or
        size: the values are ints 0 to ``size - 1``. Exactly one of the two.
        width: of the embedding.

    Raises:
        TypeError: the vocabulary mixes types, or holds others than strings and ints.
        ValueError: not exactly one of ``values`` and ``size``, a value that occurs twice, a size or width below 1, or
            more values than int32 can number.
    """

    name: str
    values: tuple[Value, ...] | None = None
    size: int | None = None
    width: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", own_scalar(self.name))
        if (self.values is None) == (self.size is None):
            raise ValueError(
                f"column {self.name!r}: expected either values or size, got values={shown(self.values)}, "
                f"size={shown(self.size)}"
            )
        for field in ("size", "width"):
            count = getattr(self, field)
            if count is not None:
                object.__setattr__(self, field, check_count(f"column {self.name!r}: {field}", count))
        if self.values is not None:
            values = own_values(f"column {self.name!r}", listed(f"column {self.name!r}: values", self.values))
            object.__setattr__(self, "values", values)
            if len(set(values)) < len(values):
                twice = next(value for value, count in Counter(values).items() if count > 1)
                raise ValueError(f"column {self.name!r}: expected every value once, got {twice!r} twice")
        if self.rows > MAX_SIZE + 1:
            raise ValueError(
                f"column {self.name!r}: expected at most {MAX_SIZE} values, got {self.rows - 1}; hash them"
            )

    @property
    def rows(self) -> int:
        """Rows of the embedding: the vocabulary and the unknown value."""
        return 1 + (len(self.values) if self.values is not None else self.size or 0)

    @cached_property
    def _codes(self) -> dict[Any, int]:
        return {value: code for code, value in enumerate(self.values or (), 1)}

    def encode(self, column: Any) -> Array:
        """Codes of a column, int32 ``(B,)``: 1 + the place in the vocabulary, 0 for what is missing or unknown.

        Raises:
            TypeError: text where the vocabulary holds ints, the other way round, or neither of the two.
            ValueError: it is not one-dimensional.
        """
        cells = cells_of(f"column {self.name!r}", column)
        return cells.by_row(self._look_up(cells) if self.size is None else self._in_range(cells), 0)

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
            codes = np.fromiter(map(self._codes.get, values.tolist(), repeat(0)), dtype=np.int32, count=len(values))
        except TypeError:  # no hash
            self._check(cells, values)
            raise
        if values.dtype.kind == "O":  # what the vocabulary holds is of the right kind
            self._check(cells, values[codes == 0])
        return codes


@dataclass(frozen=True)
class Numeric:
    """A column of numbers, standardised: ``(f(x) - mean) / std``, computed in float64.

    Args:
        name: the column.
        transform: f: ``"log1p"``, for amounts: ``sign(x) log(1 + |x|)``; ``None``: as it is.
        mean, std: of the transformed training data; :func:`columns_from` measures them.
        missing: what a missing number (NaN) is: ``"error"``; ``"mean"``; or ``"indicator"``: the mean, and a second
            feature that is 1 where the number is missing. Training must meet some for that feature to mean anything.
        width: ``None``: the number itself is a feature. Otherwise each number (and indicator) becomes ``relu(x w + b)``
            with learned w and b of this width (Gorishniy et al., NeurIPS 2022).

    Raises:
        TypeError: a mean or std that is no number.
        ValueError: an unknown transform or treatment, a mean that is not finite, a std that is not above 0, a width
            below 1.
    """

    name: str
    transform: Literal["log1p"] | None = None
    mean: float = 0.0
    std: float = 1.0
    missing: Missing = "error"
    width: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", own_scalar(self.name))
        for field in ("mean", "std"):
            object.__setattr__(self, field, check_number(f"column {self.name!r}: {field}", getattr(self, field)))
        for field, choices in (("transform", ("log1p", None)), ("missing", ("error", "indicator", "mean"))):
            if getattr(self, field) not in choices:
                got = getattr(self, field)
                raise ValueError(f"column {self.name!r}: expected {field} to be one of {choices}, got {shown(got)}")
        if not np.isfinite(self.mean) or not np.isfinite(self.std) or self.std <= 0:
            raise ValueError(
                f"column {self.name!r}: expected a finite mean and a finite std above 0, got {self.mean} and {self.std}"
            )
        if self.width is not None:
            object.__setattr__(self, "width", check_count(f"column {self.name!r}: width", self.width))

    @property
    def features(self) -> int:
        """Numbers per row: 1, and one more for an indicator."""
        return 2 if self.missing == "indicator" else 1

    def transformed(self, column: Any) -> Array:
        """``f(x)``, float64 ``(B,)``; NaN stays where the number is missing.

        Raises:
            TypeError: the column holds no numbers.
            ValueError: it is not one-dimensional, or holds an infinity.
        """
        cells = cells_of(f"column {self.name!r}", column)
        values = cells.numbers("numbers (declare it Categorical, or convert it)")
        if np.isinf(values).any():
            raise ValueError(f"{cells.where}: expected finite numbers, got {int(np.isinf(values).sum())} infinite")
        return np.sign(values) * np.log1p(np.abs(values)) if self.transform == "log1p" else values

    def check_present(self, absent: Array) -> None:
        """ValueError where one of ``absent (B,)``, bool, is True: a missing number (NaN)."""
        if absent.any():
            raise ValueError(
                f"column {self.name!r}: expected numbers, got {absent.sum()} of {len(absent)} missing (NaN); fill them "
                'in, or give the column missing="mean" (a trained model can have it too) or, in training, '
                '"indicator"; columns_from(..., missing=) asks for one beforehand'
            )

    def encode(self, column: Any) -> Array:
        """Features of a column, float32 ``(B, features)``, finite.

        Raises:
            TypeError: the column holds no numbers.
            ValueError: it holds an infinity, or NaN with ``missing="error"``.
        """
        values = self.transformed(column)
        absent = np.isnan(values)
        if self.missing == "error":
            self.check_present(absent)
        with np.errstate(over="ignore"):  # what overflows is named below
            scaled = np.where(absent, 0.0, (values - self.mean) / self.std).astype(np.float32)
        if not np.isfinite(scaled).all():
            raise ValueError(
                f"column {self.name!r}: expected numbers within float32 once standardised (mean {self.mean:g}, "
                f"std {self.std:g}), got {np.nanmin(values):g} to {np.nanmax(values):g}"
            )
        parts = [scaled, absent.astype(np.float32)] if self.missing == "indicator" else [scaled]
        return np.stack(parts, axis=1)


Column = Categorical | Numeric


def encode(data: Table, columns: Sequence[Column]) -> Encoded:
    """Raw columns as codes and numbers, in the order of ``columns``.

    Raises:
        TypeError: a column holds other values than it was declared with.
        ValueError: a column is missing, not one-dimensional or of another length, or holds NaN or infinity.
    """
    given: Sequence[Any] = columns
    wrong = [column for column in given if not isinstance(column, (Categorical, Numeric))]
    if wrong or not given:
        got = repr(wrong[0]) if wrong else "none"
        raise TypeError(f"columns: expected at least one Categorical or Numeric, got {got}; columns_from makes them")
    codes: list[Array] = []
    numbers: list[Array] = []
    lengths = {}
    for column in columns:
        encoded = column.encode(column_of(data, column.name))
        lengths[column.name] = len(encoded)
        (codes if isinstance(column, Categorical) else numbers).append(encoded)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"data: expected columns of one length, got {lengths}")
    rows = next(iter(lengths.values()))
    return Encoded(
        torch.from_numpy(np.stack(codes, axis=1) if codes else np.zeros((rows, 0), np.int32)),
        torch.from_numpy(np.concatenate(numbers, axis=1) if numbers else np.zeros((rows, 0), np.float32)),
    )


def to_json(column: Column) -> dict[str, Any]:
    """A column as plain values."""
    return {"kind": type(column).__name__} | asdict(column)


def from_json(fields: Mapping[str, Any]) -> Column:
    """The column that :func:`to_json` wrote.

    Raises:
        ValueError: it is of an unknown kind.
    """
    kinds: dict[str, type[Categorical] | type[Numeric]] = {"Categorical": Categorical, "Numeric": Numeric}
    rest = dict(fields)
    kind = rest.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"columns: expected a kind of {', '.join(kinds)}, got {kind!r}")
    return kinds[kind](**rest)


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

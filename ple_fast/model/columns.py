"""Columns of a table, and how their raw values become numbers: vocabularies and statistics, no parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..scalars import check_count

Value = str | int
Array = np.ndarray[Any, Any]


class Table(Protocol):
    """Columns by name: a mapping of arrays, or a data frame."""

    def __getitem__(self, key: str, /) -> Any: ...

    def __contains__(self, key: Any, /) -> bool: ...


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
        values: the vocabulary, all strings or all ints; or
        size: the values are ints 0 to ``size - 1``. Exactly one of the two.
        width: of the embedding.

    Raises:
        TypeError: the vocabulary mixes types, or holds others than strings and ints.
        ValueError: not exactly one of ``values`` and ``size``, a value that occurs twice, or a size or width below 1.
    """

    name: str
    values: tuple[Value, ...] | None = None
    size: int | None = None
    width: int = 4

    def __post_init__(self) -> None:
        if (self.values is None) == (self.size is None):
            raise ValueError(
                f"column {self.name!r}: expected either values or size, got values={self.values!r}, size={self.size!r}"
            )
        for field in ("size", "width"):
            count = getattr(self, field)
            if count is not None:
                check_count(f"column {self.name!r}: {field}", count)
        if self.values is None:
            return
        object.__setattr__(self, "values", tuple(self.values))
        kinds = {type(value) for value in self.values}
        if len(kinds) > 1 or not kinds <= {str, int}:
            names = sorted(kind.__name__ for kind in kinds)
            raise TypeError(
                f"column {self.name!r}: expected values that are all str or all int, got {names}; convert them first"
            )
        if len(set(self.values)) < len(self.values):
            twice = next(value for value in self.values if self.values.count(value) > 1)
            raise ValueError(f"column {self.name!r}: expected every value once, got {twice!r} twice")

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
            TypeError: text where the vocabulary holds ints, or the other way round.
        """
        split = _categories(column)
        if split is not None:  # look up each category once; code -1 (missing) takes the last entry
            categories, codes = split
            table: Array = np.append(self._lookup(categories), np.int32(0))
            return table[codes]
        return self._lookup(_one_dimensional(self.name, column))

    def _lookup(self, column: Array) -> Array:
        text = _is_text(column)
        expects_text = self.values is not None and isinstance(next(iter(self.values), None), str)
        if column.dtype.kind in "cmMV" or (text is not None and text != expects_text and self.rows > 1):
            expected, got = "strings" if expects_text else "ints", "text" if text else str(column.dtype)
            raise TypeError(f"column {self.name!r}: its vocabulary holds {expected}, got {got}; convert the column")
        if self.size is not None:
            numbers = column if column.dtype.kind in "iu" else np.asarray(column, dtype=np.float64)
            known = (numbers >= 0) & (numbers < self.size) & (numbers == np.floor(numbers))
            return np.where(known, numbers, -1).astype(np.int32) + np.int32(1)
        # One look-up per row: a hash finds 1, 1.0, True and numpy's scalars alike, and sorting text would be slower.
        codes = self._codes
        found = (codes.get(value, 0) for value in column.tolist())
        return np.fromiter(found, dtype=np.int32, count=len(column))


@dataclass(frozen=True)
class Numeric:
    """A column of numbers, standardised: ``(f(x) - mean) / std``, computed in float64.

    Args:
        name: the column.
        transform: f: ``"log1p"``, for amounts: ``sign(x) log(1 + |x|)``; ``None``: as it is.
        mean, std: of the transformed training data; :func:`columns_from` measures them.
        missing: what a missing number (NaN) is: ``"error"``, or ``"indicator"``: the mean, and a second feature that is
            1 where the number is missing.
        width: ``None``: the number itself is a feature. Otherwise each number (and indicator) becomes ``relu(x w + b)``
            with learned w and b of this width (Gorishniy et al., NeurIPS 2022).

    Raises:
        ValueError: an unknown transform or treatment, a mean that is not finite, a std that is not above 0, a width
            below 1.
    """

    name: str
    transform: Literal["log1p"] | None = None
    mean: float = 0.0
    std: float = 1.0
    missing: Literal["error", "indicator"] = "error"
    width: int | None = None

    def __post_init__(self) -> None:
        for field, choices in (("transform", ("log1p", None)), ("missing", ("error", "indicator"))):
            if getattr(self, field) not in choices:
                got = getattr(self, field)
                raise ValueError(f"column {self.name!r}: expected {field} to be one of {choices}, got {got!r}")
        if not np.isfinite(self.mean) or not np.isfinite(self.std) or self.std <= 0:
            raise ValueError(
                f"column {self.name!r}: expected a finite mean and a finite std above 0, got {self.mean} and {self.std}"
            )
        if self.width is not None:
            check_count(f"column {self.name!r}: width", self.width)

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
        raw = _one_dimensional(self.name, column)
        if _is_text(raw) or raw.dtype.kind in "cmMV":
            raise TypeError(
                f"column {self.name!r}: expected numbers, got {raw.dtype}; convert it, or declare Categorical"
            )
        try:
            values = np.asarray(column, dtype=np.float64)  # the column itself: pandas turns its missing values into NaN
        except (TypeError, ValueError) as error:
            raise TypeError(f"column {self.name!r}: expected numbers, got {raw.dtype} ({error})") from error
        if np.isinf(values).any():
            raise ValueError(
                f"column {self.name!r}: expected finite numbers, got {int(np.isinf(values).sum())} infinite"
            )
        return np.sign(values) * np.log1p(np.abs(values)) if self.transform == "log1p" else values

    def encode(self, column: Any) -> Array:
        """Features of a column, float32 ``(B, features)``, finite.

        Raises:
            TypeError: the column holds no numbers.
            ValueError: it holds an infinity, or NaN with ``missing="error"``.
        """
        values = self.transformed(column)
        absent = np.isnan(values)
        if absent.any() and self.missing == "error":
            raise ValueError(
                f"column {self.name!r}: expected numbers, got {int(absent.sum())} of {len(values)} missing (NaN); "
                'fill them in, or declare Numeric(..., missing="indicator")'
            )
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


def columns_from(
    data: Table,
    *,
    categorical: Sequence[str] = (),
    numeric: Sequence[str] = (),
    width: int = 4,
    min_count: int = 1,
    transform: Literal["log1p"] | None = None,
    numeric_width: int | None = None,
) -> list[Column]:
    """Columns with the vocabularies and statistics of training data.

    Args:
        data: columns by name: a mapping of arrays, or a data frame.
        categorical: names of columns of text or ints. Missing values are left out of the vocabulary.
        numeric: names of columns of numbers. One that holds NaN gets ``missing="indicator"``; a constant one gets std
            1.
        width: of each embedding.
        min_count: how often a value must occur to be in the vocabulary. With 2 or more the rare ones train the
            embedding of the unknown value, which values that training never saw then get.
        transform, numeric_width: ``Numeric.transform`` and ``Numeric.width`` of every numeric column.

    Raises:
        TypeError: a categorical column that holds other than text or ints, a numeric one that holds no numbers.
        ValueError: a column that is not there, is empty, or is named twice.
    """
    check_count("min_count", min_count)
    names = [*categorical, *numeric]
    check_names(names)
    columns: list[Column] = []
    for name in names:
        column = column_of(data, name)
        if len(column) == 0:
            raise ValueError(f"column {name!r}: expected at least one row, got none")
        if name in categorical:
            columns.append(Categorical(name, values=_vocabulary(name, column, min_count), width=width))
            continue
        blank = Numeric(name, transform=transform, width=numeric_width)
        values = blank.transformed(column)
        present = values[~np.isnan(values)]
        varies = len(present) > 0 and present.min() < present.max()
        mean, std = (float(present.mean()) if len(present) else 0.0), (float(present.std()) if varies else 1.0)
        missing: Literal["error", "indicator"] = "error" if len(present) == len(values) else "indicator"
        columns.append(Numeric(name, transform, mean, std, missing, numeric_width))
    return columns


def check_names(names: Sequence[str]) -> None:
    """ValueError where a column is named twice."""
    twice = [name for name in dict.fromkeys(names) if list(names).count(name) > 1]
    if twice:
        raise ValueError(f"columns: expected every name once, got {twice} more than once")


def column_of(data: Table, name: str, what: str = "data") -> Any:
    """One column, or a ValueError that names it."""
    if name not in data:
        there = f", got {list(data)[:60]}" if isinstance(data, Iterable) else ""
        raise ValueError(f"{what}: expected a column {name!r}{there}")
    return data[name]


def encode(data: Table, columns: Sequence[Column]) -> Encoded:
    """Raw columns as codes and numbers, in the order of ``columns``.

    Raises:
        TypeError: a column holds other values than it was declared with.
        ValueError: a column is missing, not one-dimensional or of another length, or holds NaN or infinity.
    """
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


def _one_dimensional(name: str, column: Any) -> Array:
    values = np.asarray(column)
    if values.ndim != 1:
        raise ValueError(f"column {name!r}: expected one dimension, (B,), got shape {values.shape}")
    return values


def _categories(column: Any) -> tuple[Array, Array] | None:
    """Categories and codes of a pandas column or array of dtype ``category``; None for any other."""
    for source in (column, getattr(column, "cat", None)):
        categories, codes = getattr(source, "categories", None), getattr(source, "codes", None)
        if categories is not None and codes is not None:
            return np.asarray(categories), np.asarray(codes)
    return None


def _is_missing(value: Any) -> bool:
    try:
        return value is None or bool(value != value)
    except TypeError:  # pandas.NA is neither true nor false
        return True


def _is_text(column: Array) -> bool | None:
    """Whether a column holds text; None where nothing in it tells."""
    if column.dtype.kind == "O":
        first = next((value for value in column if not _is_missing(value)), None)
        return None if first is None else isinstance(first, str)
    return column.dtype.kind in "UST"


def _vocabulary(name: str, column: Any, min_count: int) -> tuple[Value, ...]:
    """Values that occur at least ``min_count`` times, sorted."""
    split = _categories(column)
    if split is not None:
        categories, codes = split
        counts = np.bincount(codes[codes >= 0], minlength=len(categories))
        found: Mapping[Any, int] = dict(zip(categories.tolist(), counts.tolist(), strict=True))
    else:
        found = Counter(_one_dimensional(name, column).tolist())
    kept = {value for value, count in found.items() if count >= min_count and not _is_missing(value)}
    wrong = {type(value).__name__ for value in kept} - {"str", "int", "bool"}
    if wrong:
        raise TypeError(
            f"column {name!r}: expected text or ints as categories, got {sorted(wrong)}; convert it, or make it numeric"
        )
    values = {int(value) if isinstance(value, bool) else value for value in kept}
    return tuple(sorted(values, key=lambda value: (isinstance(value, str), value)))

"""Columns of training data: their vocabularies, means and deviations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from ..scalars import check_count, own_scalar
from .columns import Categorical, Column, Missing, Numeric, Value, own_values
from .tables import Array, Cells, Table, cells_of, check_names, column_of, kinds_of, listed


def columns_from(
    data: Table,
    *,
    categorical: Sequence[str] = (),
    numeric: Sequence[str] = (),
    width: int = 4,
    min_count: int = 1,
    transform: Literal["log1p"] | None = None,
    numeric_width: int | None = None,
    missing: Missing | None = None,
) -> list[Column]:
    """Columns with the vocabularies and statistics of training data.

    Args:
        data: columns by name: a mapping of arrays, a data frame of pandas or polars, or a table of pyarrow.
        categorical: names of columns of text or ints. Missing values are left out of the vocabulary.
        numeric: names of columns of numbers. A constant one, up to rounding, gets std 1.
        width: of each embedding.
        min_count: how often a value must occur to be in the vocabulary. With 2 or more the rare ones train the
            embedding of the unknown value, which values that training never saw then get.
        transform, numeric_width: ``Numeric.transform`` and ``Numeric.width`` of every numeric column.
        missing: ``Numeric.missing`` of every numeric column; default ``"indicator"`` for one in which ``data`` has
            missing numbers, ``"error"`` for the others.

    Raises:
        TypeError: a categorical column that holds other than text or ints, a numeric one that holds no numbers.
        ValueError: a column that is not there, is empty, or is named twice; with ``missing="error"`` one with missing
            numbers.
    """
    min_count = check_count("min_count", min_count)
    categories, names = listed("categorical", categorical), listed("numeric", numeric)
    check_names([*categories, *names])
    columns: list[Column] = []
    for name in categories:
        values = _vocabulary(cells_of(f"column {name!r}", column_of(data, name)), min_count)
        columns.append(Categorical(name, values=values, width=width))
    for name in names:
        blank = Numeric(name, transform=transform, missing="error" if missing is None else missing, width=numeric_width)
        columns.append(_measured(blank, column_of(data, name), missing))
    return columns


def _vocabulary(cells: Cells, min_count: int) -> tuple[Value, ...]:
    """Values that occur at least ``min_count`` times, sorted."""
    where, values = cells.where, cells.values
    _check_rows(where, values if cells.codes is None else cells.codes)
    wrong = kinds_of(where, values) - {"text", "numbers"}
    if wrong:
        raise TypeError(f"{where}: expected text or ints as categories, got {', '.join(sorted(wrong))}; convert it")
    if cells.codes is not None:
        counts = np.bincount(cells.codes[cells.codes >= 0], minlength=len(values)).tolist()
        found: Mapping[Any, int] = dict(zip(values.tolist(), counts, strict=True))
    else:
        present = values if cells.missing is None else values[~cells.missing]
        if present.dtype.kind in "iufb":
            uniques, counts = np.unique(present, return_counts=True)
            found = dict(zip(uniques.tolist(), counts.tolist(), strict=True))
        else:
            found = Counter(present.tolist())
    own = {value: count for value, count in found.items() if not _is_missing(value)}
    kept = dict(zip(own_values(where, map(own_scalar, own)), own.values(), strict=True))
    return tuple(sorted(value for value, count in kept.items() if count >= min_count))


def _is_missing(value: Any) -> bool:
    try:
        return value is None or bool(value != value)
    except TypeError:  # pandas.NA is neither true nor false
        return True


def _check_rows(where: str, values: Array) -> None:
    if len(values) == 0:
        raise ValueError(f"{where}: expected at least one row, got none")


def _measured(blank: Numeric, column: Any, missing: Missing | None) -> Numeric:
    """The column with its mean and deviation."""
    values = blank.transformed(column)
    _check_rows(f"column {blank.name!r}", values)
    absent = np.isnan(values)
    if missing == "error":
        blank.check_present(absent)
    mean, std = mean_and_std(values[~absent])
    if missing is None:
        missing = "indicator" if absent.any() else "error"
    return replace(blank, mean=mean, std=std, missing=missing)


def mean_and_std(values: Array) -> tuple[float, float]:
    """Of float64 values; the deviation of what is constant up to rounding, and of nothing, is 1.

    What overflows is infinite: whoever keeps the two refuses that.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        mean, variance = (float(values.mean()), float(values.var())) if len(values) else (0.0, 0.0)
    # What rounding alone leaves of a constant (Chan, Golub and LeVeque, 1983), as in scikit-learn.
    # A product, because a power of floats that overflows raises.
    rounding = len(values) * float(np.finfo(np.float64).eps)
    is_constant = math.isfinite(variance) and variance <= rounding * variance + (rounding * mean) * (rounding * mean)
    return mean, 1.0 if is_constant else math.sqrt(variance)

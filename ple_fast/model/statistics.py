"""Columns of training data: their vocabularies, means and deviations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from ..scalars import check_count, own_scalar, shown
from .bags import Keep, Pooling, check_padding
from .categorical import Categorical, own_values
from .columns import Column, owners_of
from .hashed import Hashed, check_ids
from .lists import lists_of
from .numeric import Missing, Numeric
from .tables import Array, Cells, Table, Value, cells_of, check_names, column_of, is_missing, kinds_of, listed

LONGEST = 256
"""Of a row of several values, where ``max_length`` is not given: one long row would make all of them long."""


def columns_from(
    data: Table,
    *,
    categorical: Sequence[str] = (),
    numeric: Sequence[str] = (),
    width: int | Mapping[str, int] = 4,
    min_count: int = 1,
    buckets: Mapping[str, int] | None = None,
    share: Mapping[str, str] | None = None,
    pooling: Mapping[str, Pooling] | None = None,
    max_length: int | Mapping[str, int] | None = None,
    padding: Value | Mapping[str, Value] | None = None,
    keep: Keep | Mapping[str, Keep] = "last",
    transform: Literal["log1p"] | None = None,
    numeric_width: int | Mapping[str, int] | None = None,
    missing: Missing | None = None,
) -> list[Column]:
    """Columns with the vocabularies and statistics of training data.

    An option that may be a mapping says by name what it is for each column; one that it does not name has the default.

    Args:
        data: columns by name: a mapping of arrays, a data frame of pandas or polars, or a table of pyarrow.
        categorical: names of columns of text or ints. Missing values are left out of the vocabulary.
        numeric: names of columns of numbers. A constant one, up to rounding, gets std 1.
        width: of each embedding; a mapping may leave categorical columns out, which then have 4.
        min_count: how often a value must occur to be in the vocabulary. With 2 or more the rare ones train the
            embedding of the unknown value, which values that training never saw then get.
        buckets: makes categorical columns :class:`Hashed`, of so many buckets: no vocabulary.
        share: of categorical columns, the one whose embedding they share, as ``{"history": "item"}``. The vocabulary is
            then of the values of both.
        pooling: of categorical columns with several values per row, in lists: ``"sum"``, ``"mean"`` or ``"max"``.
        max_length, padding, keep: with ``pooling``, as of :class:`Categorical`; default of ``max_length``: the longest
            row of ``data``, which may have 256 values.
        transform, numeric_width: ``Numeric.transform`` and ``Numeric.width`` of the numeric columns.
        missing: ``Numeric.missing`` of every numeric column; default ``"indicator"`` for one in which ``data`` has
            missing numbers, ``"error"`` for the others.

    Raises:
        TypeError: a categorical column that holds other than text or ints, a numeric one that holds no numbers; an
            option that is no mapping where it has to be one.
        ValueError: a column that is not there, is empty, or is named twice; a mapping that names another column; with
            ``missing="error"`` one with missing numbers; a row longer than 256 without ``max_length``.
    """
    min_count = check_count("min_count", min_count)
    categories, names = listed("categorical", categorical), listed("numeric", numeric)
    check_names([*categories, *names])
    hashed, shared = _named("buckets", buckets, categories), _named("share", share, categories)
    pooled = _named("pooling", pooling, categories)
    if both := [name for name in shared if name in hashed]:
        raise ValueError(f"share, buckets: expected one of them for {both[0]!r}, got both")
    for name, owner in shared.items():
        Categorical(name, share=owner)  # says what is wrong with it
    lengths = _of_pooled("max_length", max_length, pooled, None)
    filled = _of_pooled("padding", padding, pooled, None)
    kept = _of_pooled("keep", keep, pooled, "last")
    embedded = [name for name in categories if name not in shared]
    widths = _by_name("width", width, embedded, 4)
    numeric_widths = _by_name("numeric_width", numeric_width, names, None)

    counts: dict[str, Counter[Any]] = {name: Counter() for name in embedded if name not in hashed}
    options: dict[str, dict[str, Any]] = {}
    for name in categories:
        where, raw = f"column {name!r}", column_of(data, name)
        if name in pooled:
            padding = check_padding(where, filled[name])
            cells, rows = lists_of(where, raw, padding)
            length = _length(name, rows) if lengths[name] is None else lengths[name]
            options[name] = {"pooling": pooled[name], "max_length": length, "padding": padding, "keep": kept[name]}
        else:
            cells = cells_of(where, raw)
            rows, options[name] = cells.values if cells.codes is None else cells.codes, {}
        _check_rows(where, rows)
        owner = own_scalar(shared.get(name, name))
        if owner in counts:
            counts[owner].update(_counts(cells))
        else:
            check_ids(cells)
    columns: list[Column] = []
    for name in categories:
        if name in shared:
            columns.append(Categorical(name, share=shared[name], **options[name]))
        elif name in hashed:
            columns.append(Hashed(name, hashed[name], width=widths[name], **options[name]))
        else:
            values = _vocabulary(name, counts[name], min_count)
            columns.append(Categorical(name, values=values, width=widths[name], **options[name]))
    owners_of(columns)
    for name in names:
        blank = Numeric(
            name, transform=transform, missing="error" if missing is None else missing, width=numeric_widths[name]
        )
        columns.append(_measured(blank, column_of(data, name), missing))
    return columns


def _named(option: str, given: Any, names: Collection[str]) -> dict[str, Any]:
    """An option of some columns, by name."""
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"{option}: expected a dict by the names of categorical columns, got {shown(given)}")
    found = {own_scalar(name): value for name, value in (given or {}).items()}
    if other := [name for name in found if name not in names]:
        raise ValueError(f"{option}: expected names of {list(names)[:60]}, got {other[0]!r}")
    return found


def _by_name(option: str, given: Any, names: Collection[str], default: Any) -> dict[str, Any]:
    """An option of every column, by name: one for all, or those of a mapping."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given)
    return {**dict.fromkeys(names, default), **_named(option, given, names)}


def _of_pooled(option: str, given: Any, pooled: Collection[str], default: Any) -> dict[str, Any]:
    """An option of every column that is pooled, by name."""
    is_default = given is None or (isinstance(given, str) and given == default)
    if not pooled and not is_default:
        raise ValueError(f"{option}: expected pooling with it, by the names of columns, got none")
    return _by_name(option, given, pooled, default)


def _length(name: str, lengths: Array) -> int:
    """The longest row, which may not be too long."""
    longest = int(lengths.max(initial=1))
    if longest > LONGEST:
        most = int(np.quantile(lengths, 0.99, method="higher"))
        raise ValueError(
            f"column {name!r}: expected max_length, because its longest row has {longest} values, and every row takes "
            f"that many codes; 99 % of its rows have {most} or fewer: max_length={{{name!r}: {most}}} keeps the last "
            "values of longer ones"
        )
    return longest


def _counts(cells: Cells) -> dict[Any, int]:
    """How often each value of some cells occurs; what is missing is left out.

    Raises:
        TypeError: they hold other than text and numbers.
    """
    where, values = cells.where, cells.values
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
    own = {value: count for value, count in found.items() if not is_missing(value)}
    return dict(zip(own_values(where, map(own_scalar, own)), own.values(), strict=True))


def _vocabulary(name: str, counts: Mapping[Any, int], min_count: int) -> tuple[Value, ...]:
    """The values that occur often enough, in order."""
    if len(set(map(type, counts))) > 1:  # of several columns
        own_values(f"column {name!r}, with those that share its embedding", counts)
    return tuple(sorted(value for value, count in counts.items() if count >= min_count))


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

"""Columns of training data: their vocabularies, means and deviations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from ple_fast_encoder.bags import Keep, Pooling, check_padding
from ple_fast_encoder.categorical import Categorical, own_values
from ple_fast_encoder.columns import Column, owners_of
from ple_fast_encoder.hashed import Hashed, check_ids, paddings_of
from ple_fast_encoder.lists import lists_of
from ple_fast_encoder.numeric import Missing, Numeric
from ple_fast_encoder.tables import (
    Cells,
    Table,
    Value,
    cells_of,
    check_names,
    column_of,
    is_missing,
    kinds_of,
    listed,
)

from ..scalars import check_count, own_scalar, shown
from .columns import Encoded
from .moments import Moments
from .parts import Parts, is_parts, parts_of

LONGEST = 256
"""Of a row of several values, where ``max_length`` is not given: one long row would make all of them long."""


def columns_from(
    data: Table | Parts,
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
        data: columns by name: a mapping of arrays, a data frame of pandas or polars, or a table of pyarrow; or such
            tables one after the other (a list, :class:`ParquetTables`, a ``DataLoader``), which are read once.
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
    pads = {name: check_padding(f"column {name!r}", filled[name]) for name in pooled}
    owners = {name: own_scalar(shared.get(name, name)) for name in categories}
    paddings = {name: paddings_of(pads[name], are_hashed=owners[name] in hashed) for name in pooled}
    row_lengths: dict[str, Counter[int]] = {name: Counter() for name in pooled}
    treated: Missing = "error" if missing is None else missing
    blanks = [Numeric(name, transform=transform, missing=treated, width=numeric_widths[name]) for name in names]
    measures = [_Measure(blank, missing) for blank in blanks]
    rows = dict.fromkeys([*categories, *names], 0)
    for table in _tables(data):
        for name in categories:
            where, raw = f"column {name!r}", column_of(table, name)
            if name in pooled:
                cells, row_counts = lists_of(where, raw, paddings[name])
                rows[name] += len(row_counts)
                row_lengths[name].update(row_counts.tolist())
            else:
                cells = cells_of(where, raw)
                rows[name] += len(cells.values if cells.codes is None else cells.codes)
            owner = owners[name]
            if owner in counts:
                counts[owner].update(_counts(cells))
            else:
                check_ids(cells)
        for name, measure in zip(names, measures, strict=True):
            rows[name] += measure.add(column_of(table, name))
    if empty := [name for name, count in rows.items() if not count]:
        raise ValueError(f"column {empty[0]!r}: expected at least one row, got none")
    options: dict[str, dict[str, Any]] = {name: {} for name in categories}
    for name in pooled:
        length = _length(name, row_lengths[name]) if lengths[name] is None else lengths[name]
        options[name] = {"pooling": pooled[name], "max_length": length, "padding": pads[name], "keep": kept[name]}
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
    return [*columns, *(measure.column() for measure in measures)]


def _tables(data: Any) -> Iterator[Table]:
    if not is_parts(data):
        yield data
        return
    for place, part in enumerate(parts_of("data", data), 1):
        if isinstance(part.data, Encoded):
            raise TypeError(f"data: expected tables, got encoded rows as part {place}, whose columns are made already")
        yield part.data


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


def _length(name: str, lengths: Mapping[int, int]) -> int:
    """The longest row, which may not be too long; ``lengths``: of how many rows there are how many."""
    longest = max(1, *lengths)
    if longest > LONGEST:
        rest, most = sum(lengths.values()) // 100, longest
        for most in sorted(lengths, reverse=True):
            rest -= lengths[most]
            if rest < 0:
                break
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


class _Measure:
    """Mean and deviation of a column of numbers, table by table."""

    def __init__(self, blank: Numeric, missing: Missing | None) -> None:
        self.blank, self.missing = blank, missing
        self.moments, self.has_absent = Moments(), False

    def add(self, column: Any) -> int:
        """The column of one table; how many rows it has."""
        values = self.blank.transformed(column)
        absent = np.isnan(values)
        if self.missing == "error":
            self.blank.check_present(absent)
        self.has_absent |= bool(absent.any())
        self.moments.add(values[~absent])
        return len(values)

    def column(self) -> Numeric:
        mean, std = self.moments.mean_and_std()
        missing: Missing = self.missing or ("indicator" if self.has_absent else "error")
        return replace(self.blank, mean=mean, std=std, missing=missing)

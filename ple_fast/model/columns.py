"""Columns of a table: all of them at once as codes and numbers, and as JSON. No parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .caller import warn_caller
from .categorical import Categorical
from .hashed import Hashed
from .numeric import Numeric
from .tables import Array, Table, column_of
from .unknown import said_of_unknown


class Encoded(NamedTuple):
    """Rows as a model reads them. ``TensorDataset(*encoded)`` and a ``DataLoader`` take it as it is."""

    codes: Tensor
    """``(B, C)``, int32; 0 is the unknown value. One for each column of one value per row, in the order of the columns,
    and then ``max_length`` for each column of several, with -1 behind the last value of a row."""
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


EmbeddedColumn = Categorical | Hashed
Column = Categorical | Hashed | Numeric
COLUMN_TYPES = (Categorical, Hashed, Numeric)
OPTIONAL = ("share", "pooling", "max_length", "padding", "keep")
"""Fields that are written only where they say something, so that releases before them read what they can."""


def owners_of(columns: Sequence[Column]) -> dict[str, EmbeddedColumn]:
    """By the name of each column with an embedding: the column that the embedding belongs to, itself or another one.

    Raises:
        ValueError: ``share`` names no such column, or one that shares that of a third.
    """
    embedded = {column.name: column for column in columns if not isinstance(column, Numeric)}
    owners = dict(embedded)
    for name, column in embedded.items():
        share = column.share if isinstance(column, Categorical) else None
        if share is None:
            continue
        if share not in embedded:
            is_number = any(column.name == share for column in columns)
            got = f"{share!r}, which is Numeric" if is_number else f"{share!r}, and columns {list(embedded)[:60]}"
            raise ValueError(f"column {name!r}: expected share to name a column with an embedding, got {got}")
        owner = embedded[share]
        if isinstance(owner, Categorical) and owner.share is not None:
            raise ValueError(
                f"column {name!r}: expected share to name the column that has the embedding, got {share!r}, which "
                f"shares that of {owner.share!r}; write share={owner.share!r}"
            )
        owners[name] = owner
    return owners


def encode(data: Table, columns: Sequence[Column]) -> Encoded:
    """Raw columns as codes and numbers, in the order of ``columns``; see :class:`Encoded`.

    Warns:
        UserWarning: of two or more rows not one has a value of a column that the column knows.

    Raises:
        TypeError: a column holds other values than it was declared with.
        ValueError: a column is missing, not one-dimensional or of another length, or holds NaN or infinity; it shares
            the embedding of one that is not among ``columns``.
    """
    given: Sequence[Any] = columns
    wrong = [column for column in given if not isinstance(column, COLUMN_TYPES)]
    if wrong or not given:
        got = repr(wrong[0]) if wrong else "none"
        raise TypeError(
            f"columns: expected at least one Categorical, Hashed or Numeric, got {got}; columns_from makes them"
        )
    single: list[tuple[EmbeddedColumn, Array]] = []
    several: list[tuple[EmbeddedColumn, Array]] = []
    numbers: list[Array] = []
    lengths = {}
    for column in columns:
        raw = column_of(data, column.name)
        if isinstance(column, Numeric):
            encoded = column.encode(raw)
            numbers.append(encoded)
        else:
            if isinstance(column, Categorical) and column.share is not None:
                encoded = column.encode(raw, owners_of(columns)[column.name])
            else:
                encoded = column.encode(raw)
            (single if column.pooling is None else several).append((column, encoded))
        lengths[column.name] = len(encoded)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"data: expected columns of one length, got {lengths}")
    rows = next(iter(lengths.values()))
    codes = np.stack([one for _, one in single], axis=1) if single else np.zeros((rows, 0), np.int32)
    if rows > 1:
        is_known: Any = codes.any(axis=0)
        unknown = [column for (column, _), known in zip(single, is_known, strict=True) if not known]
        unknown += [column for column, block in several if not (block > 0).any()]
        if unknown:
            warn_of_unknown(data, columns, unknown)
    if several:
        codes = np.concatenate([codes, *(block for _, block in several)], axis=1)
    return Encoded(
        torch.from_numpy(codes),
        torch.from_numpy(np.concatenate(numbers, axis=1) if numbers else np.zeros((rows, 0), np.float32)),
    )


def warn_of_unknown(data: Table, columns: Sequence[Column], unknown: Sequence[EmbeddedColumn]) -> None:
    """A warning, at whoever called the library, for each column of which no value is known."""
    owners = owners_of(columns)
    for column in unknown:
        raw = column_of(data, column.name)
        warn_caller(f"column {column.name!r}: {said_of_unknown(column, raw, owners[column.name])}")


def to_json(column: Column) -> dict[str, Any]:
    """A column as plain values."""
    fields = asdict(column)
    if fields.get("share") is not None:
        fields = {name: value for name, value in fields.items() if name not in ("values", "size", "width")}
    usual: dict[str, Any] = {**dict.fromkeys(OPTIONAL), "keep": "last"}
    kept = {name: value for name, value in fields.items() if name not in usual or value != usual[name]}
    return {"kind": type(column).__name__} | kept


def from_json(fields: Mapping[str, Any]) -> Column:
    """The column that :func:`to_json` wrote.

    Raises:
        ValueError: it is of an unknown kind.
    """
    kinds: dict[str, type[Column]] = {kind.__name__: kind for kind in COLUMN_TYPES}
    rest = dict(fields)
    kind = rest.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"columns: expected a kind of {', '.join(kinds)}, got {kind!r}")
    return kinds[kind](**rest)

"""Columns of a table, of every kind: whose embedding each has, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .categorical import Categorical
from .hashed import Hashed
from .numeric import Numeric

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

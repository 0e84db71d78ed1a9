"""Tables and rows as the codes and numbers that a model reads; kept in a file of JSON."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .caller import warn_caller
from .categorical import Categorical
from .columns import COLUMN_TYPES, Column, EmbeddedColumn, from_json, owners_of, to_json
from .few_rows import FewRows
from .numeric import Numeric
from .scalars import shown
from .tables import Array, Table, check_names, columns_named
from .unknown import said_of_unknown

FORMAT, VERSION = "ple_fast_encoder", 1
MANY_MORE = 10
"""Times as many rows as in the table that a warning was given of: another one is worth a warning of its own."""


class Encoder:
    """Raw columns as codes and numbers, for a model that was trained with the same columns.

    Any number of threads may share one.

    Args:
        columns: :class:`Categorical`, :class:`Hashed` and :class:`Numeric`.

    Raises:
        TypeError: no column, or one of another type.
        ValueError: a column twice; it shares the embedding of one that is not among ``columns``.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        given: Sequence[Any] = columns
        wrong = [column for column in given if not isinstance(column, COLUMN_TYPES)]
        if wrong or not given:
            got = repr(wrong[0]) if wrong else "none"
            raise TypeError(
                f"columns: expected at least one Categorical, Hashed or Numeric, got {got}; columns_from makes them"
            )
        self.columns: tuple[Column, ...] = tuple(columns)
        check_names(column.name for column in self.columns)
        self._owners = owners_of(self.columns)
        self._few = FewRows(self.columns, self._owners)
        self._warned: dict[Any, int] = {}
        """By the name of a column that was warned of: the rows of the largest such table. Threads that meet there warn
        twice, at worst."""

    def __reduce__(self) -> Any:
        """Copies and pickles are made of the columns."""
        return type(self), (self.columns,)

    @property
    def num_codes(self) -> int:
        """C: codes per row."""
        embedded = (column for column in self.columns if not isinstance(column, Numeric))
        return sum(column.max_length or 1 for column in embedded)

    @property
    def num_numbers(self) -> int:
        """N: numbers per row."""
        return self._few.features

    def encode(self, data: Table) -> tuple[Array, Array]:
        """A table, columns by name, as arrays.

        Returns:
            Codes, int32 ``(B, C)``; 0 is the unknown value. One for each column of one value per row, in the order of
            the columns, and then ``max_length`` for each column of several, with -1 behind the last value of a row.
            Numbers, float32 ``(B, N)``, standardised and finite.

        Warns:
            UserWarning: of two or more rows not one has a value of a column that the column knows; once per column, and
                again of a table of ten times as many rows.

        Raises:
            TypeError: it is no table, or a column holds other values than it was declared with.
            ValueError: a column is missing, not one-dimensional or of another length, or holds NaN or infinity.
        """
        raws = columns_named(data, (column.name for column in self.columns))
        found = self._few.encode(raws, self._encode_one)
        codes, numbers, unknown = self._encode(raws) if found is None else found
        for column in unknown:
            if len(codes) >= MANY_MORE * self._warned.get(column.name, 0):
                raw = raws[self.columns.index(column)]
                warn_caller(f"column {column.name!r}: {said_of_unknown(column, raw, self._owners[column.name])}")
                self._warned[column.name] = len(codes)
        return codes, numbers

    def warn_anew(self) -> None:
        """Forgets what it has warned of: other data comes than before, such as that of another training."""
        self._warned.clear()

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Array, Array]:
        """Rows as a request of JSON holds them, such as ``[{"age": 37, "tags": ["a", "b"]}, ...]``: see :meth:`encode`.

        Keys that are no columns are left alone. None is a missing value.

        Raises:
            TypeError: no list of mappings; and as :meth:`encode`.
            ValueError: a row without a column; and as :meth:`encode`.
        """
        given: Any = rows
        if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Sequence):
            mend = "; write [row]" if isinstance(given, Mapping) else ""
            raise TypeError(f"rows: expected a list of mappings by column, got {type(rows).__name__}{mend}")
        try:
            return self.encode({column.name: [row[column.name] for row in rows] for column in self.columns})
        except (KeyError, TypeError):
            self._check_rows(rows)
            raise

    def _check_rows(self, rows: Sequence[Any]) -> None:
        for place, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise TypeError(f"rows[{place}]: expected a mapping by column, got {shown(row)}") from None
            for column in self.columns:
                if column.name not in row:
                    raise ValueError(
                        f"rows[{place}]: expected a value of {column.name!r}, got {list(row)[:60]}; write None where "
                        "it is missing"
                    ) from None

    def _encode_one(self, column: Column, raw: Any) -> Array:
        if isinstance(column, Categorical) and column.share is not None:
            return column.encode(raw, self._owners[column.name])
        return column.encode(raw)

    def _encode(self, raws: Sequence[Any]) -> tuple[Array, Array, list[EmbeddedColumn]]:
        """Codes, numbers, and the columns of which no value is known."""
        single: list[tuple[EmbeddedColumn, Array]] = []
        several: list[tuple[EmbeddedColumn, Array]] = []
        numbers: list[Array] = []
        lengths = {}
        for column, raw in zip(self.columns, raws, strict=True):
            encoded = self._encode_one(column, raw)
            if isinstance(column, Numeric):
                numbers.append(encoded)
            else:
                (single if column.pooling is None else several).append((column, encoded))
            lengths[column.name] = len(encoded)
        if len(set(lengths.values())) > 1:
            raise ValueError(f"data: expected columns of one length, got {lengths}")
        rows = next(iter(lengths.values()))
        codes = np.stack([one for _, one in single], axis=1) if single else np.zeros((rows, 0), np.int32)
        unknown: list[EmbeddedColumn] = []
        if rows > 1:
            is_known: Any = codes.any(axis=0)
            unknown = [column for (column, _), known in zip(single, is_known, strict=True) if not known]
            unknown += [column for column, block in several if not (block > 0).any()]
        if several:
            codes = np.concatenate([codes, *(block for _, block in several)], axis=1)
        return codes, np.concatenate(numbers, axis=1) if numbers else np.zeros((rows, 0), np.float32), unknown

    def save(self, file: str | Path) -> None:
        """Writes the columns, with vocabularies and statistics, as JSON; a file that is there is replaced in one step.

        Raises:
            OSError: it cannot be written.
        """
        file = Path(file)
        columns = [to_json(column) for column in self.columns]
        text = json.dumps({"format": FORMAT, "version": VERSION, "columns": columns}, allow_nan=False)
        fresh = file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp")
        try:
            with fresh.open("x", encoding="utf-8") as stream:
                stream.write(text + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            fresh.replace(file)
        finally:
            fresh.unlink(missing_ok=True)

    @classmethod
    def load(cls, file: str | Path) -> Encoder:
        """The encoder that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is damaged, of another kind or of a newer version.
        """
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: expected JSON that Encoder.save wrote, got {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{file}: expected the format {FORMAT!r}, got another file; Encoder.save writes it")
        if content.get("version") != VERSION:
            raise ValueError(
                f"{file}: expected version {VERSION}, got {shown(content.get('version'))}; a newer ple_fast wrote it, "
                "take that one's ple_fast_encoder"
            )
        try:
            return cls([from_json(fields) for fields in content["columns"]])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{file}: expected columns that Encoder.save wrote, got {error!r}") from error

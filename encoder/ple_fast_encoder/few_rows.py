"""A handful of rows at once: cell by cell in plain Python, and all numbers in one pass of NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .cells import Unusual, as_codes, cells_of_few, coder_of, floats_of, lists_coder
from .columns import Column, EmbeddedColumn
from .numeric import Numeric
from .tables import Array

FEW = 64
"""Rows; of more a pass of NumPy per column is faster."""


class FewRows:
    """What encodes few rows of some columns.

    The results are those of the columns' own ``encode``, bit for bit, and so are the errors: a column with unusual
    cells goes there.

    Args:
        owners: by name, the column that the embedding of each belongs to.
    """

    def __init__(self, columns: Sequence[Column], owners: Mapping[str, EmbeddedColumn]) -> None:
        self._readers: list[tuple[Column, Any]] = []
        numeric = [column for column in columns if isinstance(column, Numeric)]
        for column in columns:
            if isinstance(column, Numeric):
                self._readers.append((column, None))
            elif column.pooling is None:
                self._readers.append((column, coder_of(owners[column.name])))
            else:
                self._readers.append((column, lists_coder(column, owners[column.name])))
        self._mean = np.array([[column.mean] for column in numeric], dtype=np.float64)
        self._std = np.array([[column.std] for column in numeric], dtype=np.float64)
        self._logs = [place for place, column in enumerate(numeric) if column.transform == "log1p"]
        self._log_index: Any = slice(None) if len(self._logs) == len(numeric) else self._logs
        self._places: list[int] = []
        """Of each numeric column its first feature."""
        self.features = 0
        for column in numeric:
            self._places.append(self.features)
            self.features += column.features
        self._indicators = [place for place, column in enumerate(numeric) if column.features == 2]

    def encode(self, raws: Sequence[Any], encode_one: Any) -> tuple[Array, Array, list[EmbeddedColumn]] | None:
        """Codes ``(B, C)``, numbers ``(B, N)``, and the columns of which no value is known; None where it cannot.

        Args:
            raws: the columns, in order.
            encode_one: called with a column and what is unusual of it.
        """
        try:
            rows = len(raws[0])
        except TypeError:
            return None
        if not 0 < rows <= FEW:
            return None
        single: list[list[int]] = []
        several: list[list[list[int]]] = []
        numbers: list[list[float]] = []
        as_they_are: list[tuple[int, Array]] = []
        """Features of columns with unusual cells, each with the place of the first."""
        unknown: list[EmbeddedColumn] = []
        unknown_lists: list[EmbeddedColumn] = []
        for (column, reader), raw in zip(self._readers, raws, strict=True):
            try:
                cells = cells_of_few(raw)
                if isinstance(column, Numeric):
                    found: Any = floats_of(cells, column.missing != "error")
                else:
                    found = reader(cells)
            except Unusual:
                try:
                    own = encode_one(column, raw)
                except (TypeError, ValueError):  # which is said of the first column that is wrong
                    return None
                found = own.tolist()
                if isinstance(column, Numeric):
                    as_they_are.append((self._places[len(numbers)], own))
                    found = [0.0] * len(own)
            if len(found) != rows:
                return None
            if isinstance(column, Numeric):
                numbers.append(found)
            elif column.pooling is None:
                single.append(found)
                if rows > 1 and not any(found):
                    unknown.append(column)
            else:
                several.append(found)
                if rows > 1 and not any(code > 0 for codes in found for code in codes):
                    unknown_lists.append(column)
        scaled = self._scaled(numbers, rows)
        if scaled is not None:
            for place, own in as_they_are:
                scaled[:, place : place + own.shape[1]] = own
        return None if scaled is None else (as_codes(single, several, rows), scaled, unknown + unknown_lists)

    def _scaled(self, numbers: list[list[float]], rows: int) -> Array | None:
        """float32 ``(B, features)``; None where one is beyond float32."""
        if not numbers:
            return np.zeros((rows, 0), np.float32)
        values = np.array(numbers)
        with np.errstate(over="ignore"):  # what overflows is for the column's own encode
            if self._logs:
                logs = values[self._log_index]
                values[self._log_index] = np.sign(logs) * np.log1p(np.abs(logs))
            scaled = ((values - self._mean) / self._std).astype(np.float32)
        absent = np.isnan(values)
        scaled[absent] = 0.0
        if not np.isfinite(scaled).all():
            return None
        if not self._indicators:
            return np.ascontiguousarray(scaled.T)
        features = np.empty((rows, self.features), np.float32)
        features[:, self._places] = scaled.T
        features[:, [self._places[place] + 1 for place in self._indicators]] = absent[self._indicators].T
        return features

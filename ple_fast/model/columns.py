"""Columns of a table as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ple_fast_encoder import Column, Encoder
from ple_fast_encoder.tables import Table


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


def encode(data: Table, columns: Sequence[Column]) -> Encoded:
    """Raw columns as codes and numbers, in the order of ``columns``; see :class:`Encoded`.

    Warns:
        UserWarning: of two or more rows not one has a value of a column that the column knows.

    Raises:
        TypeError: a column holds other values than it was declared with.
        ValueError: a column is missing, not one-dimensional or of another length, or holds NaN or infinity; it shares
            the embedding of one that is not among ``columns``.
    """
    return encoded(Encoder(columns), data)


def encoded(encoder: Encoder, data: Table) -> Encoded:
    """What an encoder makes of a table, as tensors."""
    codes, numbers = encoder.encode(data)
    return Encoded(torch.from_numpy(codes), torch.from_numpy(numbers))

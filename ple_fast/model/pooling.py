"""Pooling of the embeddings of a row's values, in operators of PyTorch that every device, compiler and export has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ple_fast_encoder.bags import Pooling


class Bag(NamedTuple):
    """A column of several values per row, among the look-ups of a table."""

    max_length: int
    pooling: Pooling


def pooled(vectors: Tensor, codes: Tensor, singles: int, bags: Sequence[Bag]) -> list[Tensor]:
    """Look-ups of columns of one value per row, and behind them of ``bags``, as features.

    Args:
        vectors: ``(B, singles + the bags' max_length, W)``.
        codes: ``(B, ...)`` of the same places: below 0 where there is no value.

    Returns:
        ``(B, singles W)`` where there are any, then ``(B, W)`` for each bag.
    """
    lengths = [*([singles] if singles else []), *(bag.max_length for bag in bags)]
    # split, whose backward writes one gradient; that of each slice would fill one of zeros.
    parts, present = vectors.split(lengths, dim=1), (codes >= 0).split(lengths, dim=1)
    found = [parts[0].flatten(1)] if singles else []
    for part, there, bag in zip(parts[len(found) :], present[len(found) :], bags, strict=True):
        found.append(pool(part, there, bag.pooling))
    return found


def pool(vectors: Tensor, present: Tensor, pooling: Pooling) -> Tensor:
    """``vectors (B, L, W)`` where ``present (B, L)``, bool, pooled: ``(B, W)``, zeros where there is none.

    What is not present is left out, and not multiplied by 0: NaN there stays there, and no gradient goes there.
    """
    absent = ~present.unsqueeze(2)
    if pooling == "max":
        return vectors.masked_fill(absent, -math.inf).amax(1).masked_fill(absent.all(1), 0.0)
    total = vectors.masked_fill(absent, 0.0).sum(1)
    return total / present.sum(1, keepdim=True).clamp(min=1) if pooling == "mean" else total

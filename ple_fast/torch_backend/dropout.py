"""Dropout from a seed: the same mask again in backward, in a second forward, and in either implementation.

Rows are drawn in chunks of fixed size, each from its own generator, so a mask does not depend on how the batch is cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK_ROWS = 512
"""Row blocks begin at multiples of this."""


def mask(seed: int, position: int, start: int, like: Tensor, p: float) -> Tensor:
    """Scaled mask ``0`` or ``1 / (1 - p)`` for rows ``start``... of layer ``position``, in the shape of ``like``."""
    assert start % MASK_ROWS == 0
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    for row in range(0, like.shape[0], MASK_ROWS):
        chunk = out[row : row + MASK_ROWS]
        generator = torch.Generator(like.device)
        generator.manual_seed((seed * 1_000_003 + position * 7_919 + (start + row) // MASK_ROWS) % (2**63))
        chunk.bernoulli_(1.0 - p, generator=generator)
    return out.div_(1.0 - p)

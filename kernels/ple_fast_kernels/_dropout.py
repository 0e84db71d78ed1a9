"""Dropout of a tile by a counter-based generator: no mask is stored, backward and every backend draw the same one.

The bits are SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a word for four neighbouring elements of a row, 16 bits
each. They depend on seed, layer, row and column alone, as in ``ple_fast/torch_backend/dropout.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LEVELS = 1 << 16
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)


class Dropout(NamedTuple):
    """Dropout of one layer ``(B, n, H)`` at one call."""

    seed: Tensor
    """One int64, read by the kernel: a CUDA graph that draws it drops other elements at every replay."""
    layer: int
    """Number of the layer: every one has a mask of its own."""
    rate: float
    """Rounded to a multiple of 2**-16, but neither 0 nor 1."""


class DropoutConstants(NamedTuple):
    """Of a kernel; KEEPS 0: no dropout."""

    LAYER: int
    KEEPS: int
    SCALE: float


_NO_DROPOUT = DropoutConstants(0, 0, 1.0)


def dropout_constants(dropout: Dropout | None) -> DropoutConstants:
    """Constants of dropout, or of none."""
    if dropout is None:
        return _NO_DROPOUT
    keeps = min(max(round((1.0 - dropout.rate) * LEVELS), 1), LEVELS - 1)
    return DropoutConstants(dropout.layer, keeps, 1.0 / (1.0 - dropout.rate))


@triton.jit
def _mix(bits):
    """SplitMix64's output function."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


@triton.jit
def _is_kept(bits, lane, KEEPS: tl.constexpr):
    """Whether the 16 bits of ``lane``, as a signed number, are among the KEEPS largest."""
    return ((bits >> (16 * lane)) + 32768) & 65535 >= 65536 - KEEPS


@triton.jit
def drop(x, Seed, o_m, first, WIDTH: tl.constexpr, UNITS: tl.constexpr, LAYER: tl.constexpr, KEEPS: tl.constexpr,
         SCALE: tl.constexpr):  # fmt: skip
    """``x`` ``[M, N]`` times SCALE where it is kept, else 0: rows ``o_m``, columns from ``first`` of rows of WIDTH.

    ``first`` is a multiple of N beyond a multiple of UNITS.
    """
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    WORDS: tl.constexpr = (WIDTH + 3) // 4
    key = _mix(_mix(tl.load(Seed).to(tl.uint64) + GOLDEN) + ((LAYER * GOLDEN) & 0xFFFFFFFFFFFFFFFF))
    of_row = key + o_m.to(tl.uint64) * ((WORDS * GOLDEN) & 0xFFFFFFFFFFFFFFFF)
    if UNITS % 4 == 0:  # a word serves four elements of the tile
        word = first // 4 + 1 + tl.arange(0, N // 4)
        bits = _mix(of_row[:, None] + word.to(tl.uint64)[None, :] * GOLDEN)
        even = tl.join(_is_kept(bits, 0, KEEPS).to(tl.int8), _is_kept(bits, 2, KEEPS).to(tl.int8))
        odd = tl.join(_is_kept(bits, 1, KEEPS).to(tl.int8), _is_kept(bits, 3, KEEPS).to(tl.int8))
        kept = tl.join(even, odd).reshape(M, N) != 0
    else:
        column = first + tl.arange(0, N)
        bits = _mix(of_row[:, None] + (column // 4 + 1).to(tl.uint64)[None, :] * GOLDEN)
        kept = _is_kept(bits, (column % 4).to(tl.uint64)[None, :], KEEPS)
    return x * kept * SCALE  # a NaN stays a NaN, as PyTorch's does; what is dropped does not overflow first


@triton.jit
def drop_kept(y, Seed, o_m, first, NAME: tl.constexpr, WIDTH: tl.constexpr, UNITS: tl.constexpr, LAYER: tl.constexpr,
              KEEPS: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    """``drop`` of an activation's output that backward reads: -0 where ReLU let nothing through, so that ``undropped``
    can tell that from what was dropped, 0."""
    out = drop(y, Seed, o_m, first, WIDTH, UNITS, LAYER, KEEPS, SCALE)
    if NAME == "relu":
        out = tl.where(y == 0, tl.abs(out) * -1.0, out)  # Triton makes 0 of a literal -0
    return out


@triton.jit
def undropped(kept, NAME: tl.constexpr, SCALE: tl.constexpr, STORED: tl.constexpr):
    """What ``derive`` reads of an activation whose output went through ``drop_kept`` and was stored as STORED."""
    if SCALE != 1.0:
        if NAME == "tanh" or NAME == "sigmoid":
            # An output of 1 or -1 has derivative 0: the quotient alone would be off by a rounding of STORED.
            one = tl.full([1, 1], SCALE, kept.dtype).to(STORED).to(kept.dtype)
            kept = tl.where(tl.abs(kept) >= one, 1.0, kept * (1.0 / SCALE))
        elif NAME == "relu":  # where ReLU let through what was dropped, a gradient that is not finite is NaN
            if kept.dtype == tl.float64:
                bits = kept.to(tl.int64, bitcast=True)
            else:
                bits = kept.to(tl.int32, bitcast=True)
            kept = tl.where(bits == 0, 1.0, kept)
    return kept

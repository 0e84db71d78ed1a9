"""The parts of several sums added up in one launch, in a fixed order."""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from ._launch import CACHED, Prepared, cdiv, prepare
from ._tiles import REDUCE_TILE

ALIGNMENT = 16
"""Every sum begins at a multiple of so many elements of the flat buffer, and every number of parts."""


@triton.jit
def _reduce_parts_kernel(
    Parts, Splits, Out, START: tl.constexpr, SIZE: tl.constexpr, OUT_AT: tl.constexpr, STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``Out[region] = sum_z Parts[region][z]``, in the order of z, for all regions.

    Parts: region r ``(Splits[r STEP], SIZE[r])``, one after the other; Splits ``(regions STEP,)``; Out: region r
    ``(SIZE[r],)`` at ``OUT_AT[r]``; START counts programs.
    """
    pid = tl.program_id(0)
    for r in tl.static_range(len(SIZE)):
        splits = tl.load(Splits + r * STEP).to(tl.int32)
        if (pid >= START[r]) & (pid < START[r + 1]):
            o = (pid - START[r]).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK,), Parts.dtype.element_ty)
            p = Parts + o
            for _ in range(splits):
                total += tl.load(p, mask=o < SIZE[r], other=0.0)
                p += SIZE[r]
            tl.store(Out + OUT_AT[r] + o, total.to(Out.dtype.element_ty), mask=o < SIZE[r])
        Parts += splits.to(tl.int64) * SIZE[r]


@lru_cache(maxsize=CACHED)
def _prepared(sizes: tuple[int, ...], out_at: tuple[int, ...]) -> tuple[Prepared, int]:
    start = [0]
    for size in sizes:
        start.append(start[-1] + cdiv(size, REDUCE_TILE.columns))
    run = prepare(
        _reduce_parts_kernel,
        REDUCE_TILE,
        START=tuple(start),
        SIZE=sizes,
        OUT_AT=out_at,
        STEP=ALIGNMENT,
        BLOCK=REDUCE_TILE.columns,
    )
    return run, start[-1]


def reduce_parts(parts: Tensor, splits: Tensor, out: Tensor, sizes: tuple[int, ...], out_at: tuple[int, ...]) -> None:
    """Add up the parts of every region.

    Args:
        parts: region r ``(splits[ALIGNMENT r], sizes[r])``, one after the other, flat.
        splits: the number of parts of each region, ``ALIGNMENT`` elements apart.
        out: gets region r at ``out_at[r]``, flat.
    """
    run, programs = _prepared(sizes, out_at)
    run((programs,), out.device, Parts=parts, Splits=splits, Out=out)

"""Batch norm over the rows: merging what the tiles of a product found, and its backward."""

from __future__ import annotations

import struct
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dropout import drop
from ._launch import CACHED, Prepared, cdiv, prepare, wide_of
from ._layer_end import affine, column_statistics, to_norm
from ._level_tiles import end_tile
from ._tiles import Tile
from .layer_end import EndConstants, LayerEnd

MERGE_TILE = Tile(64, 32, 0, 8, 1)
"""Parts that a program adds up at once, by columns."""
PART_ROWS = 256
"""Rows whose sums one program of the backward writes."""


@triton.jit
def _moved(running, new, take):
    """``running`` on its way to ``new`` by the share ``take``."""
    moved = running + (new - running) * take
    # The difference of two infinities is NaN, where PyTorch's sum of shares is infinite.
    return tl.where(tl.abs(moved) < float("inf"), moved, running * (1.0 - take) + new * take)


@triton.jit(do_not_specialize=["B", "tiles", "factor", "rest"])
def _batch_norm_merge_kernel(
    Moments, Mean, Rstd, RunningMean, RunningVar, B, tiles, factor, rest,
    WIDTH: tl.constexpr, TILE_ROWS: tl.constexpr, EPS: tl.constexpr, MOVES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / deviation of every column over all B rows, out of the moments of tiles of TILE_ROWS rows; running
    statistics move by ``factor + rest``.

    Moments ``(tiles, 2, WIDTH)``, Mean, Rstd, RunningMean, RunningVar ``(WIDTH,)``.
    """
    wide: tl.constexpr = Moments.dtype.element_ty
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < WIDTH
    o_t = tl.arange(0, BLOCK_T)
    tail = (B - tl.cast(tiles - 1, tl.int64) * TILE_ROWS).to(tl.int32)  # rows of the last tile
    total = tl.zeros((BLOCK_T, BLOCK_C), wide)
    for t in range(0, tiles, BLOCK_T):
        m = (t + o_t < tiles)[:, None] & m_c[None, :]
        rows = tl.where(t + o_t == tiles - 1, tail, TILE_ROWS)
        p = Moments + (t + o_t).to(tl.int64)[:, None] * (2 * WIDTH) + o_c[None, :]
        total += tl.load(p, mask=m, other=0.0) * rows[:, None]
    mean = tl.sum(total, 0) / B
    total = tl.zeros((BLOCK_T, BLOCK_C), wide)
    for t in range(0, tiles, BLOCK_T):
        m = (t + o_t < tiles)[:, None] & m_c[None, :]
        rows = tl.where(t + o_t == tiles - 1, tail, TILE_ROWS)
        p = Moments + (t + o_t).to(tl.int64)[:, None] * (2 * WIDTH) + o_c[None, :]
        gap = tl.load(p, mask=m, other=0.0) - mean[None, :]
        total += tl.where(m, tl.load(p + WIDTH, mask=m, other=0.0) + gap * gap * rows[:, None], 0.0)
    squares = tl.sum(total, 0)
    tl.store(Mean + o_c, mean, mask=m_c)
    tl.store(Rstd + o_c, 1.0 / tl.sqrt(squares / B + EPS), mask=m_c)
    if MOVES:
        take = tl.cast(factor, wide) + tl.cast(rest, wide)
        moved = _moved(tl.load(RunningMean + o_c, mask=m_c, other=0.0).to(wide), mean, take)
        tl.store(RunningMean + o_c, moved.to(RunningMean.dtype.element_ty), mask=m_c)
        moved = _moved(tl.load(RunningVar + o_c, mask=m_c, other=0.0).to(wide), squares / (B - 1), take)
        tl.store(RunningVar + o_c, moved.to(RunningVar.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=["B"])
def _batch_norm_sums_kernel(
    D, Z, Mean, Spread, NormW, NormBias, Seed, Parts, B,
    UNITS: tl.constexpr, MEMBERS: tl.constexpr, D_ROW: tl.constexpr, Z_ROW: tl.constexpr, PLACE: tl.constexpr,
    EPS: tl.constexpr, AFFINE: tl.constexpr, IS_VARIANCE: tl.constexpr, NAME: tl.constexpr, VALUE: tl.constexpr,
    LAYER: tl.constexpr, KEEPS: tl.constexpr, SCALE: tl.constexpr, PART: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Per part of the rows: column sums of the gradient of the norm's output, and of it times the normalised input.

    D, Z ``(B, n, UNITS)``, Mean, Spread, NormW, NormBias ``(n, UNITS)``, Seed: one int64, Parts
    ``(parts, 2, n UNITS)``.
    """
    wide: tl.constexpr = Parts.dtype.element_ty
    TILES: tl.constexpr = (UNITS + BLOCK_N - 1) // BLOCK_N
    WIDTH: tl.constexpr = UNITS * MEMBERS
    part = tl.program_id(0)
    e = tl.program_id(1) // TILES
    first = (tl.program_id(1) % TILES) * BLOCK_N
    o_n = first + tl.arange(0, BLOCK_N)
    m_n = o_n < UNITS
    o_c = e * UNITS + o_n
    mean, rstd = column_statistics(Mean, Spread, o_c, m_n, EPS, IS_VARIANCE, wide)
    norm_w, norm_b = affine(NormW, NormBias, o_c, m_n, AFFINE, wide)
    sums = tl.zeros((BLOCK_N,), wide)
    products = tl.zeros((BLOCK_N,), wide)
    begin = part.to(tl.int64) * PART
    for r in range(0, tl.minimum(B - begin, PART).to(tl.int32), BLOCK_M):
        o_m = begin + r + tl.arange(0, BLOCK_M)
        m_m = o_m < B
        m_mn = m_m[:, None] & m_n[None, :]
        d = tl.load(D + o_m[:, None] * D_ROW + o_c[None, :], mask=m_mn, other=0.0).to(wide)
        z = tl.load(Z + o_m[:, None] * Z_ROW + o_c[None, :], mask=m_mn, other=0.0).to(wide)
        if KEEPS > 0:
            d = drop(d, Seed, o_m, e * UNITS + first, WIDTH, UNITS, LAYER, KEEPS, SCALE)
        d, normed = to_norm(d, z, mean, rstd, norm_w, norm_b, PLACE, NAME, VALUE)
        d = tl.where(m_m[:, None], d, 0.0)
        sums += tl.sum(d, 0)
        products += tl.sum(tl.where(m_m[:, None], d * normed, 0.0), 0)
    p_parts = Parts + part.to(tl.int64) * (2 * WIDTH) + o_c
    tl.store(p_parts, sums, mask=m_n)
    tl.store(p_parts + WIDTH, products, mask=m_n)


@triton.jit(do_not_specialize=["B", "parts"])
def _norm_sums_merge_kernel(
    Parts, DWeight, DBias, Means, B, parts,
    WIDTH: tl.constexpr, PRODUCTS: tl.constexpr, SAVE_GRADS: tl.constexpr, SAVE_MEANS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over all parts, in order: gradients of weight and bias, and, divided by B, what the input's reads; without
    PRODUCTS the parts are those of a bias alone.

    Parts ``(parts, 2, WIDTH)``, without PRODUCTS ``(parts, 1, WIDTH)``, DWeight, DBias ``(WIDTH,)``, Means
    ``(2, WIDTH)``.
    """
    wide: tl.constexpr = Parts.dtype.element_ty
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < WIDTH
    o_t = tl.arange(0, BLOCK_T)
    sums = tl.zeros((BLOCK_T, BLOCK_C), wide)
    products = tl.zeros((BLOCK_T, BLOCK_C), wide)
    for t in range(0, parts, BLOCK_T):
        m = (t + o_t < parts)[:, None] & m_c[None, :]
        p = Parts + (t + o_t).to(tl.int64)[:, None] * (2 * WIDTH if PRODUCTS else WIDTH) + o_c[None, :]
        sums += tl.load(p, mask=m, other=0.0)
        if PRODUCTS:
            products += tl.load(p + WIDTH, mask=m, other=0.0)
    total = tl.sum(sums, 0)
    product = tl.sum(products, 0)
    if SAVE_GRADS:
        tl.store(DBias + o_c, total.to(DBias.dtype.element_ty), mask=m_c)
        if PRODUCTS:
            tl.store(DWeight + o_c, product.to(DWeight.dtype.element_ty), mask=m_c)
    if SAVE_MEANS:
        tl.store(Means + o_c, total / B, mask=m_c)
        tl.store(Means + WIDTH + o_c, product / B, mask=m_c)


@lru_cache(maxsize=CACHED)
def _merge(width: int, tile_rows: int, eps: float, moves: bool) -> Prepared:
    return prepare(
        _batch_norm_merge_kernel, MERGE_TILE, WIDTH=width, TILE_ROWS=tile_rows, EPS=eps, MOVES=moves,
        BLOCK_T=MERGE_TILE.rows, BLOCK_C=MERGE_TILE.columns,
    )  # fmt: skip


@lru_cache(maxsize=CACHED)
def _sums(tile: Tile, units: int, members: int, d_row: int, z_row: int, end: EndConstants) -> Prepared:
    return prepare(
        _batch_norm_sums_kernel, tile, UNITS=units, MEMBERS=members, D_ROW=d_row, Z_ROW=z_row, **end._asdict(),
        PART=PART_ROWS, BLOCK_M=tile.rows, BLOCK_N=tile.columns,
    )  # fmt: skip


@lru_cache(maxsize=CACHED)
def _sums_merge(width: int, products: bool, save_grads: bool, save_means: bool) -> Prepared:
    return prepare(
        _norm_sums_merge_kernel, MERGE_TILE, WIDTH=width, PRODUCTS=products, SAVE_GRADS=save_grads,
        SAVE_MEANS=save_means,
        BLOCK_T=MERGE_TILE.rows, BLOCK_C=MERGE_TILE.columns,
    )  # fmt: skip


def batch_norm_merge(
    moments: Tensor,
    rows: int,
    tile_rows: int,
    eps: float,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    factor: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Statistics of a batch out of those of its row tiles, as in Chan, Golub and LeVeque (1979).

    Args:
        moments: ``(row tiles, 2, C)`` of tiles of ``tile_rows`` rows, the last one shorter.
        running_mean, running_var: ``(C,)``, contiguous, moved in place where ``factor`` is positive:
            ``running += factor (batch - running)``, with the unbiased variance.

    Returns:
        Mean and ``1 / sqrt(variance + eps)``, ``(C,)``.
    """
    tiles, _, width = moments.shape
    mean, rstd = torch.empty((2, width), dtype=moments.dtype, device=moments.device).unbind(0)
    moves = factor > 0.0 and running_mean is not None
    # A kernel takes scalars in float32: what that cuts off comes as a second one.
    (head,) = struct.unpack("f", struct.pack("f", factor))
    _merge(width, tile_rows, eps, moves)(
        (cdiv(width, MERGE_TILE.columns),), moments.device,
        Moments=moments, Mean=mean, Rstd=rstd, RunningMean=running_mean if moves else None,
        RunningVar=running_var if moves else None, B=rows, tiles=tiles, factor=head, rest=factor - head,
    )  # fmt: skip
    return mean, rstd


def batch_norm_sums(d: Tensor, z: Tensor, end: LayerEnd) -> Tensor:
    """Per part of the rows sums of the gradient of the norm's output, and of it times the norm's normalised input.

    ``d``, ``z``, ``end``: as in ``layer_end_grad``. Returns ``(parts, 2, n H)``.
    """
    assert end.mean is not None and end.spread is not None
    rows, members, units = z.shape
    tile = end_tile(z, units)
    count = cdiv(rows, PART_ROWS)
    parts = torch.empty((count, 2, members * units), dtype=wide_of(z.dtype), device=z.device)
    _sums(tile, units, members, d.stride(0), z.stride(0), end.constants)(
        (count, members * cdiv(units, tile.columns)), z.device,
        D=d, Z=z, Mean=end.mean, Spread=end.spread, NormW=end.weight, NormBias=end.bias, Seed=end.seed, Parts=parts,
        B=rows,
    )  # fmt: skip
    return parts


def norm_sums_merge(
    parts: Tensor, rows: int, like: Tensor | None, *, means: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of weight and bias in the dtype and shape of ``like`` (None: not wanted), and the sums divided by
    ``rows``, ``(2, n H)``, if ``means``."""
    count, _, width = parts.shape
    dweight = dbias = found = None
    if like is not None:
        dweight, dbias = (torch.empty(like.shape, dtype=like.dtype, device=like.device) for _ in range(2))
    if means:
        found = torch.empty((2, width), dtype=parts.dtype, device=parts.device)
    _sums_merge(width, True, like is not None, means)(
        (cdiv(width, MERGE_TILE.columns),), parts.device,
        Parts=parts, DWeight=dweight, DBias=dbias, Means=found, B=rows, parts=count,
    )  # fmt: skip
    return dweight, dbias, found


def column_sums_merge(parts: Tensor, like: Tensor) -> Tensor:
    """Column sums of the rows of all parts, ``(parts, 1, C)``, in the dtype and shape of ``like``."""
    count, _, width = parts.shape
    total = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    _sums_merge(width, False, True, False)(
        (cdiv(width, MERGE_TILE.columns),), parts.device,
        Parts=parts, DWeight=None, DBias=total, Means=None, B=count, parts=count,
    )  # fmt: skip
    return total

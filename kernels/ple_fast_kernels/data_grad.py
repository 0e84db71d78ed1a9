"""Data gradient of a layer: what the layer below starts from, its activation's derivative and dropout included."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activations import HEAVY, derive
from ._dropout import drop, undropped
from ._launch import CACHED, Prepared, cdiv, prepare, wide_of
from ._layer_end import affine, column_statistics, to_norm
from ._matmul import accumulate, swizzle, tiles_of
from ._tiles import NARROW, Tile, cut_depth, matmul_tile
from .layer_end import NO_END, EndConstants, LayerEnd
from .persistent import data_grad_tile, persistent_data_grad


@triton.jit(do_not_specialize=["B", "depth"])
def _grouped_data_grad_kernel(
    D, W, Kept, Mean, Spread, NormW, NormBias, Seed, Out, Parts, B, depth,
    DEPTH: tl.constexpr, UNITS: tl.constexpr, MEMBERS: tl.constexpr, D_ROW: tl.constexpr, KEPT_ROW: tl.constexpr,
    OUT_ROW: tl.constexpr, PLACE: tl.constexpr, EPS: tl.constexpr, AFFINE: tl.constexpr, IS_VARIANCE: tl.constexpr,
    NAME: tl.constexpr, VALUE: tl.constexpr,
    LAYER: tl.constexpr, KEEPS: tl.constexpr, SCALE: tl.constexpr, SUMS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``Out[:, m] = (D[:, m] @ W[m]) f'(Kept[:, m])``: W ``(n, DEPTH, UNITS)``, UNITS the width of the layer below.

    With batch norm there: the gradient of the norm's output, and its sums over a tile's rows; so with SUMS.

    D ``(B, n, DEPTH)``, Kept, Out ``(B, n, UNITS)``, Mean, Spread, NormW, NormBias ``(n, UNITS)``, Seed: one int64,
    Parts ``(row tiles, 2, n UNITS)``, with SUMS ``(row tiles, 1, n UNITS)``.
    """
    wide: tl.constexpr = tl.float64 if D.dtype.element_ty == tl.float64 else tl.float32
    TILES: tl.constexpr = (UNITS + BLOCK_N - 1) // BLOCK_N
    i_m, i_n = swizzle(tl.program_id(0), tiles_of(B, BLOCK_M), TILES * MEMBERS, GROUP)
    e = i_n // TILES
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = (i_n % TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_n = o_m < B, o_n < UNITS
    p_d = D + tl.where(m_m, o_m, 0)[:, None] * D_ROW + (e * DEPTH + o_k)[None, :]
    p_w = W + (e.to(tl.int64) * DEPTH + o_k)[:, None] * UNITS + o_n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), wide)
    acc = accumulate(acc, p_d, p_w, depth, BLOCK_K, BLOCK_K * UNITS, m_n, DEPTH, UNITS % BLOCK_N != 0, PRECISION,
                     BLOCK_K)  # fmt: skip
    m_mn = m_m[:, None] & m_n[None, :]
    if KEEPS > 0:
        acc = drop(acc, Seed, o_m, e * UNITS + (i_n % TILES) * BLOCK_N, UNITS * MEMBERS, UNITS, LAYER, KEEPS, SCALE)
    if PLACE != "none":
        o_c = e * UNITS + o_n
        z = tl.load(Kept + o_m[:, None] * KEPT_ROW + o_c[None, :], mask=m_mn, other=0.0).to(wide)
        mean, rstd = column_statistics(Mean, Spread, o_c, m_n, EPS, IS_VARIANCE, wide)
        norm_w, norm_b = affine(NormW, NormBias, o_c, m_n, AFFINE, wide)
        acc, normed = to_norm(acc, z, mean, rstd, norm_w, norm_b, PLACE, NAME, VALUE)
        # Their means are subtracted from these numbers as they are stored.
        acc = tl.where(m_m[:, None], acc.to(Out.dtype.element_ty).to(wide), 0.0)
        p_parts = Parts + i_m.to(tl.int64) * (2 * UNITS * MEMBERS) + o_c
        tl.store(p_parts, tl.sum(acc, 0), mask=m_n)
        tl.store(p_parts + UNITS * MEMBERS, tl.sum(tl.where(m_m[:, None], acc * normed, 0.0), 0), mask=m_n)
    elif NAME != "identity":
        p_kept = Kept + o_m[:, None] * KEPT_ROW + (e * UNITS + o_n)[None, :]
        kept = undropped(tl.load(p_kept, mask=m_mn, other=0.0).to(wide), NAME, SCALE, Kept.dtype.element_ty)
        acc = derive(acc, kept, NAME, VALUE)
    out = acc.to(Out.dtype.element_ty)
    tl.store(Out + o_m[:, None] * OUT_ROW + (e * UNITS + o_n)[None, :], out, mask=m_mn)
    if SUMS:  # of what was stored: the accumulator's registers are free
        p_parts = Parts + i_m.to(tl.int64) * (UNITS * MEMBERS) + e * UNITS + o_n
        tl.store(p_parts, tl.sum(tl.where(m_m[:, None], out, 0.0).to(wide), 0), mask=m_n)


@lru_cache(maxsize=CACHED)
def _prepared(
    tile: Tile, precision: str, depth: int, units: int, members: int, d_row: int, kept_row: int, out_row: int,
    end: EndConstants, sums: bool,
) -> Prepared:  # fmt: skip
    return prepare(
        _grouped_data_grad_kernel, tile, DEPTH=depth, UNITS=units, MEMBERS=members, D_ROW=d_row, KEPT_ROW=kept_row,
        OUT_ROW=out_row, **end._asdict(), SUMS=sums, PRECISION=precision, BLOCK_M=tile.rows, BLOCK_N=tile.columns,
        BLOCK_K=tile.depth, GROUP=tile.group,
    )  # fmt: skip


def grouped_data_grad(
    d: Tensor,
    weight: Tensor,
    *,
    kept: Tensor | None = None,
    end: LayerEnd = NO_END,
    sums: bool = False,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``out[:, m] = (d[:, m] @ weight[m]) f'(kept[:, m])``: gradient of the linear layer below, before its activation.

    Args:
        d: ``(B, n, H)``, its last two axes contiguous. B at least 1.
        weight: ``(n, H, K)``, contiguous.
        kept: ``(B, n, K)``, its last two axes contiguous; what ``derive`` reads (an output as ``drop_kept`` left it),
            None for identity; with a norm the product of the layer below.
        end: what the layer below ends in: no norm, or batch norm.
        sums: without a norm, also leave what ``column_sums_merge`` adds up to the gradient of the bias below.
        tile: default from the tables, by which also programs that stay may take the product (``persistent.py``).

    Returns:
        ``(B, n, K)``; with a norm it is the gradient of the norm's output, and ``(parts, 2, n K)`` as in
        ``batch_norm_sums``; with ``sums`` ``(parts, 1, n K)``.
    """
    rows, (members, depth, units) = d.shape[0], weight.shape
    if tile is None and end.mean is None and end.dropout is None:
        wide = data_grad_tile(d, weight, end.activation[0])
        if wide is not None:
            return persistent_data_grad(d, weight, kept, end.activation, wide, sums=sums)
    out = torch.empty((rows, members, units), dtype=d.dtype, device=d.device)
    if tile is None:
        tile = cut_depth(matmul_tile("data_grad", d, rows, units, members, precision), depth)
        if end.mean is not None or end.dropout is not None or end.activation[0] in HEAVY:
            tile = tile._replace(columns=min(tile.columns, NARROW))
    parts = None
    sums = sums and end.mean is None
    if end.mean is not None or sums:
        shape = (cdiv(rows, tile.rows), 1 if sums else 2, members * units)
        parts = torch.empty(shape, dtype=wide_of(d.dtype), device=d.device)
    kept_row = 0 if kept is None else kept.stride(0)
    run = _prepared(tile, precision, depth, units, members, d.stride(0), kept_row, out.stride(0), end.constants, sums)
    run(
        (cdiv(rows, tile.rows) * members * cdiv(units, tile.columns),), d.device,
        D=d, W=weight, Kept=kept, Mean=end.mean, Spread=end.spread, NormW=end.weight, NormBias=end.bias, Seed=end.seed,
        Out=out, Parts=parts, B=rows, depth=depth,
    )  # fmt: skip
    return out, parts

"""Backward of layer norm over the units of each member, with the activation and the dropout around it."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dropout import drop
from ._launch import CACHED, Prepared, cdiv, prepare, wide_of
from ._layer_end import affine, from_norm, to_norm
from ._level_tiles import whole_row_tile
from ._tiles import Tile
from .batch_norm import norm_sums_merge
from .layer_end import EndConstants, LayerEnd

PART_ROWS = 128
"""Rows whose sums one program writes."""


@triton.jit
def _at_norm(
    D, Z, NormW, NormBias, Seed, o_m, m_m, e, mean, rstd, CHUNK: tl.constexpr,
    UNITS: tl.constexpr, MEMBERS: tl.constexpr, D_ROW: tl.constexpr, Z_ROW: tl.constexpr, PLACE: tl.constexpr,
    AFFINE: tl.constexpr, NAME: tl.constexpr, VALUE: tl.constexpr, LAYER: tl.constexpr, KEEPS: tl.constexpr,
    SCALE: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk of units: gradient of the norm's output and the normalised input, 0 beyond the last unit; the product
    and the norm's weight."""
    o_n = CHUNK * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < UNITS
    m_mn = m_m[:, None] & m_n[None, :]
    o_c = e * UNITS + o_n
    d = tl.load(D + o_m[:, None] * D_ROW + o_c[None, :], mask=m_mn, other=0.0).to(WIDE)
    z = tl.load(Z + o_m[:, None] * Z_ROW + o_c[None, :], mask=m_mn, other=0.0).to(WIDE)
    norm_w, norm_b = affine(NormW, NormBias, o_c, m_n, AFFINE, WIDE)
    if KEEPS > 0:
        d = drop(d, Seed, o_m, e * UNITS + CHUNK * BLOCK_N, UNITS * MEMBERS, UNITS, LAYER, KEEPS, SCALE)
    d, normed = to_norm(d, z, mean, rstd, norm_w, norm_b, PLACE, NAME, VALUE)
    return tl.where(m_mn, d, 0.0), tl.where(m_mn, normed, 0.0), z, norm_w


@triton.jit(do_not_specialize=["B"])
def _layer_norm_grad_kernel(
    D, Z, Mean, Rstd, NormW, NormBias, Seed, Out, Parts, B,
    UNITS: tl.constexpr, MEMBERS: tl.constexpr, D_ROW: tl.constexpr, Z_ROW: tl.constexpr, OUT_ROW: tl.constexpr,
    SAVE_PARTS: tl.constexpr, PLACE: tl.constexpr, EPS: tl.constexpr, AFFINE: tl.constexpr, IS_VARIANCE: tl.constexpr,
    NAME: tl.constexpr, VALUE: tl.constexpr, LAYER: tl.constexpr, KEEPS: tl.constexpr, SCALE: tl.constexpr,
    PART: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of the product, of D, that of the layer's output; and per part of the rows the sums of
    ``batch_norm_sums``. A program has all units of its rows, in chunks of BLOCK_N.

    D, Z, Out ``(B, n, UNITS)``, Mean, Rstd ``(B, n)``, NormW, NormBias ``(n, UNITS)``, Seed: one int64, Parts
    ``(parts, 2, n UNITS)``.
    """
    wide: tl.constexpr = tl.float64 if D.dtype.element_ty == tl.float64 else tl.float32
    CHUNKS: tl.constexpr = (UNITS + BLOCK_N - 1) // BLOCK_N
    WIDTH: tl.constexpr = UNITS * MEMBERS
    part, e = tl.program_id(0), tl.program_id(1)
    sums = ()
    products = ()
    for _ in tl.static_range(CHUNKS):
        sums = sums + (tl.zeros((BLOCK_N,), wide),)
        products = products + (tl.zeros((BLOCK_N,), wide),)
    begin = part.to(tl.int64) * PART
    for r in range(0, tl.minimum(B - begin, PART).to(tl.int32), BLOCK_M):
        o_m = begin + r + tl.arange(0, BLOCK_M)
        m_m = o_m < B
        mean = tl.load(Mean + o_m * MEMBERS + e, mask=m_m, other=0.0)[:, None]
        rstd = tl.load(Rstd + o_m * MEMBERS + e, mask=m_m, other=0.0)[:, None]
        row_sum = tl.zeros((BLOCK_M,), wide)
        row_product = tl.zeros((BLOCK_M,), wide)
        for c in tl.static_range(CHUNKS):
            d, normed, z, norm_w = _at_norm(
                D, Z, NormW, NormBias, Seed, o_m, m_m, e, mean, rstd, c, UNITS, MEMBERS, D_ROW, Z_ROW, PLACE, AFFINE,
                NAME, VALUE, LAYER, KEEPS, SCALE, wide, BLOCK_N,
            )  # fmt: skip
            row_sum += tl.sum(d * norm_w, 1)
            row_product += tl.sum(d * norm_w * normed, 1)
        row_sum = (row_sum / UNITS)[:, None]
        row_product = (row_product / UNITS)[:, None]
        new_sums = ()
        new_products = ()
        for c in tl.static_range(CHUNKS):
            if CHUNKS > 1:
                d, normed, z, norm_w = _at_norm(
                    D, Z, NormW, NormBias, Seed, o_m, m_m, e, mean, rstd, c, UNITS, MEMBERS, D_ROW, Z_ROW, PLACE,
                    AFFINE, NAME, VALUE, LAYER, KEEPS, SCALE, wide, BLOCK_N,
                )  # fmt: skip
            new_sums = new_sums + (sums[c] + tl.sum(d, 0),)
            new_products = new_products + (products[c] + tl.sum(d * normed, 0),)
            d = from_norm((d * norm_w - row_sum - normed * row_product) * rstd, z, PLACE, NAME, VALUE)
            o_n = c * BLOCK_N + tl.arange(0, BLOCK_N)
            p_out = Out + o_m[:, None] * OUT_ROW + (e * UNITS + o_n)[None, :]
            tl.store(p_out, d.to(Out.dtype.element_ty), mask=m_m[:, None] & (o_n < UNITS)[None, :])
        sums = new_sums
        products = new_products
    if SAVE_PARTS:
        for c in tl.static_range(CHUNKS):
            o_n = c * BLOCK_N + tl.arange(0, BLOCK_N)
            p_parts = Parts + part.to(tl.int64) * (2 * WIDTH) + e * UNITS + o_n
            tl.store(p_parts, sums[c], mask=o_n < UNITS)
            tl.store(p_parts + WIDTH, products[c], mask=o_n < UNITS)


@lru_cache(maxsize=CACHED)
def _backward(
    tile: Tile, units: int, members: int, d_row: int, z_row: int, out_row: int, save_parts: bool, end: EndConstants
) -> Prepared:
    return prepare(
        _layer_norm_grad_kernel, tile, UNITS=units, MEMBERS=members, D_ROW=d_row, Z_ROW=z_row, OUT_ROW=out_row,
        SAVE_PARTS=save_parts, **end._asdict(), PART=PART_ROWS, BLOCK_M=tile.rows, BLOCK_N=tile.columns,
    )  # fmt: skip


def layer_norm_grad(
    d: Tensor, z: Tensor, end: LayerEnd, *, affine_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradient of a layer's product, of ``d``, that of its output; and those of the norm's weight and bias, if wanted.

    Args:
        d, z: ``(B, n, H)``, last two axes contiguous; z: the product. B at least 1.
        end: with the statistics ``(B, n)`` of layer norm.
    """
    rows, members, units = z.shape
    assert end.mean is not None and end.spread is not None and not end.is_variance
    out = torch.empty((rows, members, units), dtype=d.dtype, device=d.device)
    count, parts = cdiv(rows, PART_ROWS), None
    if affine_grad:
        parts = torch.empty((count, 2, members * units), dtype=wide_of(d.dtype), device=d.device)
    tile = whole_row_tile(d, units)
    run = _backward(tile, units, members, d.stride(0), z.stride(0), out.stride(0), affine_grad, end.constants)
    run(
        (count, members), d.device,
        D=d, Z=z, Mean=end.mean, Rstd=end.spread, NormW=end.weight, NormBias=end.bias, Seed=end.seed, Out=out,
        Parts=parts, B=rows,
    )  # fmt: skip
    if parts is None:
        return out, None, None
    dweight, dbias, _ = norm_sums_merge(parts, rows, end.weight, means=False)
    return out, dweight, dbias

"""Norm, activation and dropout of a layer in a launch of their own, once its statistics are known; and backward."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activations import derive
from ._dropout import Dropout, drop, dropout_constants, undropped
from ._launch import CACHED, Prepared, cdiv, prepare
from ._layer_end import affine, column_statistics, finish, from_norm, to_norm
from ._level_tiles import end_tile
from ._tiles import Tile


class EndConstants(NamedTuple):
    """Of a kernel that does what follows a product, or undoes it."""

    PLACE: str
    EPS: float
    AFFINE: bool
    IS_VARIANCE: bool
    NAME: str
    VALUE: float
    LAYER: int
    KEEPS: int
    SCALE: float


class LayerEnd(NamedTuple):
    """What follows the product of a layer, with the statistics of this call."""

    activation: tuple[str, float] = ("identity", 0.0)
    dropout: Dropout | None = None
    weight: Tensor | None = None
    """Of the norm: ``(n H,)`` or ``(n, H)``, contiguous; None, like the bias: 1 and 0."""
    bias: Tensor | None = None
    mean: Tensor | None = None
    """Batch norm ``(n H,)``, layer norm ``(B, n)``; None: there is no norm."""
    spread: Tensor | None = None
    """``1 / sqrt(variance + eps)``, or the variance."""
    is_variance: bool = False
    eps: float = 0.0
    after: bool = False
    """The norm stands after the activation."""

    @property
    def place(self) -> str:
        """PLACE of a kernel."""
        if self.mean is None:
            return "none"
        return "after" if self.after else "before"

    @property
    def constants(self) -> EndConstants:
        """Constants of a kernel."""
        name, value = self.activation
        layer, keeps, scale = dropout_constants(self.dropout)
        has_affine = self.weight is not None
        return EndConstants(self.place, self.eps, has_affine, self.is_variance, name, value, layer, keeps, scale)

    @property
    def seed(self) -> Tensor | None:
        """Seed of a kernel."""
        return None if self.dropout is None else self.dropout.seed


NO_END = LayerEnd()


@triton.jit
def end_of(z, Mean, Spread, NormW, NormBias, Seed, o_m, e, first, m_n, MEMBERS: tl.constexpr, UNITS: tl.constexpr,
           PLACE: tl.constexpr, EPS: tl.constexpr, AFFINE: tl.constexpr, IS_VARIANCE: tl.constexpr, NAME: tl.constexpr,
           VALUE: tl.constexpr, LAYER: tl.constexpr, KEEPS: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    """A tile of a layer's output of its product ``z``, as it is loaded: units from ``first`` of member ``e``; for batch
    norm, or ``z`` itself where there is no norm."""
    if PLACE != "none":
        o_c = e * UNITS + first + tl.arange(0, z.shape[1])
        mean, rstd = column_statistics(Mean, Spread, o_c, m_n, EPS, IS_VARIANCE, z.dtype)
        norm_w, norm_b = affine(NormW, NormBias, o_c, m_n, AFFINE, z.dtype)
        z = finish(z, mean, rstd, norm_w, norm_b, PLACE, NAME, VALUE)
        if KEEPS > 0:
            z = drop(z, Seed, o_m, e * UNITS + first, MEMBERS * UNITS, UNITS, LAYER, KEEPS, SCALE)
    return z


@triton.jit(do_not_specialize=["B"])
def _layer_end_fwd_kernel(
    Z, Moments, Mean, Spread, NormW, NormBias, Seed, Y, B,
    UNITS: tl.constexpr, MEMBERS: tl.constexpr, Z_ROW: tl.constexpr, Y_ROW: tl.constexpr, BY_ROW: tl.constexpr,
    PARTS: tl.constexpr, PART_UNITS: tl.constexpr, PLACE: tl.constexpr, EPS: tl.constexpr, AFFINE: tl.constexpr,
    IS_VARIANCE: tl.constexpr, NAME: tl.constexpr, VALUE: tl.constexpr, LAYER: tl.constexpr, KEEPS: tl.constexpr,
    SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``Y = dropout(norm and activation (Z))``; BY_ROW: layer norm, whose statistics are merged here and written.

    Z, Y ``(B, n, UNITS)``, NormW, NormBias ``(n, UNITS)``, Seed: one int64; Mean, Spread ``(n, UNITS)``, BY_ROW
    ``(B, n)`` out of Moments ``(B, n, PARTS, 2)``.
    """
    wide: tl.constexpr = tl.float64 if Z.dtype.element_ty == tl.float64 else tl.float32
    TILES: tl.constexpr = (UNITS + BLOCK_N - 1) // BLOCK_N
    e = tl.program_id(1) // TILES
    first = (tl.program_id(1) % TILES) * BLOCK_N
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = first + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < B, o_n < UNITS
    m_mn = m_m[:, None] & m_n[None, :]
    o_c = e * UNITS + o_n
    norm_w, norm_b = affine(NormW, NormBias, o_c, m_n, AFFINE, wide)
    if BY_ROW:
        p_r = Moments + (o_m * MEMBERS + e) * (2 * PARTS)
        total = tl.zeros((BLOCK_M,), wide)
        for i in tl.static_range(PARTS):
            count = min(UNITS - i * PART_UNITS, PART_UNITS)
            total += tl.load(p_r + 2 * i, mask=m_m, other=0.0) * count
        mean = total / UNITS
        squares = tl.zeros((BLOCK_M,), wide)
        for i in tl.static_range(PARTS):
            count = min(UNITS - i * PART_UNITS, PART_UNITS)
            gap = tl.load(p_r + 2 * i, mask=m_m, other=0.0) - mean
            squares += tl.load(p_r + 2 * i + 1, mask=m_m, other=0.0) + gap * gap * count
        rstd = 1.0 / tl.sqrt(squares / UNITS + EPS)
        if first == 0:
            tl.store(Mean + o_m * MEMBERS + e, mean, mask=m_m)
            tl.store(Spread + o_m * MEMBERS + e, rstd, mask=m_m)
        mean, rstd = mean[:, None], rstd[:, None]
    else:
        mean, rstd = column_statistics(Mean, Spread, o_c, m_n, EPS, IS_VARIANCE, wide)
    z = tl.load(Z + o_m[:, None] * Z_ROW + o_c[None, :], mask=m_mn, other=0.0).to(wide)
    y = finish(z, mean, rstd, norm_w, norm_b, PLACE, NAME, VALUE)
    if KEEPS > 0:
        y = drop(y, Seed, o_m, e * UNITS + first, UNITS * MEMBERS, UNITS, LAYER, KEEPS, SCALE)
    tl.store(Y + o_m[:, None] * Y_ROW + o_c[None, :], y.to(Y.dtype.element_ty), mask=m_mn)


@triton.jit(do_not_specialize=["B"])
def _layer_end_grad_kernel(
    D, Z, Mean, Spread, NormW, NormBias, Seed, Means, Out, B,
    UNITS: tl.constexpr, MEMBERS: tl.constexpr, D_ROW: tl.constexpr, Z_ROW: tl.constexpr, OUT_ROW: tl.constexpr,
    HAS_MEANS: tl.constexpr, PLACE: tl.constexpr, EPS: tl.constexpr, AFFINE: tl.constexpr, IS_VARIANCE: tl.constexpr,
    NAME: tl.constexpr, VALUE: tl.constexpr, LAYER: tl.constexpr, KEEPS: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of the product, of D, that of the layer's output, for batch norm or no norm.

    D, Z, Out ``(B, n, UNITS)``, Mean, Spread, NormW, NormBias ``(n, UNITS)``, Seed: one int64, Means
    ``(2, n UNITS)``.
    """
    wide: tl.constexpr = tl.float64 if D.dtype.element_ty == tl.float64 else tl.float32
    TILES: tl.constexpr = (UNITS + BLOCK_N - 1) // BLOCK_N
    WIDTH: tl.constexpr = UNITS * MEMBERS
    e = tl.program_id(1) // TILES
    first = (tl.program_id(1) % TILES) * BLOCK_N
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = first + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < B, o_n < UNITS
    m_mn = m_m[:, None] & m_n[None, :]
    o_c = e * UNITS + o_n
    d = tl.load(D + o_m[:, None] * D_ROW + o_c[None, :], mask=m_mn, other=0.0).to(wide)
    if KEEPS > 0:
        d = drop(d, Seed, o_m, e * UNITS + first, WIDTH, UNITS, LAYER, KEEPS, SCALE)
    if PLACE == "none":
        if NAME != "identity":
            kept = tl.load(Z + o_m[:, None] * Z_ROW + o_c[None, :], mask=m_mn, other=0.0).to(wide)
            d = derive(d, undropped(kept, NAME, SCALE, Z.dtype.element_ty), NAME, VALUE)
    else:
        z = tl.load(Z + o_m[:, None] * Z_ROW + o_c[None, :], mask=m_mn, other=0.0).to(wide)
        mean, rstd = column_statistics(Mean, Spread, o_c, m_n, EPS, IS_VARIANCE, wide)
        norm_w, norm_b = affine(NormW, NormBias, o_c, m_n, AFFINE, wide)
        d, normed = to_norm(d, z, mean, rstd, norm_w, norm_b, PLACE, NAME, VALUE)
        if HAS_MEANS:
            d -= tl.load(Means + o_c, mask=m_n, other=0.0)[None, :]
            d -= normed * tl.load(Means + WIDTH + o_c, mask=m_n, other=0.0)[None, :]
        d = from_norm(d * norm_w * rstd, z, PLACE, NAME, VALUE)
    tl.store(Out + o_m[:, None] * OUT_ROW + o_c[None, :], d.to(Out.dtype.element_ty), mask=m_mn)


@lru_cache(maxsize=CACHED)
def _forward(
    tile: Tile, units: int, members: int, z_row: int, y_row: int, parts: int, part_units: int, end: EndConstants
) -> Prepared:
    """``parts``: 0 for statistics by column."""
    return prepare(
        _layer_end_fwd_kernel, tile, UNITS=units, MEMBERS=members, Z_ROW=z_row, Y_ROW=y_row, BY_ROW=parts > 0,
        PARTS=max(parts, 1), PART_UNITS=part_units, **end._asdict(), BLOCK_M=tile.rows, BLOCK_N=tile.columns,
    )  # fmt: skip


@lru_cache(maxsize=CACHED)
def _backward(
    tile: Tile, units: int, members: int, d_row: int, z_row: int, out_row: int, has_means: bool, end: EndConstants
) -> Prepared:
    return prepare(
        _layer_end_grad_kernel, tile, UNITS=units, MEMBERS=members, D_ROW=d_row, Z_ROW=z_row, OUT_ROW=out_row,
        HAS_MEANS=has_means, **end._asdict(), BLOCK_M=tile.rows, BLOCK_N=tile.columns,
    )  # fmt: skip


def layer_end_fwd(
    z: Tensor, end: LayerEnd, *, moments: Tensor | None = None, part_units: int = 0, out: Tensor | None = None
) -> tuple[Tensor, LayerEnd]:
    """A layer's output of its product ``z``, ``(B, n, H)``, its last two axes contiguous. B at least 1.

    Args:
        end: with a norm; batch norm has its statistics in it.
        moments: ``(B, n, parts, 2)`` of parts of ``part_units`` units: layer norm.
        out: ``(B, n, H)``, its last two axes contiguous; default new.

    Returns:
        The output, and ``end`` with the statistics.
    """
    rows, members, units = z.shape
    y = torch.empty((rows, members, units), dtype=z.dtype, device=z.device) if out is None else out
    if moments is not None:
        mean, rstd = torch.empty((2, rows, members), dtype=moments.dtype, device=z.device).unbind(0)
        end = end._replace(mean=mean, spread=rstd)
    assert end.mean is not None and end.spread is not None
    tile = end_tile(z, units)
    parts = 0 if moments is None else moments.shape[2]
    run = _forward(tile, units, members, z.stride(0), y.stride(0), parts, part_units, end.constants)
    run(
        (cdiv(rows, tile.rows), members * cdiv(units, tile.columns)), z.device,
        Z=z, Moments=moments, Mean=end.mean, Spread=end.spread, NormW=end.weight, NormBias=end.bias, Seed=end.seed,
        Y=y, B=rows,
    )  # fmt: skip
    return y, end


def layer_end_grad(d: Tensor, z: Tensor | None, end: LayerEnd, means: Tensor | None = None) -> Tensor:
    """Gradient of a layer's product, of ``d``, that of its output.

    Args:
        d: ``(B, n, H)``, like ``z`` its last two axes contiguous. B at least 1.
        z: the product; without a norm what ``derive`` reads (an output as ``drop_kept`` left it), None for identity.
        end: without a norm or with batch norm.
        means: ``(2, n H)`` of ``norm_sums_merge``, where the statistics were those of the batch.
    """
    rows, members, units = d.shape
    out = torch.empty((rows, members, units), dtype=d.dtype, device=d.device)
    tile = end_tile(d, units)
    z_row = 0 if z is None else z.stride(0)
    run = _backward(tile, units, members, d.stride(0), z_row, out.stride(0), means is not None, end.constants)
    run(
        (cdiv(rows, tile.rows), members * cdiv(units, tile.columns)), d.device,
        D=d, Z=z, Mean=end.mean, Spread=end.spread, NormW=end.weight, NormBias=end.bias, Seed=end.seed, Means=means,
        Out=out, B=rows,
    )  # fmt: skip
    return out

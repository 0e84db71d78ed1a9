"""Slots scaled element by element, forward and backward in one launch each."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import CACHED, Prepared, cdiv, next_power, prepare
from ._tiles import Tile

ELEMENTS = 2048
"""Of a tile, half as many in float64: loads and stores are 16 bytes wide for each thread, and nothing spills."""
WIDEST = 256


@triton.jit(do_not_specialize=["B"])
def _scale_fwd_kernel(
    X, Scale, Y, B,
    SLOTS: tl.constexpr, UNITS: tl.constexpr, X_ROW: tl.constexpr, X_SLOT: tl.constexpr, SCALE_ROW: tl.constexpr,
    SCALE_SLOT: tl.constexpr, FACTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``Y[:, j] = FACTOR X[:, j] Scale[:, j]``; an operand whose slot stride is 0 is read once.

    X, Scale ``(B, SLOTS, UNITS)`` by their strides, Y ``(B, SLOTS, UNITS)``.
    """
    wide: tl.constexpr = tl.float64 if Y.dtype.element_ty == tl.float64 else tl.float32
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mn = (o_m < B)[:, None] & (o_n < UNITS)[None, :]
    p_x = X + o_m[:, None] * X_ROW + o_n[None, :]
    p_scale = Scale + o_m[:, None] * SCALE_ROW + o_n[None, :]
    p_y = Y + o_m[:, None] * (SLOTS * UNITS) + o_n[None, :]
    x = tl.load(p_x, mask=m_mn, other=0.0).to(wide) * FACTOR
    scale = tl.load(p_scale, mask=m_mn, other=0.0).to(wide)
    for j in range(SLOTS):
        if X_SLOT > 0:
            x = tl.load(p_x + j * X_SLOT, mask=m_mn, other=0.0).to(wide) * FACTOR
        if SCALE_SLOT > 0:
            scale = tl.load(p_scale + j * SCALE_SLOT, mask=m_mn, other=0.0).to(wide)
        tl.store(p_y + j * UNITS, (x * scale).to(Y.dtype.element_ty), mask=m_mn)


@triton.jit(do_not_specialize=["B"])
def _scale_bwd_kernel(
    DY, X, Scale, DX, DScale, B,
    SLOTS: tl.constexpr, UNITS: tl.constexpr, DY_ROW: tl.constexpr, DY_SLOT: tl.constexpr, X_ROW: tl.constexpr,
    X_SLOT: tl.constexpr, SCALE_ROW: tl.constexpr, SCALE_SLOT: tl.constexpr, FACTOR: tl.constexpr,
    SAVE_DX: tl.constexpr, SAVE_DSCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``DX[:, j] = FACTOR DY[:, j] Scale[:, j]`` and ``DScale[:, j] = FACTOR DY[:, j] X[:, j]``, each the sum over j
    where the operand's slot stride is 0.

    DY, X, Scale ``(B, SLOTS, UNITS)`` by their strides; DX, DScale ``(B, SLOTS, UNITS)``, or ``(B, UNITS)`` for sums.
    """
    wide: tl.constexpr = tl.float64 if DY.dtype.element_ty == tl.float64 else tl.float32
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mn = (o_m < B)[:, None] & (o_n < UNITS)[None, :]
    p_dy = DY + o_m[:, None] * DY_ROW + o_n[None, :]
    p_x = X + o_m[:, None] * X_ROW + o_n[None, :]
    p_scale = Scale + o_m[:, None] * SCALE_ROW + o_n[None, :]
    o_one = o_m[:, None] * UNITS + o_n[None, :]
    o_all = o_m[:, None] * (SLOTS * UNITS) + o_n[None, :]
    dx = tl.zeros((BLOCK_M, BLOCK_N), wide)
    dscale = tl.zeros((BLOCK_M, BLOCK_N), wide)
    if SAVE_DSCALE:
        x = tl.load(p_x, mask=m_mn, other=0.0).to(wide)
    if SAVE_DX:
        scale = tl.load(p_scale, mask=m_mn, other=0.0).to(wide)
    for j in range(SLOTS):
        dy = tl.load(p_dy + j * DY_SLOT, mask=m_mn, other=0.0).to(wide) * FACTOR
        if SAVE_DSCALE:
            if X_SLOT > 0:
                x = tl.load(p_x + j * X_SLOT, mask=m_mn, other=0.0).to(wide)
            if SCALE_SLOT > 0:
                tl.store(DScale + o_all + j * UNITS, (dy * x).to(DScale.dtype.element_ty), mask=m_mn)
            else:
                dscale += dy * x
        if SAVE_DX:
            if SCALE_SLOT > 0:
                scale = tl.load(p_scale + j * SCALE_SLOT, mask=m_mn, other=0.0).to(wide)
            if X_SLOT > 0:
                tl.store(DX + o_all + j * UNITS, (dy * scale).to(DX.dtype.element_ty), mask=m_mn)
            else:
                dx += dy * scale
    if SAVE_DSCALE and SCALE_SLOT == 0:
        tl.store(DScale + o_one, dscale.to(DScale.dtype.element_ty), mask=m_mn)
    if SAVE_DX and X_SLOT == 0:
        tl.store(DX + o_one, dx.to(DX.dtype.element_ty), mask=m_mn)


def _tile(units: int, dtype: torch.dtype) -> Tile:
    columns = min(next_power(units), WIDEST)
    elements = ELEMENTS // 2 if dtype == torch.float64 else ELEMENTS
    return Tile(elements // columns, columns, 0, 4, 2)


@lru_cache(maxsize=CACHED)
def _forward(
    slots: int, units: int, x: tuple[int, int], scale: tuple[int, int], factor: float, dtype: torch.dtype
) -> Prepared:
    tile = _tile(units, dtype)
    return prepare(
        _scale_fwd_kernel, tile, SLOTS=slots, UNITS=units, X_ROW=x[0], X_SLOT=x[1], SCALE_ROW=scale[0],
        SCALE_SLOT=scale[1], FACTOR=factor, BLOCK_M=tile.rows, BLOCK_N=tile.columns,
    )  # fmt: skip


@lru_cache(maxsize=CACHED)
def _backward(
    slots: int, units: int, dy: tuple[int, int], x: tuple[int, int], scale: tuple[int, int], factor: float,
    save_dx: bool, save_dscale: bool, dtype: torch.dtype,
) -> Prepared:  # fmt: skip
    tile = _tile(units, dtype)
    return prepare(
        _scale_bwd_kernel, tile, SLOTS=slots, UNITS=units, DY_ROW=dy[0], DY_SLOT=dy[1], X_ROW=x[0], X_SLOT=x[1],
        SCALE_ROW=scale[0], SCALE_SLOT=scale[1], FACTOR=factor, SAVE_DX=save_dx, SAVE_DSCALE=save_dscale,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns,
    )  # fmt: skip


def _readable(tensor: Tensor) -> Tensor:
    """Itself where its last axis is contiguous and no slot lies on another one; else a copy."""
    slots = tensor.dim() == 3 and tensor.shape[1] > 1
    is_dense = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    return tensor if is_dense and not (slots and tensor.stride(1) < 1) else tensor.contiguous()


def _strides(tensor: Tensor) -> tuple[int, int]:
    """Of rows and of slots; of slots 0 where there is one for all."""
    return tensor.stride(0), max(1, tensor.stride(1)) if tensor.dim() == 3 else 0


def scale_fwd(x: Tensor, scale: Tensor, factor: float) -> Tensor:
    """``y[:, j] = factor x[:, j] scale[:, j]``: ``(B, S, D)``.

    Args:
        x, scale: ``(B, S, D)``, or ``(B, D)`` for all slots (not both), of any floating dtype. B, D at least 1.
    """
    x, scale = _readable(x), _readable(scale)
    rows, slots, units = (x if x.dim() == 3 else scale).shape
    y = torch.empty((rows, slots, units), dtype=torch.promote_types(x.dtype, scale.dtype), device=x.device)
    run = _forward(slots, units, _strides(x), _strides(scale), factor, y.dtype)
    run(
        (cdiv(rows, run.tile.rows), cdiv(units, run.tile.columns)), x.device, X=x, Scale=scale, Y=y, B=rows,
    )  # fmt: skip
    return y


def scale_bwd(
    dy: Tensor, x: Tensor, scale: Tensor, factor: float, *, want_x: bool, want_scale: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``x`` and ``scale``, each in the shape and dtype of its operand; None where not wanted.

    Args:
        dy: ``(B, S, D)``; the others as in forward.
    """
    dy, x, scale = _readable(dy), _readable(x), _readable(scale)
    rows, slots, units = dy.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if want_x else None
    dscale = torch.empty(scale.shape, dtype=scale.dtype, device=x.device) if want_scale else None
    run = _backward(slots, units, _strides(dy), _strides(x), _strides(scale), factor, want_x, want_scale, dy.dtype)
    run(
        (cdiv(rows, run.tile.rows), cdiv(units, run.tile.columns)), dy.device,
        DY=dy, X=x, Scale=scale, DX=dx, DScale=dscale, B=rows,
    )  # fmt: skip
    return dx, dscale

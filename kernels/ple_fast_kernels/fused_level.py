"""A whole level in one launch: expert products, activation, gates and mixtures, with expert outputs in registers.

The experts are a run-time loop with dense weights: unrolled, the compiler would spill their accumulators.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import CACHED, Prepared, cdiv, next_power, prefixed, prepare, wide_of
from ._layer_end import Norm, RunningConstants, finish_running, norm_pointers, running_constants
from ._level_tiles import fused_tile
from ._matmul import accumulate, pick_wide, swizzle, tiles_of
from ._tiles import Tile, cut_depth, without_ahead
from .tables import Mixtures


@triton.jit
def _row_of(TABLE: tl.constexpr, FIRST: tl.constexpr, EXPERTS: tl.constexpr, o_e):
    """``TABLE[FIRST + o_e]`` for every expert, -1 beyond the last."""
    row = o_e * 0 - 1
    for e in tl.static_range(EXPERTS):
        row = tl.where(o_e == e, TABLE[FIRST + e], row)
    return row


@triton.jit
def _dense_weights(
    X, GateW, GateBias, Logits, GateMean, GateVar, GateNormW, GateNormBias, Offset, P, o_m, m_m, save, gate_depth,
    MIXTURE: tl.constexpr, WEIGHT: tl.constexpr, LOGIT: tl.constexpr, OFFSET: tl.constexpr, IS_STATIC: tl.constexpr,
    HAS_OFFSET: tl.constexpr, EXPERTS: tl.constexpr, WEIGHTS: tl.constexpr, LOGITS: tl.constexpr,
    HAS_LOGITS: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, GATE_PLACE: tl.constexpr, GATE_EPS: tl.constexpr,
    GATE_AFFINE: tl.constexpr, GATE_DEPTH: tl.constexpr, X_ROW: tl.constexpr,
    X_AT: tl.constexpr, TEMPERATURE: tl.constexpr, SAVE_P: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights of MIXTURE over all experts ``[BLOCK_M, WIDTH]``, 0 where it weighs none."""
    o_e = tl.arange(0, WIDTH)
    o_w = _row_of(WEIGHT, MIXTURE * EXPERTS, EXPERTS, o_e)
    m_e = o_w >= 0
    if IS_STATIC:
        weight = tl.where(m_e[None, :], tl.full((BLOCK_M, WIDTH), 1.0, WIDE), 0.0)
    else:
        o_l = tl.where(m_e, _row_of(LOGIT, MIXTURE * EXPERTS, EXPERTS, o_e), 0)
        if HAS_LOGITS:
            p_l = Logits + o_m[:, None] * LOGITS + o_l[None, :]
            logit = tl.load(p_l, mask=m_m[:, None] & m_e[None, :], other=0.0)
        else:
            o_k = tl.arange(0, BLOCK_K)
            p_x = X + X_AT + tl.where(m_m, o_m, 0)[:, None] * X_ROW + o_k[None, :]
            p_w = GateW + o_l.to(tl.int64)[None, :] * GATE_DEPTH + o_k[:, None]
            logit = tl.zeros((BLOCK_M, WIDTH), WIDE)
            logit = accumulate(
                logit, p_x, p_w, gate_depth, BLOCK_K, BLOCK_K, m_e, GATE_DEPTH, False, PRECISION, BLOCK_K
            )
            if HAS_GATE_BIAS:
                logit += tl.load(GateBias + o_l, mask=m_e, other=0.0).to(WIDE)[None, :]
            logit = finish_running(logit, GateMean, GateVar, GateNormW, GateNormBias, o_l, m_e, GATE_PLACE, GATE_EPS,
                                   GATE_AFFINE, "identity", 0.0, WIDE)  # fmt: skip
        logit = tl.where(m_e[None, :], logit / TEMPERATURE, float("-inf"))
        weight = tl.exp(logit - tl.max(logit, 1)[:, None])
        weight = weight / tl.sum(weight, 1)[:, None]
    if SAVE_P:
        if save:
            tl.store(P + o_m[:, None] * WEIGHTS + o_w[None, :], weight, mask=m_m[:, None] & m_e[None, :])
    if HAS_OFFSET:
        o_s = _row_of(OFFSET, MIXTURE * EXPERTS, EXPERTS, o_e)
        weight += tl.load(Offset + tl.where(o_s >= 0, o_s, 0), mask=o_s >= 0, other=0.0).to(WIDE)[None, :]
    return weight


@triton.jit
def _mix(ys, weights, h, e, WEIGHT: tl.constexpr, EXPERTS: tl.constexpr, WIDTH: tl.constexpr):
    """Every mixture with its share of the output ``h`` of expert ``e`` added."""
    o_e = tl.arange(0, WIDTH)
    mixed = ()
    for o in tl.static_range(len(ys)):
        share = tl.sum(tl.where((o_e == e)[None, :], weights[o], 0.0), 1)
        weighs = tl.sum(tl.where(o_e == e, _row_of(WEIGHT, o * EXPERTS, EXPERTS, o_e), 0)) >= 0
        # An expert that overflows must not reach mixtures that do not weigh it: 0 times infinity is NaN.
        mixed = mixed + (ys[o] + share[:, None] * tl.where(weighs, h, 0.0),)
    return mixed


@triton.jit(do_not_specialize=["B", "experts", "depth", "gate_depth"])
def _fused_level_fwd_kernel(
    A, W, Bias, Mean, Var, NormW, NormBias, X, GateW, GateBias, Logits, GateMean, GateVar, GateNormW, GateNormBias,
    Offset, H, Z, P, Y, B, experts, depth, gate_depth,
    DEPTH: tl.constexpr, UNITS: tl.constexpr, SLOT: tl.constexpr, A_ROW: tl.constexpr, A_SLOT: tl.constexpr,
    GATE_DEPTH: tl.constexpr, X_ROW: tl.constexpr, X_SLOT: tl.constexpr, MIXTURE_SLOT: tl.constexpr,
    WEIGHT: tl.constexpr, LOGIT: tl.constexpr, OFFSET: tl.constexpr, STATIC: tl.constexpr, WEIGHTS: tl.constexpr,
    LOGITS: tl.constexpr, TEMPERATURE: tl.constexpr, NAME: tl.constexpr, VALUE: tl.constexpr,
    HAS_BIAS: tl.constexpr, PLACE: tl.constexpr, EPS: tl.constexpr, AFFINE: tl.constexpr, HAS_LOGITS: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr, GATE_PLACE: tl.constexpr, GATE_EPS: tl.constexpr, GATE_AFFINE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    SAVE_H: tl.constexpr, SAVE_Z: tl.constexpr, SAVE_P: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``Y[:, o] = sum_e weight_oe f(A[:, SLOT[e]] @ W[e].T + Bias[e])``; the weights out of logits, or of X and GateW.

    A program is a tile of rows by a tile of units, for all experts and all mixtures.

    A ``(B, S, DEPTH)``, W ``(E, UNITS, DEPTH)``, Bias, Mean, Var, NormW, NormBias ``(E, UNITS)``; X
    ``(B, S, GATE_DEPTH)``, GateW ``(LOGITS, GATE_DEPTH)``, GateBias, GateMean, GateVar, GateNormW, GateNormBias
    ``(LOGITS,)``, Logits ``(B, LOGITS)``; Offset: the tables' scalars; H, Z ``(B, E, UNITS)``, P ``(B, WEIGHTS)``, Y
    ``(B, O, UNITS)``.
    """
    wide: tl.constexpr = tl.float64 if A.dtype.element_ty == tl.float64 else tl.float32
    EXPERTS: tl.constexpr = len(SLOT)
    i_m, i_n = swizzle(tl.program_id(0), tiles_of(B, BLOCK_M), (UNITS + BLOCK_N - 1) // BLOCK_N, GROUP)
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_n = o_m < B, o_n < UNITS
    m_mn = m_m[:, None] & m_n[None, :]
    weights = ()
    ys = ()
    for o in tl.static_range(len(STATIC)):
        weight = _dense_weights(
            X, GateW, GateBias, Logits, GateMean, GateVar, GateNormW, GateNormBias, Offset, P, o_m, m_m, i_n == 0,
            gate_depth,
            o, WEIGHT, LOGIT, OFFSET, STATIC[o], HAS_OFFSET, EXPERTS, WEIGHTS, LOGITS, HAS_LOGITS, HAS_GATE_BIAS,
            GATE_PLACE, GATE_EPS, GATE_AFFINE,
            GATE_DEPTH, X_ROW, MIXTURE_SLOT[o] * X_SLOT, TEMPERATURE, SAVE_P, wide, PRECISION, BLOCK_M, WIDTH, BLOCK_K,
        )  # fmt: skip
        weights = weights + (weight,)
        ys = ys + (tl.zeros((BLOCK_M, BLOCK_N), wide),)
    row = tl.where(m_m, o_m, 0)[:, None]
    column = tl.where(m_n, o_n, 0)
    for e in range(experts):
        p_a = A + row * A_ROW + pick_wide(SLOT, e) * A_SLOT + o_k[None, :]
        p_w = W + tl.cast(e * UNITS + column, tl.int64)[None, :] * DEPTH + o_k[:, None]
        h = tl.zeros((BLOCK_M, BLOCK_N), wide)
        h = accumulate(h, p_a, p_w, depth, BLOCK_K, BLOCK_K, m_n, DEPTH, False, PRECISION, BLOCK_K)
        if HAS_BIAS:
            h += tl.load(Bias + e * UNITS + o_n, mask=m_n, other=0.0).to(wide)[None, :]
        o_h = o_m[:, None] * (EXPERTS * UNITS) + (e * UNITS + o_n)[None, :]
        if SAVE_Z:
            if PLACE != "none":  # backward reads the product as it is kept, and so does the norm
                h = h.to(Z.dtype.element_ty).to(wide)
            tl.store(Z + o_h, h.to(Z.dtype.element_ty), mask=m_mn)
        h = finish_running(h, Mean, Var, NormW, NormBias, e * UNITS + o_n, m_n, PLACE, EPS, AFFINE, NAME, VALUE, wide)
        if SAVE_H:
            tl.store(H + o_h, h.to(H.dtype.element_ty), mask=m_mn)
        ys = _mix(ys, weights, h, e, WEIGHT, EXPERTS, WIDTH)
    for o in tl.static_range(len(STATIC)):
        p_y = Y + o_m[:, None] * (len(STATIC) * UNITS) + (o * UNITS + o_n)[None, :]
        tl.store(p_y, ys[o].to(Y.dtype.element_ty), mask=m_mn)


def wiring_of(mixtures: Mixtures) -> dict[str, Any]:
    """The tables of a level, as its kernels name them."""
    weight, logit, offset = mixtures.dense()
    static = tuple(first < 0 for first in mixtures.logit_first)
    return {
        "WEIGHT": weight, "LOGIT": logit, "OFFSET": offset, "STATIC": static, "WEIGHTS": mixtures.weights,
        "LOGITS": mixtures.logits,
    }  # fmt: skip


def fused_width(mixtures: Mixtures) -> int:
    """Columns of a tile of dense weights: a power of two, at least 16."""
    return max(16, next_power(mixtures.experts))


@lru_cache(maxsize=CACHED)
def _level(
    tile: Tile, precision: str, depth: int, units: int, slots: tuple[int, ...], a_row: int, a_slot: int,
    gate_depth: int, x_row: int, x_slot: int, mixture_slots: tuple[int, ...], mixtures: Mixtures, temperature: float,
    activation: tuple[str, float], has_bias: bool, norm: RunningConstants, has_logits: bool, has_gate_bias: bool,
    logits_norm: RunningConstants, has_offset: bool, save_h: bool, save_z: bool, save_p: bool,
) -> Prepared:  # fmt: skip
    return prepare(
        _fused_level_fwd_kernel, tile, DEPTH=depth, UNITS=units, SLOT=slots, A_ROW=a_row, A_SLOT=a_slot,
        GATE_DEPTH=gate_depth, X_ROW=x_row, X_SLOT=x_slot, MIXTURE_SLOT=mixture_slots, **wiring_of(mixtures),
        TEMPERATURE=temperature, NAME=activation[0], VALUE=activation[1], HAS_BIAS=has_bias, **norm._asdict(),
        HAS_LOGITS=has_logits, HAS_GATE_BIAS=has_gate_bias, **prefixed("GATE_", logits_norm), HAS_OFFSET=has_offset,
        SAVE_H=save_h, SAVE_Z=save_z, SAVE_P=save_p, WIDTH=fused_width(mixtures), PRECISION=precision,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth, GROUP=tile.group,
    )  # fmt: skip


def fused_level_fwd(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: tuple[int, ...],
    mixtures: Mixtures,
    *,
    activation: tuple[str, float] = ("identity", 0.0),
    norm: Norm | None = None,
    logits: Tensor | None = None,
    x: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    logits_norm: Norm | None = None,
    mixture_slots: tuple[int, ...] = (),
    offset: Tensor | None = None,
    temperature: float = 1.0,
    keep_output: bool = False,
    keep_input: bool = False,
    keep_weights: bool = False,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The last layer of all experts, the gates and the mixtures in one launch; for experts of one layer: the level.

    Args:
        a, weight, bias, slots, activation: as in ``grouped_linear_fwd``.
        norm, logits_norm: of the layer and of logits that are computed here, by running statistics (``"batch"``).
        logits: ``(B, G)`` in float32 (float64); or None, and the gates are computed from
        x, gate_weight, gate_bias: ``(B, S, K)``, ``(G, K)``, ``(G,)``, contiguous in K; ``mixture_slots``: the slot
            that each mixture's gate reads.
        offset, temperature, mixtures: as in ``gate_combine_fwd``.
        keep_output, keep_input, keep_weights: return what backward reads.

    Returns:
        ``(B, O, H)``; outputs of the experts ``(B, E, H)``, inputs of their activation ``(B, E, H)``, softmax weights
        ``(B, W)``; None where not asked for.
    """
    rows, depth = a.shape[0], a.shape[2]
    experts, units, _ = weight.shape
    y = torch.empty((rows, len(mixtures.sizes), units), dtype=a.dtype, device=a.device)
    h = torch.empty((rows, experts, units), dtype=a.dtype, device=a.device) if keep_output else None
    z = torch.empty((rows, experts, units), dtype=a.dtype, device=a.device) if keep_input else None
    p = torch.empty((rows, mixtures.weights), dtype=wide_of(a.dtype), device=a.device) if keep_weights else None
    gate_depth = 1 if x is None else x.shape[2]
    if tile is None:
        tile = fused_tile(a, units, len(mixtures.sizes), fused_width(mixtures), precision)
        assert tile is not None, "the caller asks fused_tile first"
        deepest = max(depth, gate_depth)
        tile = without_ahead(cut_depth(tile, deepest), deepest)
    run = _level(
        tile, precision, depth, units, slots, a.stride(0), a.stride(1), gate_depth, 0 if x is None else x.stride(0),
        0 if x is None else x.stride(1), mixture_slots or (0,) * len(mixtures.sizes), mixtures, temperature,
        activation, bias is not None, running_constants(norm), logits is not None, gate_bias is not None,
        running_constants(logits_norm), offset is not None, keep_output, keep_input, keep_weights,
    )  # fmt: skip
    mean, var, norm_weight, norm_bias = norm_pointers(norm)
    gate_mean, gate_var, gate_norm_weight, gate_norm_bias = norm_pointers(logits_norm)
    run(
        (cdiv(rows, tile.rows) * cdiv(units, tile.columns),), a.device,
        A=a, W=weight, Bias=bias, Mean=mean, Var=var, NormW=norm_weight, NormBias=norm_bias, X=x, GateW=gate_weight,
        GateBias=gate_bias, Logits=logits, GateMean=gate_mean, GateVar=gate_var, GateNormW=gate_norm_weight,
        GateNormBias=gate_norm_bias, Offset=offset, H=h, Z=z, P=p, Y=y, B=rows, experts=experts, depth=depth,
        gate_depth=gate_depth,
    )  # fmt: skip
    return y, h, z, p

"""A whole level of experts of two layers in one launch: hidden units go into the second product from registers."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import CACHED, Prepared, cdiv, prefixed, prepare, suffixed, wide_of
from ._layer_end import Norm, RunningConstants, finish_running, norm_pointers, running_constants
from ._level_tiles import fused_tile
from ._matmul import accumulate, pick_wide
from ._tiles import Tile
from .fused_level import _dense_weights, _mix, fused_width, wiring_of
from .tables import Mixtures


@triton.jit(do_not_specialize=["B", "experts", "depth", "gate_depth"])
def _fused_two_layers_fwd_kernel(
    A, W1, Bias1, Mean1, Var1, NormW1, NormBias1, W2, Bias2, Mean2, Var2, NormW2, NormBias2,
    X, GateW, GateBias, GateMean, GateVar, GateNormW, GateNormBias, Offset, P, Y, B, experts, depth, gate_depth,
    DEPTH: tl.constexpr, HIDDEN: tl.constexpr, UNITS: tl.constexpr, SLOT: tl.constexpr, A_ROW: tl.constexpr,
    A_SLOT: tl.constexpr, GATE_DEPTH: tl.constexpr, X_ROW: tl.constexpr, X_SLOT: tl.constexpr,
    MIXTURE_SLOT: tl.constexpr, WEIGHT: tl.constexpr, LOGIT: tl.constexpr, OFFSET: tl.constexpr, STATIC: tl.constexpr,
    WEIGHTS: tl.constexpr, LOGITS: tl.constexpr, TEMPERATURE: tl.constexpr, NAME1: tl.constexpr, VALUE1: tl.constexpr,
    NAME2: tl.constexpr, VALUE2: tl.constexpr, HAS_BIAS1: tl.constexpr, HAS_BIAS2: tl.constexpr,
    PLACE1: tl.constexpr, EPS1: tl.constexpr, AFFINE1: tl.constexpr,
    PLACE2: tl.constexpr, EPS2: tl.constexpr, AFFINE2: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr, GATE_PLACE: tl.constexpr, GATE_EPS: tl.constexpr, GATE_AFFINE: tl.constexpr,
    HAS_OFFSET: tl.constexpr, SAVE_P: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Experts of two layers, gates and mixtures: a program is a tile of rows with all units, ``BLOCK_N >= UNITS``.

    Hidden units come in chunks of BLOCK_C, and a chunk goes into the second product as soon as it is there.

    A ``(B, S, DEPTH)``, W1 ``(E, HIDDEN, DEPTH)``, Bias1, Mean1, Var1, NormW1, NormBias1 ``(E, HIDDEN)``, W2
    ``(E, UNITS, HIDDEN)``, Bias2, Mean2, Var2, NormW2, NormBias2 ``(E, UNITS)``; X, GateW, GateBias, GateMean, GateVar,
    GateNormW, GateNormBias, Offset, P, Y: as in ``_fused_level_fwd_kernel``.
    """
    wide: tl.constexpr = tl.float64 if A.dtype.element_ty == tl.float64 else tl.float32
    EXPERTS: tl.constexpr = len(SLOT)
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_n = o_m < B, o_n < UNITS
    m_mn = m_m[:, None] & m_n[None, :]
    weights = ()
    ys = ()
    for o in tl.static_range(len(STATIC)):
        weight = _dense_weights(
            X, GateW, GateBias, A, GateMean, GateVar, GateNormW, GateNormBias, Offset, P, o_m, m_m, True, gate_depth,
            o, WEIGHT, LOGIT, OFFSET, STATIC[o], HAS_OFFSET, EXPERTS, WEIGHTS, LOGITS, False, HAS_GATE_BIAS,
            GATE_PLACE, GATE_EPS, GATE_AFFINE,
            GATE_DEPTH, X_ROW, MIXTURE_SLOT[o] * X_SLOT, TEMPERATURE, SAVE_P, wide, PRECISION, BLOCK_M, WIDTH, BLOCK_K,
        )  # fmt: skip
        weights = weights + (weight,)
        ys = ys + (tl.zeros((BLOCK_M, BLOCK_N), wide),)
    row = tl.where(m_m, o_m, 0)[:, None]
    column = tl.where(m_n, o_n, 0)
    for e in range(experts):
        h = tl.zeros((BLOCK_M, BLOCK_N), wide)
        for c in range(0, HIDDEN, BLOCK_C):
            o_c = c + tl.arange(0, BLOCK_C)
            m_c = o_c < HIDDEN
            p_a = A + row * A_ROW + pick_wide(SLOT, e) * A_SLOT + o_k[None, :]
            p_w = W1 + tl.cast(e * HIDDEN + tl.where(m_c, o_c, 0), tl.int64)[None, :] * DEPTH + o_k[:, None]
            a = tl.zeros((BLOCK_M, BLOCK_C), wide)
            a = accumulate(a, p_a, p_w, depth, BLOCK_K, BLOCK_K, m_c, DEPTH, False, PRECISION, BLOCK_K)
            if HAS_BIAS1:
                a += tl.load(Bias1 + e * HIDDEN + o_c, mask=m_c, other=0.0).to(wide)[None, :]
            a = finish_running(a, Mean1, Var1, NormW1, NormBias1, e * HIDDEN + o_c, m_c, PLACE1, EPS1, AFFINE1, NAME1,
                               VALUE1, wide).to(A.dtype.element_ty)  # fmt: skip
            p_w = W2 + tl.cast(e * UNITS + column, tl.int64)[None, :] * HIDDEN + o_c[:, None]
            if HIDDEN % BLOCK_C == 0:
                w = tl.load(p_w)
            else:
                a = tl.where(m_c[None, :], a, 0.0)
                w = tl.load(p_w, mask=m_c[:, None], other=0.0)
            h = tl.dot(a, w, h, input_precision=PRECISION, out_dtype=h.dtype)
        if HAS_BIAS2:
            h += tl.load(Bias2 + e * UNITS + o_n, mask=m_n, other=0.0).to(wide)[None, :]
        h = finish_running(h, Mean2, Var2, NormW2, NormBias2, e * UNITS + o_n, m_n, PLACE2, EPS2, AFFINE2, NAME2,
                           VALUE2, wide)  # fmt: skip
        ys = _mix(ys, weights, h, e, WEIGHT, EXPERTS, WIDTH)
    for o in tl.static_range(len(STATIC)):
        p_y = Y + o_m[:, None] * (len(STATIC) * UNITS) + (o * UNITS + o_n)[None, :]
        tl.store(p_y, ys[o].to(Y.dtype.element_ty), mask=m_mn)


@lru_cache(maxsize=CACHED)
def _two_layers(
    tile: Tile, precision: str, depth: int, hidden: int, units: int, slots: tuple[int, ...], a_row: int, a_slot: int,
    gate_depth: int, x_row: int, x_slot: int, mixture_slots: tuple[int, ...], mixtures: Mixtures, temperature: float,
    activations: tuple[tuple[str, float], tuple[str, float]], has_biases: tuple[bool, bool],
    norms: tuple[RunningConstants, RunningConstants], has_gate_bias: bool, logits_norm: RunningConstants,
    has_offset: bool, save_p: bool,
) -> Prepared:  # fmt: skip
    return prepare(
        _fused_two_layers_fwd_kernel, tile, DEPTH=depth, HIDDEN=hidden, UNITS=units, SLOT=slots, A_ROW=a_row,
        A_SLOT=a_slot, GATE_DEPTH=gate_depth, X_ROW=x_row, X_SLOT=x_slot, MIXTURE_SLOT=mixture_slots,
        **wiring_of(mixtures), TEMPERATURE=temperature, NAME1=activations[0][0], VALUE1=activations[0][1],
        NAME2=activations[1][0], VALUE2=activations[1][1], HAS_BIAS1=has_biases[0], HAS_BIAS2=has_biases[1],
        **suffixed(norms[0], "1"), **suffixed(norms[1], "2"), HAS_GATE_BIAS=has_gate_bias,
        **prefixed("GATE_", logits_norm), HAS_OFFSET=has_offset, SAVE_P=save_p, WIDTH=fused_width(mixtures),
        PRECISION=precision, BLOCK_M=tile.rows, BLOCK_C=tile.depth, BLOCK_N=tile.columns, BLOCK_K=tile.depth,
    )  # fmt: skip


def fused_two_layers_fwd(
    a: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    slots: tuple[int, ...],
    mixtures: Mixtures,
    *,
    activations: tuple[tuple[str, float], tuple[str, float]],
    norms: tuple[Norm | None, Norm | None] = (None, None),
    x: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    logits_norm: Norm | None = None,
    mixture_slots: tuple[int, ...] = (),
    offset: Tensor | None = None,
    temperature: float = 1.0,
    keep_weights: bool = False,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A level of experts of two layers in one launch, for inference at small sizes; see ``fused_level_fwd``.

    Returns:
        ``(B, O, H)`` and, if asked for, the softmax weights ``(B, W)``.
    """
    rows, depth = a.shape[0], a.shape[2]
    experts, hidden, _ = weights[0].shape
    units = weights[1].shape[1]
    y = torch.empty((rows, len(mixtures.sizes), units), dtype=a.dtype, device=a.device)
    p = torch.empty((rows, mixtures.weights), dtype=wide_of(a.dtype), device=a.device) if keep_weights else None
    gate_depth = 1 if x is None else x.shape[2]
    if tile is None:
        tile = fused_tile(a, units, len(mixtures.sizes), fused_width(mixtures), precision, whole=True)
        assert tile is not None, "the caller asks fused_tile first"
    run = _two_layers(
        tile, precision, depth, hidden, units, slots, a.stride(0), a.stride(1), gate_depth,
        0 if x is None else x.stride(0), 0 if x is None else x.stride(1),
        mixture_slots or (0,) * len(mixtures.sizes), mixtures, temperature, activations,
        (biases[0] is not None, biases[1] is not None), (running_constants(norms[0]), running_constants(norms[1])),
        gate_bias is not None, running_constants(logits_norm), offset is not None, keep_weights,
    )  # fmt: skip
    mean_1, var_1, norm_weight_1, norm_bias_1 = norm_pointers(norms[0])
    mean_2, var_2, norm_weight_2, norm_bias_2 = norm_pointers(norms[1])
    gate_mean, gate_var, gate_norm_weight, gate_norm_bias = norm_pointers(logits_norm)
    run(
        (cdiv(rows, tile.rows),), a.device,
        A=a, W1=weights[0], Bias1=biases[0], Mean1=mean_1, Var1=var_1, NormW1=norm_weight_1, NormBias1=norm_bias_1,
        W2=weights[1], Bias2=biases[1], Mean2=mean_2, Var2=var_2, NormW2=norm_weight_2, NormBias2=norm_bias_2,
        X=x, GateW=gate_weight, GateBias=gate_bias, GateMean=gate_mean, GateVar=gate_var, GateNormW=gate_norm_weight,
        GateNormBias=gate_norm_bias, Offset=offset, P=p, Y=y, B=rows, experts=experts, depth=depth,
        gate_depth=gate_depth,
    )  # fmt: skip
    return y, p

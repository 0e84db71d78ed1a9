"""Gates and mixtures: softmax over each mixture's own experts, or sigmoids, weighted sums for all outputs, and both
backward.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activations import activate, derive
from ._dropout import Dropout, DropoutConstants, drop, dropout_constants, undropped
from ._launch import CACHED, Prepared, cdiv, next_power, prepare, wide_of
from ._level_tiles import combine_tile
from ._matmul import add_at
from ._tiles import Tile
from .layer_end import NO_END, EndConstants, LayerEnd, end_of
from .tables import Mixtures


@triton.jit
def _weight(Logits, Offset, top, total, o_m, m_m, LOGITS: tl.constexpr, LOGIT: tl.constexpr, OFFSET: tl.constexpr,
            SIGMOID: tl.constexpr, TEMPERATURE: tl.constexpr):  # fmt: skip
    """One column of weights ``[M]``: ``exp(l / T - top) / total``, the sigmoid of ``l / T`` or 1, and a learned
    scalar."""
    weight = tl.full(top.shape, 1.0, top.dtype)
    if LOGIT >= 0:
        logit = tl.load(Logits + o_m * LOGITS + LOGIT, mask=m_m, other=0.0)
        if SIGMOID:
            weight = activate(logit / TEMPERATURE, "sigmoid", 0.0)
        else:
            weight = tl.exp(logit / TEMPERATURE - top) / total
    if OFFSET >= 0:
        weight += tl.load(Offset + OFFSET).to(weight.dtype)
    return weight


@triton.jit(do_not_specialize=["B"])
def _gate_combine_fwd_kernel(
    Logits, H, Mean, Spread, NormW, NormBias, Seed, Offset, P, Y, B,
    UNITS: tl.constexpr, LOGITS: tl.constexpr, WEIGHTS: tl.constexpr, H_ROW: tl.constexpr, TEMPERATURE: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr, LOGIT_FIRST: tl.constexpr, SIZES: tl.constexpr, WIDTH: tl.constexpr,
    EXPERT_FIRST: tl.constexpr, ENTRY_MIXTURE: tl.constexpr, ENTRY_LOGIT: tl.constexpr, ENTRY_OFFSET: tl.constexpr,
    ENTRY_OUTPUT: tl.constexpr, ENTRY_STARTS: tl.constexpr, ENTRY_ENDS: tl.constexpr, OUTPUTS: tl.constexpr,
    SIGMOID: tl.constexpr,
    SAVE_P: tl.constexpr, PLACE: tl.constexpr, EPS: tl.constexpr, AFFINE: tl.constexpr, IS_VARIANCE: tl.constexpr,
    NAME: tl.constexpr, VALUE: tl.constexpr, LAYER: tl.constexpr, KEEPS: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``P[:, o] = softmax(Logits[:, o] / T)``, ``Y[:, o] = sum_e (P_oe + Offset_oe) H[:, e]``; H is read once.

    P of mixtures marked in SIGMOID is that of each logit. Y has the sums of mixtures with the same output.

    Logits ``(B, LOGITS)``, H ``(B, E, UNITS)``, Mean, Spread, NormW, NormBias ``(E, UNITS)``, Seed: one int64, Offset:
    the tables' scalars, P ``(B, WEIGHTS)``, Y ``(B, O, UNITS)``.
    """
    wide: tl.constexpr = tl.float64 if H.dtype.element_ty == tl.float64 else tl.float32
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < B, o_n < UNITS
    m_mn = m_m[:, None] & m_n[None, :]
    o_g = tl.arange(0, WIDTH)
    tops = ()
    totals = ()
    ys = ()
    for o in tl.static_range(len(SIZES)):
        m_g = (o_g < SIZES[o])[None, :]
        if LOGIT_FIRST[o] >= 0:
            p_l = Logits + o_m[:, None] * LOGITS + (LOGIT_FIRST[o] + o_g)[None, :]
            logit = tl.load(p_l, mask=m_m[:, None] & m_g, other=0.0) / TEMPERATURE
            logit = tl.where(m_g, logit, float("-inf"))
            top = tl.max(logit, 1)
            weight = tl.exp(logit - top[:, None])
            total = tl.sum(weight, 1)
            weight = weight / total[:, None]
            if SIGMOID[o]:
                weight = activate(logit, "sigmoid", 0.0)
        else:
            top = tl.zeros((BLOCK_M,), wide)
            total = tl.zeros((BLOCK_M,), wide)
            weight = tl.full((BLOCK_M, WIDTH), 1.0, wide)
        if SAVE_P:
            if tl.program_id(1) == 0:
                p_p = P + o_m[:, None] * WEIGHTS + (WEIGHT_FIRST[o] + o_g)[None, :]
                tl.store(p_p, weight, mask=m_m[:, None] & m_g)
        tops = tops + (top,)
        totals = totals + (total,)
    for _ in tl.static_range(OUTPUTS):
        ys = ys + (tl.zeros((BLOCK_M, BLOCK_N), wide),)
    for e in tl.static_range(len(EXPERT_FIRST) - 1):
        h = tl.load(H + o_m[:, None] * H_ROW + (e * UNITS + o_n)[None, :], mask=m_mn, other=0.0).to(wide)
        h = end_of(h, Mean, Spread, NormW, NormBias, Seed, o_m, e, tl.program_id(1) * BLOCK_N, m_n,
                   len(EXPERT_FIRST) - 1, UNITS, PLACE, EPS, AFFINE, IS_VARIANCE, NAME, VALUE, LAYER, KEEPS,
                   SCALE)  # fmt: skip
        for i in tl.static_range(tl.constexpr(EXPERT_FIRST[e]), tl.constexpr(EXPERT_FIRST[e + 1])):
            weight = _weight(Logits, Offset, tops[ENTRY_MIXTURE[i]], totals[ENTRY_MIXTURE[i]], o_m, m_m, LOGITS,
                             ENTRY_LOGIT[i], ENTRY_OFFSET[i], SIGMOID[ENTRY_MIXTURE[i]], TEMPERATURE)  # fmt: skip
            if ENTRY_STARTS[i]:
                share = weight
            else:
                share += weight
            if ENTRY_ENDS[i]:
                ys = add_at(ys, ENTRY_OUTPUT[i], share[:, None] * h)
    for o in tl.static_range(OUTPUTS):
        p_y = Y + o_m[:, None] * (OUTPUTS * UNITS) + (o * UNITS + o_n)[None, :]
        tl.store(p_y, ys[o].to(Y.dtype.element_ty), mask=m_mn)


@triton.jit(do_not_specialize=["B"])
def _gate_combine_bwd_kernel(
    DY, DListed, H, Mean, Spread, NormW, NormBias, Seed, Kept, KeptSeed, Offset, P, DH, DP, DL, B,
    UNITS: tl.constexpr, LOGITS: tl.constexpr, WEIGHTS: tl.constexpr, H_ROW: tl.constexpr, KEPT_ROW: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr, LOGIT_FIRST: tl.constexpr, SIZES: tl.constexpr, WIDTH: tl.constexpr,
    EXPERT_FIRST: tl.constexpr, ENTRY_OUTPUT: tl.constexpr, ENTRY_WEIGHT: tl.constexpr, ENTRY_OFFSET: tl.constexpr,
    ENTRY_STOP: tl.constexpr, ENTRY_STARTS: tl.constexpr, ENTRY_ENDS: tl.constexpr, OUTPUTS: tl.constexpr,
    SIGMOID: tl.constexpr,
    PLACE: tl.constexpr, EPS: tl.constexpr, AFFINE: tl.constexpr, IS_VARIANCE: tl.constexpr,
    H_NAME: tl.constexpr, H_VALUE: tl.constexpr, H_LAYER: tl.constexpr, H_KEEPS: tl.constexpr, H_SCALE: tl.constexpr,
    NAME: tl.constexpr, VALUE: tl.constexpr, LAYER: tl.constexpr, KEEPS: tl.constexpr, SCALE: tl.constexpr,
    HAS_DY: tl.constexpr, HAS_LISTED: tl.constexpr, SAVE_DH: tl.constexpr,
    SAVE_DP: tl.constexpr, SAVE_DL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``DH[:, e] = f'(Kept) sum_o (P_oe + Offset_oe) DY[:, o]`` over entries that do not stop, ``DP_oe =
    <DY[:, o], H[:, e]>``, and the softmax's backward ``DL_oe = P_oe (dP_oe - sum_j P_oj dP_oj) / T`` with
    ``dP = DP + DListed``; that of a sigmoid is ``DL_oe = P_oe (1 - P_oe) dP_oe / T``. DY is that of the output of each
    mixture.

    DY ``(B, O, UNITS)``, H, Kept, DH ``(B, E, UNITS)``, Mean, Spread, NormW, NormBias ``(E, UNITS)``, Seed, KeptSeed:
    one int64 each, Offset: the tables' scalars, P, DListed, DP ``(B, WEIGHTS)``, DL ``(B, LOGITS)``.
    """
    wide: tl.constexpr = tl.float64 if P.dtype.element_ty == tl.float64 else tl.float32
    CHUNKS: tl.constexpr = (UNITS + BLOCK_N - 1) // BLOCK_N
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < B
    if HAS_DY:
        dys = ()
        if CHUNKS == 1:  # every row of DY is read once, and stays in registers
            o_n = tl.arange(0, BLOCK_N)
            m_mn = m_m[:, None] & (o_n < UNITS)[None, :]
            for o in tl.static_range(OUTPUTS):
                p_dy = DY + o_m[:, None] * (OUTPUTS * UNITS) + (o * UNITS + o_n)[None, :]
                dys = dys + (tl.load(p_dy, mask=m_mn, other=0.0),)
        for e in tl.static_range(len(EXPERT_FIRST) - 1):
            dps = ()
            for _ in tl.static_range(tl.constexpr(EXPERT_FIRST[e]), tl.constexpr(EXPERT_FIRST[e + 1])):
                dps = dps + (tl.zeros((BLOCK_M,), wide),)
            for c in tl.static_range(CHUNKS):
                o_n = c * BLOCK_N + tl.arange(0, BLOCK_N)
                m_mn = m_m[:, None] & (o_n < UNITS)[None, :]
                if SAVE_DP:
                    p_h = H + o_m[:, None] * H_ROW + (e * UNITS + o_n)[None, :]
                    h = tl.load(p_h, mask=m_mn, other=0.0).to(wide)
                    h = end_of(h, Mean, Spread, NormW, NormBias, Seed, o_m, e, c * BLOCK_N, o_n < UNITS,
                               len(EXPERT_FIRST) - 1, UNITS, PLACE, EPS, AFFINE, IS_VARIANCE, H_NAME, H_VALUE, H_LAYER,
                               H_KEEPS, H_SCALE)  # fmt: skip
                d = tl.zeros((BLOCK_M, BLOCK_N), wide)
                for i in tl.static_range(tl.constexpr(EXPERT_FIRST[e]), tl.constexpr(EXPERT_FIRST[e + 1])):
                    if ENTRY_STARTS[i]:
                        if CHUNKS == 1:
                            dy = dys[ENTRY_OUTPUT[i]].to(wide)
                        else:
                            p_dy = DY + o_m[:, None] * (OUTPUTS * UNITS) + (ENTRY_OUTPUT[i] * UNITS + o_n)[None, :]
                            dy = tl.load(p_dy, mask=m_mn, other=0.0).to(wide)
                    if SAVE_DH and not ENTRY_STOP[i]:
                        weight = tl.load(P + o_m * WEIGHTS + ENTRY_WEIGHT[i], mask=m_m, other=0.0)
                        if ENTRY_OFFSET[i] >= 0:
                            weight += tl.load(Offset + ENTRY_OFFSET[i]).to(wide)
                        if ENTRY_STARTS[i]:
                            share = weight
                        else:
                            share += weight
                        if ENTRY_ENDS[i]:
                            d += share[:, None] * dy
                    if SAVE_DP:
                        if ENTRY_STARTS[i]:
                            dot = tl.sum(dy * h, 1)
                        dps = add_at(dps, i - EXPERT_FIRST[e], dot)
                if SAVE_DH:
                    if KEEPS > 0:
                        d = drop(d, KeptSeed, o_m, e * UNITS + c * BLOCK_N, UNITS * (len(EXPERT_FIRST) - 1), UNITS,
                                 LAYER, KEEPS, SCALE)  # fmt: skip
                    if NAME != "identity":
                        p_kept = Kept + o_m[:, None] * KEPT_ROW + (e * UNITS + o_n)[None, :]
                        kept = tl.load(p_kept, mask=m_mn, other=0.0).to(wide)
                        kept = undropped(kept, NAME, SCALE, Kept.dtype.element_ty)
                        d = derive(d, kept, NAME, VALUE)
                    p_dh = DH + o_m[:, None] * ((len(EXPERT_FIRST) - 1) * UNITS) + (e * UNITS + o_n)[None, :]
                    tl.store(p_dh, d.to(DH.dtype.element_ty), mask=m_mn)
            if SAVE_DP:
                for i in tl.static_range(tl.constexpr(EXPERT_FIRST[e]), tl.constexpr(EXPERT_FIRST[e + 1])):
                    tl.store(DP + o_m * WEIGHTS + ENTRY_WEIGHT[i], dps[i - EXPERT_FIRST[e]], mask=m_m)
    if SAVE_DL:
        if HAS_DY:
            tl.debug_barrier()  # other threads of this program wrote what is read now
        o_g = tl.arange(0, WIDTH)
        for o in tl.static_range(len(SIZES)):
            if LOGIT_FIRST[o] >= 0:
                m_mg = m_m[:, None] & (o_g < SIZES[o])[None, :]
                o_p = o_m[:, None] * WEIGHTS + (WEIGHT_FIRST[o] + o_g)[None, :]
                p = tl.load(P + o_p, mask=m_mg, other=0.0)
                dp = tl.zeros((BLOCK_M, WIDTH), wide)
                if HAS_DY:
                    dp += tl.load(DP + o_p, mask=m_mg, other=0.0)
                if HAS_LISTED:
                    dp += tl.load(DListed + o_p, mask=m_mg, other=0.0)
                if SIGMOID[o]:
                    dl = p * (1.0 - p) * dp / TEMPERATURE
                else:
                    dl = p * (dp - tl.sum(p * dp, 1)[:, None]) / TEMPERATURE
                p_dl = DL + o_m[:, None] * LOGITS + (LOGIT_FIRST[o] + o_g)[None, :]
                tl.store(p_dl, dl.to(DL.dtype.element_ty), mask=m_mg)


def _width(mixtures: Mixtures) -> int:
    return next_power(max(mixtures.sizes))


@lru_cache(maxsize=CACHED)
def _forward(
    tile: Tile, units: int, h_row: int, temperature: float, mixtures: Mixtures, save_p: bool, end: EndConstants
) -> Prepared:
    return prepare(
        _gate_combine_fwd_kernel, tile, UNITS=units, LOGITS=mixtures.logits, WEIGHTS=mixtures.weights, H_ROW=h_row,
        TEMPERATURE=temperature, WEIGHT_FIRST=mixtures.weight_first, LOGIT_FIRST=mixtures.logit_first,
        SIZES=mixtures.sizes, WIDTH=_width(mixtures), EXPERT_FIRST=mixtures.expert_first,
        ENTRY_MIXTURE=mixtures.entry_mixture, ENTRY_LOGIT=mixtures.entry_logit, ENTRY_OFFSET=mixtures.entry_offset,
        ENTRY_OUTPUT=mixtures.entry_output, ENTRY_STARTS=mixtures.entry_starts, ENTRY_ENDS=mixtures.entry_ends,
        OUTPUTS=mixtures.outputs, SIGMOID=mixtures.sigmoid,
        SAVE_P=save_p, **end._asdict(), BLOCK_M=tile.rows, BLOCK_N=tile.columns,
    )  # fmt: skip


@lru_cache(maxsize=CACHED)
def _backward(
    tile: Tile, units: int, h_row: int, kept_row: int, temperature: float, mixtures: Mixtures, end: EndConstants,
    activation: tuple[str, float], dropout: DropoutConstants, has_dy: bool, has_listed: bool, save_dh: bool,
    save_dp: bool, save_dl: bool,
) -> Prepared:  # fmt: skip
    return prepare(
        _gate_combine_bwd_kernel, tile, UNITS=units, LOGITS=mixtures.logits, WEIGHTS=mixtures.weights, H_ROW=h_row,
        KEPT_ROW=kept_row, TEMPERATURE=temperature, WEIGHT_FIRST=mixtures.weight_first,
        LOGIT_FIRST=mixtures.logit_first, SIZES=mixtures.sizes, WIDTH=_width(mixtures),
        EXPERT_FIRST=mixtures.expert_first, ENTRY_OUTPUT=mixtures.entry_output,
        ENTRY_WEIGHT=mixtures.entry_weight, ENTRY_OFFSET=mixtures.entry_offset, ENTRY_STOP=mixtures.entry_stop,
        ENTRY_STARTS=mixtures.entry_starts, ENTRY_ENDS=mixtures.entry_ends, OUTPUTS=mixtures.outputs,
        SIGMOID=mixtures.sigmoid,
        PLACE=end.PLACE, EPS=end.EPS, AFFINE=end.AFFINE, IS_VARIANCE=end.IS_VARIANCE,
        H_NAME=end.NAME, H_VALUE=end.VALUE, H_LAYER=end.LAYER, H_KEEPS=end.KEEPS, H_SCALE=end.SCALE,
        NAME=activation[0], VALUE=activation[1], **dropout._asdict(), HAS_DY=has_dy, HAS_LISTED=has_listed,
        SAVE_DH=save_dh, SAVE_DP=save_dp, SAVE_DL=save_dl, BLOCK_M=tile.rows, BLOCK_N=tile.columns,
    )  # fmt: skip


def gate_combine_fwd(
    h: Tensor,
    logits: Tensor | None,
    mixtures: Mixtures,
    *,
    end: LayerEnd = NO_END,
    offset: Tensor | None = None,
    temperature: float = 1.0,
    keep_weights: bool = True,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``y_o = sum_e (softmax(logits_o / T) + offset)_e h_e`` for all mixtures (paper eq. 2), sums of some of them.

    Args:
        h: ``(B, E, H)``, its last two axes contiguous. B at least 1.
        end: with batch norm ``h`` is the last layer's product, and what follows it is done as it is loaded.
        logits: ``(B, G)`` in float32 (float64 for float64), contiguous; None where every mixture is static.
        offset: learned scalars, those of the tables.
        temperature: positive.
        keep_weights: return the weights.

    Returns:
        ``(B, O, H)`` like ``h``; softmax weights ``(B, W)`` without the learned scalars, or None.
    """
    rows, _, units = h.shape
    y = torch.empty((rows, mixtures.outputs, units), dtype=h.dtype, device=h.device)
    p = torch.empty((rows, mixtures.weights), dtype=wide_of(h.dtype), device=h.device) if keep_weights else None
    tile = combine_tile(h, rows, units, mixtures.outputs) if tile is None else tile
    _forward(tile, units, h.stride(0), temperature, mixtures, keep_weights, end.constants)(
        (cdiv(rows, tile.rows), cdiv(units, tile.columns)), h.device,
        Logits=logits, H=h, Mean=end.mean, Spread=end.spread, NormW=end.weight, NormBias=end.bias, Seed=end.seed,
        Offset=offset, P=p, Y=y, B=rows,
    )  # fmt: skip
    return y, p


def gate_combine_bwd(
    dy: Tensor | None,
    dlisted: Tensor | None,
    h: Tensor | None,
    p: Tensor,
    mixtures: Mixtures,
    units: int,
    dtype: torch.dtype,
    *,
    end: LayerEnd = NO_END,
    kept: Tensor | None = None,
    activation: tuple[str, float] = ("identity", 0.0),
    dropout: Dropout | None = None,
    offset: Tensor | None = None,
    temperature: float = 1.0,
    experts_grad: bool = True,
    weights_grad: bool = True,
    logits_grad: bool = True,
    tile: Tile | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Backward of ``gate_combine_fwd``, and of the activation and the dropout that made ``h``.

    Args:
        dy: ``(B, O, H)``, contiguous, or None.
        dlisted: gradient of the weights ``(B, W)``, contiguous, or None.
        h, end: as in forward; read where ``weights_grad``.
        p: the weights that forward returned.
        dtype: of the gradients.
        kept: ``(B, E, H)``, what ``derive`` reads, an output as ``drop_kept`` left it; None for identity.
        dropout: of the experts' last layer, as in ``grouped_data_grad``.
        experts_grad, weights_grad, logits_grad: which results are asked for.

    Returns:
        Gradient of the experts' outputs, before activation and dropout if they are given, ``(B, E, H)``;
        ``<dy_o, h_e>`` ``(B, W)`` in float32 (float64), without ``dlisted``; gradient of the logits ``(B, G)``.
    """
    rows, wide = p.shape[0], p.dtype
    weights_grad = weights_grad or logits_grad
    dh = dp = dl = None
    if dy is not None and experts_grad:
        dh = torch.empty((rows, mixtures.experts, units), dtype=dtype, device=p.device)
    if dy is not None and weights_grad:
        dp = torch.empty((rows, mixtures.weights), dtype=wide, device=p.device)
    if logits_grad and mixtures.logits:
        dl = torch.empty((rows, mixtures.logits), dtype=dtype, device=p.device)
    tile = combine_tile(p, rows, units, mixtures.outputs, backward=True) if tile is None else tile
    run = _backward(
        tile, units, 0 if h is None else h.stride(0), 0 if kept is None else kept.stride(0), temperature, mixtures,
        end.constants, activation, dropout_constants(dropout), dy is not None, dlisted is not None, dh is not None,
        dp is not None, dl is not None,
    )  # fmt: skip
    run(
        (cdiv(rows, tile.rows),), p.device,
        DY=dy, DListed=dlisted, H=h, Mean=end.mean, Spread=end.spread, NormW=end.weight, NormBias=end.bias,
        Seed=end.seed, Kept=kept, KeptSeed=None if dropout is None else dropout.seed, Offset=offset, P=p, DH=dh,
        DP=dp, DL=dl, B=rows,
    )  # fmt: skip
    return dh, dp, dl

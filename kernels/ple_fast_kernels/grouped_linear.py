"""Linear layers of stacked MLPs: all members in one launch, the gates' logits beside them."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activations import HEAVY, activate
from ._dropout import Dropout, DropoutConstants, drop, drop_kept, dropout_constants
from ._launch import CACHED, Prepared, cdiv, prefixed, prepare, wide_of
from ._layer_end import (
    Norm,
    NormConstants,
    affine,
    finish_running,
    norm_constants,
    norm_pointers,
    normalise,
    row_moments,
    store_column_moments,
)
from ._matmul import accumulate, pick, pick_wide, swizzle, tiles_of
from ._tiles import NARROW, Tile, cut_depth, gate_width, matmul_tile
from .library import library_linear_fwd, linear_in_library
from .persistent import forward_tile, persistent_linear_fwd
from .tables import NO_GATES, GateRuns


@triton.jit(do_not_specialize=["B", "depth"])
def _grouped_linear_fwd_kernel(
    A, W, Bias, Y, Z, First, Second, NormW, NormBias, Seed,
    GateW, GateBias, Logits, GateFirst, GateSecond, GateNormW, GateNormBias, B, depth,
    DEPTH: tl.constexpr, UNITS: tl.constexpr, SLOT: tl.constexpr, A_ROW: tl.constexpr, A_SLOT: tl.constexpr,
    Y_ROW: tl.constexpr, Z_ROW: tl.constexpr, NAME: tl.constexpr, VALUE: tl.constexpr,
    HAS_MEMBERS: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE_Z: tl.constexpr,
    KIND: tl.constexpr, PLACE: tl.constexpr, EPS: tl.constexpr, AFFINE: tl.constexpr,
    LAYER: tl.constexpr, KEEPS: tl.constexpr, SCALE: tl.constexpr,
    GATE_KIND: tl.constexpr, GATE_PLACE: tl.constexpr, GATE_EPS: tl.constexpr, GATE_AFFINE: tl.constexpr,
    HAS_GATES: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, GATE_SLOT: tl.constexpr, GATE_FIRST: tl.constexpr,
    GATE_SIZE: tl.constexpr, GATE_WIDTH: tl.constexpr, LOGITS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``Y[:, m] = f(A[:, SLOT[m]] @ W[m].T + Bias[m])``; ``Logits``: the same for runs of rows of the gates' weight.

    A program is one tile of rows by one tile of a member's units, or by one run of gate rows. The tiles of columns of
    all members follow each other, so that a tile of rows of A stays in L2 for every one of them.

    A ``(B, S, DEPTH)``, W ``(n, UNITS, DEPTH)``, Bias, NormW, NormBias ``(n, UNITS)``, Y, Z ``(B, n, UNITS)``; GateW
    ``(LOGITS, DEPTH)``, GateBias, GateNormW, GateNormBias ``(LOGITS,)``, Logits ``(B, LOGITS)``; Seed: one int64;
    First, Second, GateFirst, GateSecond: as ``Norm`` has them, the gates' with LOGITS columns.
    """
    wide: tl.constexpr = tl.float64 if A.dtype.element_ty == tl.float64 else tl.float32
    TILES: tl.constexpr = (UNITS + BLOCK_N - 1) // BLOCK_N
    MEMBER_TILES: tl.constexpr = TILES * len(SLOT) if HAS_MEMBERS else 0
    GATE_TILES: tl.constexpr = len(GATE_SLOT) if HAS_GATES else 0
    i_m, i_n = swizzle(tl.program_id(0), tiles_of(B, BLOCK_M), MEMBER_TILES + GATE_TILES, GROUP)
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < B
    o_k = tl.arange(0, BLOCK_K)
    # Rows are clamped, not masked: no predicate in the loop. The axis that is contiguous must not be.
    p_a = A + tl.where(m_m, o_m, 0)[:, None] * A_ROW + o_k[None, :]
    if i_n < MEMBER_TILES:
        if HAS_MEMBERS:
            e = i_n // TILES
            o_n = (i_n % TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
            m_n = o_n < UNITS
            o_w = e.to(tl.int64) * UNITS + tl.where(m_n, o_n, 0)
            p_w = W + o_w[None, :] * DEPTH + o_k[:, None]
            acc = tl.zeros((BLOCK_M, BLOCK_N), wide)
            acc = accumulate(acc, p_a + pick_wide(SLOT, e) * A_SLOT, p_w, depth, BLOCK_K, BLOCK_K, m_n, DEPTH, False,
                             PRECISION, BLOCK_K)  # fmt: skip
            if HAS_BIAS:
                acc += tl.load(Bias + e * UNITS + o_n, mask=m_n, other=0.0).to(wide)[None, :]
            m_mn = m_m[:, None] & m_n[None, :]
            if KIND != "none" and (SAVE_Z or KIND != "batch"):
                # Whoever normalises it reads the product as it is kept: statistics are of the same numbers.
                acc = acc.to(A.dtype.element_ty).to(wide)
            if SAVE_Z:
                p_z = Z + o_m[:, None] * Z_ROW + (e * UNITS + o_n)[None, :]
                tl.store(p_z, acc.to(Z.dtype.element_ty), mask=m_mn)
            o_c = e * UNITS + o_n
            if KIND == "moments":
                value = activate(acc, NAME, VALUE) if PLACE == "after" else acc
                rows = tl.minimum(B - i_m * BLOCK_M, BLOCK_M)
                store_column_moments(value, m_m, rows, i_m, First, o_c, m_n, UNITS * len(SLOT))
            elif KIND == "row_moments":
                value = activate(acc, NAME, VALUE) if PLACE == "after" else acc
                mean, squares = row_moments(
                    value, m_n, tl.minimum(UNITS - (i_n % TILES) * BLOCK_N, BLOCK_N), UNITS % BLOCK_N == 0
                )
                p_r = First + (o_m * MEMBER_TILES + i_n) * 2
                tl.store(p_r, mean, mask=m_m)
                tl.store(p_r + 1, squares, mask=m_m)
            else:
                if KIND == "row":  # the tile has all units
                    value = activate(acc, NAME, VALUE) if PLACE == "after" else acc
                    mean, squares = row_moments(value, m_n, UNITS, UNITS == BLOCK_N)
                    rstd = 1.0 / tl.sqrt(squares / UNITS + EPS)
                    if SAVE_Z:
                        tl.store(First + o_m * len(SLOT) + e, mean, mask=m_m)
                        tl.store(Second + o_m * len(SLOT) + e, rstd, mask=m_m)
                    norm_w, norm_b = affine(NormW, NormBias, o_c, m_n, AFFINE, wide)
                    acc = normalise(value, mean[:, None], rstd[:, None], norm_w, norm_b)
                    if PLACE == "before":
                        acc = activate(acc, NAME, VALUE)
                else:
                    acc = finish_running(acc, First, Second, NormW, NormBias, o_c, m_n, PLACE, EPS, AFFINE, NAME,
                                         VALUE, wide)  # fmt: skip
                if KEEPS > 0:
                    at = e * UNITS + (i_n % TILES) * BLOCK_N
                    if PLACE == "none":
                        acc = drop_kept(acc, Seed, o_m, at, NAME, UNITS * len(SLOT), UNITS, LAYER, KEEPS, SCALE)
                    else:
                        acc = drop(acc, Seed, o_m, at, UNITS * len(SLOT), UNITS, LAYER, KEEPS, SCALE)
                p_y = Y + o_m[:, None] * Y_ROW + o_c[None, :]
                tl.store(p_y, acc.to(Y.dtype.element_ty), mask=m_mn)
    else:
        if HAS_GATES:
            r = i_n - MEMBER_TILES
            o_g = tl.arange(0, GATE_WIDTH)
            m_g = o_g < pick(GATE_SIZE, r)
            o_l = pick(GATE_FIRST, r) + tl.where(m_g, o_g, 0)
            p_g = GateW + o_l.to(tl.int64)[None, :] * DEPTH + o_k[:, None]
            logit = tl.zeros((BLOCK_M, GATE_WIDTH), wide)
            logit = accumulate(logit, p_a + pick_wide(GATE_SLOT, r) * A_SLOT, p_g, depth, BLOCK_K, BLOCK_K, m_g, DEPTH,
                               False, PRECISION, BLOCK_K)  # fmt: skip
            if HAS_GATE_BIAS:
                logit += tl.load(GateBias + o_l, mask=m_g, other=0.0).to(wide)[None, :]
            o_l = pick(GATE_FIRST, r) + o_g
            if GATE_KIND == "moments":
                gate_rows = tl.minimum(B - i_m * BLOCK_M, BLOCK_M)
                store_column_moments(logit, m_m, gate_rows, i_m, GateFirst, o_l, m_g, LOGITS)
            elif GATE_KIND == "batch":
                logit = finish_running(logit, GateFirst, GateSecond, GateNormW, GateNormBias, o_l, m_g, GATE_PLACE,
                                       GATE_EPS, GATE_AFFINE, "identity", 0.0, wide)  # fmt: skip
            p_l = Logits + o_m[:, None] * LOGITS + o_l[None, :]
            tl.store(p_l, logit, mask=m_m[:, None] & m_g[None, :])


END_BYTES = 256
"""Of a row of a tile at most where a norm follows: it needs registers beside the accumulator."""


WHOLE_ROWS = 64
"""Rows at most of a tile that does layer norm."""


def linear_tile(
    a: Tensor,
    members: int,
    units: int,
    precision: str,
    *,
    activation: str = "identity",
    has_norm: bool = False,
    has_dropout: bool = False,
    by_row: bool = False,
) -> Tile:
    """The tile that ``grouped_linear_fwd`` takes for ``a`` and a weight ``(members, units, K)``.

    ``activation``, ``has_norm``, ``has_dropout``: what follows; ``by_row``: layer norm.
    """
    tile = cut_depth(matmul_tile("linear", a, a.shape[0], max(units, 1), max(members, 1), precision), a.shape[2])
    if has_dropout and not has_norm:
        tile = tile._replace(columns=min(tile.columns, NARROW))
    elif has_norm or activation in HEAVY:
        tile = tile._replace(columns=min(tile.columns, END_BYTES // a.element_size()))
    return tile._replace(rows=min(tile.rows, WHOLE_ROWS)) if by_row and has_whole_rows(tile, units) else tile


def has_whole_rows(tile: Tile, units: int) -> bool:
    """Whether one tile has all units of a member, so that layer norm is done where they are computed."""
    return tile.columns >= units


@lru_cache(maxsize=CACHED)
def _forward(
    tile: Tile, precision: str, depth: int, units: int, slots: tuple[int, ...], a_row: int, a_slot: int, y_row: int,
    z_row: int, activation: tuple[str, float], has_members: bool, has_bias: bool, save_z: bool, norm: NormConstants,
    dropout: DropoutConstants, gates: GateRuns, logits: int, has_gates: bool, has_gate_bias: bool,
    logits_norm: NormConstants,
) -> Prepared:  # fmt: skip
    return prepare(
        _grouped_linear_fwd_kernel, tile, DEPTH=depth, UNITS=max(units, 1), SLOT=slots, A_ROW=a_row, A_SLOT=a_slot,
        Y_ROW=y_row, Z_ROW=z_row, NAME=activation[0], VALUE=activation[1], HAS_MEMBERS=has_members,
        HAS_BIAS=has_bias, SAVE_Z=save_z, **norm._asdict(), **dropout._asdict(), **prefixed("GATE_", logits_norm),
        HAS_GATES=has_gates, HAS_GATE_BIAS=has_gate_bias, GATE_SLOT=gates.slot, GATE_FIRST=gates.first,
        GATE_SIZE=gates.sizes, GATE_WIDTH=gate_width(gates), LOGITS=logits, PRECISION=precision, BLOCK_M=tile.rows,
        BLOCK_N=tile.columns, BLOCK_K=tile.depth, GROUP=tile.group,
    )  # fmt: skip


def grouped_linear_fwd(
    a: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slots: tuple[int, ...],
    *,
    activation: tuple[str, float] = ("identity", 0.0),
    keep_input: bool = False,
    out: Tensor | None = None,
    norm: Norm | None = None,
    dropout: Dropout | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    gates: GateRuns = NO_GATES,
    logits_norm: Norm | None = None,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Member ``m`` reads ``a[:, slots[m]]``; runs of gate rows read theirs in the same launch.

    Args:
        a: ``(B, S, K)``, rows and slots at any stride, K contiguous. B at least 1.
        weight, bias: ``(n, H, K)`` and ``(n, H)``, contiguous; weight None: no members.
        activation: name and constant, one of ``FUSED``.
        keep_input: also return the product itself, which norm and activation read.
        out: ``(B, n, H)``, a view into wider rows, say; default new.
        norm: before or after the activation. With moments the product is the result, the first one, as it is. ``"row"``
            needs a tile with all units (``has_whole_rows``), and writes its statistics where ``keep_input``.
        dropout: after all of that.
        gate_weight, gate_bias: ``(G, K)`` and ``(G,)``, contiguous; ``gates``: which rows read which slot.
        logits_norm: ``"batch"`` or ``"moments"`` of the logits, ``(G,)``.
        tile: default from the tables, by which also the library may take the product (``library.py``), or programs that
            stay (``persistent.py``).

    Returns:
        ``(B, n, H)``, the product ``(B, n, H)``, the logits ``(B, G)`` in float32 (float64); None where not
        asked for.
    """
    if weight is not None and norm is None and dropout is None and not keep_input and tile is None:
        in_library = activation[0] == "identity" and linear_in_library(a, weight, precision)
        wide = None if in_library or logits_norm is not None else forward_tile(a, weight, activation[0])
        if in_library or wide is not None:
            beside = None
            if gate_weight is not None:
                _, _, beside = grouped_linear_fwd(
                    a, None, None, (), gate_weight=gate_weight, gate_bias=gate_bias, gates=gates,
                    logits_norm=logits_norm, precision=precision,
                )  # fmt: skip
            if wide is None:
                return library_linear_fwd(a, weight, bias, out), None, beside
            return persistent_linear_fwd(a, weight, bias, slots, activation, out, wide), None, beside
    rows, depth = a.shape[0], a.shape[2]
    y = z = logits = None
    units = members = 0
    is_whole = norm is None or norm.kind in ("batch", "row")
    keep_input = keep_input or not is_whole
    if weight is not None:
        members, units = weight.shape[0], weight.shape[1]
        if is_whole:
            y = torch.empty((rows, members, units), dtype=a.dtype, device=a.device) if out is None else out
        z = torch.empty((rows, members, units), dtype=a.dtype, device=a.device) if keep_input else None
    total = 0
    if gate_weight is not None:
        total = gate_weight.shape[0]
        logits = torch.empty((rows, total), dtype=wide_of(a.dtype), device=a.device)
    if tile is None:
        by_row = norm is not None and norm.kind.startswith("row")
        tile = linear_tile(
            a, members, units, precision, activation=activation[0], has_norm=norm is not None,
            has_dropout=dropout is not None, by_row=by_row,
        )  # fmt: skip
    assert norm is None or norm.kind != "row" or has_whole_rows(tile, units)
    programs = cdiv(rows, tile.rows) * (members * cdiv(units, tile.columns) + len(gates.slot))
    run = _forward(
        tile, precision, depth, units, slots, a.stride(0), a.stride(1), 0 if y is None else y.stride(0),
        members * units, activation, weight is not None, bias is not None, keep_input, norm_constants(norm),
        dropout_constants(dropout), gates, total, gate_weight is not None, gate_bias is not None,
        norm_constants(logits_norm),
    )  # fmt: skip
    first, second, norm_weight, norm_bias = norm_pointers(norm)
    gate_first, gate_second, gate_norm_weight, gate_norm_bias = norm_pointers(logits_norm)
    run(
        (programs,), a.device,
        A=a, W=weight, Bias=bias, Y=y, Z=z, First=first, Second=second, NormW=norm_weight, NormBias=norm_bias,
        Seed=None if dropout is None else dropout.seed, GateW=gate_weight, GateBias=gate_bias, Logits=logits,
        GateFirst=gate_first, GateSecond=gate_second, GateNormW=gate_norm_weight, GateNormBias=gate_norm_bias,
        B=rows, depth=depth,
    )  # fmt: skip
    if not is_whole:
        return z, None, logits
    return y, z, logits

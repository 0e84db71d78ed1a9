"""Gradient of a level's input: one sum over all experts and gates that read a slot, one write per element."""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from ._launch import CACHED, Prepared, cdiv, prepare
from ._matmul import accumulate, pick, swizzle, tiles_of
from ._tiles import NARROW, Tile, cut_depth, gate_width, matmul_tile, without_ahead
from .library import input_grad_in_library, library_input_grad
from .tables import NO_GATES, GateRuns, Readers


@triton.jit(do_not_specialize=["B", "depth"])
def _input_grad_kernel(
    D, W, DL, GateW, Out, B, depth,
    DEPTH: tl.constexpr, UNITS: tl.constexpr, D_ROW: tl.constexpr, OUT_ROW: tl.constexpr, SLOTS: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, ORDER: tl.constexpr, HAS_MEMBERS: tl.constexpr, HAS_GATES: tl.constexpr,
    RUNS_FIRST: tl.constexpr, RUNS_LAST: tl.constexpr, RUNS_ORDER: tl.constexpr, GATE_FIRST: tl.constexpr,
    GATE_SIZE: tl.constexpr, GATE_WIDTH: tl.constexpr, LOGITS: tl.constexpr, ADDS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``Out[:, s] (+)= sum_{e: slot s} D[:, e] @ W[e] + sum_{r: slot s} DL[:, r] @ GateW[r]``.

    D ``(B, n, DEPTH)``, W ``(n, DEPTH, UNITS)``, DL ``(B, LOGITS)``, GateW ``(LOGITS, UNITS)``, Out
    ``(B, SLOTS, UNITS)``. The members that read slot s are ``FIRST[s]`` to ``LAST[s]`` of ORDER, which is empty where
    they stand in order; the same with runs of gate rows.
    """
    wide: tl.constexpr = tl.float64 if Out.dtype.element_ty == tl.float64 else tl.float32
    TILES: tl.constexpr = (UNITS + BLOCK_N - 1) // BLOCK_N
    i_m, i_n = swizzle(tl.program_id(0), tiles_of(B, BLOCK_M), TILES * SLOTS, GROUP)
    s = i_n // TILES
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = (i_n % TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_n = o_m < B, o_n < UNITS
    m_mn = m_m[:, None] & m_n[None, :]
    row = tl.where(m_m, o_m, 0)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), wide)
    if HAS_MEMBERS:
        p_d = D + row * D_ROW + o_k[None, :]
        p_w = W + o_k.to(tl.int64)[:, None] * UNITS + o_n[None, :]
        first, last = pick(FIRST, s), pick(LAST, s)
        if len(ORDER) == 0:  # the members stand one after the other in D and W: to the loop they are one
            p_w += tl.cast(first, tl.int64) * (DEPTH * UNITS)
            acc = accumulate(acc, p_d + first * DEPTH, p_w, (last - first) * depth, BLOCK_K, BLOCK_K * UNITS, m_n,
                             DEPTH, UNITS % BLOCK_N != 0, PRECISION, BLOCK_K)  # fmt: skip
        else:
            for i in range(first, last):
                e = pick(ORDER, i)
                acc = accumulate(acc, p_d + e * DEPTH, p_w + tl.cast(e, tl.int64) * (DEPTH * UNITS), depth, BLOCK_K,
                                 BLOCK_K * UNITS, m_n, DEPTH, UNITS % BLOCK_N != 0, PRECISION, BLOCK_K)  # fmt: skip
    if HAS_GATES:
        o_g = tl.arange(0, GATE_WIDTH)
        for i in range(pick(RUNS_FIRST, s), pick(RUNS_LAST, s)):
            r = i
            if len(RUNS_ORDER) > 0:
                r = pick(RUNS_ORDER, i)
            o_l = pick(GATE_FIRST, r) + o_g
            m_g = o_g < pick(GATE_SIZE, r)
            dl = tl.load(DL + row * LOGITS + o_l[None, :], mask=m_g[None, :], other=0.0)
            p_g = GateW + o_l.to(tl.int64)[:, None] * UNITS + o_n[None, :]
            g = tl.load(p_g, mask=m_g[:, None] & m_n[None, :], other=0.0)
            acc = tl.dot(dl, g, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    p_out = Out + o_m[:, None] * OUT_ROW + (s * UNITS + o_n)[None, :]
    if ADDS:
        acc += tl.load(p_out, mask=m_mn, other=0.0).to(wide)
    tl.store(p_out, acc.to(Out.dtype.element_ty), mask=m_mn)


@lru_cache(maxsize=CACHED)
def _prepared(
    tile: Tile, precision: str, depth: int, units: int, d_row: int, out_row: int, slots: int, readers: Readers,
    has_members: bool, gates: GateRuns, logits: int, has_gates: bool, adds: bool,
) -> Prepared:  # fmt: skip
    runs = Readers.build(gates.slot, slots)
    return prepare(
        _input_grad_kernel, tile, DEPTH=depth, UNITS=units, D_ROW=d_row, OUT_ROW=out_row, SLOTS=slots,
        FIRST=readers.first, LAST=readers.last, ORDER=readers.order, HAS_MEMBERS=has_members, HAS_GATES=has_gates,
        RUNS_FIRST=runs.first, RUNS_LAST=runs.last, RUNS_ORDER=runs.order, GATE_FIRST=gates.first,
        GATE_SIZE=gates.sizes, GATE_WIDTH=gate_width(gates), LOGITS=logits, ADDS=adds, PRECISION=precision,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth, GROUP=tile.group,
    )  # fmt: skip


def grouped_input_grad(
    d: Tensor | None,
    weight: Tensor | None,
    readers: Readers | None,
    out: Tensor,
    *,
    dl: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gates: GateRuns = NO_GATES,
    adds: bool = False,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> Tensor:
    """Gradient of the slots, ``(B, S, K)``, written into ``out`` or, with ``adds``, added to it.

    Args:
        d, weight: ``(B, n, H)`` with its last two axes contiguous, ``(n, H, K)`` contiguous.
        readers: which members read which slot; with ``d`` and ``weight`` None: no members.
        out: contiguous.
        dl, gate_weight: ``(B, G)`` and ``(G, K)``, contiguous; both None: no gates.
        gates: which rows of ``gate_weight`` read which slot.
        tile: default from the tables, by which also the library may take the product (``library.py``).
    """
    if d is not None and weight is not None and tile is None and input_grad_in_library(d, weight, out, precision):
        if dl is not None:  # their part is small: the sum is rounded last
            grouped_input_grad(
                None, None, None, out, dl=dl, gate_weight=gate_weight, gates=gates, adds=adds, precision=precision
            )
        return library_input_grad(d, weight, out, adds=adds or dl is not None)
    some = d if d is not None else dl
    assert some is not None
    rows, slots, units = out.shape
    depth = 1 if weight is None else weight.shape[1]
    if readers is None:
        readers = Readers((0,) * slots, (0,) * slots, ())
    if tile is None:
        tile = matmul_tile("input_grad", some, rows, units, slots, precision)
        if weight is not None:
            tile = cut_depth(tile, depth)
        if readers.order or adds or depth % tile.depth:  # products of more columns would wait for each other (C7515)
            tile = tile._replace(columns=min(tile.columns, NARROW))
        tile = without_ahead(tile, depth)
    run = _prepared(
        tile, precision, depth, units, 0 if d is None else d.stride(0), out.stride(0), slots, readers, d is not None,
        gates, 0 if dl is None else dl.shape[1], dl is not None, adds,
    )  # fmt: skip
    run(
        (cdiv(rows, tile.rows) * slots * cdiv(units, tile.columns),), out.device,
        D=d, W=weight, DL=dl, GateW=gate_weight, Out=out, B=rows, depth=depth,
    )  # fmt: skip
    return out

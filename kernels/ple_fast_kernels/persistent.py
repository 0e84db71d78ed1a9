"""Products of large tiles in half precision: programs that stay, and loads by the tensor memory engine (TMA).

A program goes from tile to tile, in an order that follows from its number alone, and the engine loads the first
operands of the next tile while the last one is finished. The launchers of ``grouped_linear.py`` and ``data_grad.py``
take these kernels where the table has a row for them (``_tile_tables.py``) and the engine can load the operands; all
else takes theirs.

The engine reads boxes of a tensor that a descriptor of the host bounds: rows, columns and depth beyond the tensor are 0
in both operands, so no box reaches into the next slot or member. Triton encodes a descriptor at each launch, and passes
it as a parameter of the kernel, by value: a CUDA graph keeps a copy, which is as good as the address in it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._activations import activate, derive
from ._launch import ALIGNMENT, CACHED, MAX_INT, Prepared, cdiv, prepare
from ._matmul import pick, swizzle, tiles_of
from ._tiles import Tile, cut_depth, persistent_programs, persistent_tile


@triton.jit
def _product(A, W, slot, row, e, n, depth, ACROSS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_K: tl.constexpr):  # fmt: skip
    """The tile of ``A[slot] @ W[e]`` that begins at ``row`` and column ``n``: A ``(slots, B, depth)``, W
    ``(members, depth, columns)``, or with ACROSS ``(members, columns, depth)``."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        a = A.load([slot, row, k]).reshape(BLOCK_M, BLOCK_K)
        if ACROSS:
            w = W.load([e, n, k]).reshape(BLOCK_N, BLOCK_K).T
        else:
            w = W.load([e, k, n]).reshape(BLOCK_K, BLOCK_N)
        acc = tl.dot(a, w, acc)
    # What follows works on a copy: of the accumulator itself, ptxas would wait for every product (C7514).
    return acc + tl.zeros_like(acc)


@triton.jit(do_not_specialize=["B", "depth"])
def _grouped_linear_fwd_persistent_kernel(
    A, W, Bias, Y, B, depth,
    UNITS: tl.constexpr, SLOT: tl.constexpr, Y_ROW: tl.constexpr, NAME: tl.constexpr, VALUE: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``Y[:, m] = f(A[SLOT[m]] @ W[m].T + Bias[m])``.

    A ``(S, B, depth)`` and W ``(n, UNITS, depth)``, descriptors; Bias ``(n, UNITS)``, Y ``(B, n, UNITS)``, rows Y_ROW
    apart.
    """
    TILES: tl.constexpr = (UNITS + BLOCK_N - 1) // BLOCK_N
    COLUMNS: tl.constexpr = TILES * len(SLOT)
    row_tiles = tiles_of(B, BLOCK_M)
    for t in tl.range(tl.program_id(0), row_tiles * COLUMNS, tl.num_programs(0), flatten=True):
        i_m, i_n = swizzle(t, row_tiles, COLUMNS, GROUP)
        e = i_n // TILES
        n = (i_n % TILES) * BLOCK_N
        acc = _product(A, W, pick(SLOT, e), i_m * BLOCK_M, e, n, depth, True, BLOCK_M, BLOCK_N, BLOCK_K)
        o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        o_n = n + tl.arange(0, BLOCK_N)
        m_n = o_n < UNITS
        if HAS_BIAS:
            acc += tl.load(Bias + e * UNITS + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        acc = activate(acc, NAME, VALUE)
        p_y = Y + o_m[:, None] * Y_ROW + (e * UNITS + o_n)[None, :]
        tl.store(p_y, acc.to(Y.dtype.element_ty), mask=(o_m < B)[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["B", "depth"])
def _grouped_data_grad_persistent_kernel(
    D, W, Kept, Out, Parts, B, depth,
    UNITS: tl.constexpr, MEMBERS: tl.constexpr, KEPT_ROW: tl.constexpr, NAME: tl.constexpr, VALUE: tl.constexpr,
    SUMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``Out[:, m] = (D[m] @ W[m]) f'(Kept[:, m])``; with SUMS also the sums of its columns over a tile's rows.

    D ``(n, B, depth)`` and W ``(n, depth, UNITS)``, descriptors; Kept ``(B, n, UNITS)``, rows KEPT_ROW apart; Out
    ``(B, n, UNITS)``; Parts ``(row tiles, 1, n UNITS)``.
    """
    TILES: tl.constexpr = (UNITS + BLOCK_N - 1) // BLOCK_N
    WIDTH: tl.constexpr = UNITS * MEMBERS
    row_tiles = tiles_of(B, BLOCK_M)
    for t in tl.range(tl.program_id(0), row_tiles * (TILES * MEMBERS), tl.num_programs(0), flatten=True):
        i_m, i_n = swizzle(t, row_tiles, TILES * MEMBERS, GROUP)
        e = i_n // TILES
        n = (i_n % TILES) * BLOCK_N
        acc = _product(D, W, e, i_m * BLOCK_M, e, n, depth, False, BLOCK_M, BLOCK_N, BLOCK_K)
        o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        o_n = n + tl.arange(0, BLOCK_N)
        m_m, m_n = o_m < B, o_n < UNITS
        m_mn = m_m[:, None] & m_n[None, :]
        o_c = e * UNITS + o_n
        if NAME != "identity":
            kept = tl.load(Kept + o_m[:, None] * KEPT_ROW + o_c[None, :], mask=m_mn, other=0.0).to(tl.float32)
            acc = derive(acc, kept, NAME, VALUE)
        out = acc.to(Out.dtype.element_ty)
        tl.store(Out + o_m[:, None] * WIDTH + o_c[None, :], out, mask=m_mn)
        if SUMS:
            total = tl.sum(tl.where(m_m[:, None], out, 0.0).to(tl.float32), 0)
            tl.store(Parts + i_m.to(tl.int64) * WIDTH + o_c, total, mask=m_n)


ACTIVATIONS = {
    "linear": ("identity", "relu", "leaky_relu", "tanh"),
    "data_grad": ("identity", "relu", "leaky_relu"),
}
"""Those whose formulas leave enough registers beside the accumulator of a large tile."""
MOST_STRIDE = 1 << 40
"""Bytes; the engine takes less."""


def can_load(tensor: Tensor) -> bool:
    """Whether the engine can load ``tensor``, of three axes: it begins at a multiple of 16 bytes, its last axis is
    contiguous, and the others take steps of multiples of 16 bytes, so that no element belongs to two places."""
    size = tensor.element_size()
    if tensor.data_ptr() % ALIGNMENT or tensor.stride(2) != 1:
        return False
    steps = [size * step for n, step in zip(tensor.shape[:2], tensor.stride()[:2], strict=True) if n > 1]
    row = size * tensor.shape[2]
    # A row of a single row or slot is what the steps of ``_described`` are then made of.
    return row % ALIGNMENT == 0 and all(step % ALIGNMENT == 0 and row <= step < MOST_STRIDE for step in steps)


def _tile(kernel: str, a: Tensor, weight: Tensor, columns: int, activation: str) -> Tile | None:
    rows, members = a.shape[0], weight.shape[0]
    if activation not in ACTIVATIONS[kernel]:
        return None
    tile = persistent_tile(kernel, a, rows, columns, members)
    if tile is None or rows < tile.rows or cut_depth(tile, a.shape[2]) != tile:  # too little to fill a tile
        return None
    if not (can_load(a) and can_load(weight)):
        return None
    # Tiles are counted in 32 bits, one step beyond the last one.
    tiles = cdiv(rows, tile.rows) * members * cdiv(columns, tile.columns)
    return tile if tiles + persistent_programs(a, tile, tiles) <= MAX_INT else None


def forward_tile(a: Tensor, weight: Tensor, activation: str) -> Tile | None:
    """The tile with which ``persistent_linear_fwd`` is to be taken; None: it is not."""
    return _tile("linear", a, weight, weight.shape[1], activation)


def data_grad_tile(d: Tensor, weight: Tensor, activation: str) -> Tile | None:
    """The tile with which ``persistent_data_grad`` is to be taken; None: it is not."""
    return _tile("data_grad", d, weight, weight.shape[2], activation)


def _by_slot(a: Tensor, tile: Tile) -> TensorDescriptor:
    """``a (B, S, K)`` as ``(S, B, K)``, in boxes of a tile's rows and depth of one slot.

    This way round the operand of a product has all of a box but its first axis; with rows first ptxas would wait for
    each product (C7515). A slot's step may be less than a row's: the engine asks no order of them.
    """
    rows, slots, depth = a.shape
    row = a.stride(0) if rows > 1 else depth
    slot = a.stride(1) if slots > 1 else row
    return TensorDescriptor(a, [slots, rows, depth], [slot, row, 1], [1, tile.rows, tile.depth])


def _by_member(weight: Tensor, tile: Tile, *, across: bool) -> TensorDescriptor:
    """``weight (n, H, K)`` in boxes of a tile's columns and depth of one member; ``across``: the columns are units."""
    members, units, inputs = weight.shape
    box = [1, tile.columns, tile.depth] if across else [1, tile.depth, tile.columns]
    return TensorDescriptor(weight, [members, units, inputs], [units * inputs, inputs, 1], box)


@lru_cache(maxsize=CACHED)
def _forward(
    tile: Tile, units: int, slots: tuple[int, ...], y_row: int, activation: tuple[str, float], has_bias: bool
) -> Prepared:
    return prepare(
        _grouped_linear_fwd_persistent_kernel, tile, UNITS=units, SLOT=slots, Y_ROW=y_row, NAME=activation[0],
        VALUE=activation[1], HAS_BIAS=has_bias, BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth,
        GROUP=tile.group,
    )  # fmt: skip


@lru_cache(maxsize=CACHED)
def _data_grad(
    tile: Tile, units: int, members: int, kept_row: int, activation: tuple[str, float], sums: bool
) -> Prepared:
    return prepare(
        _grouped_data_grad_persistent_kernel, tile, UNITS=units, MEMBERS=members, KEPT_ROW=kept_row,
        NAME=activation[0], VALUE=activation[1], SUMS=sums, BLOCK_M=tile.rows, BLOCK_N=tile.columns,
        BLOCK_K=tile.depth, GROUP=tile.group,
    )  # fmt: skip


def persistent_linear_fwd(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: tuple[int, ...],
    activation: tuple[str, float],
    out: Tensor | None,
    tile: Tile,
) -> Tensor:
    """``f(a[:, slots[m]] @ weight[m].T + bias[m])`` of all members, ``(B, n, H)``; arguments as of
    ``grouped_linear_fwd``, ``tile`` that of ``forward_tile``."""
    rows, (members, units, depth) = a.shape[0], weight.shape
    if out is None:
        out = torch.empty((rows, members, units), dtype=a.dtype, device=a.device)
    tiles = cdiv(rows, tile.rows) * members * cdiv(units, tile.columns)
    run = _forward(tile, units, slots, out.stride(0), activation, bias is not None)
    run(
        (persistent_programs(a, tile, tiles),), a.device,
        A=_by_slot(a, tile), W=_by_member(weight, tile, across=True), Bias=bias, Y=out, B=rows, depth=depth,
    )  # fmt: skip
    return out


def persistent_data_grad(
    d: Tensor, weight: Tensor, kept: Tensor | None, activation: tuple[str, float], tile: Tile, *, sums: bool
) -> tuple[Tensor, Tensor | None]:
    """``(d[:, m] @ weight[m]) f'(kept[:, m])`` of all members, ``(B, n, K)``, and ``sums``; arguments as of
    ``grouped_data_grad``, ``tile`` that of ``data_grad_tile``."""
    rows, (members, depth, units) = d.shape[0], weight.shape
    out = torch.empty((rows, members, units), dtype=d.dtype, device=d.device)
    parts = None
    if sums:
        parts = torch.empty((cdiv(rows, tile.rows), 1, members * units), dtype=torch.float32, device=d.device)
    tiles = cdiv(rows, tile.rows) * members * cdiv(units, tile.columns)
    run = _data_grad(tile, units, members, 0 if kept is None else kept.stride(0), activation, sums)
    run(
        (persistent_programs(d, tile, tiles),), d.device,
        D=_by_slot(d, tile), W=_by_member(weight, tile, across=False), Kept=kept, Out=out, Parts=parts, B=rows,
        depth=depth,
    )  # fmt: skip
    return out, parts

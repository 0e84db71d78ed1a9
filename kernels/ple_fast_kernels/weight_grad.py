"""Gradients of weights and biases: rows are split, every part adds up on its own, and one launch adds the parts.

No atomics: the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import CACHED, Prepared, cdiv, prepare, wide_of
from ._matmul import pick, pick_wide
from ._tiles import NARROW, Tile, gate_width, row_splits, weight_grad_tile
from .library import library_weight_grad, weight_grad_in_library
from .reduce_parts import ALIGNMENT, reduce_parts
from .tables import NO_GATES, GateRuns


@triton.jit(do_not_specialize=["B", "CHUNK"])
def _grouped_weight_grad_kernel(
    A, D, DL, Parts, Split, B, CHUNK,
    DEPTH: tl.constexpr, UNITS: tl.constexpr, SLOT: tl.constexpr, A_ROW: tl.constexpr, A_SLOT: tl.constexpr,
    D_ROW: tl.constexpr, HAS_MEMBERS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BIAS_BESIDE: tl.constexpr, HAS_GATES: tl.constexpr, GATE_SLOT: tl.constexpr, GATE_FIRST: tl.constexpr,
    GATE_SIZE: tl.constexpr, GATE_WIDTH: tl.constexpr, LOGITS: tl.constexpr, HAS_GATE_BIAS: tl.constexpr,
    SIZE: tl.constexpr, BIAS_AT: tl.constexpr, GATE_AT: tl.constexpr, GATE_BIAS_AT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``D[:, m].T @ A[:, SLOT[m]]``, ``D[:, m].sum(0)`` and the same of the gates, over rows ``z CHUNK`` to
    ``(z + 1) CHUNK``, into ``Parts[z]``.

    A ``(B, S, DEPTH)``, D ``(B, n, UNITS)``, DL ``(B, LOGITS)``, Parts ``(parts, SIZE)``, Split: gets the
    number of parts. A program is a tile of a weight, a tile of a run of gate rows, or some columns of a bias that no
    tile of a weight adds up beside its product (BIAS_BESIDE).
    """
    wide: tl.constexpr = tl.float64 if A.dtype.element_ty == tl.float64 else tl.float32
    O_TILES: tl.constexpr = (UNITS + BLOCK_O - 1) // BLOCK_O
    I_TILES: tl.constexpr = (DEPTH + BLOCK_I - 1) // BLOCK_I
    WEIGHT_TILES: tl.constexpr = len(SLOT) * O_TILES * I_TILES if HAS_WEIGHT else 0
    GATE_TILES: tl.constexpr = len(GATE_SLOT) * I_TILES if HAS_GATES else 0
    WIDTH: tl.constexpr = len(SLOT) * UNITS  # of D
    BIAS_TILES: tl.constexpr = (WIDTH + BLOCK_O - 1) // BLOCK_O if HAS_BIAS and not BIAS_BESIDE else 0
    pid = tl.program_id(0)
    z = tl.program_id(1)
    if pid + z == 0:
        tl.store(Split, tl.num_programs(1))
    begin = z.to(tl.int64) * CHUNK
    first, last = 0, tl.minimum(B - begin, CHUNK).to(tl.int32)  # rows of this part, none where last is below 1
    row = (begin + tl.arange(0, BLOCK_R))[:, None]
    Parts += z.to(tl.int64) * SIZE
    if pid < WEIGHT_TILES:
        if HAS_WEIGHT:
            e = pid // (O_TILES * I_TILES)
            tile = pid % (O_TILES * I_TILES)
            o_o = (tile // I_TILES) * BLOCK_O + tl.arange(0, BLOCK_O)
            o_i = (tile % I_TILES) * BLOCK_I + tl.arange(0, BLOCK_I)
            m_o, m_i = o_o < UNITS, o_i < DEPTH
            p_d = D + row * D_ROW + (e * UNITS + o_o)[None, :]
            p_a = A + row * A_ROW + pick_wide(SLOT, e) * A_SLOT + o_i[None, :]
            acc = tl.zeros((BLOCK_O, BLOCK_I), wide)
            if BIAS_BESIDE:
                if tile % I_TILES == 0:
                    acc, sums = _products(acc, p_d, p_a, m_o, m_i, first, last, D_ROW, A_ROW, UNITS % BLOCK_O != 0,
                                          DEPTH % BLOCK_I != 0, True, PRECISION, BLOCK_R)  # fmt: skip
                    tl.store(Parts + BIAS_AT + e * UNITS + o_o, sums, mask=m_o)
                else:
                    acc, _ = _products(acc, p_d, p_a, m_o, m_i, first, last, D_ROW, A_ROW, UNITS % BLOCK_O != 0,
                                       DEPTH % BLOCK_I != 0, False, PRECISION, BLOCK_R)  # fmt: skip
            else:
                acc, _ = _products(acc, p_d, p_a, m_o, m_i, first, last, D_ROW, A_ROW, UNITS % BLOCK_O != 0,
                                   DEPTH % BLOCK_I != 0, False, PRECISION, BLOCK_R)  # fmt: skip
            p_part = Parts + (e.to(tl.int64) * UNITS + o_o)[:, None] * DEPTH + o_i[None, :]
            tl.store(p_part, acc, mask=m_o[:, None] & m_i[None, :])
    elif pid < WEIGHT_TILES + GATE_TILES:
        if HAS_GATES:
            gate_tile = pid - WEIGHT_TILES
            g = gate_tile // I_TILES
            o_g = tl.arange(0, GATE_WIDTH)
            o_x = (gate_tile % I_TILES) * BLOCK_I + tl.arange(0, BLOCK_I)
            m_g, m_x = o_g < pick(GATE_SIZE, g), o_x < DEPTH
            o_l = pick(GATE_FIRST, g) + o_g
            p_dl = DL + row * LOGITS + o_l[None, :]
            p_x = A + row * A_ROW + pick_wide(GATE_SLOT, g) * A_SLOT + o_x[None, :]
            # This way round: a run of gate rows may be narrower than a product's rows.
            gate_acc = tl.zeros((BLOCK_I, GATE_WIDTH), wide)
            gate_acc, _ = _products(gate_acc, p_x, p_dl, m_x, m_g, first, last, A_ROW, LOGITS, True, True, False,
                                    PRECISION, BLOCK_R)  # fmt: skip
            p_gate = Parts + GATE_AT + o_l.to(tl.int64)[None, :] * DEPTH + o_x[:, None]
            tl.store(p_gate, gate_acc, mask=m_x[:, None] & m_g[None, :])
    elif pid < WEIGHT_TILES + GATE_TILES + BIAS_TILES:
        if HAS_BIAS:
            o_c = (pid - WEIGHT_TILES - GATE_TILES) * BLOCK_O + tl.arange(0, BLOCK_O)
            total = _column_sums(D, D_ROW, row, o_c, o_c < WIDTH, first, last, wide, BLOCK_O, BLOCK_R)
            tl.store(Parts + BIAS_AT + o_c, total, mask=o_c < WIDTH)
    else:
        if HAS_GATE_BIAS:
            o_c = (pid - WEIGHT_TILES - GATE_TILES - BIAS_TILES) * BLOCK_O + tl.arange(0, BLOCK_O)
            total = _column_sums(DL, LOGITS, row, o_c, o_c < LOGITS, first, last, wide, BLOCK_O, BLOCK_R)
            tl.store(Parts + GATE_BIAS_AT + o_c, total, mask=o_c < LOGITS)


ONES = tl.constexpr(16)
"""Columns of the ones that D is multiplied by to be added up: no product has fewer."""


@triton.jit
def _products(acc, p_d, p_a, m_o, m_i, first, last, D_ROW: tl.constexpr, A_ROW: tl.constexpr, MASK_O: tl.constexpr,
              MASK_I: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """``acc + d.T @ a`` over rows ``first`` to ``last``: ``p_d`` ``[BLOCK_R, O]``, ``p_a`` ``[BLOCK_R, I]``; with SUMS
    also the column sums ``[O]`` of d, else 0.

    The sums are a product with ones: tensor cores read d where it lies, and no thread asks another one for its share.
    """
    o_r = tl.arange(0, BLOCK_R)
    ones = tl.full((BLOCK_R, ONES), 1.0, p_d.dtype.element_ty)
    sums = tl.zeros((acc.shape[0], ONES), acc.dtype)
    for r in range(first, last, BLOCK_R):
        m_r = (o_r < last - r)[:, None]
        if MASK_O:
            d = tl.load(p_d, mask=m_r & m_o[None, :], other=0.0)
        else:
            d = tl.load(p_d, mask=m_r, other=0.0)
        if MASK_I:
            a = tl.load(p_a, mask=m_r & m_i[None, :], other=0.0)
        else:
            a = tl.load(p_a, mask=m_r, other=0.0)
        acc = tl.dot(tl.trans(d), a, acc, input_precision=PRECISION, out_dtype=acc.dtype)
        if SUMS:
            sums = tl.dot(tl.trans(d), ones, sums, input_precision=PRECISION, out_dtype=sums.dtype)
        p_d += BLOCK_R * D_ROW
        p_a += BLOCK_R * A_ROW
    # All columns of ones give the same sums.
    return acc, tl.sum(tl.where((tl.arange(0, ONES) == 0)[None, :], sums, 0.0), 1)


@triton.jit
def _column_sums(D, ROW: tl.constexpr, row, o_c, m_c, first, last, WIDE: tl.constexpr, BLOCK_C: tl.constexpr,
                 BLOCK_R: tl.constexpr):  # fmt: skip
    """Sums of columns ``o_c`` of D over rows ``first`` to ``last``; a thread adds up rows of its own until the end."""
    o_r = tl.arange(0, BLOCK_R)
    p_d = D + row * ROW + o_c[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_C), WIDE)
    for r in tl.range(first, last, BLOCK_R, num_stages=1 if tl.float64 == WIDE else 4):
        total += tl.load(p_d, mask=(o_r < last - r)[:, None] & m_c[None, :], other=0.0).to(WIDE)
        p_d += BLOCK_R * ROW
    return tl.sum(total, 0)


class WeightGrad(NamedTuple):
    """One layer's part of the flat buffers: which gradients, and where they begin within the part."""

    a: Tensor
    """``(B, S, K)``: what the layer read."""
    d: Tensor | None
    """``(B, n, H)``: gradient of the layer's linear output; its last two axes contiguous."""
    slots: tuple[int, ...]
    weight: bool
    bias: bool
    dl: Tensor | None = None
    """``(B, G)``: gradient of the logits, where the gates read ``a`` too."""
    gates: GateRuns = NO_GATES
    gate_weight: bool = False
    gate_bias: bool = False


class WeightGradResult(NamedTuple):
    """Gradients, as views of one flat buffer; None where not asked for."""

    weight: Tensor | None
    bias: Tensor | None
    gate_weight: Tensor | None
    gate_bias: Tensor | None


GATES_ALONE = 64
"""Units that the tile of a launch for gates alone is chosen for."""


class _Region(NamedTuple):
    bias_at: int
    gate_at: int
    gate_bias_at: int
    size: int
    splits: int
    programs: int
    tile: Tile


def _aligned(size: int) -> int:
    return cdiv(size, ALIGNMENT) * ALIGNMENT


def _region(layer: WeightGrad, precision: str, tile: Tile | None) -> _Region:
    rows, depth = layer.a.shape[0], layer.a.shape[2]
    units = 0 if layer.d is None else layer.d.shape[2]
    members = len(layer.slots)
    logits = 0 if layer.dl is None else layer.dl.shape[1]
    bias_at = _aligned(members * units * depth) if layer.weight else 0
    gate_at = bias_at + (_aligned(members * units) if layer.bias else 0)
    gate_bias_at = gate_at + (_aligned(logits * depth) if layer.gate_weight else 0)
    size = gate_bias_at + (_aligned(logits) if layer.gate_bias else 0)
    if tile is None:
        # Gates alone have no units; with 16 rows to a tile the sums of their bias would spill.
        tile = weight_grad_tile(layer.a, rows, units or GATES_ALONE, depth, max(members, 1), precision)
        if depth % tile.columns:  # with masks, products of more columns would wait for each other (C7515)
            tile = tile._replace(columns=min(tile.columns, NARROW))
    programs = _programs(layer, tile)
    return _Region(
        bias_at, gate_at, gate_bias_at, size, row_splits(layer.a, rows, programs, size, tile), programs, tile
    )


def _sums_beside(layer: WeightGrad) -> bool:
    """Whether the tiles of the weight add up D beside their products: where tensor cores do it without rounding D."""
    return layer.bias and layer.weight and layer.a.element_size() == 2


def _programs(layer: WeightGrad, tile: Tile) -> int:
    """Programs per part of the rows."""
    depth, members = layer.a.shape[2], len(layer.slots)
    units = 0 if layer.d is None else layer.d.shape[2]
    logits = 0 if layer.dl is None else layer.dl.shape[1]
    return (
        members * cdiv(units, tile.rows) * cdiv(depth, tile.columns) * layer.weight
        + len(layer.gates.slot) * cdiv(depth, tile.columns) * layer.gate_weight
        + cdiv(members * units, tile.rows) * (layer.bias and not _sums_beside(layer))
        + cdiv(logits, tile.rows) * layer.gate_bias
    )


@lru_cache(maxsize=CACHED)
def _prepared(
    tile: Tile, precision: str, depth: int, units: int, slots: tuple[int, ...], a_row: int, a_slot: int, d_row: int,
    has_members: bool, has_weight: bool, has_bias: bool, bias_beside: bool, gates: GateRuns, logits: int,
    has_gates: bool, has_gate_bias: bool, size: int, bias_at: int, gate_at: int, gate_bias_at: int,
) -> Prepared:  # fmt: skip
    return prepare(
        _grouped_weight_grad_kernel, tile, DEPTH=depth, UNITS=max(units, 1), SLOT=slots, A_ROW=a_row, A_SLOT=a_slot,
        D_ROW=d_row, HAS_MEMBERS=has_members, HAS_WEIGHT=has_weight, HAS_BIAS=has_bias, BIAS_BESIDE=bias_beside,
        HAS_GATES=has_gates, GATE_SLOT=gates.slot, GATE_FIRST=gates.first, GATE_SIZE=gates.sizes,
        GATE_WIDTH=gate_width(gates), LOGITS=logits, HAS_GATE_BIAS=has_gate_bias, SIZE=size, BIAS_AT=bias_at,
        GATE_AT=gate_at, GATE_BIAS_AT=gate_bias_at, PRECISION=precision, BLOCK_O=tile.rows, BLOCK_I=tile.columns,
        BLOCK_R=tile.depth,
    )  # fmt: skip


def grouped_weight_grads(
    layers: Sequence[WeightGrad], dtype: torch.dtype, *, precision: str = "ieee", tile: Tile | None = None
) -> list[WeightGradResult]:
    """Weight and bias gradients of all layers of a level: a launch per layer, and one that adds up all parts.

    Args:
        layers: what to compute; B at least 1, the same for all.
        dtype: of the gradients. Sums run in float32 (float64 for float64).
        tile: default from the tables, by which also the library may take a layer's weights (``library.py``).
    """
    layers = list(layers)
    if tile is None and any(_in_library(layer, dtype, precision) for layer in layers):
        return _beside_library(layers, dtype, precision)
    regions = [_region(layer, precision, tile) for layer in layers]
    if not regions:
        return []
    device, wide = layers[0].a.device, wide_of(dtype)
    # The numbers of parts come first, each aligned: a launch of what is not would go Triton's slow way.
    parts_at, out_at = [ALIGNMENT * len(regions)], [0]
    for region in regions:
        parts_at.append(parts_at[-1] + region.size * region.splits)
        out_at.append(out_at[-1] + region.size)
    buffer = torch.empty(parts_at[-1], dtype=wide, device=device)
    for i, (layer, region) in enumerate(zip(layers, regions, strict=True)):
        split = buffer[ALIGNMENT * i : ALIGNMENT * (i + 1)]
        _launch_weight_grad(layer, region, buffer[parts_at[i] : parts_at[i + 1]], split, precision)
    flat = torch.empty(out_at[-1], dtype=dtype, device=device)
    reduce_parts(buffer[parts_at[0] :], buffer, flat, tuple(region.size for region in regions), tuple(out_at[:-1]))
    return [_views(layer, region, flat, at) for layer, region, at in zip(layers, regions, out_at, strict=False)]


def _in_library(layer: WeightGrad, dtype: torch.dtype, precision: str) -> bool:
    d = layer.d
    return layer.weight and d is not None and d.dtype == dtype and weight_grad_in_library(layer.a, d, precision)


def _without_weight(layer: WeightGrad) -> WeightGrad:
    """What is left of a layer whose weight the library takes: it has D only where its sums are asked for."""
    left = layer._replace(weight=False)
    return left if layer.bias else left._replace(d=None, slots=())


def _beside_library(layers: Sequence[WeightGrad], dtype: torch.dtype, precision: str) -> list[WeightGradResult]:
    """``grouped_weight_grads`` where the library takes some of the weights."""
    weights: list[Tensor | None] = []
    rest = []
    for layer in layers:
        takes = _in_library(layer, dtype, precision)
        weights.append(library_weight_grad(layer.a, layer.d) if takes and layer.d is not None else None)
        rest.append(_without_weight(layer) if takes else layer)
    left = [any((layer.weight, layer.bias, layer.gate_weight, layer.gate_bias)) for layer in rest]
    found = iter(
        grouped_weight_grads([r for r, is_left in zip(rest, left, strict=True) if is_left], dtype, precision=precision)
    )
    results = [next(found) if is_left else WeightGradResult(None, None, None, None) for is_left in left]
    return [r if w is None else r._replace(weight=w) for r, w in zip(results, weights, strict=True)]


def _launch_weight_grad(layer: WeightGrad, region: _Region, parts: Tensor, split: Tensor, precision: str) -> None:
    a, d, dl, tile = layer.a, layer.d, layer.dl, region.tile
    rows, depth = a.shape[0], a.shape[2]
    chunk = cdiv(cdiv(rows, region.splits), tile.depth) * tile.depth
    run = _prepared(
        tile, precision, depth, 0 if d is None else d.shape[2], layer.slots, a.stride(0), a.stride(1),
        0 if d is None else d.stride(0), d is not None, layer.weight, layer.bias, _sums_beside(layer),
        layer.gates, 0 if dl is None else dl.shape[1], layer.gate_weight, layer.gate_bias, region.size, region.bias_at,
        region.gate_at, region.gate_bias_at,
    )  # fmt: skip
    run((region.programs, region.splits), a.device, A=a, D=d, DL=dl, Parts=parts, Split=split, B=rows, CHUNK=chunk)


def _views(layer: WeightGrad, region: _Region, flat: Tensor, at: int) -> WeightGradResult:
    depth = layer.a.shape[2]
    members, units = len(layer.slots), 0 if layer.d is None else layer.d.shape[2]
    logits = 0 if layer.dl is None else layer.dl.shape[1]

    def view(asked: bool, offset: int, *shape: int) -> Tensor | None:
        if not asked:
            return None
        size = 1
        for n in shape:
            size *= n
        return flat[at + offset : at + offset + size].view(shape)

    return WeightGradResult(
        view(layer.weight, 0, members, units, depth),
        view(layer.bias, region.bias_at, members, units),
        view(layer.gate_weight, region.gate_at, logits, depth),
        view(layer.gate_bias, region.gate_bias_at, logits),
    )

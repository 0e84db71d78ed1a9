"""Which levels run in one launch: where the model of ``docs/performance.md`` says that it is faster."""

from __future__ import annotations

from enum import Enum

from ple_fast_kernels import FUSED, fused_tile, fused_width

from ..call import LevelInput
from ..state import NormState
from .wiring import Source, matmul_precision, mixtures_of


class Fusion(Enum):
    """What one launch covers."""

    LEVEL = "experts of one layer, gates and mixtures"
    LAST_LAYER = "the last layer of the experts, softmax and mixtures"
    TWO_LAYERS = "experts of two layers, gates and mixtures"


SMALL_FLOPS = 4e9
"""Below this a level's products take less time than a launch costs the host or a pass over the experts' outputs."""
NARROW = 256
"""Depth of the last layer up to which its product waits for memory: then it is free to mix on the way."""
SERIAL_FLOPS = 12e6
"""Of one program at most that has all experts of its rows: what it does one after the other takes as long as the
launches that it saves, whatever the number of rows."""
SERIAL_ROWS = 64


def _folds(norm: NormState | None, *, keeps: bool) -> bool:
    """Whether a norm is a factor and a summand of a product: batch norm by running statistics, in inference."""
    return norm is None or (norm.kind == "batch" and not norm.batch and not keeps)


def can_fuse(inputs: LevelInput, fusion: Fusion, x: Source, gates_beside_experts: bool, *, keeps: bool) -> bool:
    """Whether the kernel serves this level: one block, plain gates, no norm or dropout that does not fold away."""
    plan, state = inputs.plan, inputs.state
    if len(plan.blocks) > 1 or not _folds(state.gate_norm, keeps=keeps):
        return False
    if plan.gate.slots and not gates_beside_experts:
        return False
    block = plan.blocks[0]
    layers = len(block.layers)
    states = state.layers[block.position : block.position + layers]
    for spec, own in zip(block.layers, states, strict=True):
        if own.dice is not None or own.dropout or spec.activation.name not in FUSED:
            return False
        if not _folds(own.norm, keeps=keeps):
            return False
    if fusion is Fusion.LEVEL and layers != 1:
        return False
    if fusion is Fusion.LAST_LAYER and (layers == 1 or keeps):
        return False
    if fusion is Fusion.TWO_LAYERS and (layers != 2 or keeps):
        return False
    mixtures = mixtures_of(plan)
    tile = fused_tile(
        x.tensor, block.layers[-1].units, len(mixtures.sizes), fused_width(mixtures), matmul_precision(),
        whole=fusion is Fusion.TWO_LAYERS,
    )  # fmt: skip
    return tile is not None


def choose_fusion(inputs: LevelInput, x: Source, gates_beside_experts: bool, *, keeps: bool) -> Fusion | None:
    """What to fuse at this call; None: a launch per layer, and one that mixes. ``keeps``: a backward follows."""
    block = inputs.plan.blocks[0]
    rows, experts, depth = inputs.x.batch, len(block.slots), x.tensor.shape[2]
    units = [spec.units for spec in block.layers]
    products = sum(a * b for a, b in zip([depth, *units], units, strict=False))
    flops = 2.0 * rows * experts * products
    wanted = []
    if len(units) == 1 and (flops < SMALL_FLOPS or (not keeps and depth <= NARROW)):
        wanted.append(Fusion.LEVEL)
    if len(units) == 2 and flops / rows * SERIAL_ROWS <= SERIAL_FLOPS:
        wanted.append(Fusion.TWO_LAYERS)
    if len(units) > 1 and (flops < SMALL_FLOPS or units[-2] <= NARROW):
        wanted.append(Fusion.LAST_LAYER)
    for fusion in wanted:
        if can_fuse(inputs, fusion, x, gates_beside_experts, keeps=keeps):
            return fusion
    return None

"""Levels in one launch: which ones, where the model of ``docs/performance.md`` says that it is faster, and how."""

from __future__ import annotations

from enum import Enum

from torch import Tensor

from ple_fast_kernels import fused_level_fwd, fused_tile, fused_two_layers_fwd, fused_width

from ..call import LevelInput
from ..saved import in_kernels
from ..state import NormState
from .ends import folded, norm_of
from .forward import ForwardRun
from .inputs import Source, columns_of, dense, matmul_precision, mixtures_of


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
    if len(plan.blocks) > 1 or plan.top_k or plan.sigmoid_rows or plan.outputs:
        return False
    if not _folds(state.gate_norm, keeps=keeps):
        return False
    if plan.gate.slots and not gates_beside_experts:
        return False
    block = plan.blocks[0]
    layers = len(block.layers)
    states = state.layers[block.position : block.position + layers]
    for spec, own in zip(block.layers, states, strict=True):
        if own.dropout or not in_kernels(spec, own):
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
    mixes = not inputs.plan.passes  # else the last layer is one launch as it is
    if mixes and len(units) == 1 and (flops < SMALL_FLOPS or (not keeps and depth <= NARROW)):
        wanted.append(Fusion.LEVEL)
    if len(units) == 2 and flops / rows * SERIAL_ROWS <= SERIAL_FLOPS:
        wanted.append(Fusion.TWO_LAYERS)
    if mixes and len(units) > 1 and (flops < SMALL_FLOPS or units[-2] <= NARROW):
        wanted.append(Fusion.LAST_LAYER)
    for fusion in wanted:
        if can_fuse(inputs, fusion, x, gates_beside_experts, keeps=keeps):
            return fusion
    return None


def fused_forward(run: ForwardRun, fusion: Fusion, weights_wanted: bool) -> tuple[Tensor, Tensor | None]:
    """The level in one launch, or its last layer with gates and mixtures."""
    inputs, plan, gate = run.inputs, run.plan, run.inputs.gate
    block = plan.blocks[0]
    part = slice(block.position, block.position + len(block.layers))
    tensors, spec, at = inputs.layers[part], block.layers[-1], run.saved.layers[part][-1]
    slots = tuple(run.x.columns[s] for s in plan.topology.mixture_slot)
    weight, bias = dense(gate.weight), dense(gate.bias)
    norms = [folded(norm_of(*layer)) for layer in zip(block.layers, tensors, run.state.layers[part], strict=True)]
    logits_norm = folded(run.logits_norm())
    if fusion is Fusion.TWO_LAYERS:
        first, second = tensors
        return fused_two_layers_fwd(
            run.x.tensor,
            (first.weight.contiguous(), second.weight.contiguous()),
            (dense(first.bias), dense(second.bias)),
            columns_of(block.slots, run.x.columns),
            run.mixtures,
            activations=(tuple(block.layers[0].activation), tuple(spec.activation)),  # type: ignore[arg-type]
            norms=(norms[0], norms[1]),
            x=run.x.tensor,
            gate_weight=weight,
            gate_bias=bias,
            logits_norm=logits_norm,
            mixture_slots=slots,
            offset=run.offset,
            temperature=plan.gate_spec.temperature,
            keep_weights=weights_wanted,
            precision=run.precision,
        )
    a, columns = run.x.tensor, columns_of(block.slots, run.x.columns)
    logits: Tensor | None = None
    if fusion is Fusion.LAST_LAYER:
        a, found = run.mlp_forward(block, run.x, None, with_gates=True, layers=len(block.layers) - 1)
        logits = None if found is None else found.logits
        columns = tuple(range(len(block.slots)))
    keeps_input = at.act >= 0 and at.act != at.h
    y, h, z, p = fused_level_fwd(
        a,
        tensors[-1].weight.contiguous(),
        dense(tensors[-1].bias),
        columns,
        run.mixtures,
        activation=(spec.activation[0], spec.activation[1]),
        norm=norms[-1],
        logits=logits,
        x=None if logits is not None else run.x.tensor,
        gate_weight=None if logits is not None else weight,
        gate_bias=None if logits is not None else bias,
        logits_norm=None if logits is not None else logits_norm,
        mixture_slots=slots,
        offset=run.offset,
        temperature=plan.gate_spec.temperature,
        keep_output=at.h >= 0,
        keep_input=keeps_input,
        keep_weights=weights_wanted,
        precision=run.precision,
    )
    run.keep(at.h, h)
    if keeps_input:
        run.keep(at.act, z)
    return y, p

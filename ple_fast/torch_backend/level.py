"""A whole extraction network, forward and backward by hand, in blocks of rows that stay in cache.

``level_forward`` and ``level_backward`` see plain tensors; autograd is not involved. Row blocks go through the level
one after the other. Where there are several and a norm takes the statistics of the batch, all of them go from one such
norm to the next: a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..call import LevelInput, Wants
from ..grads import RowGrads, plus
from ..slots import rows_of
from ..tensors import flatten
from . import mix
from .folding import fold_norms
from .input_grads import InputGrads
from .layer import Gradients, RowBlock
from .norms import BatchNormSaved, Moments, batch_moments, merge_moments, merge_sums
from .prepared import MLP, Level, prepared


def _mlp_forward(mlp: MLP, inputs: LevelInput, blocks: Sequence[RowBlock]) -> None:
    """Leaves ``(rows, n, H)`` in ``value`` of every row block."""
    moments: BatchNormSaved | None = None
    for stage in mlp.whole if len(blocks) == 1 else mlp.stages:
        parts: list[Moments] = []
        for block in blocks:
            a = None if stage.resumed is None else stage.resumed.end(inputs, block, block.take(), moments)
            for layer in stage.whole:
                a = layer.product(inputs, block, a)
                if layer.ends:
                    a = layer.end(inputs, block, a, None)
            if stage.begun is not None:
                a = stage.begun.product(inputs, block, a)
                parts.append(batch_moments(a))
            block.value = a
            del a  # nothing large stays in two hands
        if stage.begun is not None:
            norm = inputs.state.layers[stage.begun.number].norm
            assert norm is not None
            moments = merge_moments(parts, norm)


def _gates_forward(level: Level, inputs: LevelInput, blocks: Sequence[RowBlock]) -> None:
    """Leaves the softmax ``(rows, O_gated, E)`` in ``value`` of every row block."""
    gate = level.gate
    assert gate is not None
    if level.hidden is not None:
        _mlp_forward(level.hidden, inputs, blocks)
    moments: BatchNormSaved | None = None
    if len(blocks) > 1 and gate.waits:
        parts: list[Moments] = []
        for block in blocks:
            block.value = gate.product(inputs, block, block.value)
            parts.append(batch_moments(block.value.unsqueeze(1)))
        norm = inputs.state.gate_norm
        assert norm is not None
        moments = merge_moments(parts, norm)
        for block in blocks:
            block.value = gate.end(inputs, block, block.take(), moments)
        return
    for block in blocks:
        block.value = gate.end(inputs, block, gate.product(inputs, block, block.value), None)


def _rows_forward(
    level: Level, inputs: LevelInput, blocks: Sequence[RowBlock], out: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """``y (rows, O, H)`` and the mixtures' dense weights of every row block; ``y`` in ``out``, if that is given."""
    plan, at = level.plan, level.saved.mix
    for mlp in level.experts:
        _mlp_forward(mlp, inputs, blocks)
        for block in blocks:
            block.experts.append(block.take())
    if level.gate is not None:
        _gates_forward(level, inputs, blocks)
    done = []
    for block in blocks:
        h = block.take_experts()
        weights = mix.mixture_weights(plan, block.value, inputs.gate.offset, h.shape[0], h)
        block.value = None
        if at.h >= 0:
            block.kept[at.h] = h
        summed = mix.output_weights(plan, weights)
        if at.weights >= 0:
            block.kept[at.weights] = summed
        done.append((mix.combine(plan, summed, h, None if out is None else out[block.rows]), weights))
    return done


def _one_by_one(level: Level, blocks: Sequence[RowBlock]) -> Sequence[Sequence[RowBlock]]:
    """The row blocks that go through the level together."""
    return [blocks] if level.waits else [(block,) for block in blocks]


def level_forward(
    inputs: LevelInput,
    wants: Wants | None,
    *,
    listed: bool,
    take: Callable[[RowBlock], None] | None = None,
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """``y (B, O, H)``, the listed weights ``(B, num_weights)`` if asked for, and what backward reads.

    That is what row block after row block keeps, in the order of ``saved_by_rows``. Without ``wants`` nothing is kept,
    and norms that can be folded are. ``take``: gets each row block as soon as it is through; the list is then empty.
    """
    if wants is None and inputs.plan.has_norms:
        layers, gate, state = fold_norms(inputs.plan, inputs.layers, inputs.gate, inputs.state, inputs.x.batch)
        inputs = inputs._replace(layers=layers, gate=gate, state=state)
    level = prepared(inputs, wants)
    blocks, plan = level.blocks(inputs), inputs.plan
    kept: list[Tensor | None] = []
    if len(blocks) == 1:
        ((y, weights),) = _rows_forward(level, inputs, blocks)
        if take is not None:
            take(blocks[0])
        else:
            kept = blocks[0].kept
        return y, mix.listed_weights(plan, weights) if listed else None, kept
    weight, batch = inputs.layers[0].weight, inputs.x.batch
    units = plan.blocks[0].layers[-1].units
    y = torch.empty((batch, plan.topology.num_outputs, units), dtype=weight.dtype, device=weight.device)
    shown: Tensor | None = None
    if listed:
        wide = torch.promote_types(weight.dtype, torch.float32)
        shown = torch.empty((batch, plan.topology.num_weights), dtype=wide, device=weight.device)
    for together in _one_by_one(level, blocks):
        for block, (_, weights) in zip(together, _rows_forward(level, inputs, together, y), strict=True):
            if shown is not None:
                shown[block.rows] = mix.listed_weights(plan, weights)
            if take is not None:
                take(block)
            else:
                kept += block.kept
            block.kept = []  # the next block may take the memory, if this one's has been taken
    return y, shown, kept


def _weights_backward(
    level: Level,
    inputs: LevelInput,
    block: RowBlock,
    given: tuple[Tensor | None, Tensor | None],
    grads: Gradients,
) -> None:
    """From the gradients of output and listed weights, ``given``, to those of experts, in ``value``, and of logits."""
    plan, wants, at = level.plan, level.wants, level.saved.mix
    dy = None if given[0] is None else rows_of(given[0], block.rows)
    dlisted = None if given[1] is None else rows_of(given[1], block.rows)
    dweights: Tensor | None = None
    if wants.weights and dy is not None:
        h = block.kept[at.h] if at.h >= 0 else _experts_again(level, inputs, block)
        assert h is not None
        dweights = mix.mixture_part(plan, mix.weights_grad(dy, h))
    if wants.weights and dlisted is not None:
        listed = mix.listed_weights_backward(plan, dlisted)
        dweights = listed if dweights is None else dweights.add_(listed)
    if dy is not None and wants.experts:
        weights = dy if plan.passes else block.kept[at.weights]  # dy: it is not read
        assert weights is not None
        block.value = mix.combine_backward(plan, weights, dy)
    if dweights is not None and wants.gate.offset:
        assert inputs.gate.offset is not None
        doffset = mix.offset_grad(plan, dweights, inputs.gate.offset.dtype)
        grads.gate.offset = plus(grads.gate.offset, doffset)
    if dweights is not None and wants.logits:
        assert level.gate is not None
        block.dlogits = level.gate.end_backward(inputs, block, dweights)


def _experts_again(level: Level, inputs: LevelInput, block: RowBlock) -> Tensor:
    """The outputs of all experts, out of what their norms read."""
    replayed = [mlp.layers[-1].replay(inputs, block) for mlp in level.experts]
    block.replayed = replayed[0]  # whose backward comes next
    return replayed[0].output if len(replayed) == 1 else torch.cat([own.output for own in replayed], dim=1)


def _mlp_backward(
    mlp: MLP, inputs: LevelInput, blocks: Sequence[RowBlock], grads: Gradients, start: Callable[[RowBlock], Tensor]
) -> None:
    """From the gradient of the outputs ``(rows, n, H)``, which ``start`` gives of each row block, down to the input."""
    sums: Moments | None = None
    for stage in mlp.whole_backward if len(blocks) == 1 else mlp.stages_backward:
        parts: list[Moments] = []
        for block in blocks:
            d: Tensor | None
            if stage.resumed is None:
                d = start(block)
            else:
                d = stage.resumed.norm_backward(inputs, block, block.take(), grads, sums)
                d = stage.resumed.product_backward(inputs, block, d, grads)
            for layer in stage.whole:
                assert d is not None
                d = layer.end_backward(inputs, block, d, grads)
                d = layer.product_backward(inputs, block, layer.norm_backward(inputs, block, d, grads, None), grads)
            if stage.begun is not None:
                assert d is not None
                d = stage.begun.end_backward(inputs, block, d, grads)
                parts.append(stage.begun.sums(inputs, block, d))
                block.replayed = None  # nothing that is large outlives a stage
            block.value = d
            del d
        if stage.begun is not None:
            sums = merge_sums(parts)
            if stage.begun.want.affine:
                _add_up(grads.layers[stage.begun.number], parts)
    for block in blocks:
        block.value = None


def _add_up(own: RowGrads, parts: Sequence[Moments]) -> None:
    """The gradients of a norm's weight and bias out of those of row blocks."""
    for _, dw, db in parts:
        own.norm_weight, own.norm_bias = plus(own.norm_weight, dw), plus(own.norm_bias, db)


def _gates_backward(level: Level, inputs: LevelInput, blocks: Sequence[RowBlock], grads: Gradients) -> None:
    """From the gradient of the logits down to the input."""
    gate = level.gate
    assert gate is not None
    sums: Moments | None = None
    if len(blocks) > 1 and gate.waits:
        parts = [gate.sums(inputs, block, block.dlogits) for block in blocks if block.dlogits is not None]
        sums = merge_sums(parts)
        if gate.want.affine:
            _add_up(grads.gate, parts)

    def start(block: RowBlock) -> Any:
        assert block.dlogits is not None
        d = gate.norm_backward(inputs, block, block.dlogits, grads, sums)
        block.dlogits = None
        return gate.product_backward(inputs, block, d, grads)

    if level.hidden is not None and level.hidden.goes_back:
        _mlp_backward(level.hidden, inputs, blocks, grads, start)
        return
    for block in blocks:
        start(block)
        block.replayed = None


def _rows_backward(
    level: Level,
    inputs: LevelInput,
    blocks: Sequence[RowBlock],
    given: tuple[Tensor | None, Tensor | None],
    grads: Gradients,
) -> None:
    """Adds every gradient of these rows to ``grads``."""
    going = [mlp for mlp in level.experts if mlp.goes_back] if given[0] is not None else []
    several = len(level.experts) > 1
    parts: dict[int, Tensor] = {}
    for j, mlp in enumerate(going):

        def start(block: RowBlock, mlp: MLP = mlp, is_first: bool = j == 0) -> Tensor:
            if is_first:
                _weights_backward(level, inputs, block, given, grads)
                if several:
                    block.replayed = block.replayed if mlp is level.experts[0] else None
                    parts[block.rows.start] = block.take()
            if not several:
                return block.take()
            return parts[block.rows.start][:, mlp.plan.start : mlp.plan.start + len(mlp.plan.slots)].contiguous()

        _mlp_backward(mlp, inputs, blocks, grads, start)
    if not going:
        for block in blocks:
            _weights_backward(level, inputs, block, given, grads)
            block.replayed = None
    parts.clear()
    if level.wants.logits and blocks[-1].dlogits is not None:
        _gates_backward(level, inputs, blocks, grads)


def level_backward(
    inputs: LevelInput, wants: Wants, kept: Sequence[Tensor | None], dy: Tensor | None, dlisted: Tensor | None
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Gradients of the inputs, the gate inputs and the flat tuple. Without ``kept`` the forward is run again."""
    level = prepared(inputs, wants)
    x = InputGrads(inputs.x, wants.x)
    gate_x = x if inputs.gate_x is inputs.x else InputGrads(inputs.gate_x, wants.gate_x)
    grads = Gradients(inputs.plan.num_layers, x, gate_x)
    blocks = level.blocks(inputs)
    size = len(level.saved.values)
    again = None if kept or not size else inputs._replace(state=inputs.state.still())
    for i, block in enumerate(blocks) if again is None else ():
        block.kept = list(kept[i * size : (i + 1) * size])
    held: list[list[Tensor | None]] = []
    for together in _one_by_one(level, blocks):
        if again is not None:
            _rows_forward(level, again, together)
        held.clear()  # not before: memory that is given back ahead of the next block's is mapped anew for it
        held += [block.kept for block in together]
        _rows_backward(level, inputs, together, (dy, dlisted), grads)
        for block in together:
            block.kept = []
    rows = [block.rows for block in blocks]
    dgate = [] if gate_x is x else gate_x.finish(rows)
    # A product may leave its result transposed, and sums over row blocks are wide.
    given = flatten(inputs.layers, inputs.gate)
    flat = [
        None if grad is None or tensor is None else mix.as_dtype(grad, tensor.dtype).contiguous()
        for grad, tensor in zip(grads.flat(), given, strict=True)
    ]
    return x.finish(rows), dgate, flat

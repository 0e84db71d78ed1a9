"""What forward keeps for backward: named values, declared once, before anything runs.

A row block of the torch backend keeps a list of tensors, the kernels keep one list for all rows, an operator returns
one: each in the order of ``Saved.values``, where backward finds them by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .call import LayerWants, LevelInput, Wants
from .plan import LevelPlan, MLPPlan
from .specs import LEARNED, LayerSpec, from_output
from .state import LayerKind, LayerState, LevelKind


class Value(NamedTuple):
    """A tensor that backward reads: ``(rows, *shape)``, or ``shape`` unless it is ``by_row``.

    Its dtype is that of the parameters, float32 at least if ``wide``, or that of the statistics of a batch norm.
    """

    shape: tuple[int, ...]
    by_row: bool = True
    wide: bool = False
    layer: int | None = None
    """Whose batch norm the statistics are of; -1: of the logits."""
    is_dice: bool = False
    """Of the batch norm within its dice."""


class LayerSaved(NamedTuple):
    """Numbers of the values of one layer; -1: not kept. Two names of one tensor have one number."""

    z: int = -1
    """The norm's input."""
    act: int = -1
    """What the activation's derivative reads: its output where that is enough, else its input."""
    h: int = -1
    """The layer's output."""
    mean: int = -1
    rstd: int = -1
    """1 / deviation. Both of the batch, or of each row; running statistics stay where they are."""
    dice_mean: int = -1
    dice_rstd: int = -1


class MixSaved(NamedTuple):
    """The same of the gates' end and the mixtures."""

    z: int = -1
    """The logits before their norm."""
    mean: int = -1
    rstd: int = -1
    p: int = -1
    """The softmax: dense ``(O_gated, E)``; of kernels ``(num_weights,)``, all weights."""
    weights: int = -1
    """Weights of all outputs, dense ``(O, E)``."""
    h: int = -1
    """Outputs of all experts ``(E, H)``."""


class Saved(NamedTuple):
    """All values of a level."""

    values: tuple[Value, ...]
    layers: tuple[LayerSaved, ...]
    mix: MixSaved

    def empty(self, inputs: LevelInput, rows: int) -> list[Tensor]:
        """Tensors for the values of ``rows`` rows, not filled."""
        like = inputs.layers[0].weight
        tensors = []
        for value in self.values:
            dtype = torch.promote_types(like.dtype, torch.float32) if value.wide else like.dtype
            if value.layer is not None:
                dtype = _statistics_dtype(inputs, value.layer, value.is_dice)
            tensors.append(like.new_empty((rows, *value.shape) if value.by_row else value.shape, dtype=dtype))
        return tensors


def _statistics_dtype(inputs: LevelInput, layer: int, is_dice: bool) -> torch.dtype:
    """PyTorch's batch norm takes statistics in the dtype of its parameters or buffers, else in that of its input."""
    if layer < 0:
        weight, norm = inputs.gate.norm_weight, inputs.state.gate_norm
    elif is_dice:
        weight, norm = None, inputs.state.layers[layer].dice
    else:
        weight, norm = inputs.layers[layer].norm_weight, inputs.state.layers[layer].norm
    if weight is None and norm is not None and norm.factor > 0.0:
        weight = norm.running_mean
    return inputs.layers[0].weight.dtype if weight is None else weight.dtype


def in_kernels(spec: LayerSpec, own: LayerKind | LayerState) -> bool:
    """Whether kernels do all that follows the product; else PyTorch's operators do, between two launches."""
    return own.dice is None and spec.activation.name not in LEARNED


class _List:
    """Values, numbered as they come."""

    def __init__(self) -> None:
        self.values: list[Value] = []

    def keep(self, wanted: bool, *shape: int, wide: bool = False) -> int:
        return self._add(Value(shape, wide=wide)) if wanted else -1

    def _add(self, value: Value) -> int:
        self.values.append(value)
        return len(self.values) - 1

    def statistics(
        self, norm: str | None, members: int, units: int, layer: int, is_dice: bool = False
    ) -> tuple[int, int]:
        """Mean and 1 / deviation of a norm."""
        if norm == "layer":
            return self.keep(True, members, 1, wide=True), self.keep(True, members, 1, wide=True)
        if norm != "batch":
            return -1, -1
        value = Value((members * units,), by_row=False, layer=layer, is_dice=is_dice)
        return self._add(value), self._add(value)


def is_replayed(kind: LayerKind, want: LayerWants) -> bool:
    """Whether backward computes the layer's output again out of the norm's input.

    That costs less than to write and read it.
    """
    return want.output and kind.norm is not None and kind.dice is None and not kind.drops


def relu_drops(spec: LayerSpec, kind: LayerKind) -> bool:
    """Whether ReLU comes right before dropout: what they let through is then what is above 0 after both."""
    between = kind.norm is not None and spec.norm_position == "after"
    return kind.drops and spec.activation.name == "relu" and not between


def _above(plan: LevelPlan, mlp: MLPPlan, number: int, wants: Wants) -> bool:
    """Whether a gradient of what is above layer ``number`` reads its output."""
    if number + 1 < mlp.position + len(mlp.layers):
        return wants.layers[number + 1].output and wants.layers[number + 1].weight
    if mlp is plan.gate:
        return wants.logits and wants.gate.weight
    return wants.weights and len(plan.blocks) == 1


@lru_cache(maxsize=1024)
def saved_by_rows(plan: LevelPlan, wants: Wants, kind: LevelKind) -> Saved:
    """What a row block of the torch backend keeps. After a norm without dropout only the norm's input."""
    found, layers = _List(), []
    for mlp in plan.mlps():
        members = len(mlp.slots)
        for i, spec in enumerate(mlp.layers):
            number = mlp.position + i
            want, own = wants.layers[number], kind.layers[number]
            replays = is_replayed(own, want)
            before = own.norm is not None and spec.norm_position == "before"
            reads = _above(plan, mlp, number, wants)
            if i + 1 < len(mlp.layers) and wants.layers[number + 1].output:
                reads = reads or relu_drops(mlp.layers[i + 1], kind.layers[number + 1])
            z = found.keep(want.output and own.norm is not None, members, spec.units)
            act = h = dice_mean = dice_rstd = -1
            if own.dice is not None:
                act = found.keep(want.output, members, spec.units)
                if want.output:
                    dice_mean, dice_rstd = found.statistics(own.dice, members, spec.units, number, is_dice=True)
            elif want.output and spec.activation.name != "identity" and not (replays and before):
                by_output = from_output(spec.activation)
                if by_output and own.norm is not None and not before:
                    act = z
                else:
                    act = found.keep(True, members, spec.units)
                    if by_output and (not own.drops or relu_drops(spec, own)):
                        h = act
            if h < 0:
                h = found.keep(reads and not replays, members, spec.units)
            mean, rstd = found.statistics(own.norm if want.output else None, members, spec.units, number)
            layers.append(LayerSaved(z, act, h, mean, rstd, dice_mean, dice_rstd))
    mix = _mix_by_rows(plan, wants, kind, layers, found)
    return Saved(tuple(found.values), tuple(layers), mix)


def _mix_by_rows(
    plan: LevelPlan, wants: Wants, kind: LevelKind, layers: Sequence[LayerSaved], found: _List
) -> MixSaved:
    t = plan.topology
    lasts = [block.position + len(block.layers) - 1 for block in plan.blocks]
    replays = all(is_replayed(kind.layers[last], wants.layers[last]) for last in lasts)
    units = plan.blocks[0].layers[-1].units
    z = found.keep(wants.logits and kind.gate_norm is not None, t.num_logits)
    mean, rstd = found.statistics(kind.gate_norm if wants.logits else None, 1, t.num_logits, -1)
    p = found.keep(wants.logits, len(t.gated_mixtures), t.num_experts, wide=True)
    weights = p
    if plan.passes:
        return MixSaved(z, mean, rstd, p, -1, -1)
    if plan.static_entry or plan.offset_entry or plan.outputs or not wants.experts or p < 0:
        weights = found.keep(wants.experts, t.num_outputs, t.num_experts, wide=True)
    h = layers[lasts[0]].h
    if len(lasts) > 1:
        h = found.keep(wants.weights and not replays, t.num_experts, units)
    elif not wants.weights or replays:
        h = -1
    return MixSaved(z, mean, rstd, p, weights, h)


@lru_cache(maxsize=1024)
def saved_by_kernels(plan: LevelPlan, wants: Wants, kind: LevelKind) -> Saved:
    """What the kernels keep, which run norm and activation again as they load the product."""
    found, layers = _List(), []
    t, several = plan.topology, len(plan.blocks) > 1
    units = plan.blocks[0].layers[-1].units
    lasts = {block.position + len(block.layers) - 1 for block in plan.blocks}
    experts = -1
    for mlp in plan.mlps():
        members = len(mlp.slots)
        for i, spec in enumerate(mlp.layers):
            number = mlp.position + i
            want, own = wants.layers[number], kind.layers[number]
            is_fused = in_kernels(spec, own)
            # The mixtures do norm, activation and dropout as they load the product, which is then the output.
            deferred = number in lasts and not several and own.norm == "batch" and is_fused
            z = found.keep(want.output and own.norm is not None, members, spec.units)
            act = h = dice_mean = dice_rstd = -1
            is_output = False
            if not is_fused:
                act = found.keep(want.output, members, spec.units)
                if want.output:
                    dice_mean, dice_rstd = found.statistics(own.dice, members, spec.units, number, is_dice=True)
            elif own.norm is None and want.output and spec.activation.name != "identity":
                is_output = from_output(spec.activation)
                act = -1 if is_output else found.keep(True, members, spec.units)
            if number in lasts and several:  # a part of what all experts gave
                if experts < 0:
                    experts = found.keep(wants.weights or is_output, t.num_experts, units)
                h = experts
            elif deferred:
                h = z if z >= 0 else found.keep(wants.weights, members, spec.units)
            else:
                h = found.keep(is_output or _above(plan, mlp, number, wants), members, spec.units)
            normed = want.output or (deferred and wants.weights)
            if normed and own.norm == "layer" and is_fused:
                mean, rstd = found.keep(True, members, wide=True), found.keep(True, members, wide=True)
            else:
                mean, rstd = found.statistics(own.norm if normed else None, members, spec.units, number)
            layers.append(LayerSaved(z, h if is_output else act, h, mean, rstd, dice_mean, dice_rstd))
    z = found.keep(wants.logits and kind.gate_norm is not None, t.num_logits)
    mean, rstd = found.statistics(kind.gate_norm if wants.logits else None, 1, t.num_logits, -1)
    p = found.keep((wants.experts or wants.logits) and not plan.passes, t.num_weights, wide=True)
    h = experts if several else layers[min(lasts)].h
    mix = MixSaved(z, mean, rstd, p, -1, h if wants.weights else -1)
    return Saved(tuple(found.values), tuple(layers), mix)

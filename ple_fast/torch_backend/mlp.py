"""Stacked MLPs on a block of rows, forward and backward by hand: experts of a block, or all gates' hidden layers.

After a norm without dropout only the norm's input is kept: backward computes the layer's output again, which costs less
than to write and read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..grads import LayerGrads, plus
from ..plan import LayerState, LayerTensors, MLPPlan
from ..specs import LayerSpec
from .activations import activation_backward, activation_forward, dice_backward, dice_forward, from_output
from .barriers import Steps
from .dropout import keep_mask
from .finite import looks_finite
from .grouped_linear import slots_linear_backward, slots_linear_forward, stacked_linear_backward
from .norms import (
    BatchNormSaved,
    Shared,
    batch_norm_again,
    batch_norm_backward_steps,
    batch_norm_steps,
    layer_norm_affine,
    layer_norm_backward,
    layer_norm_forward,
    layer_normalised,
)
from .products import grouped
from .slots import Groups, SlotGrads, Slots


class LayerNeeds(NamedTuple):
    """Which gradients backward will be asked for at one layer."""

    tensors: LayerTensors
    """A bool in the place of each tensor."""
    below: bool
    """Of the layer's input."""
    output: bool
    """Anything of this layer or below: whether the gradient must come this far at all."""


class LayerKept(NamedTuple):
    """What backward needs of one layer on one block of rows."""

    a: Tensor | None
    """Input of a later layer (the first one reads the slots)."""
    act: Tensor | None
    """Output or input of the activation, as ``from_output`` says; dice: its input."""
    normed: Tensor | None
    """Input of the norm."""
    mean: Tensor | None
    var: Tensor | None
    dice_mean: Tensor | None
    dice_var: Tensor | None


KEPT_WIDTH = len(LayerKept._fields)
NOTHING_KEPT = LayerKept(None, None, None, None, None, None, None)


def needs_of(
    layers: int, tensor_needs: Sequence[Sequence[bool]], input_needed: bool, grad_enabled: bool = True
) -> list[LayerNeeds]:
    """Needs of each layer of an MLP, from those of its tensors (rows in the order of ``LayerTensors``)."""
    needs, below = [], input_needed
    for i in range(layers):
        wanted = LayerTensors(*tensor_needs[i])  # type: ignore[arg-type]  # bools in the place of tensors
        output = grad_enabled and (below or any(tensor_needs[i]))
        needs.append(LayerNeeds(wanted, below, output))
        below = output
    return needs


class Replayed(NamedTuple):
    """A layer's output, computed again in backward, and what it passed through."""

    output: Tensor
    act: Tensor | None
    """What ``LayerKept.act`` would hold."""
    normed: Tensor | None
    """Layer norm: its result before weight and bias."""


def is_replayed(state: LayerState, need: LayerNeeds) -> bool:
    """Whether backward computes the layer's output again out of the norm's input."""
    return need.output and state.norm is not None and state.dice is None and not state.dropout


def replay(spec: LayerSpec, tensor: LayerTensors, state: LayerState, keep: LayerKept) -> Replayed:
    """The output of a layer that ``is_replayed``, of what has been kept of it."""
    norm, z = state.norm, keep.normed
    assert norm is not None and z is not None
    normed = None
    if norm.kind == "batch":
        y = batch_norm_again(z, tensor.norm_weight, tensor.norm_bias, norm, BatchNormSaved(keep.mean, keep.var))
    else:
        assert tensor.norm_weight is not None and tensor.norm_bias is not None
        normed = layer_normalised(z, norm.eps)
        y = layer_norm_affine(normed, tensor.norm_weight, tensor.norm_bias, z.dtype)
    if spec.norm_position == "after":
        return Replayed(y, keep.act, normed)
    by_output = from_output(spec.activation)
    out = activation_forward(y, spec.activation, tensor.slope, keep_input=not by_output)
    return Replayed(out, out if by_output else y, normed)


def mlp_forward(
    plan: MLPPlan,
    tensors: Sequence[LayerTensors],
    states: Sequence[LayerState],
    slots: Slots,
    groups: Groups,
    rows: slice,
    needs: Sequence[LayerNeeds],
    seed: int | Tensor | None,
    shared: Shared | None,
) -> Steps[tuple[Tensor, list[LayerKept]]]:
    """Run the layers on ``rows``; returns ``(rows, n, H)`` and what backward needs.

    ``shared``: for batch norm over several row blocks; None where there is one.
    """
    kept: list[LayerKept] = []
    a: Tensor | None = None
    for i, (spec, tensor, state, need) in enumerate(zip(plan.layers, tensors, states, needs, strict=True)):
        # ReLU right after the linear layer is applied by the product itself.
        relu = spec.activation.name == "relu" and (state.norm is None or spec.norm_position == "after")
        if a is None:
            z = slots_linear_forward(slots, rows, groups, tensor.weight, tensor.bias, relu=relu)
        else:
            z = grouped(a, tensor.weight, tensor.bias, relu=relu)
        keeps_a = a is not None and need.output and (need.tensors.weight or _relu_drops(spec, state))
        kept_a = a if keeps_a and not is_replayed(states[i - 1], needs[i - 1]) else None
        a = None  # a barrier may follow
        a, keep = yield from after_linear(
            z, spec, tensor, state, need, seed, plan.position + i, rows.start, shared, activated=relu, replays=True
        )
        kept.append(keep if kept_a is None else keep._replace(a=kept_a))
    assert a is not None
    return a, kept


def after_linear(
    z: Tensor,
    spec: LayerSpec,
    tensor: LayerTensors,
    state: LayerState,
    need: LayerNeeds,
    seed: int | Tensor | None,
    position: int,
    start: int,
    shared: Shared | None = None,
    *,
    activated: bool = False,
    replays: bool = False,
) -> Steps[tuple[Tensor, LayerKept]]:
    """Norm, activation (unless it is done) and dropout of one layer on one row block; ``z`` may be overwritten.

    Whatever backward reads is kept; ``replays``: less of a layer that ``is_replayed``.
    """
    keep = NOTHING_KEPT
    replays = replays and is_replayed(state, need)
    if state.norm is not None and spec.norm_position == "before":
        z, keep = yield from _norm(z, tensor, state, need, keep, shared, position)
    if state.dice is not None:
        assert tensor.slope is not None
        y, saved = dice_forward(z, tensor.slope, state.dice)
        if need.output:
            keep = keep._replace(act=z, dice_mean=saved.mean, dice_var=saved.var)
        z = y
    else:
        by_output = from_output(spec.activation)
        keeps = need.output and not (replays and spec.norm_position == "before")
        y = z
        if not activated:
            y = activation_forward(z, spec.activation, tensor.slope, keep_input=keeps and not by_output)
        if keeps and spec.activation.name != "identity":
            keep = keep._replace(act=y if by_output else z)
        z = y
    if state.norm is not None and spec.norm_position == "after":
        z, keep = yield from _norm(z, tensor, state, need, keep, shared, position)
    if state.dropout:
        assert seed is not None
        kept = keep_mask(seed, position, start, z, state.dropout)
        if z is not keep.act:
            z.mul_(kept).div_(1.0 - state.dropout)
        elif _relu_drops(spec, state):
            keep = keep._replace(act=z.mul_(kept).div_(1.0 - state.dropout))
        else:
            z = (z * kept).div_(1.0 - state.dropout)
    return z, keep


def _relu_drops(spec: LayerSpec, state: LayerState) -> bool:
    """Whether ReLU comes right before dropout: what they let through is then what is above 0 after both."""
    between = state.norm is not None and spec.norm_position == "after"
    return bool(state.dropout) and spec.activation.name == "relu" and not between


def _norm(
    z: Tensor,
    tensor: LayerTensors,
    state: LayerState,
    need: LayerNeeds,
    keep: LayerKept,
    shared: Shared | None,
    number: int,
) -> Steps[tuple[Tensor, LayerKept]]:
    norm = state.norm
    assert norm is not None
    mean: Tensor | None
    var: Tensor | None
    if norm.kind == "batch":
        y, (mean, var) = yield from batch_norm_steps(z, tensor.norm_weight, tensor.norm_bias, norm, shared, number)
    else:
        assert tensor.norm_weight is not None and tensor.norm_bias is not None
        y, mean, var = layer_norm_forward(z, tensor.norm_weight, tensor.norm_bias, norm.eps)
    if need.output:
        keep = keep._replace(normed=z, mean=mean, var=var)
    return y, keep


def _norm_backward(
    d: Tensor,
    normed: Tensor | None,
    tensor: LayerTensors,
    state: LayerState,
    need: LayerNeeds,
    keep: LayerKept,
    own: LayerGrads,
    shared: Shared | None,
    number: int,
) -> Steps[Tensor]:
    norm = state.norm
    assert norm is not None and keep.normed is not None
    affine = bool(need.tensors.norm_weight or need.tensors.norm_bias)
    if norm.kind == "batch":
        saved = BatchNormSaved(keep.mean, keep.var)
        d, dw, db = yield from batch_norm_backward_steps(
            d, keep.normed, tensor.norm_weight, norm, saved, shared, number, affine=affine
        )
    else:
        assert tensor.norm_weight is not None and keep.mean is not None and keep.var is not None
        d, dw, db = layer_norm_backward(
            d, keep.normed, normed, tensor.norm_weight, keep.mean, keep.var, affine=affine
        )  # fmt: skip
    own.norm_weight = plus(own.norm_weight, dw)
    own.norm_bias = plus(own.norm_bias, db)
    return d


def after_linear_backward(
    d: Tensor,
    spec: LayerSpec,
    tensor: LayerTensors,
    state: LayerState,
    need: LayerNeeds,
    keep: LayerKept,
    own: LayerGrads,
    seed: int | Tensor | None,
    position: int,
    start: int,
    replayed: Replayed | None = None,
    shared: Shared | None = None,
) -> Steps[Tensor]:
    """Backward of ``after_linear``, activation included: ``d``, ``(rows, n, H)``, may be overwritten.

    ``own``: the layer's gradients, those of norm and slope are accumulated.
    ``replayed``: the layer, if it is one to be replayed, or up to its dropout.
    """
    _, act, normed = replayed or (None, keep.act, None)
    is_again = replayed is not None
    replayed = None  # nothing that is large outlives a barrier
    if state.dropout:
        assert seed is not None
        if is_again or not _relu_drops(spec, state):
            d.mul_(keep_mask(seed, position, start, d, state.dropout))
        d.div_(1.0 - state.dropout)
    if state.norm is not None and spec.norm_position == "after":
        d = yield from _norm_backward(d, normed, tensor, state, need, keep, own, shared, position)
    if state.dice is not None:
        assert keep.act is not None and tensor.slope is not None
        saved = BatchNormSaved(keep.dice_mean, keep.dice_var)
        wanted = bool(need.tensors.slope)
        d, ds = dice_backward(d, keep.act, tensor.slope, state.dice, saved, alpha_grad=wanted)
        own.slope = plus(own.slope, ds)
    elif spec.activation.name != "identity":
        assert act is not None
        wanted = bool(need.tensors.slope)
        ds = activation_backward(d, act, spec.activation, tensor.slope, slope_grad=wanted)
        own.slope = plus(own.slope, ds)
    act = None
    if state.norm is not None and spec.norm_position == "before":
        d = yield from _norm_backward(d, normed, tensor, state, need, keep, own, shared, position)
    return d


def _up_to_dropout(
    specs: Sequence[LayerSpec],
    tensors: Sequence[LayerTensors],
    states: Sequence[LayerState],
    needs: Sequence[LayerNeeds],
    kept: Sequence[LayerKept],
    i: int,
    source: tuple[Slots, slice, Groups],
) -> Replayed:
    """Layer ``i`` as it was before dropout: where an element was dropped, what is kept does not tell whether ReLU let
    it through, and a gradient that is not finite is NaN there if it did.
    """
    tensor = tensors[i]
    if states[i].norm is not None:
        return replay(specs[i], tensor, states[i], kept[i])
    if i == 0:
        out = slots_linear_forward(*source, tensor.weight, tensor.bias, relu=True)
        return Replayed(out, out, None)
    a = kept[i].a
    if a is None and is_replayed(states[i - 1], needs[i - 1]):
        a = replay(specs[i - 1], tensors[i - 1], states[i - 1], kept[i - 1]).output
    assert a is not None
    out = grouped(a, tensor.weight, tensor.bias, relu=True)
    return Replayed(out, out, None)


def mlp_backward(
    plan: MLPPlan,
    tensors: Sequence[LayerTensors],
    states: Sequence[LayerState],
    slots: Slots,
    groups: Groups,
    rows: slice,
    needs: Sequence[LayerNeeds],
    seed: int | Tensor | None,
    kept: Sequence[LayerKept],
    last: Replayed | None,
    d: Tensor,
    grads: Sequence[LayerGrads],
    dslots: SlotGrads,
    shared: Shared | None,
) -> Steps[None]:
    """Backward of ``mlp_forward``: ``d``, ``(rows, n, H)``, is overwritten.

    ``last``: the last layer, where it has been replayed already. ``grads``: per layer, accumulated over row blocks.
    """
    for i in range(len(plan.layers) - 1, -1, -1):
        spec, tensor, state, need, keep = plan.layers[i], tensors[i], states[i], needs[i], kept[i]
        if not need.output:
            return
        own = grads[i]
        if last is None and is_replayed(state, need):
            last = replay(spec, tensor, state, keep)
        elif keep.act is not None and _relu_drops(spec, state) and not (looks_finite(d) and looks_finite(keep.act)):
            last = _up_to_dropout(plan.layers, tensors, states, needs, kept, i, (slots, rows, groups))
        steps = after_linear_backward(
            d, spec, tensor, state, need, keep, own, seed, plan.position + i, rows.start, last, shared
        )
        last = None
        d = yield from steps
        if tensor.bias is not None and need.tensors.bias:
            own.bias = plus(own.bias, d.view(d.shape[0], -1).sum(0).view(tensor.bias.shape))
        wanted = bool(need.tensors.weight)
        if i == 0:
            dweight = slots_linear_backward(slots, rows, groups, d, tensor.weight, dslots, weight_grad=wanted)
            own.weight = plus(own.weight, dweight)
            return
        a = keep.a
        if wanted and a is None:
            last = replay(plan.layers[i - 1], tensors[i - 1], states[i - 1], kept[i - 1])
            a = last.output
        da, dweight = stacked_linear_backward(a, d, tensor.weight, weight_grad=wanted, below=need.below)
        own.weight = plus(own.weight, dweight)
        if da is None:
            return
        d = da

"""One layer of stacked MLPs on a block of rows, forward and backward by hand: product, norm, activation, dropout.

Backward reads what ``saved.py`` lists. Where rows come in several blocks, batch norm waits for the statistics of all:
then ``level.py`` runs ``product`` of every block, merges, and runs ``end`` of every block; backward likewise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..call import LayerWants, LevelInput
from ..grads import LevelGrads, plus, sum_of_rows
from ..plan import MLPPlan
from ..saved import LayerSaved, is_replayed, relu_drops
from ..slots import Groups, Slots
from ..specs import from_output
from ..state import LayerKind, NormState
from .activations import activation_backward, activation_forward, dice_backward, dice_forward
from .dropout import keep_mask
from .finite import looks_finite
from .grouped_linear import slots_linear, slots_linear_backward, stacked_linear_backward
from .input_grads import InputGrads
from .norms import (
    BatchNormSaved,
    Moments,
    batch_norm,
    batch_norm_again,
    batch_norm_backward,
    batch_norm_backward_by_sums,
    batch_norm_sums,
    layer_norm_affine,
    layer_norm_backward,
    layer_norm_forward,
    layer_normalised,
)
from .products import grouped


class Replayed(NamedTuple):
    """A layer's output, computed again in backward, and what it passed through."""

    output: Tensor
    act: Tensor | None
    """What ``LayerSaved.act`` would name."""
    normed: Tensor | None
    """Layer norm: its result before weight and bias."""


class Gradients(LevelGrads):
    """All gradients of a level, while they gather."""

    def __init__(self, num_layers: int, x: InputGrads, gate_x: InputGrads) -> None:
        super().__init__(num_layers)
        self.x, self.gate_x = x, gate_x


class RowBlock:
    """A block of rows on its way through a level, forward or backward."""

    __slots__ = ("dlogits", "experts", "kept", "replayed", "rows", "value")

    def __init__(self, rows: slice, kept: list[Tensor | None]) -> None:
        self.rows, self.kept = rows, kept
        self.value: Tensor | None = None
        """What the next step of the level reads."""
        self.replayed: Replayed | None = None
        """The next layer of backward, where it has been computed again already."""
        self.experts: list[Tensor] = []
        """Outputs of one block of experts after the other."""
        self.dlogits: Tensor | None = None

    def statistics(self, mean: int, rstd: int, norm: NormState) -> BatchNormSaved:
        """What forward normalised by: kept under these numbers, or running statistics."""
        if mean < 0:
            return BatchNormSaved(norm.running_mean, norm.running_var)
        return BatchNormSaved(self.kept[mean], self.kept[rstd])

    def take(self) -> Tensor:
        """``value``, which is then in nobody's hands but the caller's."""
        value, self.value = self.value, None
        assert value is not None
        return value

    def take_experts(self) -> Tensor:
        """The outputs of all experts ``(rows, E, H)``, which are then in nobody's hands but the caller's."""
        parts = self.experts
        self.experts = []
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class Layer:
    """A layer, prepared once for all calls that want and keep the same.

    Args:
        mlp, number: whose layer it is, and its number in the level.
        want, kind, at: which gradients are wanted, which norms there are, what is kept where.
        groups: of the first layer, which members read which slot.
        below: the layer that it reads otherwise.
        reads_gate_x: the slots are those of the gates.
    """

    def __init__(
        self,
        mlp: MLPPlan,
        number: int,
        want: LayerWants,
        kind: LayerKind,
        at: LayerSaved,
        *,
        groups: Groups = (),
        below: Layer | None = None,
        reads_gate_x: bool = False,
    ) -> None:
        self.spec = spec = mlp.layers[number - mlp.position]
        self.number, self.want, self.at, self.groups, self.below = number, want, at, groups, below
        self.reads_gate_x = reads_gate_x
        self.has_norm, self.has_dice, self.drops = kind.norm is not None, kind.dice is not None, kind.drops
        self.is_before = self.has_norm and spec.norm_position == "before"
        self.is_after = self.has_norm and not self.is_before
        self.waits = kind.norm == "batch"
        """Its norm takes the statistics of the batch."""
        self.relu = spec.activation.name == "relu" and not self.is_before
        """The product applies it."""
        self.by_output = from_output(spec.activation)
        self.activates = self.has_dice or spec.activation.name != "identity"
        self.activates_first = self.activates and not self.is_before
        """Before the norm, or without one."""
        self.replays = is_replayed(kind, want)
        self.relu_drops = relu_drops(spec, kind)
        self.acts_on_product = self.activates_first and not (self.relu and at.act < 0)
        """Something is left to do of the activation, or to keep."""
        self.any_order = not (self.has_norm or self.has_dice or self.drops)
        """Of its output: elements are all that is left to look at. Statistics and masks are taken row by row."""
        self.ends = self.has_norm or self.drops or at.h >= 0
        """``end`` does anything."""
        self.keeps_input = at.act >= 0 and not self.by_output
        self.drops_in_place = not (at.act >= 0 and self.by_output and not self.is_after) or self.relu_drops

    def slots(self, inputs: LevelInput) -> Slots:
        """What the first layer reads."""
        return inputs.gate_x if self.reads_gate_x else inputs.x

    def product(self, inputs: LevelInput, block: RowBlock, a: Tensor | None) -> Tensor:
        """From ``a (rows, n, K)``, the first layer from its slots, to the norm's input; without one to dropout."""
        tensor = inputs.layers[self.number]
        if a is None:
            slots = self.slots(inputs)
            z = slots_linear(slots, block.rows, self.groups, tensor.weight, tensor.bias, relu=self.relu)
        else:
            z = grouped(a, tensor.weight, tensor.bias, relu=self.relu, any_order=self.any_order)
        return self.activation(inputs, block, z) if self.acts_on_product else z

    def after_product(self, inputs: LevelInput, block: RowBlock, z: Tensor) -> Tensor:
        """The whole layer but its product, which has not applied ReLU."""
        z = self.activation(inputs, block, z) if self.activates_first else z
        return self.end(inputs, block, z, None)

    def activation(self, inputs: LevelInput, block: RowBlock, z: Tensor) -> Tensor:
        """The activation, unless the product has applied it; ``z`` may be overwritten."""
        at, y = self.at, z
        slope = inputs.layers[self.number].slope
        if self.has_dice:
            dice = inputs.state.layers[self.number].dice
            assert dice is not None and slope is not None
            y, saved = dice_forward(z, slope, dice)
            if at.dice_mean >= 0:
                block.kept[at.dice_mean], block.kept[at.dice_rstd] = saved
        elif not self.relu:
            y = activation_forward(z, self.spec.activation, slope, keep_input=self.keeps_input)
        if at.act >= 0:
            block.kept[at.act] = y if self.by_output else z
        return y

    def end(self, inputs: LevelInput, block: RowBlock, z: Tensor, moments: BatchNormSaved | None) -> Tensor:
        """What ``product`` left, to the layer's output; ``moments``: of the batch, where there are several blocks."""
        if self.has_norm:
            z = self._norm(inputs, block, z, moments)
            if self.activates and not self.activates_first:
                z = self.activation(inputs, block, z)
        if self.drops:
            seed, p = inputs.state.seed, inputs.state.layers[self.number].dropout
            assert seed is not None
            mask = keep_mask(seed, self.number, block.rows.start, z, p)
            z = (z.mul_(mask) if self.drops_in_place else z * mask).div_(1.0 - p)
        if self.at.h >= 0:
            block.kept[self.at.h] = z
        return z

    def _norm(self, inputs: LevelInput, block: RowBlock, z: Tensor, moments: BatchNormSaved | None) -> Tensor:
        tensor, norm, at = inputs.layers[self.number], inputs.state.layers[self.number].norm, self.at
        assert norm is not None
        mean: Tensor | None
        rstd: Tensor | None
        if norm.kind == "layer":
            assert tensor.norm_weight is not None and tensor.norm_bias is not None
            y, mean, rstd = layer_norm_forward(z, tensor.norm_weight, tensor.norm_bias, norm.eps)
        else:
            y, (mean, rstd) = batch_norm(z, tensor.norm_weight, tensor.norm_bias, norm, moments)
        if at.z >= 0:
            block.kept[at.z] = z
        if at.mean >= 0:
            block.kept[at.mean], block.kept[at.rstd] = mean, rstd
        return y

    def _statistics(self, inputs: LevelInput, block: RowBlock) -> BatchNormSaved:
        norm = inputs.state.layers[self.number].norm
        assert norm is not None
        return block.statistics(self.at.mean, self.at.rstd, norm)

    def replay(self, inputs: LevelInput, block: RowBlock) -> Replayed:
        """The output of a layer that ``replays``, of what has been kept of it."""
        tensor, norm = inputs.layers[self.number], inputs.state.layers[self.number].norm
        z, normed = block.kept[self.at.z], None
        assert norm is not None and z is not None
        if norm.kind == "batch":
            y = batch_norm_again(z, tensor.norm_weight, tensor.norm_bias, norm, self._statistics(inputs, block))
        else:
            assert tensor.norm_weight is not None and tensor.norm_bias is not None
            normed = layer_normalised(z, norm.eps)
            y = layer_norm_affine(normed, tensor.norm_weight, tensor.norm_bias, z.dtype)
        if self.is_after:
            return Replayed(y, self._kept_act(block), normed)
        out = activation_forward(y, self.spec.activation, tensor.slope, keep_input=not self.by_output)
        return Replayed(out, out if self.by_output else y, normed)

    def _kept_act(self, block: RowBlock) -> Tensor | None:
        return None if self.at.act < 0 else block.kept[self.at.act]

    def output(self, inputs: LevelInput, block: RowBlock) -> Tensor | None:
        """What the layer above read, computed again where it was not kept; None where it is neither."""
        if self.replays:
            block.replayed = self.replay(inputs, block)
            return block.replayed.output
        return None if self.at.h < 0 else block.kept[self.at.h]

    def _up_to_dropout(self, inputs: LevelInput, block: RowBlock) -> Replayed:
        """The layer as it was before dropout: where an element was dropped, what is kept does not tell whether ReLU let
        it through, and a gradient that is not finite is NaN there if it did.
        """
        if self.has_norm:
            return self.replay(inputs, block)
        tensor = inputs.layers[self.number]
        if self.below is None:
            slots = self.slots(inputs)
            out = slots_linear(slots, block.rows, self.groups, tensor.weight, tensor.bias, relu=True)
        else:
            a = self.below.output(inputs, block)
            assert a is not None
            out = grouped(a, tensor.weight, tensor.bias, relu=True)
        return Replayed(out, out, None)

    def end_backward(self, inputs: LevelInput, block: RowBlock, d: Tensor, grads: LevelGrads) -> Tensor:
        """From the gradient of the output, which may be overwritten, to that of the norm's output; without a norm to
        that of the product.
        """
        if self.replays:
            if block.replayed is None:
                block.replayed = self.replay(inputs, block)
        elif self.relu_drops:
            act = self._kept_act(block)
            if act is not None and not (looks_finite(d) and looks_finite(act)):
                block.replayed = self._up_to_dropout(inputs, block)
        if self.drops:
            seed, p = inputs.state.seed, inputs.state.layers[self.number].dropout
            assert seed is not None
            if block.replayed is not None or not self.relu_drops:
                d.mul_(keep_mask(seed, self.number, block.rows.start, d, p))
            d.div_(1.0 - p)
        return d if self.is_after else self._activation_backward(inputs, block, d, grads)

    def _activation_backward(self, inputs: LevelInput, block: RowBlock, d: Tensor, grads: LevelGrads) -> Tensor:
        if not self.activates:
            return d
        slope, own = inputs.layers[self.number].slope, grads.layers[self.number]
        act = self._kept_act(block) if block.replayed is None else block.replayed.act
        assert act is not None
        if self.has_dice:
            dice, at = inputs.state.layers[self.number].dice, self.at
            assert dice is not None and slope is not None
            saved = block.statistics(at.dice_mean, at.dice_rstd, dice)
            d, dslope = dice_backward(d, act, slope, dice, saved, alpha_grad=self.want.slope)
        else:
            dslope = activation_backward(d, act, self.spec.activation, slope, slope_grad=self.want.slope)
        own.slope = plus(own.slope, dslope)
        return d

    def sums(self, inputs: LevelInput, block: RowBlock, d: Tensor) -> Moments:
        """What the norm's backward needs to know of all row blocks; ``d``: what ``end_backward`` returned."""
        z, norm = block.kept[self.at.z], inputs.state.layers[self.number].norm
        assert z is not None and norm is not None
        return batch_norm_sums(d, z, inputs.layers[self.number].norm_weight, norm, self._statistics(inputs, block))

    def norm_backward(
        self, inputs: LevelInput, block: RowBlock, d: Tensor, grads: LevelGrads, sums: Moments | None
    ) -> Tensor:
        """On to the gradient of the product. ``sums``: of several row blocks, whose gradients the caller adds up."""
        if self.has_norm:
            tensor, own = inputs.layers[self.number], grads.layers[self.number]
            norm, z = inputs.state.layers[self.number].norm, block.kept[self.at.z]
            assert norm is not None and z is not None
            dw = db = None
            if norm.kind == "layer":
                normed = None if block.replayed is None else block.replayed.normed
                mean, rstd = block.kept[self.at.mean], block.kept[self.at.rstd]
                assert tensor.norm_weight is not None and mean is not None and rstd is not None
                d, dw, db = layer_norm_backward(
                    d, z, normed, tensor.norm_weight, mean, rstd, affine=self.want.affine
                )  # fmt: skip
            else:
                saved = self._statistics(inputs, block)
                if sums is not None:
                    d = batch_norm_backward_by_sums(d, z, tensor.norm_weight, saved, sums)
                else:
                    d, dw, db = batch_norm_backward(d, z, tensor.norm_weight, norm, saved, affine=self.want.affine)
            own.norm_weight = plus(own.norm_weight, dw)
            own.norm_bias = plus(own.norm_bias, db)
            if self.is_after:
                d = self._activation_backward(inputs, block, d, grads)
        block.replayed = None
        return d

    def product_backward(self, inputs: LevelInput, block: RowBlock, d: Tensor, grads: Gradients) -> Tensor | None:
        """From the gradient of the product to that of its input, if it is wanted; of the first layer into ``grads``."""
        tensor, own, want = inputs.layers[self.number], grads.layers[self.number], self.want
        if want.bias:
            own.bias = plus(own.bias, sum_of_rows(d))
        if self.below is None:
            slots, dslots = self.slots(inputs), grads.gate_x if self.reads_gate_x else grads.x
            dweight = slots_linear_backward(
                slots, block.rows, self.groups, d, tensor.weight, dslots, weight_grad=want.weight
            )
            own.weight = plus(own.weight, dweight)
            return None
        a = self.below.output(inputs, block) if want.weight else None
        da, dweight = stacked_linear_backward(a, d, tensor.weight, weight_grad=want.weight, below=want.below)
        own.weight = plus(own.weight, dweight)
        return da

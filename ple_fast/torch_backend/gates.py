"""The gates' end on a block of rows, forward and backward by hand: logits, their norm, temperature, softmax.

It has the form of ``layer.py``: ``product``, then ``end``; ``end_backward``, then the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import LevelInput, Wants
from ..grads import plus, sum_of_rows
from ..plan import LevelPlan
from ..saved import Saved
from ..slots import Groups
from . import mix
from .grouped_linear import slots_linear, slots_linear_backward
from .layer import Gradients, Layer, RowBlock
from .norms import (
    BatchNormSaved,
    Moments,
    batch_norm,
    batch_norm_backward,
    batch_norm_backward_by_sums,
    batch_norm_sums,
)
from .products import linear


def _rows_by_slot(plan: LevelPlan, groups: Groups) -> Groups:
    """Rows of the last weight by the slot that they read, where gates have no hidden layer."""
    topology, runs = plan.topology, []
    for slot, first, last in groups:
        start, end = topology.gated_mixtures[first], topology.gated_mixtures[last - 1]
        stop = topology.logit_offset[end] + len(topology.mixture_experts[end])
        runs.append((slot, topology.logit_offset[start], stop))
    return tuple(runs)


def _rows_by_mixture(plan: LevelPlan) -> list[tuple[int, int, int]]:
    """Rows of the last weight by gated mixture: its number among them, first, last + 1."""
    topology = plan.topology
    starts = [topology.logit_offset[o] for o in topology.gated_mixtures]
    return [
        (i, start, stop) for i, (start, stop) in enumerate(zip(starts, [*starts[1:], topology.num_logits], strict=True))
    ]


class GateEnd:
    """The end of all gates, prepared once for all calls that want and keep the same.

    Args:
        plan, wants, saved: the level.
        gate_norm: of the logits, ``"batch"``, ``"running"`` or None.
        groups: which gated mixtures read which slot.
        hidden: the last hidden layer, if there is one.
    """

    def __init__(
        self, plan: LevelPlan, wants: Wants, saved: Saved, gate_norm: str | None, groups: Groups, hidden: Layer | None
    ) -> None:
        self.plan, self.want, self.at, self.hidden = plan, wants.gate, saved.mix, hidden
        self.groups = () if hidden is not None else _rows_by_slot(plan, groups)
        self.mixture_rows = _rows_by_mixture(plan) if hidden is not None else []
        self.waits = gate_norm == "batch"
        self.temperature = plan.gate_spec.temperature
        self.goes_below = hidden is not None and hidden.want.output

    def product(self, inputs: LevelInput, block: RowBlock, a: Tensor | None) -> Tensor:
        """Logits ``(rows, G)`` out of the last hidden layer ``a (rows, O_gated, K)``, or out of the slots."""
        weight, bias = inputs.gate.weight, inputs.gate.bias
        assert weight is not None
        if a is None:
            if len(self.groups) == 1:
                return linear(inputs.gate_x.at(self.groups[0][0], block.rows), weight, bias)
            per_row = None if bias is None else bias.view(-1, 1)
            return slots_linear(inputs.gate_x, block.rows, self.groups, weight.unsqueeze(1), per_row).squeeze(2)
        logits = torch.empty((a.shape[0], weight.shape[0]), dtype=a.dtype, device=a.device)
        for i, start, stop in self.mixture_rows:
            own = None if bias is None else bias[start:stop]
            logits[:, start:stop] = linear(a[:, i], weight[start:stop], own)
        return logits

    def end(self, inputs: LevelInput, block: RowBlock, logits: Tensor, moments: BatchNormSaved | None) -> Tensor:
        """The softmax ``(rows, O_gated, E)``; ``moments``: of the batch, where there are several blocks."""
        at, gate, norm = self.at, inputs.gate, inputs.state.gate_norm
        if norm is not None:
            normed, moments = batch_norm(logits.unsqueeze(1), gate.norm_weight, gate.norm_bias, norm, moments)
            if at.z >= 0:
                block.kept[at.z] = logits
            if at.mean >= 0:
                block.kept[at.mean], block.kept[at.rstd] = moments
            logits = normed.squeeze(1)
        if self.temperature != 1.0:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        p = mix.gate_softmax(self.plan, logits)
        if at.p >= 0:
            block.kept[at.p] = p
        return p

    def end_backward(self, inputs: LevelInput, block: RowBlock, dweights: Tensor) -> Tensor:
        """From the gradient of all weights ``(rows, O, E)``, overwritten, to that of the logits before temperature."""
        p = block.kept[self.at.p]
        assert p is not None
        d = mix.gate_softmax_backward(self.plan, mix.gated_part(self.plan, dweights), p)
        if self.temperature != 1.0:
            d = d / self.temperature
        return mix.as_dtype(d, inputs.gate_x.tensors[0].dtype)

    def _norm_input(self, inputs: LevelInput, block: RowBlock) -> tuple[Tensor, BatchNormSaved]:
        """What the norm read, and what forward normalised by."""
        z, norm = block.kept[self.at.z], inputs.state.gate_norm
        assert z is not None and norm is not None
        return z.unsqueeze(1), block.statistics(self.at.mean, self.at.rstd, norm)

    def sums(self, inputs: LevelInput, block: RowBlock, d: Tensor) -> Moments:
        """What the norm's backward needs to know of all row blocks."""
        norm = inputs.state.gate_norm
        assert norm is not None
        z, saved = self._norm_input(inputs, block)
        return batch_norm_sums(d.unsqueeze(1), z, inputs.gate.norm_weight, norm, saved)

    def norm_backward(
        self, inputs: LevelInput, block: RowBlock, d: Tensor, grads: Gradients, sums: Moments | None
    ) -> Tensor:
        """On to the gradient of the product. ``sums``: of several row blocks, whose gradients the caller adds up."""
        norm, own = inputs.state.gate_norm, grads.gate
        if norm is None:
            return d
        z, saved = self._norm_input(inputs, block)
        wide, weight = d.unsqueeze(1), inputs.gate.norm_weight
        if sums is not None:
            return batch_norm_backward_by_sums(wide, z, weight, saved, sums).squeeze(1)
        normed, dw, db = batch_norm_backward(wide, z, weight, norm, saved, affine=self.want.affine)
        own.norm_weight, own.norm_bias = plus(own.norm_weight, dw), plus(own.norm_bias, db)
        return normed.squeeze(1)

    def product_backward(self, inputs: LevelInput, block: RowBlock, d: Tensor, grads: Gradients) -> Tensor | None:
        """From the gradient of the logits to that of the last hidden layer, if it is wanted; else into ``grads``."""
        gate, own, want = inputs.gate, grads.gate, self.want
        assert gate.weight is not None
        if want.bias:
            own.bias = plus(own.bias, sum_of_rows(d))
        if self.hidden is None:
            dweight = slots_linear_backward(
                inputs.gate_x, block.rows, self.groups, d, gate.weight, grads.gate_x, weight_grad=want.weight
            )
            own.weight = plus(own.weight, dweight)
            return None
        a = self.hidden.output(inputs, block) if want.weight else None
        dweight = torch.empty_like(gate.weight, memory_format=torch.contiguous_format) if want.weight else None
        shape = (d.shape[0], len(self.mixture_rows), gate.weight.shape[1])
        da = torch.empty(shape, dtype=d.dtype, device=d.device) if self.goes_below else None
        for i, start, stop in self.mixture_rows:
            if dweight is not None:
                assert a is not None
                torch.mm(d[:, start:stop].t(), a[:, i], out=dweight[start:stop])
            if da is not None:
                torch.mm(d[:, start:stop], gate.weight[start:stop], out=da[:, i])
        own.weight = plus(own.weight, dweight)
        return da

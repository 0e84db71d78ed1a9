"""A level in differentiable PyTorch operators, vectorised over experts: the same numbers as ``level.py``.

For what a hand-written backward cannot serve: derivatives of derivatives, batched gradients, function transforms,
compilation and export.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backend import is_exporting
from ..plan import LevelPlan, MLPPlan
from ..slots import Slots, groups_of
from ..specs import LayerSpec
from ..state import LayerState, LevelState, NormState
from ..tensors import GateTensors, LayerTensors
from . import mix
from .activations import activate
from .dropout import keep_mask


def level(
    plan: LevelPlan,
    layers: Sequence[LayerTensors],
    gate: GateTensors,
    state: LevelState,
    x: Slots,
    gate_x: Slots,
    *,
    moves_statistics: bool = True,
) -> tuple[Tensor, Tensor]:
    """``y (B, O, H)`` and the listed weights ``(B, num_weights)``.

    ``moves_statistics=False`` repeats a forward: batch statistics are taken, running ones stay.
    """
    parts = []
    for block in plan.blocks:
        parts.append(_mlp(block, layers, state, x, moves_statistics))
    h = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    gated = None
    if gate.weight is not None:
        logits = _logits(plan, layers, gate, state, gate_x, moves_statistics)
        gated = mix.gate_softmax(plan, logits, is_traced=True)
    weights = mix.mixture_weights(plan, gated, gate.offset, h.shape[0], h)
    return _mix(plan, mix.output_weights(plan, weights), h), mix.listed_weights(plan, weights)


def _mix(plan: LevelPlan, weights: Tensor, h: Tensor) -> Tensor:
    """``mix.combine``, in the form that suits who reads the program."""
    if plan.passes:
        return h
    # A sum fuses with what stands around it. A product of small matrices does not, and the template that
    # max-autotune may choose for it on a CPU is wrong for any batch but the first (torch 2.13).
    fuses = torch.compiler.is_compiling() and not is_exporting()
    if plan.is_stopped and (h.requires_grad or not is_exporting()):  # a transform's gradients may not show on a tensor
        both = torch.cat((h, h.detach()), dim=1).to(weights.dtype)
        return mix.sum_weighted(mix.stopped_sums(plan), weights, both, multiplies=not fuses).to(h.dtype)
    if not plan.weighs_all:
        wide = h.to(weights.dtype)
        return mix.sum_weighted(mix.mixture_sums(plan), weights, wide, multiplies=not fuses).to(h.dtype)
    if fuses:
        return (weights.unsqueeze(3) * h.to(weights.dtype).unsqueeze(1)).sum(2).to(h.dtype)
    return mix.combine_dense(weights, h)


def grouped_linear(x: Slots, slots: Sequence[int], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Member ``m`` reads slot ``slots[m]``: weight ``(n, H, D)``, bias ``(n, H)`` to ``(B, n, H)``."""
    parts = []
    for slot, first, last in groups_of(x.places, tuple(slots)):  # uncached: compilers trace this
        count, units, width = last - first, weight.shape[1], weight.shape[2]
        part_bias = None if bias is None else bias[first:last].reshape(count * units)
        part = F.linear(x.at(slot), weight[first:last].reshape(count * units, width), part_bias)
        parts.append(part.view(x.batch, count, units))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def stacked_linear(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Member ``m`` reads ``a[:, m]``: ``(B, n, K)``, weight ``(n, H, K)``, bias ``(n, H)`` to ``(B, n, H)``."""
    z = torch.bmm(a.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
    return z if bias is None else z + bias


def _mlp(plan: MLPPlan, layers: Sequence[LayerTensors], state: LevelState, x: Slots, moves_statistics: bool) -> Tensor:
    a: Tensor | None = None
    for i, spec in enumerate(plan.layers, start=plan.position):
        tensor = layers[i]
        if a is None:
            z = grouped_linear(x, plan.slots, tensor.weight, tensor.bias)
        else:
            z = stacked_linear(a, tensor.weight, tensor.bias)
        a = _after_linear(z, spec, tensor, state.layers[i], state.seed, i, moves_statistics)
    assert a is not None
    return a


def gate_shares(
    plan: LevelPlan, layers: Sequence[LayerTensors], gate: GateTensors, state: LevelState, gate_x: Slots
) -> tuple[Tensor, Tensor | None]:
    """The softmax of every gate over all experts that it weighs, dense ``(B, gates, E)``, and which of them it chooses,
    bool (None: every); sigmoids are left out. It repeats what a forward in this state has done: statistics stay."""
    dense = mix.dense_logits(plan, _logits(plan, layers, gate, state, gate_x, moves_statistics=False))
    chosen = None
    if plan.top_k:
        chosen = mix.chosen_logits(plan, dense.detach(), is_traced=True) != -torch.inf
    if plan.sigmoid_rows:
        rows = mix.index_of(tuple(i for i in range(dense.shape[1]) if i not in plan.sigmoid_rows), dense.device)
        dense, chosen = dense.index_select(1, rows), None if chosen is None else chosen.index_select(1, rows)
    return torch.softmax(dense, dim=2), chosen


def _logits(
    plan: LevelPlan,
    layers: Sequence[LayerTensors],
    gate: GateTensors,
    state: LevelState,
    gate_x: Slots,
    moves_statistics: bool,
) -> Tensor:
    """Of all gates, ``(B, G)``, over the temperature."""
    topology = plan.topology
    assert gate.weight is not None
    hidden = _mlp(plan.gate, layers, state, gate_x, moves_statistics) if plan.gate.layers else None
    parts = []
    for row, o in enumerate(topology.gated_mixtures):
        first = topology.logit_offset[o]
        rows = slice(first, first + len(topology.mixture_experts[o]))
        a = gate_x.at(plan.gate.slots[row]) if hidden is None else hidden[:, row]
        parts.append(F.linear(a, gate.weight[rows], None if gate.bias is None else gate.bias[rows]))
    logits = torch.cat(parts, dim=1)
    if state.gate_norm is not None:
        logits = _batch_norm(logits, gate.norm_weight, gate.norm_bias, state.gate_norm, moves_statistics)
    if plan.gate_spec.temperature != 1.0:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / plan.gate_spec.temperature
    return logits


def _after_linear(
    z: Tensor,
    spec: LayerSpec,
    tensor: LayerTensors,
    state: LayerState,
    seed: int | Tensor | None,
    position: int,
    moves_statistics: bool,
) -> Tensor:
    if spec.norm_position == "before":
        z = _norm(z, spec, tensor, state, moves_statistics)
    if state.dice is not None:
        assert tensor.slope is not None
        p = torch.sigmoid(_batch_norm(z.flatten(1), None, None, state.dice, moves_statistics).view(z.shape))
        z = p * z - (p - 1) * tensor.slope * z  # the exporter to ONNX of torch 2.11 fails on 1 - p
    else:
        z = activate(z, spec.activation, tensor.slope)
    if spec.norm_position == "after":
        z = _norm(z, spec, tensor, state, moves_statistics)
    if state.dropout:
        if seed is None:  # the program is being traced, and PyTorch's own generator is what it can trace
            z = F.dropout(z, state.dropout)
        else:
            z = z * keep_mask(seed, position, 0, z, state.dropout) / (1.0 - state.dropout)
    return z


def _norm(z: Tensor, spec: LayerSpec, tensor: LayerTensors, state: LayerState, moves_statistics: bool) -> Tensor:
    norm = state.norm
    if norm is None:
        return z
    if norm.kind == "batch":
        return _batch_norm(z.flatten(1), tensor.norm_weight, tensor.norm_bias, norm, moves_statistics).view(z.shape)
    assert tensor.norm_weight is not None and tensor.norm_bias is not None
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    out = F.layer_norm(wide, [spec.units], eps=norm.eps)  # a size of z is no constant to the older exporter to ONNX
    return torch.addcmul(tensor.norm_bias.to(out.dtype), out, tensor.norm_weight.to(out.dtype)).to(z.dtype)


def _batch_norm(
    z: Tensor, weight: Tensor | None, bias: Tensor | None, norm: NormState, moves_statistics: bool
) -> Tensor:
    if norm.module is not None:
        out: Tensor = norm.module(z)
        return out
    mean, var = norm.running_mean, norm.running_var
    if norm.batch and not (moves_statistics and norm.factor > 0.0):
        mean = var = None
    # Its backward on the CPU reads the weight as if it had no gaps.
    weight = None if weight is None else weight.contiguous()
    return F.batch_norm(z, mean, var, weight, bias, norm.batch, norm.factor, norm.eps)

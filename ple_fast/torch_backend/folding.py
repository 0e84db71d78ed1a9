"""Batch norm in eval mode is ``scale z + shift`` per feature: here it becomes part of a linear layer beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..plan import LevelPlan
from ..state import LayerState, LevelState, NormState
from ..tensors import GateTensors, LayerTensors
from .finite import looks_finite
from .norms import BatchNormSaved, batch_norm_coefficients


def scale_and_shift(weight: Tensor | None, bias: Tensor | None, norm: NormState) -> tuple[Tensor, Tensor]:
    """The factor and the summand ``(features,)`` of a batch norm with running statistics."""
    return batch_norm_coefficients(weight, bias, norm, BatchNormSaved(norm.running_mean, norm.running_var))


def fold_output(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``scale (weight x + bias) + shift``: ``(..., H, K)``, the others ``(..., H)``."""
    return weight * scale.unsqueeze(-1), shift if bias is None else bias * scale + shift


def fold_input(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``weight (scale x + shift) + bias``: ``(..., H, K)``, ``(..., H)``, ``(..., K)`` others."""
    constant = (weight @ shift.unsqueeze(-1)).squeeze(-1)
    return weight * scale.unsqueeze(-2), constant if bias is None else bias + constant


def fold_norms(
    plan: LevelPlan, layers: Sequence[LayerTensors], gate: GateTensors, state: LevelState, rows: int
) -> tuple[Sequence[LayerTensors], GateTensors, LevelState]:
    """The level with the norms folded that cost more on ``rows`` rows than a pass over the weights does.

    A norm before the activation goes into its own linear layer, one after it into the next one of the MLP, unless
    dropout is between. Low precision is left alone: a folded weight would be rounded a second time. So is what is
    not finite: folded, it would be the sum of infinities of two signs where it was one.
    """
    if layers[0].weight.dtype not in (torch.float32, torch.float64) or not any(map(_is_affine, state.norms())):
        return layers, gate, state
    folded, states = list(layers), list(state.layers)
    for mlp in plan.mlps():
        for i, spec in enumerate(mlp.layers, start=mlp.position):
            norm, is_last = states[i].norm, i == mlp.position + len(mlp.layers) - 1
            after = spec.norm_position == "after"
            if norm is None or not _is_affine(norm) or (after and (is_last or states[i].dropout)):
                continue
            target = folded[i + after]
            if not _pays(target.weight, rows):
                continue
            scale, shift = scale_and_shift(folded[i].norm_weight, folded[i].norm_bias, norm)
            shape = folded[i].weight.shape[:2]
            fold = fold_input if after else fold_output
            weight, bias = fold(target.weight, target.bias, scale.view(shape), shift.view(shape))
            if not looks_finite(bias):
                continue
            folded[i + after] = target._replace(weight=weight, bias=bias)
            states[i] = LayerState(None, states[i].dice, states[i].dropout)
    if gate.weight is not None and _is_affine(state.gate_norm) and _pays(gate.weight, rows):
        assert state.gate_norm is not None
        scale, shift = scale_and_shift(gate.norm_weight, gate.norm_bias, state.gate_norm)
        weight, bias = fold_output(gate.weight, gate.bias, scale, shift)
        if looks_finite(bias):
            gate, state = gate._replace(weight=weight, bias=bias), state._replace(gate_norm=None)
    return folded, gate, state._replace(layers=tuple(states))


def _is_affine(norm: NormState | None) -> bool:
    """Whether the norm is one scale and one shift for every feature, whatever the batch."""
    return norm is not None and norm.kind == "batch" and not norm.batch and norm.module is None


def _pays(weight: Tensor, rows: int) -> bool:
    """Folded, a product's results are passed over twice less: norm, and ReLU where it follows."""
    return 2 * rows >= weight.shape[-1]

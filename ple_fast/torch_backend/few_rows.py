"""The level for a handful of rows without gradients, where the host's time counts beside the arithmetic.

As few operators and as little Python as possible, for the make-up that serving meets most: one block of experts with no
norms or dropout, and gates of one linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..plan import GateTensors, LayerTensors, LevelPlan
from .activations import activation_forward
from .gate_combine import gate_softmax
from .products import by_onednn, linear

MAX_ROWS = 32
"""From here on the products take most of the time, and ``level.py`` chooses them better."""

WIDE_ROWS = 2
"""Up to here a product per expert reads the weights faster than one wide product does, MKL's always."""


@lru_cache(maxsize=1024)
def serves(plan: LevelPlan, stacked: bool) -> bool:
    """Whether ``few_rows_forward`` can run the plan on one ``(B, D)`` for all slots or on a stacked ``(B, S, D)``."""
    topology = plan.topology
    if len(plan.blocks) > 1 or plan.gate.layers or plan.gate_spec.logits_norm is not None:
        return False
    if plan.gate_spec.temperature != 1.0 or plan.static_entry or plan.offset_entry:
        return False
    for spec in plan.blocks[0].layers:
        if spec.norm is not None or spec.dropout or spec.activation.name in ("prelu", "dice"):
            return False
    if not stacked:
        return True
    counts = {stop - start for start, stop in topology.slot_experts}
    sizes = {len(experts) for experts in topology.mixture_experts}
    return len(counts) == 1 and len(sizes) == 1 and topology.mixture_slot == tuple(range(topology.num_mixtures))


def few_rows_forward(plan: LevelPlan, layers: Sequence[LayerTensors], gate: GateTensors, x: Tensor) -> Tensor:
    """``y (B, O, H)`` of ``x (B, D)`` or ``(B, S, D)``; the plan is one that ``serves``."""
    rows = x.shape[0]
    weight, bias = layers[0].weight, layers[0].bias
    count, units, width = weight.shape
    specs = plan.blocks[0].layers
    relu = specs[0].activation.name == "relu"
    applied = False  # by the product
    assert gate.weight is not None
    if x.dim() == 2:
        if rows <= WIDE_ROWS or not by_onednn(x):
            a = _products(x.expand(count, rows, width), weight, bias)
        else:
            flat_bias, applied = None if bias is None else bias.reshape(-1), relu
            z = linear(x, weight.reshape(count * units, width), flat_bias, relu=relu)
            a = z.view(rows, count, units).transpose(0, 1)
        logits = linear(x, gate.weight, gate.bias)
    else:
        slots, x = x.shape[1], x.transpose(0, 1)
        z = _products(x, weight.reshape(slots, -1, width), bias)
        a = z.view(slots, rows, -1, units).transpose(1, 2).reshape(count, rows, units)
        mixtures = plan.topology.num_mixtures
        listed = _products(x[:mixtures], gate.weight.reshape(mixtures, -1, width), gate.bias)
        logits = listed.transpose(0, 1).reshape(rows, -1)
    for i, spec in enumerate(specs):
        if i > 0:
            a = _products(a, layers[i].weight, layers[i].bias)
        if spec.activation.name == "relu":
            if i > 0 or not applied:
                a.relu_()
        else:
            a = activation_forward(a, spec.activation, None, keep_input=False)
    return torch.bmm(gate_softmax(plan, logits), a.transpose(0, 1))


def _products(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``(n, rows, K)``, ``(n, H, K)`` and ``n * H`` biases to ``(n, rows, H)``."""
    if bias is None:
        return torch.bmm(x, weight.transpose(1, 2))
    return torch.baddbmm(bias.reshape(weight.shape[0], 1, -1), x, weight.transpose(1, 2))

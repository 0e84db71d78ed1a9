"""What the kernels' forward keeps for backward, in an order and in shapes that follow from the plan alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..autograd import LevelCall
from ..plan import LevelPlan, MLPPlan
from ..torch_backend.activations import from_output
from ..torch_backend.level import BlockKept, LevelNeeds
from ..torch_backend.mlp import NOTHING_KEPT, LayerKept, LayerNeeds


class Entry(NamedTuple):
    """A tensor that backward reads: ``(B, *shape)``, its dtype the parameters', or float32 (float64) if ``wide``."""

    shape: tuple[int, ...]
    wide: bool = False


class KernelLayout(NamedTuple):
    """What forward keeps, in order, each tensor once; per MLP and layer the number of its output and its input."""

    entries: tuple[Entry, ...]
    weights: int
    experts: int
    outputs: tuple[tuple[int, ...], ...]
    inputs: tuple[tuple[int, ...], ...]
    """Of the activation. -1 stands for what is not kept."""


def _reads_output(mlp: MLPPlan, needs: Sequence[LayerNeeds], i: int) -> bool:
    """Whether backward reads the output of layer ``i``: for its own activation, or as the next one's input."""
    activation = mlp.layers[i].activation
    own = needs[i].output and from_output(activation) and activation.name != "identity"
    if i + 1 == len(mlp.layers):
        return own
    return own or (needs[i + 1].output and bool(needs[i + 1].tensors.weight))


@lru_cache(maxsize=1024)
def kernel_layout(call: LevelCall, needed: tuple[bool, ...]) -> KernelLayout:
    plan, needs = call.plan, call.needs(needed)
    t = plan.topology
    entries: list[Entry] = []

    def keep(wanted: bool, *shape: int, wide: bool = False) -> int:
        if wanted:
            entries.append(Entry(shape, wide))
        return len(entries) - 1 if wanted else -1

    weights = keep(needs.experts or needs.logits, t.num_weights, wide=True)
    last = len(plan.blocks[0].layers) - 1
    reads_experts = needs.weights or any(
        _reads_output(block, own, len(block.layers) - 1) for block, own in zip(plan.blocks, needs.mlps, strict=False)
    )
    experts = keep(reads_experts, t.num_experts, plan.blocks[0].layers[last].units)
    outputs, inputs = [], []
    for mlp, own in zip(plan.mlps(), needs.mlps, strict=True):
        rows: tuple[list[int], list[int]] = ([], [])
        for i, spec in enumerate(mlp.layers):
            is_last = i + 1 == len(mlp.layers)
            wanted = _reads_output(mlp, own, i)
            if is_last and mlp is plan.gate:
                wanted = wanted or bool(needs.logits and needs.gate.weight)
            rows[0].append(keep(wanted and not (is_last and mlp is not plan.gate), len(mlp.slots), spec.units))
            rows[1].append(keep(own[i].output and not from_output(spec.activation), len(mlp.slots), spec.units))
        outputs.append(tuple(rows[0]))
        inputs.append(tuple(rows[1]))
    return KernelLayout(tuple(entries), weights, experts, tuple(outputs), tuple(inputs))


def pack(layout: KernelLayout, plan: LevelPlan, kept: BlockKept) -> list[Tensor]:
    """The kept tensors in the order of the layout."""
    found: dict[int, Tensor | None] = {layout.weights: kept.gated, layout.experts: kept.h}
    for mlp, layers, outputs, inputs in zip(plan.mlps(), kept.mlps, layout.outputs, layout.inputs, strict=True):
        for i, layer in enumerate(layers):
            above = layers[i + 1].a if i + 1 < len(layers) else kept.hidden if mlp is plan.gate else None
            by_output = from_output(mlp.layers[i].activation)
            found[outputs[i]] = layer.act if by_output and layer.act is not None else above
            found[inputs[i]] = layer.act
            if i + 1 == len(layers) and mlp is not plan.gate and found.get(layout.experts) is None:
                # Nobody reads the experts' outputs but their own activations: of one block they are all outputs.
                found[layout.experts] = layer.act if len(plan.blocks) == 1 else _base(layer.act)
    tensors = []
    for number in range(len(layout.entries)):
        tensor = found[number]
        assert tensor is not None
        tensors.append(tensor)
    return tensors


def _base(view: Tensor | None) -> Tensor | None:
    """The tensor of all experts that a block's output is a part of."""
    return None if view is None else view._base


def unpack(layout: KernelLayout, plan: LevelPlan, needs: LevelNeeds, kept: Sequence[Tensor]) -> BlockKept:
    """The inverse of ``pack``."""

    def at(number: int) -> Tensor | None:
        return None if number < 0 else kept[number]

    mlps = []
    experts = at(layout.experts)
    for mlp, own, outputs, inputs in zip(plan.mlps(), needs.mlps, layout.outputs, layout.inputs, strict=True):
        layers: list[LayerKept] = []
        for i, spec in enumerate(mlp.layers):
            keep = NOTHING_KEPT
            if own[i].output and spec.activation.name != "identity":
                output = at(outputs[i])
                if i + 1 == len(mlp.layers) and mlp is not plan.gate and experts is not None:
                    output = experts[:, mlp.start : mlp.start + len(mlp.slots)] if len(plan.blocks) > 1 else experts
                keep = keep._replace(act=output if from_output(spec.activation) else at(inputs[i]))
            if i > 0 and own[i].output and own[i].tensors.weight:
                keep = keep._replace(a=at(outputs[i - 1]))
            layers.append(keep)
        mlps.append(layers)
    hidden = at(layout.outputs[-1][-1]) if plan.gate.layers and needs.logits and needs.gate.weight else None
    return BlockKept(mlps, experts if needs.weights else None, at(layout.weights), None, hidden, None, None, None)


def empty(layout: KernelLayout, like: Tensor, batch: int) -> list[Tensor]:
    """The kept tensors, not filled."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return [like.new_empty((batch, *e.shape), dtype=wide if e.wide else like.dtype) for e in layout.entries]

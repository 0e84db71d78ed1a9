"""Trees of modules with the names of AdaTT's classes, out of levels of ours: what ``to_adatt`` writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .library import Library, PlainLevel, in_order, tree
from .plain_layers import PlainLayer, PlainStack


def _mlp(library: Library, layers: Sequence[PlainLayer]) -> nn.Module:
    for layer in layers:
        spec = layer.spec
        if spec.norm is not None or spec.activation.name != "relu" or spec.dropout:
            library.cannot("its layers are linear and a ReLU, without norm and dropout")
    return tree({"mlp_net": nn.Sequential(*in_order(layers))})


def _experts(library: Library, levels: list[PlainLevel]) -> list[list[nn.Module]]:
    return [[_mlp(library, expert) for expert in level.experts] for level in levels]


def _lists(library: Library, levels: list[PlainLevel]) -> dict[str, list[Any]]:
    """Experts and single-layer gates."""
    return {
        "experts": _experts(library, levels),
        "gate_weights": [
            [nn.Sequential(end, nn.Softmax(dim=-1)) for end in library.linear_gates(level.gates)] for level in levels
        ],
    }


def _made(content: dict[str, Any], **attributes: Any) -> nn.Module:
    made = tree(content)
    vars(made).update(attributes)
    return made


def _counts(library: Library, levels: list[PlainLevel]) -> list[int]:
    """Experts per slot, the same at every level."""
    counts = [
        tuple(level.topology.expert_slot.count(s) for s in range(level.topology.num_slots or 0))
        for level, _, _ in levels
    ]
    if len(set(counts)) > 1:
        library.cannot(f"all its levels have the same numbers of experts, got {counts}")
    return list(counts[0])


def write_ple(library: Library, levels: list[PlainLevel]) -> nn.Module:
    """``PLE``."""
    *own, shared = _counts(library, levels)
    return _made(
        _lists(library, levels), num_tasks=len(own), num_task_experts=own, num_shared_experts=shared
    )  # fmt: skip


def _scalars(library: Library, levels: list[PlainLevel], counts: Sequence[int]) -> list[list[Tensor]]:
    """The learned scalars per level and mixture; none where they are constants 1, or where there are none."""
    offsets = [[gate.offset for gate in level.gates] for level in levels]
    if all(offset is None for row in offsets for offset in row):
        return []
    found = [[offset.weight.detach() for offset in row if offset is not None] for row in offsets]
    if [len(row) for row in found] != [len(row) for row in offsets]:
        library.cannot("its mixtures have scalars for their own experts everywhere, or nowhere")
    if any(count != 1 for count in counts):
        return found
    if any(offset is not None and offset.weight.requires_grad for row in offsets for offset in row) or any(
        bool((weight != 1).any()) for row in found for weight in row
    ):
        library.cannot("where every unit has one expert, its scalars are constants 1")
    return []


def _with_scalars(library: Library, levels: list[PlainLevel], scalars: list[Tensor], **attributes: Any) -> nn.Module:
    return _made(
        {**_lists(library, levels), "self_exp_weights": nn.ParameterList(scalars)},
        self_exp_res_connect=any(level.topology.has_offsets for level, _, _ in levels),
        **attributes,
    )


def write_sp(library: Library, levels: list[PlainLevel]) -> nn.Module:
    """``AdaTTSp``: scalars ``(T, experts per task)`` per level."""
    counts = _counts(library, levels)
    if len(set(counts)) > 1:
        library.cannot(f"every task has as many experts, got {counts}")
    scalars = [torch.stack(row) for row in _scalars(library, levels, counts)]
    return _with_scalars(library, levels, scalars, num_tasks=len(counts), num_task_experts=counts[0])


def write_shared(library: Library, levels: list[PlainLevel]) -> nn.Module:
    """``AdaTTWSharedExps``: scalars ``(levels, its experts)`` per unit; the shared one has none at the last level."""
    counts = _counts(library, levels)
    rows = _scalars(library, levels, counts)
    scalars = []
    for unit, count in enumerate(counts if rows else ()):
        own = [row[unit] for row in rows if unit < len(row)]
        scalars.append(torch.stack(own) if own else rows[0][0].new_empty(0, count))
    return _with_scalars(library, levels, scalars, num_tasks=len(counts) - 1, num_expert_list=counts)


def write_mlmmoe(library: Library, levels: list[PlainLevel]) -> nn.Module:
    """``MLMMoE``, whose gates may have hidden layers."""
    gates = []
    for level in levels:
        made = []
        for gate in level.gates:
            end = PlainStack(gate.path, gate.layers[-1:], gate.temperature)
            (linear,) = library.linear_gates([end])
            made.append(nn.Sequential(_mlp(library, gate.layers[:-1]), linear, nn.Softmax(dim=-1)))
        gates.append(made)
    return tree({"experts": _experts(library, levels), "gates": gates})

"""The linear layer of stacked MLPs: one wide product where they share an input, a grouped one elsewhere.

Outputs and gradients are contiguous ``(rows, n, H)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..slots import Groups, Slots
from .input_grads import InputGrads
from .products import grouped, grouped_input_grad, grouped_weight_grad, linear, linear_weight_grad


def slots_linear(
    slots: Slots, rows: slice, groups: Groups, weight: Tensor, bias: Tensor | None, *, relu: bool = False
) -> Tensor:
    """First layer: member ``m`` reads its slot. Weight ``(n, H, D)``, bias ``(n, H)``; returns ``(rows, n, H)``.

    A gate's ragged weights come as n = G members of H = 1.
    """
    n, units, width = weight.shape
    flat, flat_bias = weight.reshape(n * units, width), None if bias is None else bias.reshape(n * units)
    if len(groups) == 1:
        return linear(slots.at(groups[0][0], rows), flat, flat_bias, relu=relu).view(-1, n, units)
    stack = slots.even_stack(groups, rows)
    if stack is not None:
        s = len(groups)
        batched_bias = None if flat_bias is None else flat_bias.view(s, -1)
        return grouped(stack, flat.view(s, -1, width), batched_bias, relu=relu).view(-1, n, units)
    out = torch.empty((rows.stop - rows.start, n * units), dtype=weight.dtype, device=weight.device)
    for slot, first, last in groups:
        part = slice(first * units, last * units)
        part_bias = None if flat_bias is None else flat_bias[part]
        out[:, part] = linear(slots.at(slot, rows), flat[part], part_bias, relu=relu)
    return out.view(-1, n, units)


def slots_linear_backward(
    slots: Slots, rows: slice, groups: Groups, d: Tensor, weight: Tensor, dslots: InputGrads, *, weight_grad: bool
) -> Tensor | None:
    """Backward of ``slots_linear`` for ``d (rows, n, H)``: adds to ``dslots`` where wanted.

    Gates come as ``(rows, G)`` with a weight ``(G, D)``. Returns the weight's gradient of these rows, if wanted; it may
    be a transposed view.
    """
    if d.dim() == 2:
        (members, width), units, wide, flat = weight.shape, 1, d, weight
    else:
        members, units, width = weight.shape
        wide, flat = d.reshape(d.shape[0], members * units), weight.reshape(members * units, width)
    stack = slots.even_stack(groups, rows)
    s = len(groups)
    if stack is not None and dslots.is_even:
        dslots.add_even(groups[0][0], rows, wide.view(d.shape[0], s, members * units // s), flat.view(s, -1, width))
    else:
        for slot, first, last in groups:
            if dslots.wants(slot):
                part = slice(first * units, last * units)
                dslots.add(slot, rows, wide[:, part], flat[part])
    if not weight_grad:
        return None
    if len(groups) == 1:
        return linear_weight_grad(wide, slots.at(groups[0][0], rows)).view(weight.shape)
    if stack is not None:
        parts = wide.view(d.shape[0], s, members * units // s)
        return grouped_weight_grad(parts, stack).view(weight.shape)
    dweight = torch.empty_like(flat, memory_format=torch.contiguous_format)
    for slot, first, last in groups:
        part = slice(first * units, last * units)
        torch.mm(wide[:, part].t(), slots.at(slot, rows), out=dweight[part])
    return dweight.view(weight.shape)


def stacked_linear_backward(
    a: Tensor | None, d: Tensor, weight: Tensor, *, weight_grad: bool, below: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Backward of ``grouped`` for ``d (rows, n, H)``: gradients of ``a`` and of the weight, each if wanted."""
    dweight = None
    if weight_grad:
        assert a is not None
        dweight = grouped_weight_grad(d, a)
    return grouped_input_grad(d, weight) if below else None, dweight

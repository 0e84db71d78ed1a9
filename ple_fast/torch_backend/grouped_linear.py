"""The linear layer of stacked MLPs: one wide product where they share an input, a batched one elsewhere.

Outputs and gradients are ``(rows, n, H)``; products write into strided views of them, so nothing is stacked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .slots import SlotGrads, Slots

Groups = Sequence[tuple[int, int, int]]
"""Runs ``(slot, first, last + 1)`` of members, or of rows of a weight, that read one slot."""


def addmm(bias: Tensor | None, x: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out = x @ weight.T + bias``."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def slots_linear_forward(
    slots: Slots, rows: slice, groups: Groups, weight: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """First layer: member ``m`` reads its slot. Weight ``(n, H, D)``, bias ``(n, H)``, out ``(rows, n, H)``.

    A gate's ragged weights come as n = G members of H = 1.
    """
    n, units, width = weight.shape
    flat, flat_bias = weight.reshape(n * units, width), None if bias is None else bias.reshape(n * units)
    wide = out.view(out.shape[0], n * units)
    if len(groups) == 1:
        addmm(flat_bias, slots.at(groups[0][0], rows), flat, wide)
        return
    stack = slots.even_stack(groups, rows)
    if stack is not None:
        s = len(groups)
        target = wide.view(out.shape[0], s, n * units // s).transpose(0, 1)
        batched = flat.view(s, -1, width).transpose(1, 2)
        if flat_bias is None:
            torch.bmm(stack, batched, out=target)
        else:
            torch.baddbmm(flat_bias.view(s, 1, -1), stack, batched, out=target)
        return
    for slot, first, last in groups:
        part = slice(first * units, last * units)
        part_bias = None if flat_bias is None else flat_bias[part]
        addmm(part_bias, slots.at(slot, rows), flat[part], wide[:, part])


def slots_linear_backward(
    slots: Slots,
    rows: slice,
    groups: Groups,
    d: Tensor,
    weight: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dslots: SlotGrads,
    *,
    first_block: bool,
) -> None:
    """Backward of ``slots_linear_forward``: ``d`` is ``(rows, n, H)``; weight gradients accumulate over row blocks."""
    n, units, width = weight.shape
    wide, flat = d.view(d.shape[0], n * units), weight.reshape(n * units, width)
    even = slots.even_stack(groups, rows) if len(groups) > 1 else None
    if even is not None:
        s = len(groups)
        parts = wide.view(d.shape[0], s, n * units // s).transpose(0, 1)
        if dweight is not None:
            target = dweight.view(s, -1, width)
            if first_block:
                torch.bmm(parts.transpose(1, 2), even, out=target)
            else:
                target.baddbmm_(parts.transpose(1, 2), even)
        if dslots.is_even:
            dslots.add_even(rows, parts, flat.view(s, -1, width))
    for slot, first, last in groups:
        part = slice(first * units, last * units)
        if dweight is not None and even is None:
            target = dweight.view(n * units, width)[part]
            if first_block:
                torch.mm(wide[:, part].t(), slots.at(slot, rows), out=target)
            else:
                target.addmm_(wide[:, part].t(), slots.at(slot, rows))
        if dslots.wants(slot) and not (even is not None and dslots.is_even):
            dslots.add(slot, rows, wide[:, part], flat[part])
    if dbias is not None:
        add_rows(dbias, d, first_block=first_block)


def stacked_linear_forward(a: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """A later layer: member ``m`` reads ``a[:, m]``. ``a (rows, n, K)``, weight ``(n, H, K)``, out ``(rows, n, H)``."""
    if weight.shape[0] == 1:
        addmm(None if bias is None else bias[0], a[:, 0], weight[0], out[:, 0])
    elif bias is None:
        torch.bmm(a.transpose(0, 1), weight.transpose(1, 2), out=out.transpose(0, 1))
    else:
        torch.baddbmm(bias.unsqueeze(1), a.transpose(0, 1), weight.transpose(1, 2), out=out.transpose(0, 1))


def stacked_linear_backward(
    a: Tensor | None,
    d: Tensor,
    weight: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
    *,
    below: bool,
    first_block: bool,
) -> Tensor | None:
    """Backward of ``stacked_linear_forward``; returns the gradient of ``a`` if ``below`` wants it."""
    parts = d.transpose(0, 1)
    if dweight is not None:
        assert a is not None
        if first_block:
            torch.bmm(parts.transpose(1, 2), a.transpose(0, 1), out=dweight)
        else:
            dweight.baddbmm_(parts.transpose(1, 2), a.transpose(0, 1))
    if dbias is not None:
        add_rows(dbias, d, first_block=first_block)
    if not below:
        return None
    da = torch.empty((d.shape[0], d.shape[1], weight.shape[2]), dtype=d.dtype, device=d.device)
    torch.bmm(parts, weight, out=da.transpose(0, 1))
    return da


def add_rows(total: Tensor, d: Tensor, *, first_block: bool) -> None:
    """``total`` (+)= the sum of ``d`` over its rows."""
    if first_block:
        torch.sum(d.view(d.shape[0], -1), 0, out=total.view(-1))
    else:
        total.add_(d.sum(0).view(total.shape))

"""Slots scaled element by element, in differentiable operators."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled(x: Tensor, scale: Tensor, factor: float) -> Tensor:
    """``y[:, j] = factor x[:, j] scale[:, j]``; one of them may be ``(B, D)``, for all slots.

    In float32 (float64), forward and backward; rounded once. The factor goes to the smaller operand.
    """
    dtype = torch.promote_types(x.dtype, scale.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    x, scale = x.to(wide), scale.to(wide)
    if x.dim() > scale.dim():
        x, scale = scale, x
    x = x * factor
    if x.dim() < scale.dim():
        x = x.unsqueeze(1)
    return (x * scale).to(dtype)


def scaled_backward(
    dy: Tensor, x: Tensor, scale: Tensor, factor: float, *, want_x: bool, want_scale: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``x`` and ``scale``, which are themselves differentiable; None where not wanted."""
    return _grad(dy, scale, x, factor) if want_x else None, _grad(dy, x, scale, factor) if want_scale else None


def _grad(dy: Tensor, other: Tensor, like: Tensor, factor: float) -> Tensor:
    product = scaled(dy, other, factor)
    return (product.sum(1) if like.dim() < dy.dim() else product).to(like.dtype)

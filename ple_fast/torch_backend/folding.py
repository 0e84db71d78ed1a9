"""Batch norm in eval mode is ``scale z + shift`` per feature: here it becomes part of a linear layer beside it."""

from __future__ import annotations

import torch
from torch import Tensor


def scale_and_shift(
    mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The factor and the summand of a batch norm with running statistics ``mean`` and ``var``, all ``(features,)``."""
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def fold_output(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``scale (weight x + bias) + shift``: ``(..., H, K)``, the others ``(..., H)``."""
    return weight * scale.unsqueeze(-1), shift if bias is None else bias * scale + shift


def fold_input(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``weight (scale x + shift) + bias``: ``(..., H, K)``, ``(..., H)``, ``(..., K)`` others."""
    constant = (weight @ shift.unsqueeze(-1)).squeeze(-1)
    return weight * scale.unsqueeze(-2), constant if bias is None else bias + constant

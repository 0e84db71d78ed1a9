"""Batch norm and layer norm of stacked layers, ``(rows, n, H)``, forward and backward.

Batch norm is PyTorch's own kernel, which takes low precision with float32 parameters; layer norm, whose parameters
differ from expert to expert, is that kernel without parameters, in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..plan import NormState

aten = torch.ops.aten


class BatchNormSaved(NamedTuple):
    """What backward needs besides the input: statistics of the batch, or the running ones that stood in for them."""

    mean: Tensor | None
    var: Tensor | None
    """Batch statistics: ``1 / sqrt(var + eps)``; running ones: the variance itself."""


def _wide(z: Tensor) -> Tensor:
    return z if z.dtype in (torch.float32, torch.float64) else z.float()


def batch_norm_forward(
    z: Tensor, weight: Tensor | None, bias: Tensor | None, norm: NormState
) -> tuple[Tensor, BatchNormSaved]:
    """Normalise every feature over the rows; running statistics move where the norm says so."""
    mean, var = norm.running_mean, norm.running_var
    if norm.batch and norm.factor == 0.0:
        mean = var = None
    out, batch_mean, inverse = torch.native_batch_norm(
        z.flatten(1), weight, bias, mean, var, norm.batch, norm.factor, norm.eps
    )
    return out.view(z.shape), BatchNormSaved(batch_mean, inverse) if norm.batch else BatchNormSaved(mean, var)


def batch_norm_backward(
    d: Tensor, z: Tensor, weight: Tensor | None, norm: NormState, saved: BatchNormSaved, *, affine: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the input, the weight and the bias (None unless ``affine``)."""
    # PyTorch's kernel reads these as if they had no gaps.
    given = [None if t is None else t.contiguous() for t in saved]
    weight = None if weight is None else weight.contiguous()
    running, batch = ((None, None), given) if norm.batch else (given, (None, None))
    dx, dw, db = aten.native_batch_norm_backward(
        d.flatten(1), z.flatten(1), weight, *running, *batch, norm.batch, norm.eps, [True, affine, affine]
    )
    return dx.view(z.shape), dw if affine else None, db if affine else None


def batch_normalised(z: Tensor, norm: NormState, saved: BatchNormSaved) -> Tensor:
    """The normalised ``z`` of a forward pass that has been; no statistics move."""
    assert saved.mean is not None and saved.var is not None
    x = _wide(z)
    scale = saved.var if norm.batch else torch.rsqrt(saved.var + norm.eps)
    shape = z.shape[1:]
    return (x - saved.mean.to(x.dtype).view(shape)).mul_(scale.to(x.dtype).view(shape)).to(z.dtype)


def layer_norm_forward(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise over the last axis, then ``weight`` and ``bias``, ``(n, H)``; also mean and 1 / deviation."""
    out, mean, rstd = torch.native_layer_norm(_wide(z), [z.shape[-1]], None, None, eps)
    return torch.addcmul(bias.to(out.dtype), out, weight.to(out.dtype)).to(z.dtype), mean, rstd


def layer_norm_backward(
    d: Tensor, z: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, *, affine: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the input, the weight and the bias (None unless ``affine``)."""
    x, g = _wide(z), _wide(d)
    dw = db = None
    if affine:
        normed = (x - mean).mul_(rstd)
        dw, db = (g * normed).sum(0).to(weight.dtype), g.sum(0).to(weight.dtype)
    dx, _, _ = aten.native_layer_norm_backward(
        g * weight.to(g.dtype), x, [z.shape[-1]], mean, rstd, None, None, [True, False, False]
    )
    return dx.to(z.dtype), dw, db

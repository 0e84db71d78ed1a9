"""Batch norm and layer norm of stacked layers, ``(rows, n, H)``, forward and backward.

Batch norm of one row block is PyTorch's own kernel, which takes low precision with float32 parameters; of several, it
is their merged statistics and two passes over each. Layer norm, whose parameters differ from expert to expert, is
PyTorch's kernel without parameters, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..state import NormState
from .finite import looks_finite

aten = torch.ops.aten


class BatchNormSaved(NamedTuple):
    """What backward needs besides the input: statistics of the batch, or the running ones that stood in for them."""

    mean: Tensor | None
    var: Tensor | None
    """Batch statistics: ``1 / sqrt(var + eps)``; running ones: the variance itself."""


def take_up(norm: NormState, mean: Tensor, var: Tensor) -> None:
    """Running statistics take up those of a batch; the variance is the unbiased one."""
    for running, new in ((norm.running_mean, mean), (norm.running_var, var)):
        if running is not None:
            # lerp_ would subtract first: of two infinities that is NaN.
            running.mul_(1.0 - norm.factor).add_(new.to(running.dtype), alpha=norm.factor)


Moments = tuple[int, Tensor, Tensor]
"""Of a row block: how many rows, and per feature their mean and variance or, in backward, the gradients of the norm's
weight and bias."""


def batch_moments(z: Tensor) -> Moments:
    """Of ``z (rows, n, H)``, before they are merged."""
    mean, var = torch.batch_norm_update_stats(z.flatten(1), None, None, 0.0)
    return z.shape[0], mean, var


def merge_moments(parts: Sequence[Moments], norm: NormState) -> BatchNormSaved:
    """Statistics of the batch, merged as in Chan, Golub and LeVeque (1979); running ones move if the norm says so."""
    rows, means, variances = zip(*parts, strict=True)
    total = sum(rows)
    every = torch.stack(means)
    share = torch.tensor(rows, dtype=every.dtype, device=every.device).div_(total).unsqueeze(1)
    mean = (every * share).sum(0)
    var = (torch.stack(variances).add_((every - mean).square_()) * share).sum(0)
    if norm.moves:
        take_up(norm, mean, var * (total / (total - 1)))
    return BatchNormSaved(mean, var.add_(norm.eps).rsqrt_())


def merge_sums(parts: Sequence[Moments]) -> Moments:
    """Rows of the batch, and the gradients of weight and bias over all of them."""
    rows, dws, dbs = zip(*parts, strict=True)
    return sum(rows), torch.stack(dws).sum(0), torch.stack(dbs).sum(0)


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


def batch_norm_coefficients(
    weight: Tensor | None, bias: Tensor | None, norm: NormState, saved: BatchNormSaved
) -> tuple[Tensor, Tensor]:
    """``scale`` and ``shift`` with ``batch_norm(z) = scale z + shift``, at least in float32."""
    assert saved.mean is not None and saved.var is not None
    var = _wide(saved.var)
    scale = var if norm.batch else (var + norm.eps).rsqrt_()
    if weight is not None:
        scale = scale * weight
    return scale, torch.mul(saved.mean, scale).neg_() if bias is None else torch.addcmul(
        bias.to(scale.dtype), saved.mean.to(scale.dtype), scale, value=-1
    )


def batch_norm_again(
    z: Tensor, weight: Tensor | None, bias: Tensor | None, norm: NormState, saved: BatchNormSaved
) -> Tensor:
    """The result of a forward pass that has been; no statistics move."""
    scale, shift = batch_norm_coefficients(weight, bias, norm, saved)
    shape = z.shape[1:]
    return torch.addcmul(shift.view(shape), _wide(z), scale.view(shape)).to(z.dtype)


def batch_norm(
    z: Tensor, weight: Tensor | None, bias: Tensor | None, norm: NormState, moments: BatchNormSaved | None
) -> tuple[Tensor, BatchNormSaved]:
    """``batch_norm_forward``; ``moments``: of the batch, where ``z`` is one row block of several."""
    if moments is None:
        return batch_norm_forward(z, weight, bias, norm)
    return batch_norm_again(z, weight, bias, norm, moments), moments


def batch_norm_backward(
    d: Tensor, z: Tensor, weight: Tensor | None, norm: NormState, saved: BatchNormSaved, *, affine: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the input, the weight and the bias (None unless ``affine``)."""
    dx, dw, db = _batch_norm_backward(d, z, weight, norm, saved, [True, affine, affine])
    return dx.view(z.shape), dw if affine else None, db if affine else None


def _batch_norm_backward(
    d: Tensor, z: Tensor, weight: Tensor | None, norm: NormState, saved: BatchNormSaved, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    # PyTorch's kernel reads these as if they had no gaps.
    given = [None if t is None else t.contiguous() for t in saved]
    weight = None if weight is None else weight.contiguous()
    running, batch = ((None, None), given) if norm.batch else (given, (None, None))
    grads: tuple[Tensor, Tensor, Tensor] = aten.native_batch_norm_backward(
        d.flatten(1), z.flatten(1), weight, *running, *batch, norm.batch, norm.eps, wanted
    )
    return grads


def batch_norm_sums(d: Tensor, z: Tensor, weight: Tensor | None, norm: NormState, saved: BatchNormSaved) -> Moments:
    """What of one row block enters the gradients of the others, before it is merged."""
    _, dw, db = _batch_norm_backward(d, z, weight, norm, saved, [False, True, True])
    return z.shape[0], dw, db


def batch_norm_backward_by_sums(
    d: Tensor, z: Tensor, weight: Tensor | None, saved: BatchNormSaved, sums: Moments
) -> Tensor:
    """Gradient of the input of one row block of several; ``sums``: those of all, merged."""
    rows, dw_sum, db_sum = sums
    assert saved.mean is not None and saved.var is not None
    # scale (d - mean(d) - normed mean(d normed)), with normed = (z - mean) / deviation.
    shape = z.shape[1:]
    scale = saved.var if weight is None else saved.var * weight
    slope = (saved.var * dw_sum).div_(-rows)
    constant = torch.addcmul(db_sum / -rows, slope, saved.mean, value=-1)
    if looks_finite(scale):  # it may be multiplied first, which takes a pass less
        constant, slope = constant.mul_(scale), slope.mul_(scale)
        return torch.addcmul(constant.view(shape), z, slope.view(shape)).addcmul_(d, scale.view(shape))
    return torch.addcmul(constant.view(shape), z, slope.view(shape)).add_(d).mul_(scale.view(shape))


def batch_normalised(z: Tensor, norm: NormState, saved: BatchNormSaved) -> Tensor:
    """The normalised ``z`` of a forward pass that has been; no statistics move."""
    assert saved.mean is not None and saved.var is not None
    x = _wide(z)
    scale = saved.var if norm.batch else torch.rsqrt(saved.var + norm.eps)
    shape = z.shape[1:]
    return (x - saved.mean.to(x.dtype).view(shape)).mul_(scale.to(x.dtype).view(shape)).to(z.dtype)


def layer_norm_forward(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise over the last axis, then ``weight`` and ``bias``, ``(n, H)``; also mean and 1 / deviation."""
    normed, mean, rstd = torch.native_layer_norm(_wide(z), [z.shape[-1]], None, None, eps)
    y = torch.addcmul(bias.to(normed.dtype), normed, weight.to(normed.dtype), out=normed)
    return y.to(z.dtype), mean, rstd


def layer_norm_affine(normed: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` and ``bias``, ``(n, H)``, on what has been normalised."""
    return torch.addcmul(bias.to(normed.dtype), normed, weight.to(normed.dtype)).to(dtype)


def layer_normalised(z: Tensor, eps: float) -> Tensor:
    """The normalised ``z``, in float32 (or float64)."""
    normed, _, _ = torch.native_layer_norm(_wide(z), [z.shape[-1]], None, None, eps)
    return normed


def layer_norm_backward(
    d: Tensor, z: Tensor, normed: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor, *, affine: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the input, the weight and the bias (None unless ``affine``); ``d`` is overwritten.

    ``normed``: if it is at hand.
    """
    x, g = _wide(z), _wide(d)
    dw = db = None
    if affine:
        normed = (x - mean).mul_(rstd) if normed is None else normed
        # Sums of d normed and of d over the rows are what the kernel of batch norm takes in one pass.
        zero, one = torch.zeros_like(normed[0]).flatten(), torch.ones_like(normed[0]).flatten()
        sums = aten.native_batch_norm_backward(
            g.flatten(1), normed.flatten(1), None, None, None, zero, one, True, 0.0, [False, True, True]
        )
        dw, db = (total.view(weight.shape).to(weight.dtype) for total in sums[1:])
    dx, _, _ = aten.native_layer_norm_backward(
        g.mul_(weight), x, [z.shape[-1]], mean, rstd, None, None, [True, False, False]
    )
    return dx.to(z.dtype), dw, db

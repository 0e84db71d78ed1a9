"""Activations of stacked layers, ``(rows, n, H)``, forward and backward, in place where the derivative allows it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..specs import Activation
from ..state import NormState
from .norms import BatchNormSaved, batch_norm_backward, batch_norm_forward, batch_normalised
from .row_dice import row_dice_backward, row_dice_forward

aten = torch.ops.aten


def activation_forward(z: Tensor, activation: Activation, slope: Tensor | None, *, keep_input: bool) -> Tensor:
    """``f(z)``, every activation but dice; in place unless ``keep_input``. ``slope``: of prelu, row_dice, ``(n,)``."""
    name, value = activation
    if name == "identity":
        return z
    if name == "relu":
        return F.relu(z) if keep_input else z.relu_()
    if name == "tanh":
        return torch.tanh(z) if keep_input else z.tanh_()
    if name == "sigmoid":
        return torch.sigmoid(z) if keep_input else z.sigmoid_()
    if name == "leaky_relu":
        return F.leaky_relu(z, value, inplace=not keep_input)
    if name == "gelu":
        return F.gelu(z)
    if name == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if name == "silu":
        return F.silu(z, inplace=not keep_input)
    if name == "row_dice" and slope is not None:
        return row_dice_forward(z, slope, value)
    assert name == "prelu" and slope is not None, name
    return torch.prelu(z, slope)


def activation_backward(
    d: Tensor, kept: Tensor, activation: Activation, slope: Tensor | None, *, slope_grad: bool
) -> Tensor | None:
    """Turn ``d``, the gradient of the output, into that of the input, in place; returns the gradient of ``slope``.

    ``kept``: the output where ``from_output``, else the input.
    """
    name, value = activation
    if name == "relu":
        aten.threshold_backward.grad_input(d, kept, 0, grad_input=d)
    elif name == "tanh":
        aten.tanh_backward.grad_input(d, kept, grad_input=d)
    elif name == "sigmoid":
        aten.sigmoid_backward.grad_input(d, kept, grad_input=d)
    elif name == "leaky_relu":
        aten.leaky_relu_backward.grad_input(d, kept, value, value > 0, grad_input=d)
    elif name in ("gelu", "gelu_tanh"):
        aten.gelu_backward.grad_input(d, kept, approximate="tanh" if name == "gelu_tanh" else "none", grad_input=d)
    elif name == "silu":
        aten.silu_backward.grad_input(d, kept, grad_input=d)
    elif name == "prelu":
        assert slope is not None
        negative = ~(kept > 0)  # NaN too
        ds = None
        if slope_grad:
            wide = torch.promote_types(d.dtype, torch.float32)
            ds = (d.to(wide) * kept).masked_fill_(~negative, 0).sum(2).sum(0).to(slope.dtype)
        d.mul_(torch.where(negative, slope.view(-1, 1), torch.ones((), dtype=d.dtype, device=d.device)))
        return ds
    elif name == "row_dice":
        assert slope is not None
        dz, ds = row_dice_backward(d, kept, slope, value, alpha_grad=slope_grad)
        d.copy_(dz)
        return ds
    else:
        assert name == "identity", name
    return None


def dice_forward(z: Tensor, alpha: Tensor, norm: NormState) -> tuple[Tensor, BatchNormSaved]:
    """``p z + (1 - p) alpha z``, ``p = sigmoid(batch_norm(z))`` (Zhou et al., KDD 2018, eq. 3); alpha ``(n, H)``."""
    normed, saved = batch_norm_forward(z, None, None, norm)
    p = normed.sigmoid_()
    return p * z + (1 - p) * alpha * z, saved


def dice_backward(
    d: Tensor, z: Tensor, alpha: Tensor, norm: NormState, saved: BatchNormSaved, *, alpha_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``z`` and ``alpha``."""
    p = batch_normalised(z, norm, saved).sigmoid_()
    dz_p = d * z
    da = (dz_p * (1 - p)).sum(0).to(alpha.dtype) if alpha_grad else None
    direct = d * p + d * (1 - p) * alpha
    through = dz_p * (1 - alpha) * p * (1 - p)
    dz, _, _ = batch_norm_backward(through.to(z.dtype), z, None, norm, saved, affine=False)
    return direct.to(z.dtype).add_(dz), da

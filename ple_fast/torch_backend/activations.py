"""Activations of stacked layers, ``(rows, n, H)``, forward and backward, in place where the derivative allows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..specs import LEARNED, Activation
from ..state import NormState
from .norms import BatchNormSaved, batch_norm_backward, batch_norm_forward, batch_normalised
from .row_dice import row_dice_backward, row_dice_forward

aten = torch.ops.aten


class Function(NamedTuple):
    """An activation with its constant; all but dice, which looks at the batch."""

    forward: Callable[[Tensor, float], Tensor]
    """Differentiable, and changes nothing."""
    in_place: Callable[[Tensor, float], Tensor] | None
    """The same into its input, where that saves memory."""
    backward: Callable[[Tensor, Tensor, float], object]
    """Turns the gradient of the output into that of the input, in place; what it reads is ``kept`` in ``saved.py``."""


FUNCTIONS: dict[str, Function] = {
    "identity": Function(lambda z, _: z, None, lambda d, kept, _: d),
    "relu": Function(
        lambda z, _: F.relu(z),
        lambda z, _: z.relu_(),
        lambda d, kept, _: aten.threshold_backward.grad_input(d, kept, 0, grad_input=d),
    ),
    "leaky_relu": Function(
        F.leaky_relu,
        lambda z, slope: F.leaky_relu(z, slope, inplace=True),
        lambda d, kept, slope: aten.leaky_relu_backward.grad_input(d, kept, slope, slope > 0, grad_input=d),
    ),
    "tanh": Function(
        lambda z, _: torch.tanh(z),
        lambda z, _: z.tanh_(),
        lambda d, kept, _: aten.tanh_backward.grad_input(d, kept, grad_input=d),
    ),
    "sigmoid": Function(
        lambda z, _: torch.sigmoid(z),
        lambda z, _: z.sigmoid_(),
        lambda d, kept, _: aten.sigmoid_backward.grad_input(d, kept, grad_input=d),
    ),
    "gelu": Function(
        lambda z, _: F.gelu(z),
        None,
        lambda d, kept, _: aten.gelu_backward.grad_input(d, kept, approximate="none", grad_input=d),
    ),
    "gelu_tanh": Function(
        lambda z, _: F.gelu(z, approximate="tanh"),
        None,
        lambda d, kept, _: aten.gelu_backward.grad_input(d, kept, approximate="tanh", grad_input=d),
    ),
    "silu": Function(
        lambda z, _: F.silu(z),
        lambda z, _: F.silu(z, inplace=True),
        lambda d, kept, _: aten.silu_backward.grad_input(d, kept, grad_input=d),
    ),
}


def activate(z: Tensor, activation: Activation, slope: Tensor | None) -> Tensor:
    """``f(z)`` in differentiable operators. ``slope``: of prelu and row_dice, ``(n,)``."""
    name, value = activation
    if name == "prelu":
        assert slope is not None
        return torch.prelu(z, slope)
    if name == "row_dice":
        assert slope is not None
        return row_dice_forward(z, slope, value)
    return FUNCTIONS[name].forward(z, value)


def activation_forward(z: Tensor, activation: Activation, slope: Tensor | None, *, keep_input: bool) -> Tensor:
    """``activate``, in place unless ``keep_input``."""
    function = FUNCTIONS.get(activation.name)
    if keep_input or function is None or function.in_place is None:
        return activate(z, activation, slope)
    return function.in_place(z, activation.value)


def activation_backward(
    d: Tensor, kept: Tensor, activation: Activation, slope: Tensor | None, *, slope_grad: bool
) -> Tensor | None:
    """Turn ``d``, the gradient of the output, into that of the input, in place; returns the gradient of ``slope``.

    ``kept``: the output where ``from_output``, else the input.
    """
    name, value = activation
    if slope is None or name not in LEARNED:
        FUNCTIONS[name].backward(d, kept, value)
        return None
    if name == "row_dice":
        dz, ds = row_dice_backward(d, kept, slope, value, alpha_grad=slope_grad)
        d.copy_(dz)
        return ds
    negative, ds = ~(kept > 0), None  # NaN too
    if slope_grad:
        wide = torch.promote_types(d.dtype, torch.float32)
        ds = (d.to(wide) * kept).masked_fill_(~negative, 0).sum(2).sum(0).to(slope.dtype)
    d.mul_(torch.where(negative, slope.view(-1, 1), torch.ones((), dtype=d.dtype, device=d.device)))
    return ds


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

"""Slots scaled element by element, for autograd: a launch forward and one backward."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .torch_backend import scale as by_operators


@cache
def _in_kernels() -> Any:
    import ple_fast_kernels  # triton is optional

    return ple_fast_kernels


class SlotScaleFunction(torch.autograd.Function):
    """``(x, scale, factor)`` to ``y``, in kernels. There is nothing to decide that a replay would save: each pass is
    one launch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.factor = factor
        y: Tensor = _in_kernels().scale_fwd(x, scale, factor)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, scale = ctx.saved_tensors
        want_x, want_scale, _ = ctx.needs_input_grad
        functorch = torch._C._functorch
        # create_graph, and gradients in batches, such as Jacobians
        is_special = torch.is_grad_enabled() or functorch.is_legacy_batchedtensor(dy) or functorch.is_batchedtensor(dy)
        arithmetic = by_operators.scaled_backward if is_special else _in_kernels().scale_bwd
        return *arithmetic(dy, x, scale, ctx.factor, want_x=want_x, want_scale=want_scale), None

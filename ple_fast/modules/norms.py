"""Norms of stacked layers, and what one call reads of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_more_than_one
from ..state import NormState
from .uncalled import Uncalled


class StackedBatchNorm(Uncalled, nn.BatchNorm1d):
    """Batch norm of ``n`` stacked layers, over ``n * H`` features; layer ``e`` has ``e H`` to ``(e + 1) H``."""


class StackedLayerNorm(Uncalled):
    """Layer norm of ``n`` stacked layers: ``(B, n, H)``, normalised over H, with weight and bias ``(n, H)``."""

    def __init__(
        self,
        count: int,
        units: int,
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(count, units, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(count, units, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, z: Tensor) -> Tensor:
        """``(B, n, H)`` to the same."""
        return F.layer_norm(z, z.shape[-1:], eps=self.eps) * self.weight + self.bias

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def norm_state(norm: nn.Module | None, batch: int) -> NormState | None:
    """Settings and buffers of a norm at one call; counts the call where it moves running statistics.

    Raises:
        ValueError: batch norm in train mode on one row, or running statistics of another shape.
    """
    if norm is None or isinstance(norm, nn.Identity):
        return None
    if isinstance(norm, StackedLayerNorm):
        return NormState("layer", norm.eps)
    if type(norm) not in (StackedBatchNorm, nn.BatchNorm1d):
        return NormState("batch", 0.0, module=norm)
    assert isinstance(norm, nn.BatchNorm1d)
    for statistics in (norm.running_mean, norm.running_var):
        if statistics is not None and statistics.shape != (norm.num_features,):
            raise ValueError(
                f"batch norm: size mismatch, expected running statistics of shape ({norm.num_features},), got "
                f"{tuple(statistics.shape)}"
            )
    if norm.training or norm.running_mean is None:
        check_more_than_one(batch, norm.num_features)
        factor = 0.0
        # The attribute is read too: some turn it off for a pass that must leave the statistics alone.
        if norm.training and norm.track_running_stats and norm.running_mean is not None:
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.add_(1)
            # momentum=None asks for a plain average over all batches, as in PyTorch.
            factor = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        return NormState("batch", norm.eps, True, factor, norm.running_mean, norm.running_var)
    return NormState("batch", norm.eps, False, 0.0, norm.running_mean, norm.running_var)

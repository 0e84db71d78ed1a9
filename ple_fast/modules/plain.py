"""What ordinary stacks of ``torch.nn`` need beside ``torch.nn``: modules that ``unpack`` gives and ``pack`` knows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Dice(nn.Module):
    """``p z + (1 - p) alpha z`` with ``p = sigmoid(batch_norm(z))`` on ``(B, H)`` (Zhou et al., KDD 2018, eq. 3).

    ``alpha (H,)`` is learned, the batch norm ``bn`` has no weight and bias.
    """

    def __init__(
        self,
        units: int,
        *,
        eps: float = 1e-8,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(units, eps=eps, momentum=momentum, affine=False, device=device, dtype=dtype)
        self.alpha = nn.Parameter(torch.zeros(units, device=device, dtype=dtype))

    def forward(self, z: Tensor) -> Tensor:
        """``(B, H)`` to the same."""
        p = torch.sigmoid(self.bn(z))
        return p * z + (1 - p) * self.alpha * z


class Temperature(nn.Module):
    """Logits ``(B, n)`` divided by a constant, before the softmax of a gate."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = float(value)

    def forward(self, logits: Tensor) -> Tensor:
        """``(B, n)`` to the same."""
        return logits / self.value

    def extra_repr(self) -> str:
        return str(self.value)


class WeightOffset(nn.Module):
    """Learned scalars added to some columns of a mixture's weights ``(B, n)``, after the softmax (AdaTT, KDD 2023).

    Args:
        columns: one bool per column, as in ``Topology.mixture_offset``; ``weight`` has one scalar per True.
        device, dtype: of the scalars.
    """

    def __init__(
        self,
        columns: Sequence[bool],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.columns = tuple(columns)
        self.weight = nn.Parameter(torch.zeros(sum(self.columns), device=device, dtype=dtype))

    def forward(self, weights: Tensor) -> Tensor:
        """``(B, n)`` to the same."""
        marked = [i for i, column in enumerate(self.columns) if column]
        index = torch.tensor(marked, dtype=torch.int64, device=weights.device)
        offsets = weights.new_zeros(len(self.columns)).index_copy(0, index, self.weight.to(weights.dtype))
        return weights + offsets

    def extra_repr(self) -> str:
        return f"columns={self.columns}"

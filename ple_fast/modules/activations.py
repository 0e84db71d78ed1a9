"""Activations of stacked layers that learn something."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .norms import StackedBatchNorm
from .plain import row_dice
from .uncalled import Uncalled


class StackedPReLU(Uncalled):
    """PReLU of ``n`` stacked layers, one slope each: ``weight (n,)``."""

    def __init__(
        self,
        count: int,
        *,
        init: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.init = init
        self.weight = nn.Parameter(torch.empty(count, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every slope at its initial value."""
        nn.init.constant_(self.weight, self.init)

    def forward(self, z: Tensor) -> Tensor:
        """``(B, n, H)`` to the same."""
        return torch.where(z > 0, z, z * self.weight.view(-1, 1))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, init={self.init}"


class StackedDice(Uncalled):
    """Dice of ``n`` stacked layers (Zhou et al., KDD 2018, eq. 3): ``alpha (n, H)`` and a batch norm without weight."""

    def __init__(
        self,
        count: int,
        units: int,
        *,
        eps: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = StackedBatchNorm(count * units, eps=eps, affine=False, device=device, dtype=dtype)
        self.alpha = nn.Parameter(torch.empty(count, units, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Alpha 0, statistics as new."""
        nn.init.zeros_(self.alpha)
        self.norm.reset_parameters()

    def forward(self, z: Tensor) -> Tensor:
        """``(B, n, H)`` to the same."""
        p = torch.sigmoid(self.norm(z.flatten(1)).view(z.shape))
        return p * z + (1 - p) * self.alpha * z


class StackedRowDice(Uncalled):
    """The dice of torch-rechub in ``n`` stacked layers: ``alpha (n,)``; mean and scatter are those of each row."""

    def __init__(
        self,
        count: int,
        *,
        eps: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.alpha = nn.Parameter(torch.empty(count, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Alpha 0."""
        nn.init.zeros_(self.alpha)

    def forward(self, z: Tensor) -> Tensor:
        """``(B, n, H)`` to the same."""
        return row_dice(z, self.alpha.view(-1, 1), self.eps)

    def extra_repr(self) -> str:
        return f"{self.alpha.shape[0]}, eps={self.eps}"

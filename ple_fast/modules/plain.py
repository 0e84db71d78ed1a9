"""What ordinary stacks of ``torch.nn`` need beside ``torch.nn``: modules that ``unpack`` gives and ``pack`` knows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..scalars import as_tuple, check_count, check_flag, check_number, is_sequence, shown
from ..torch_backend.top_k import keep_top_k


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
        units, eps = check_count("units", units), check_number("eps", eps)
        momentum = None if momentum is None else check_number("momentum", momentum)
        self.bn = nn.BatchNorm1d(units, eps=eps, momentum=momentum, affine=False, device=device, dtype=dtype)
        self.alpha = nn.Parameter(torch.zeros(units, device=device, dtype=dtype))

    def forward(self, z: Tensor) -> Tensor:
        """``(B, H)`` to the same."""
        p = torch.sigmoid(self.bn(z))
        return p * z + (1 - p) * self.alpha * z


def row_dice(z: Tensor, alpha: Tensor, eps: float) -> Tensor:
    """``p z + (1 - p) alpha z``, ``p = sigmoid((z - m) / sqrt(sum((z - m)^2 + eps)))``, ``m`` and sum over a row."""
    centred = z - z.mean(-1, keepdim=True)
    p = torch.sigmoid(centred / (centred.square() + eps).sum(-1, keepdim=True).sqrt())
    return p * z + (1 - p) * alpha * z


class RowDice(nn.Module):
    """The ``Dice`` of torch-rechub on ``(B, H)``: ``row_dice`` with one learned ``alpha (1,)``.

    Unlike :class:`Dice` it has no statistics: each row is compared with its own mean.
    """

    def __init__(
        self, *, eps: float = 1e-3, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps = check_number("eps", eps)
        self.alpha = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(self, z: Tensor) -> Tensor:
        """``(B, H)`` to the same."""
        return row_dice(z, self.alpha, self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class TopK(nn.Module):
    """Logits ``(B, n)``, minus infinity for all but the ``k`` largest of a row, before the softmax of a gate.

    Of equal ones the first stay.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = check_count("k", k)

    def forward(self, logits: Tensor) -> Tensor:
        """``(B, n)`` to the same."""
        return keep_top_k(logits.unsqueeze(1), self.k, is_traced=True).squeeze(1)

    def extra_repr(self) -> str:
        return str(self.k)


class Temperature(nn.Module):
    """Logits ``(B, n)`` divided by a constant, before the softmax of a gate."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = check_number("temperature", value)

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
        if not is_sequence(columns):
            raise TypeError(f"columns: expected one bool per column, got {shown(columns)}")
        self.columns = tuple(check_flag(f"columns[{place}]", column) for place, column in enumerate(as_tuple(columns)))
        self.weight = nn.Parameter(torch.zeros(sum(self.columns), device=device, dtype=dtype))

    def forward(self, weights: Tensor) -> Tensor:
        """``(B, n)`` to the same."""
        marked = [i for i, column in enumerate(self.columns) if column]
        index = torch.tensor(marked, dtype=torch.int64, device=weights.device)
        offsets = weights.new_zeros(len(self.columns)).index_copy(0, index, self.weight.to(weights.dtype))
        return weights + offsets

    def extra_repr(self) -> str:
        return f"columns={self.columns}"

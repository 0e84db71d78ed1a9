"""The dice of torch-rechub, which looks at one row at a time: on stacked layers ``(rows, n, H)``, one alpha each."""

from __future__ import annotations

import torch
from torch import Tensor


def row_dice_forward(z: Tensor, alpha: Tensor, eps: float) -> Tensor:
    """``p z + (1 - p) alpha z``, ``p = sigmoid((z - m) / sqrt(sum((z - m)^2 + eps)))``; mean and sum over ``H``."""
    p = torch.sigmoid(_scores(z, eps)[0])
    wide = alpha.to(p.dtype).view(-1, 1)
    return (p * z + (1 - p) * wide * z).to(z.dtype)


def row_dice_backward(
    d: Tensor, z: Tensor, alpha: Tensor, eps: float, *, alpha_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``z`` and ``alpha (n,)``."""
    u, scale = _scores(z, eps)
    p = torch.sigmoid(u)
    wide = alpha.to(p.dtype).view(-1, 1)
    dz_p = d * z.to(p.dtype)
    da = (dz_p * (1 - p)).sum(2).sum(0).to(alpha.dtype) if alpha_grad else None
    du = dz_p * (1 - wide) * p * (1 - p)
    through = scale * (du - u * (du * u).sum(2, keepdim=True))
    direct = d * p + d * (1 - p) * wide
    return (direct + through - through.mean(2, keepdim=True)).to(z.dtype), da


def _scores(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What the sigmoid sees, and the factor ``(rows, n, 1)`` of the centred row in it; in float32 at least."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    centred = wide - wide.mean(2, keepdim=True)
    scale = (centred.square() + eps).sum(2, keepdim=True).rsqrt()
    return centred * scale, scale

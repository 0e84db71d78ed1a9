"""Part of ``ple_fast.tune``: the trunks whose steps are measured, out of what users write of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .modules import PLE


def build(
    about: dict[str, Any], rows: int, *, device: torch.device | str, dtype: torch.dtype, requires_grad: bool = True
) -> tuple[PLE, Tensor]:
    """A trunk and an input of so many rows. ``about``: keywords of ``PLE``, lists for tuples; ``batch`` is left out."""
    shape: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in about.items()}
    shape.pop("batch", None)
    x = torch.randn(rows, shape["in_features"], device=device, dtype=dtype, requires_grad=requires_grad)
    return PLE(**shape, device=device, dtype=dtype), x

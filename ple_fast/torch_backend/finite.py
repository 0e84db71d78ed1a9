"""Short cuts whose results are right for finite numbers only: a look, and the exact way where it sees another one."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def looks_finite(tensor: Tensor) -> bool:
    """Whether every element is finite; sums that overflow say no.

    On a device the look would wait for it, so the answer is no.
    """
    if not tensor.is_cpu:
        return False
    # Sums of the narrow half overflow all the time.
    total = tensor.sum(dtype=torch.float32) if tensor.dtype == torch.float16 else tensor.sum()
    return math.isfinite(total.item())

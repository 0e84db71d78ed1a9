"""How kernels are launched: on the device of the tensors, with a tile's warps and stages, and counted."""

from __future__ import annotations

from typing import Any

import torch

from ._tiles import Tile

_launched = 0


def launches() -> int:
    """Kernels launched so far by this process."""
    return _launched


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """Dtype of accumulators, logits and weights of mixtures: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def launch(kernel: Any, grid: tuple[int, ...], tile: Tile, device: torch.device, *arguments: Any) -> None:
    """Run ``kernel`` on ``grid``; arguments in the kernel's order."""
    global _launched
    _launched += 1
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, num_warps=tile.warps, num_stages=tile.stages)
    else:
        kernel[grid](*arguments, num_warps=tile.warps, num_stages=tile.stages)


def next_power(n: int) -> int:
    """The smallest power of two from ``n`` on."""
    return 1 << max(0, n - 1).bit_length()

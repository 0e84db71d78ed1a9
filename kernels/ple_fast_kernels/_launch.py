"""How kernels are launched: on the device of the tensors, counted, and with little host time.

Triton's own launch looks at every argument again, which takes several times longer than the launch itself. What it
finds depends on dtypes, alignment and constants alone: they are the key of a dictionary of compiled kernels.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from ._tiles import Tile

CACHED_VERSIONS = ("3.6", "3.7", "3.8", "3.9")
"""Triton releases whose compiled kernels are known to take their arguments as ``_Compiled`` passes them."""
ALIGNMENT = 16
MAX_INT = 2**31 - 1

_launched = 0
_interprets = os.environ.get("TRITON_INTERPRET") == "1"
_is_known = triton.__version__.rpartition(".")[0] in CACHED_VERSIONS


class _Compiled(NamedTuple):
    """A compiled kernel and what its launch needs."""

    kernel: Any
    run: Any
    function: Any
    metadata: Any


_compiled: dict[tuple[Any, ...], _Compiled] = {}
_run_time: dict[int, int] = {}
"""Per kernel the number of arguments before its constants."""


def launches() -> int:
    """Kernels launched so far by this process."""
    return _launched


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """Dtype of accumulators, logits and weights of mixtures: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def next_power(n: int) -> int:
    """The smallest power of two from ``n`` on."""
    return 1 << max(0, n - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], tile: Tile, device: torch.device, *arguments: Any) -> None:
    """Run ``kernel`` on ``grid``; arguments in the kernel's order, constants last."""
    global _launched
    _launched += 1
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch_here(kernel, grid, tile, arguments)
    else:
        _launch_here(kernel, grid, tile, arguments)


def _launch_here(kernel: Any, grid: tuple[int, ...], tile: Tile, arguments: tuple[Any, ...]) -> None:
    if _interprets or not _is_known or kernel.pre_run_hooks:
        kernel[grid](*arguments, num_warps=tile.warps, num_stages=tile.stages)
        return
    active = driver.active
    index = active.get_current_device()
    key = _key(kernel, tile, index, arguments)
    found = None if key is None else _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, num_warps=tile.warps, num_stages=tile.stages)
        if key is not None:
            _compiled[key] = _Compiled(compiled, compiled.run, compiled.function, compiled.packed_metadata)
        return
    stream = active.get_current_stream(index)
    runtime = knobs.runtime
    metadata = found.kernel.launch_metadata(grid, stream, *arguments)  # None, unless a profiler asks for it
    found.run(
        grid[0], grid[1] if len(grid) > 1 else 1, 1, stream, found.function, found.metadata, metadata,
        runtime.launch_enter_hook, runtime.launch_exit_hook, *arguments,
    )  # fmt: skip


def _key(kernel: Any, tile: Tile, device: int, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """All that Triton compiles for, None where it must look itself: unaligned tensors, large numbers."""
    count = _run_time.get(id(kernel))
    if count is None:
        count = next(i for i, parameter in enumerate(kernel.params) if parameter.is_constexpr)
        assert all(parameter.is_constexpr for parameter in kernel.params[count:]), kernel
        _run_time[id(kernel)] = count
    kinds: list[Any] = []
    for value in arguments[:count]:
        if isinstance(value, Tensor):
            if value.data_ptr() % ALIGNMENT:
                return None
            kinds.append(value.dtype)
        elif value is None:
            kinds.append(None)
        elif value > MAX_INT:
            return None
    return (id(kernel), device, tile.warps, tile.stages, *kinds, arguments[count:])

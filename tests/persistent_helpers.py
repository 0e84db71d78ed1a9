"""What tests of the kernels that load by descriptors share: a table that takes them, and what was launched."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ple_fast_kernels import Class, Tile, set_table

tiles: Any = importlib.import_module("ple_fast_kernels._tiles")
launching: Any = importlib.import_module("ple_fast_kernels._launch")
HALVES = (torch.bfloat16, torch.float16)
KERNELS = {"linear": "_grouped_linear_fwd_persistent_kernel", "data_grad": "_grouped_data_grad_persistent_kernel"}


def route(device: torch.device, least: int | None = 0, kernels: tuple[str, ...] = tuple(KERNELS)) -> None:
    """These kernels are taken from so much work on; None: never."""
    row = () if least is None else (Class(least, Tile(32, 32, 32, 4, 2)),)
    set_table(tiles.architecture(device)[0], {f"persistent_{kernel}/half": row for kernel in kernels})


@contextmanager
def launched() -> Iterator[list[tuple[str, int]]]:
    """Names of kernels that are launched meanwhile, and their programs."""
    found: list[tuple[str, int]] = []

    def note(prepared: Any, grid: tuple[int, ...], *rest: Any) -> None:
        found.append((prepared.kernel.fn.__name__, grid[0]))

    with launching.recording(note):
        yield found


@contextmanager
def routed(device: torch.device) -> Iterator[None]:
    """All that the engine can load is taken."""
    route(device)
    try:
        yield
    finally:
        set_table(tiles.architecture(device)[0], None)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether all bits are, those of NaN too."""
    as_bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.view(as_bits), b.view(as_bits))

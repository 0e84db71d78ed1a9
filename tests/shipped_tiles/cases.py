"""One kernel with one tile of a shipped table at one size, and what a kernel does with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ple_fast_kernels import Tile
from ple_fast_kernels._tile_tables import MIXTURES

WIDTHS = {"multiples": 0, "tails": 24, "odd": 13}
"""Columns beyond a multiple of a tile: none; some, and rows that begin at multiples of 16 bytes; rows that do not."""
RELU, SILU, NONE = ("relu", 0.0), ("silu", 0.0), ("identity", 0.0)


@dataclass(frozen=True)
class Case:
    """One kernel with one tile at one size."""

    kernel: str
    reads: str
    """Name that the kernel's rows of a table have."""
    architecture: str
    row: str
    """Of the table, where the tile is."""
    tile: Tile
    dtype: torch.dtype
    widths: str

    @property
    def operands(self) -> str:
        """half, tf32, ieee, double; of mixtures nothing."""
        return "" if self.row in MIXTURES else self.row.rpartition("/")[2]

    @property
    def asks(self) -> str:
        """Row that the kernel asks for first."""
        return self.reads if self.row in MIXTURES else f"{self.reads}/{self.operands}"

    @property
    def precision(self) -> str:
        return "tf32" if self.operands == "tf32" else "ieee"

    def __str__(self) -> str:
        t, dtype = self.tile, str(self.dtype).removeprefix("torch.")
        size = f"{t.rows}x{t.columns}x{t.depth}w{t.warps}s{t.stages}"
        return "-".join(filter(None, (self.architecture, self.kernel, self.operands, dtype, size, self.widths)))

    def across(self, size: int) -> int:
        """A width of two tiles."""
        return 2 * size if self.widths == "multiples" else size + WIDTHS[self.widths]

    @property
    def along(self) -> int:
        """A depth of two steps more than there are stages, or three."""
        return (self.tile.stages + 2) * self.tile.depth + WIDTHS[self.widths]


class Work(NamedTuple):
    """A call, and what its results are in plain PyTorch: per name an expression and its operands, as for ``hold``."""

    run: Callable[[], dict[str, Tensor | None]]
    truths: dict[str, tuple[Any, ...]]


class Kernel(NamedTuple):
    """``reads``: the name that its rows of a table have; ``make``: its work, on so many row tiles of a device."""

    reads: str
    make: Callable[[Case, torch.device, int], Work]
    widths: tuple[str, ...] = tuple(WIDTHS)

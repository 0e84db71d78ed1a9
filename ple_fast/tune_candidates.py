"""Part of ``ple_fast.tune``: the tiles that are worth measuring, and those that turn out not to fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ple_fast_kernels import Tile


def candidates(kind: str, architecture: str, operand_bytes: int, shared_limit: int) -> list[Tile]:
    """Tiles worth measuring for a row of the table, without those whose stages do not fit into shared memory."""
    from ple_fast_kernels import Tile

    kernel, _, operands = kind.rpartition("/")
    if kind.startswith("combine"):
        wide = 256 if kind == "combine_grad" else 128
        return [Tile(n // wide, wide, 0, warps, 2) for n, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8))]
    if operands == "double":
        return []
    depth = 64 if operands == "half" else 32
    if kernel in ("fused", "two_layers"):
        shapes = [(64, 64, 4, 3), (64, 64, 8, 3), (64, 32, 8, 3), (128, 32, 8, 3), (128, 64, 8, 3)]
    else:
        shapes = [
            (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 4, 3),
            (128, 128, 8, 3), (128, 128, 8, 4),
        ]  # fmt: skip
        shapes += [(128, 256, 8, 3), (128, 256, 8, 4)] if operands == "half" else [(64, 64, 8, 3)]
    found = []
    for rows, columns, warps, stages in shapes:
        tile = Tile(rows, columns, depth, warps, min(stages, 2) if architecture == "amd" else stages)
        if tile.stages * (rows + columns) * depth * operand_bytes <= shared_limit and tile not in found:
            found.append(tile)
    return found


def has_lost(error: BaseException | None) -> bool:
    """Whether an error says that a candidate does not fit: into shared memory or the compiler's limits, or into what is
    left of the device's memory. The end of a capture hides such an error behind its own."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            return True
        if isinstance(error, (OutOfResources, PTXASError, CompilationError)):
            return True
        error = error.__context__
    return False

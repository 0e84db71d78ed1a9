"""Tile sizes as data: one small table per architecture, chosen by dtype and amount of work, never by timing.

``ple_fast.tune`` measures and writes a table of the same form for one GPU; ``set_table`` puts it in the place of ours.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .tables import GateRuns


class Tile(NamedTuple):
    """A kernel's block sizes, warps and pipeline stages.

    Of a product: rows and columns of the result, depth of a step. Of the weight gradient: units, inputs, rows of a
    step. Of the mixtures: rows and units.
    """

    rows: int
    columns: int
    depth: int = 0
    warps: int = 4
    stages: int = 3
    group: int = 8


class Class(NamedTuple):
    """Tiles of a kind of dtype, smallest amount of work first; ``tiles`` is the number of 128 x 128 results from which
    an entry holds, at 128 multiprocessors."""

    tiles: int
    tile: Tile


Table = dict[str, tuple[Class, ...]]

_SM90: Table = {
    # half: bfloat16 and float16 operands; tf32 and ieee: float32 operands
    "half": (
        Class(0, Tile(64, 64, 64, 4, 4)),
        Class(64, Tile(64, 128, 64, 4, 4)),
        Class(192, Tile(128, 128, 64, 8, 4)),
        Class(512, Tile(128, 256, 64, 8, 3)),
    ),
    "tf32": (Class(0, Tile(64, 64, 32, 4, 4)), Class(192, Tile(128, 128, 32, 8, 3))),
    "ieee": (Class(0, Tile(64, 64, 32, 8, 3)),),
    "double": (Class(0, Tile(32, 32, 16, 4, 2)),),
    "weight_grad/half": (Class(0, Tile(64, 64, 64, 4, 4)), Class(32, Tile(128, 128, 64, 8, 4))),
    "weight_grad/tf32": (Class(0, Tile(64, 64, 32, 4, 3)), Class(32, Tile(128, 128, 32, 8, 3))),
    "weight_grad/ieee": (Class(0, Tile(64, 64, 32, 4, 3)),),
    "weight_grad/double": (Class(0, Tile(32, 32, 16, 4, 2)),),
}
_SM80: Table = {
    **_SM90,
    "half": (
        Class(0, Tile(64, 64, 64, 4, 3)),
        Class(64, Tile(64, 128, 64, 4, 3)),
        Class(192, Tile(128, 128, 64, 8, 3)),
    ),
    "tf32": (Class(0, Tile(64, 64, 32, 4, 3)), Class(192, Tile(128, 128, 32, 8, 3))),
    "weight_grad/half": (Class(0, Tile(64, 64, 64, 4, 3)), Class(32, Tile(128, 128, 64, 8, 3))),
}
_AMD: Table = {  # 64 KiB of shared memory: two stages
    name: tuple(Class(c.tiles, c.tile._replace(stages=2)) for c in classes) for name, classes in _SM80.items()
}
_INTERPRETER: Table = {  # costs a few milliseconds per step, whatever the tile
    name: (Class(0, Tile(32, 32, 32, 4, 2)),) for name in _SM90
}

TABLES: dict[str, Table] = {
    "sm_80": _SM80,
    "sm_90": _SM90,
    "sm_100": _SM90,
    "amd": _AMD,
    "interpreter": _INTERPRETER,
}
"""Per architecture; a GPU takes the newest table that is not newer than itself."""

REDUCE_TILE = Tile(1, 1024, 0, 4, 1)

_own: dict[str, Table] = {}


def set_table(architecture: str, table: Table | None) -> None:
    """Use ``table`` for ``architecture`` in this process; kinds that it lacks stay as shipped. None: as shipped."""
    if table is None:
        _own.pop(architecture, None)
    else:
        _own[architecture] = {**TABLES[architecture], **table}


@lru_cache(maxsize=64)
def _architecture(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return "amd", properties.multi_processor_count
    capability = properties.major * 10 + properties.minor
    name = "sm_100" if capability >= 100 else "sm_90" if capability >= 90 else "sm_80"
    return name, properties.multi_processor_count


def architecture(device: torch.device) -> tuple[str, int]:
    """Name of the table of a device, and its number of multiprocessors."""
    if device.type != "cuda":
        return "interpreter", 1
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


def kind_of(dtype: torch.dtype, precision: str) -> str:
    """Name of a table's row for products of ``dtype``."""
    if dtype == torch.float64:
        return "double"
    return precision if dtype == torch.float32 else "half"


def _choose(name: str, kind: str, results: int, processors: int) -> Tile:
    classes = _own.get(name, TABLES[name])[kind]
    tile = classes[0].tile
    for entry in classes:
        if results * 128 >= entry.tiles * processors:
            tile = entry.tile
    return tile


def _cut(size: int, width: int) -> int:
    """A tile is no wider than what it covers, and at least 16."""
    while size > 16 and size // 2 >= width:
        size //= 2
    return size


@lru_cache(maxsize=4096)
def _matmul(name: str, processors: int, kind: str, row_tiles: int, columns: int, members: int) -> Tile:
    tile = _choose(name, kind, row_tiles * -(-columns // 128) * members, processors)
    return tile._replace(columns=_cut(tile.columns, columns))


def matmul_tile(like: Tensor, rows: int, columns: int, members: int, precision: str) -> Tile:
    """Tile of a product with ``members`` results ``(rows, columns)``."""
    name, processors = architecture(like.device)
    return _matmul(name, processors, kind_of(like.dtype, precision), -(-rows // 128), columns, members)


@lru_cache(maxsize=4096)
def _weight_grad(name: str, processors: int, kind: str, units: int, inputs: int, members: int) -> Tile:
    tile = _choose(name, f"weight_grad/{kind}", -(-units // 128) * -(-inputs // 128) * members, processors)
    return tile._replace(rows=_cut(tile.rows, units), columns=_cut(tile.columns, inputs))


def weight_grad_tile(like: Tensor, rows: int, units: int, inputs: int, members: int, precision: str) -> Tile:
    """Tile of a weight gradient with ``members`` results ``(units, inputs)``."""
    name, processors = architecture(like.device)
    return _weight_grad(name, processors, kind_of(like.dtype, precision), units, inputs, members)


MIN_SPLIT_ROWS = 512
"""Rows of a part at least: fewer cost more to add up than they gain."""


def row_splits(like: Tensor, rows: int, tiles: int) -> int:
    """Parts that the rows of a weight gradient are cut into: two waves of programs, a power of two."""
    name, processors = architecture(like.device)
    if name == "interpreter":
        return 2 if rows > 32 else 1
    wanted = min(2 * processors // tiles, rows // MIN_SPLIT_ROWS)
    return 1 << max(0, wanted.bit_length() - 1)


def combine_tile(like: Tensor, rows: int, units: int, mixtures: int, *, backward: bool = False) -> Tile:
    """Tile of the mixing kernels: about 2,048 elements; backward wants all units of a row in one tile."""
    name, _ = architecture(like.device)
    return _combine(name, like.dtype == torch.float64, units, mixtures, backward)


@lru_cache(maxsize=4096)
def _combine(name: str, double: bool, units: int, mixtures: int, backward: bool) -> Tile:
    power = 1 << max(4, (units - 1).bit_length())
    columns = min(power, 256 if backward else 128)
    elements = 2048 if mixtures <= 8 else 1024
    if double:
        elements //= 2
    if name == "interpreter":
        elements = 32 * columns
    return Tile(max(4, elements // columns), columns, 0, 4, 2)


def gate_width(gates: GateRuns) -> int:
    """Columns of the tile that covers any of the runs: a power of two, at least 16."""
    width = 16
    while gates.sizes and width < max(gates.sizes):
        width *= 2
    return width


def fused_tile(
    like: Tensor, units: int, mixtures: int, width: int, precision: str, *, whole: bool = False
) -> Tile | None:
    """Tile of a fused level, or None: an accumulator per mixture, and the dense weights, must fit into registers.

    ``whole``: all units in one tile.
    """
    name, _ = architecture(like.device)
    return _fused(name, kind_of(like.dtype, precision), units, mixtures, width, whole)


FUSED_ELEMENTS = 128
"""Float32 registers of a thread for the accumulators of mixtures, of an expert, and the dense weights."""


@lru_cache(maxsize=4096)
def _fused(name: str, kind: str, units: int, mixtures: int, width: int, whole: bool) -> Tile | None:
    depth = 64 if kind == "half" else 32
    stages = 2 if name == "amd" else 3
    if name == "interpreter":
        columns = max(16, 1 << (units - 1).bit_length()) if whole else 32
        return Tile(32, columns, 32, 4, 2)
    if kind == "double":
        return None
    power = max(16, 1 << (units - 1).bit_length())
    for columns, warps in ((64, 4), (64, 8), (32, 8)) if not whole else ((power, 4), (power, 8)):
        columns = min(columns, power)
        per_thread = 64 * ((mixtures + 1) * columns + mixtures * width) // (32 * warps)
        if whole:
            per_thread += 64 * 64 // (32 * warps)
        if per_thread <= FUSED_ELEMENTS:
            return Tile(64, columns, depth, warps, stages)
    return None

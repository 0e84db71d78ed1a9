"""Which tile a launch takes: by kernel, dtype and amount of work, out of a table per architecture, never by timing.

``ple_fast.tune`` measures and writes a table of the same form for one GPU. It is read at the first launch on that
device (``_tile_files.py``); ``set_table`` puts one in the place of all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from ._tile_files import LIBRARY, PARTS, PERSISTENT, Library, Parts, Row, read_for
from ._tile_files import Class as Class
from ._tile_files import Table as Table
from ._tile_files import Tile as Tile
from ._tile_tables import KINDS as KINDS
from ._tile_tables import TABLES as TABLES
from .tables import GateRuns

Given = ParamSpec("Given")
Chosen = TypeVar("Chosen")
REDUCE_TILE = Tile(1, 1024, 0, 4, 1)
TOP_K_TILE = Tile(64, 1, 0, 4, 1)


class Asked(NamedTuple):
    """A tile that a launcher asked for: the row of the table, the amount of work, what it got, and what could be."""

    kind: str
    results: int
    tile: Tile | None
    fits: Callable[[Tile], bool]


asked: list[Asked] | None = None
"""While a list stands here, every request is added to it: ``ple_fast.tune`` learns from it what to measure."""

_generation = 0
_forgets: list[Callable[[], None]] = []
_own: dict[str, Table] = {}
_read: dict[str, Table] = {}


def remembered(choose: Callable[Given, Chosen]) -> Callable[Given, Chosen]:
    """``choose``, asked once for the same arguments until a table changes."""
    found = lru_cache(maxsize=4096)(choose)
    _forgets.append(found.cache_clear)
    return cast("Callable[Given, Chosen]", found)


def set_table(architecture: str, table: Table | None) -> None:
    """Use ``table`` for ``architecture`` in this process; rows that it lacks stay as shipped. It wins over a file of
    ``ple_fast.tune``. None: as before."""
    if table is None:
        _own.pop(architecture, None)
    else:
        _own[architecture] = {**TABLES[architecture], **table}
    _forget_choices()


def _forget_choices() -> None:
    global _generation
    _generation += 1
    for forget in _forgets:
        forget()


def state_of(device: torch.device) -> tuple[Any, ...]:
    """All that the tiles of a device follow from, to compare by."""
    return _generation, *table_of(device)


def reload_tables() -> None:
    """Look for files of ``ple_fast.tune`` again, at the next launch on each device."""
    _read.clear()
    _table_of.cache_clear()
    _forget_choices()


@lru_cache(maxsize=64)
def _architecture(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return "amd", properties.multi_processor_count
    name = {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(properties.major, "sm_80")
    return name, properties.multi_processor_count


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def architecture(device: torch.device) -> tuple[str, int]:
    """Name of the shipped table of a device, and its number of multiprocessors."""
    return _architecture(_index(device)) if device.type == "cuda" else ("interpreter", 1)


@lru_cache(maxsize=64)
def _table_of(index: int) -> tuple[str, int]:
    name, processors = _architecture(index)
    gpu = torch.cuda.get_device_name(index)
    table = read_for(gpu, name, KINDS)
    if table is None:
        return name, processors
    key = f"{name}/{gpu}"
    _read[key] = {**TABLES[name], **table}
    return key, processors


def table_of(device: torch.device) -> tuple[str, int]:
    """Key of a device's table, ``ARCHITECTURE`` as shipped or ``ARCHITECTURE/GPU`` out of a file, and its number of
    multiprocessors. A file is looked for once per device.

    Raises:
        ValueError: ``PLE_FAST_TILES`` names a file that is missing, broken, or another architecture's.
    """
    return _table_of(_index(device)) if device.type == "cuda" else ("interpreter", 1)


def rows_of(key: str) -> Table:
    """Rows of a table, by the key of ``table_of``."""
    architecture, _, gpu = key.partition("/")
    if architecture in _own:
        return _own[architecture]
    return _read[key] if gpu else TABLES[architecture]


def library_of(key: str, operands: str) -> Library:
    """From how much work on the library takes plain products of ``operands``, by the table of ``table_of``."""
    row = rows_of(key).get(LIBRARY + operands, Library())
    assert isinstance(row, Library), operands
    return row


def classes_of(key: str, kernel: str, operands: str) -> tuple[Class, ...]:
    """Tiles of a kernel with products: its own row, or that of the operands."""
    table = rows_of(key)
    return entries_of(table.get(f"{kernel}/{operands}", table[operands]))


def entries_of(row: Row) -> tuple[Class, ...]:
    """Of a row of tiles; which rows are, their names say."""
    return cast("tuple[Class, ...]", row)


def kind_of(dtype: torch.dtype, precision: str) -> str:
    """Name of a table's row for products of ``dtype``."""
    if dtype == torch.float64:
        return "double"
    return precision if dtype == torch.float32 else "half"


def _choose(classes: tuple[Class, ...], results: int, processors: int) -> Tile:
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


def cut_depth(tile: Tile, depth: int) -> Tile:
    """The tile of a product that is ``depth`` deep: no deeper, for what lies behind the end would be multiplied too."""
    return tile._replace(depth=_cut(tile.depth, depth))


def without_ahead(tile: Tile, depth: int) -> Tile:
    """The tile of a product that is ``depth`` deep: one that is done in a step has nothing to load ahead of, and more
    stages spill, or make products wait for each other."""
    return tile._replace(stages=1) if depth < tile.depth else tile


@remembered
def _matmul(key: str, processors: int, kernel: str, operands: str, row_tiles: int, columns: int, members: int) -> Tile:
    tile = _choose(classes_of(key, kernel, operands), _results(row_tiles, columns, members), processors)
    return tile._replace(columns=_cut(tile.columns, columns))


def matmul_tile(kernel: str, like: Tensor, rows: int, columns: int, members: int, precision: str) -> Tile:
    """Tile of a product with ``members`` results ``(rows, columns)``."""
    key, processors = table_of(like.device)
    operands, row_tiles = kind_of(like.dtype, precision), -(-rows // 128)
    tile = _matmul(key, processors, kernel, operands, row_tiles, columns, members)
    if asked is not None:
        asked.append(Asked(f"{kernel}/{operands}", _results(row_tiles, columns, members), tile, any_tile))
    return tile


@remembered
def _persistent(key: str, processors: int, kind: str, row_tiles: int, columns: int, members: int) -> Tile | None:
    classes = entries_of(rows_of(key).get(kind, ()))
    results = _results(row_tiles, columns, members)
    fitting = [entry for entry in classes if _cut(entry.tile.columns, columns) == entry.tile.columns]
    if not fitting or results * 128 < fitting[0].tiles * processors:
        return None
    return _choose(tuple(fitting), results, processors)


def persistent_tile(kernel: str, like: Tensor, rows: int, columns: int, members: int) -> Tile | None:
    """Tile of a product with ``members`` results ``(rows, columns)`` in programs that stay (``persistent.py``).

    None: too little work, by the table, or too few columns to fill a tile.
    """
    if kind_of(like.dtype, "ieee") != "half":
        return None
    (key, processors), row_tiles = table_of(like.device), -(-rows // 128)
    kind = f"{PERSISTENT}{kernel}/half"
    tile = _persistent(key, processors, kind, row_tiles, columns, members)
    if tile is not None and asked is not None:
        asked.append(Asked(kind, _results(row_tiles, columns, members), tile, any_tile))
    return tile


def persistent_programs(like: Tensor, tile: Tile, tiles: int) -> int:
    """Programs that share ``tiles`` tiles: as many as run at a time."""
    key, processors = table_of(like.device)
    return min(tiles, processors * _blocks(key, tile, like.element_size()))


def _blocks(key: str, tile: Tile, operand_bytes: int) -> int:
    """Programs of a product that a multiprocessor runs at a time."""
    if key == "interpreter":
        return 1
    stages = tile.stages * (tile.rows + tile.columns) * tile.depth * operand_bytes
    registers = tile.rows * tile.columns // (32 * tile.warps) + OTHER_REGISTERS
    shared = SHARED_MEMORY[key.partition("/")[0]]
    return max(1, min(shared // (stages + RESERVED), REGISTERS // (32 * tile.warps * registers)))


def _results(row_tiles: int, columns: int, members: int) -> int:
    return row_tiles * -(-columns // 128) * members


def any_tile(tile: Tile) -> bool:
    """What fits where every tile does."""
    return True


@remembered
def _weight_grad(key: str, processors: int, operands: str, units: int, inputs: int, members: int) -> Tile:
    classes = classes_of(key, "weight_grad", operands)
    tile = _choose(classes, _results(-(-units // 128), inputs, members), processors)
    return tile._replace(rows=_cut(tile.rows, units), columns=_cut(tile.columns, inputs))


def weight_grad_tile(like: Tensor, rows: int, units: int, inputs: int, members: int, precision: str) -> Tile:
    """Tile of a weight gradient with ``members`` results ``(units, inputs)``."""
    key, processors = table_of(like.device)
    operands = kind_of(like.dtype, precision)
    tile = _weight_grad(key, processors, operands, units, inputs, members)
    if asked is not None:
        asked.append(Asked(f"weight_grad/{operands}", _results(-(-units // 128), inputs, members), tile, any_tile))
    return tile


NARROW = 64
"""Columns of a tile at most, where more registers beside the accumulator would make products wait for each other."""

MIN_SPLIT_ROWS = 512
"""Rows of a part at least: fewer cost more to add up than they gain."""
MOST_SPLITS = 64
SHARED_MEMORY = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10, "amd": 64 << 10}
"""Bytes of shared memory of a multiprocessor."""
RESERVED = 1 << 10
"""Bytes of it that every block takes besides."""
REGISTERS = 1 << 16
"""Of a multiprocessor."""
OTHER_REGISTERS = 64
"""Of a thread of a weight gradient beside an accumulator of up to 64, as compiled; with one of 128 a processor takes
one block whatever they are."""
TILE_SPEED = 4e12
"""FLOP/s of a multiprocessor on tiles of half precision: what 128 x 256 results get out of L2 (docs/kernels.md)."""
FILL = 1e-6
"""Seconds until a tile's first operands are there."""
WORKSPACE_SPEED = 3.6e12
"""Bytes/s at which parts are written and read again."""


@remembered
def _splits(key: str, processors: int, rows: int, programs: int, size: int, tile: Tile, operand_bytes: int) -> int:
    """The number of parts that was measured to take least, or that takes least by waves of programs and the time of the
    workspace's bytes."""
    for entry in cast("tuple[Parts, ...]", rows_of(key).get(PARTS, ())):
        if entry[:-1] == (rows, programs, size, tile):
            return entry.parts
    if key == "interpreter":
        return 2 if rows > 32 else 1
    blocks = _blocks(key, tile, operand_bytes)
    slots = processors * blocks

    def seconds(parts: int) -> float:
        depth = math.ceil(math.ceil(rows / parts) / tile.depth) * tile.depth
        waves = -(-programs * parts // slots)
        product = 2.0 * depth * tile.rows * tile.columns * blocks * (operand_bytes / 2) / TILE_SPEED
        return waves * (product + FILL) + 8.0 * size * parts / WORKSPACE_SPEED

    return min(range(1, min(MOST_SPLITS, max(1, rows // MIN_SPLIT_ROWS)) + 1), key=seconds)


def row_splits(like: Tensor, rows: int, programs: int, size: int, tile: Tile) -> int:
    """Parts that the rows of a weight gradient are cut into; each has ``programs`` and ``size`` sums."""
    key, processors = table_of(like.device)
    return _splits(key, processors, rows, programs, size, tile, like.element_size())


def gate_width(gates: GateRuns) -> int:
    """Columns of the tile that covers any of the runs: a power of two, at least 16."""
    width = 16
    while gates.sizes and width < max(gates.sizes):
        width *= 2
    return width

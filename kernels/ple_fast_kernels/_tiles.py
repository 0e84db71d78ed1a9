"""Which tile a launch takes: by kernel, dtype and amount of work, out of a table per architecture, never by timing.

``ple_fast.tune`` measures and writes a table of the same form for one GPU. It is read at the first launch on that
device (``_tile_files.py``); ``set_table`` puts one in the place of all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ._tile_files import LIBRARY, PARTS, PERSISTENT, Library, Parts, Row, read_for
from ._tile_files import Class as Class
from ._tile_files import Table as Table
from ._tile_files import Tile as Tile
from ._tile_tables import KINDS as KINDS
from ._tile_tables import TABLES as TABLES
from .tables import GateRuns

REDUCE_TILE = Tile(1, 1024, 0, 4, 1)


class Asked(NamedTuple):
    """A tile that a launcher asked for: the row of the table, the amount of work, what it got, and what could be."""

    kind: str
    results: int
    tile: Tile | None
    fits: Callable[[Tile], bool]


asked: list[Asked] | None = None
"""While a list stands here, every request is added to it: ``ple_fast.tune`` learns from it what to measure."""

_generation = 0
_own: dict[str, Table] = {}
_read: dict[str, Table] = {}


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
    for chooser in (_matmul, _persistent, _weight_grad, _splits, _combine, _fused):
        chooser.cache_clear()


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


def _rows(key: str) -> Table:
    architecture, _, gpu = key.partition("/")
    if architecture in _own:
        return _own[architecture]
    return _read[key] if gpu else TABLES[architecture]


def library_of(key: str, operands: str) -> Library:
    """From how much work on the library takes plain products of ``operands``, by the table of ``table_of``."""
    row = _rows(key).get(LIBRARY + operands, Library())
    assert isinstance(row, Library), operands
    return row


def _classes(key: str, kernel: str, operands: str) -> tuple[Class, ...]:
    table = _rows(key)
    return _entries(table.get(f"{kernel}/{operands}", table[operands]))


def _entries(row: Row) -> tuple[Class, ...]:
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


@lru_cache(maxsize=4096)
def _matmul(key: str, processors: int, kernel: str, operands: str, row_tiles: int, columns: int, members: int) -> Tile:
    tile = _choose(_classes(key, kernel, operands), _results(row_tiles, columns, members), processors)
    return tile._replace(columns=_cut(tile.columns, columns))


def matmul_tile(kernel: str, like: Tensor, rows: int, columns: int, members: int, precision: str) -> Tile:
    """Tile of a product with ``members`` results ``(rows, columns)``."""
    key, processors = table_of(like.device)
    operands, row_tiles = kind_of(like.dtype, precision), -(-rows // 128)
    tile = _matmul(key, processors, kernel, operands, row_tiles, columns, members)
    if asked is not None:
        asked.append(Asked(f"{kernel}/{operands}", _results(row_tiles, columns, members), tile, _any))
    return tile


@lru_cache(maxsize=4096)
def _persistent(key: str, processors: int, kind: str, row_tiles: int, columns: int, members: int) -> Tile | None:
    classes = _entries(_rows(key).get(kind, ()))
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
        asked.append(Asked(kind, _results(row_tiles, columns, members), tile, _any))
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


def _any(tile: Tile) -> bool:
    return True


@lru_cache(maxsize=4096)
def _weight_grad(key: str, processors: int, operands: str, units: int, inputs: int, members: int) -> Tile:
    classes = _classes(key, "weight_grad", operands)
    tile = _choose(classes, _results(-(-units // 128), inputs, members), processors)
    return tile._replace(rows=_cut(tile.rows, units), columns=_cut(tile.columns, inputs))


def weight_grad_tile(like: Tensor, rows: int, units: int, inputs: int, members: int, precision: str) -> Tile:
    """Tile of a weight gradient with ``members`` results ``(units, inputs)``."""
    key, processors = table_of(like.device)
    operands = kind_of(like.dtype, precision)
    tile = _weight_grad(key, processors, operands, units, inputs, members)
    if asked is not None:
        asked.append(Asked(f"weight_grad/{operands}", _results(-(-units // 128), inputs, members), tile, _any))
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


@lru_cache(maxsize=4096)
def _splits(key: str, processors: int, rows: int, programs: int, size: int, tile: Tile, operand_bytes: int) -> int:
    """The number of parts that was measured to take least, or that takes least by waves of programs and the time of the
    workspace's bytes."""
    for entry in cast("tuple[Parts, ...]", _rows(key).get(PARTS, ())):
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


def combine_tile(like: Tensor, rows: int, units: int, mixtures: int, *, backward: bool = False) -> Tile:
    """Tile of the mixing kernels; backward wants all units of a row in one tile."""
    key, _ = table_of(like.device)
    tile = _combine(key, like.dtype == torch.float64, units, mixtures, backward)
    if asked is not None:
        asked.append(Asked("combine_grad" if backward else "combine", 0, tile, _any))
    return tile


MIXED_ELEMENTS = 96
"""Float32 registers of a thread for the sums of all mixtures."""


@lru_cache(maxsize=4096)
def _combine(key: str, double: bool, units: int, mixtures: int, backward: bool) -> Tile:
    tile = _entries(_rows(key)["combine_grad" if backward else "combine"])[0].tile
    columns = min(max(4, 1 << (units - 1).bit_length()), tile.columns)
    if key == "interpreter":
        return tile._replace(columns=columns)
    elements = tile.rows * tile.columns
    if double:
        elements //= 2
    while elements > 256 and mixtures * elements * (1 + double) > MIXED_ELEMENTS * 32 * tile.warps:
        elements //= 2
    return tile._replace(rows=max(4, elements // columns), columns=columns)


END_ELEMENTS = 4096
"""Of a tile of norm, activation and dropout alone: passes over memory, with a few registers for each element."""
WHOLE_ROW = 1024
"""Units that layer norm's backward holds in one tile; more come in chunks."""


def end_tile(like: Tensor, units: int) -> Tile:
    """Tile of norm, activation and dropout of one layer."""
    return _end(table_of(like.device)[0] == "interpreter", like.dtype == torch.float64, units, 64)


def whole_row_tile(like: Tensor, units: int) -> Tile:
    """The same with all units of a row in one tile, as far as they fit."""
    return _end(table_of(like.device)[0] == "interpreter", like.dtype == torch.float64, units, WHOLE_ROW)


@lru_cache(maxsize=1024)
def _end(interpreted: bool, double: bool, units: int, widest: int) -> Tile:
    columns = min(max(16, 1 << (units - 1).bit_length()), widest)
    if interpreted:
        return Tile(32, min(columns, 32), 0, 4, 1)
    return Tile(max(4, END_ELEMENTS // columns // (1 + double)), columns, 0, 8, 1)


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

    ``whole``: all units in one tile, after a hidden layer.
    """
    key, _ = table_of(like.device)
    operands = kind_of(like.dtype, precision)
    tile = _fused(key, operands, units, mixtures, width, whole)
    if asked is not None:
        fits = partial(_fits_units, units=units, mixtures=mixtures, width=width, whole=whole)
        asked.append(Asked(f"{'two_layers' if whole else 'fused'}/{operands}", 0, tile, fits))
    return tile


FUSED_ELEMENTS = 128
"""Float32 registers of a thread for the accumulators of mixtures, of an expert, and the dense weights."""


def fits_fused(tile: Tile, mixtures: int, width: int, *, whole: bool) -> bool:
    """Whether a fused kernel holds its sums in registers with this tile."""
    per_thread = tile.rows * ((mixtures + 1) * tile.columns + mixtures * width) // (32 * tile.warps)
    if whole:
        per_thread += tile.rows * tile.depth // (32 * tile.warps)
    return per_thread <= FUSED_ELEMENTS


def _cover(tile: Tile, units: int, whole: bool) -> Tile:
    power = max(16, 1 << (units - 1).bit_length())
    return tile._replace(columns=power if whole else min(tile.columns, power))


def _fits_units(tile: Tile, units: int, mixtures: int, width: int, whole: bool) -> bool:
    return fits_fused(_cover(tile, units, whole), mixtures, width, whole=whole)


@lru_cache(maxsize=4096)
def _fused(key: str, operands: str, units: int, mixtures: int, width: int, whole: bool) -> Tile | None:
    if key == "interpreter":
        return _cover(_classes(key, "two_layers" if whole else "fused", operands)[0].tile, units, whole)
    if operands == "double":
        return None
    for _, tile in _classes(key, "two_layers" if whole else "fused", operands):
        tile = _cover(tile, units, whole)
        if fits_fused(tile, mixtures, width, whole=whole):
            return tile
    return None

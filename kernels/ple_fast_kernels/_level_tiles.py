"""Which tile a launch takes that ends a layer, mixes experts, or is a whole level: what fits into registers."""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from . import _tiles
from ._tiles import Asked, Tile, any_tile, classes_of, entries_of, kind_of, remembered, rows_of


def combine_tile(like: Tensor, rows: int, units: int, mixtures: int, *, backward: bool = False) -> Tile:
    """Tile of the mixing kernels; backward wants all units of a row in one tile."""
    key, _ = _tiles.table_of(like.device)
    tile = _combine(key, like.dtype == torch.float64, units, mixtures, backward)
    if _tiles.asked is not None:
        _tiles.asked.append(Asked("combine_grad" if backward else "combine", 0, tile, any_tile))
    return tile


MIXED_ELEMENTS = 96
"""Float32 registers of a thread for the sums of all mixtures."""


@remembered
def _combine(key: str, double: bool, units: int, mixtures: int, backward: bool) -> Tile:
    tile = entries_of(rows_of(key)["combine_grad" if backward else "combine"])[0].tile
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
    return _end(_tiles.table_of(like.device)[0] == "interpreter", like.dtype == torch.float64, units, 64)


def whole_row_tile(like: Tensor, units: int) -> Tile:
    """The same with all units of a row in one tile, as far as they fit."""
    return _end(_tiles.table_of(like.device)[0] == "interpreter", like.dtype == torch.float64, units, WHOLE_ROW)


@lru_cache(maxsize=1024)
def _end(interpreted: bool, double: bool, units: int, widest: int) -> Tile:
    columns = min(max(16, 1 << (units - 1).bit_length()), widest)
    if interpreted:
        return Tile(32, min(columns, 32), 0, 4, 1)
    return Tile(max(4, END_ELEMENTS // columns // (1 + double)), columns, 0, 8, 1)


def fused_tile(
    like: Tensor, units: int, mixtures: int, width: int, precision: str, *, whole: bool = False
) -> Tile | None:
    """Tile of a fused level, or None: an accumulator per mixture, and the dense weights, must fit into registers.

    ``whole``: all units in one tile, after a hidden layer.
    """
    key, _ = _tiles.table_of(like.device)
    operands = kind_of(like.dtype, precision)
    tile = _fused(key, operands, units, mixtures, width, whole)
    if _tiles.asked is not None:
        fits = partial(_fits_units, units=units, mixtures=mixtures, width=width, whole=whole)
        _tiles.asked.append(Asked(f"{'two_layers' if whole else 'fused'}/{operands}", 0, tile, fits))
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


@remembered
def _fused(key: str, operands: str, units: int, mixtures: int, width: int, whole: bool) -> Tile | None:
    if key == "interpreter":
        return _cover(classes_of(key, "two_layers" if whole else "fused", operands)[0].tile, units, whole)
    if operands == "double":
        return None
    for _, tile in classes_of(key, "two_layers" if whole else "fused", operands):
        tile = _cover(tile, units, whole)
        if fits_fused(tile, mixtures, width, whole=whole):
            return tile
    return None

"""Part of ``ple_fast.tune``: weight gradients in other numbers of parts than the kernels' model chooses."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from ple_fast_kernels import Table, Tile


ROW = "weight_grad_parts"


class Split(NamedTuple):
    """One launch of a weight gradient: rows, programs and sums of a part, its tile, seconds by number of parts, that of
    the kernels' model first, and which it was (``Call.launch``)."""

    rows: int
    programs: int
    size: int
    tile: Tile
    seconds: dict[int, float]
    launch: str = ""


class Asked(NamedTuple):
    """What a launcher asked the model, and what it was told."""

    rows: int
    programs: int
    size: int
    tile: Tile
    parts: int


@contextmanager
def of_parts(number: int | None) -> Iterator[list[Asked]]:
    """Weight gradients have ``number`` parts (None: the model's); the list is of what was asked."""
    module: Any = importlib.import_module("ple_fast_kernels.weight_grad")
    model = module.row_splits
    asked: list[Asked] = []

    def told(like: Tensor, rows: int, programs: int, size: int, tile: Tile) -> int:
        parts = int(model(like, rows, programs, size, tile)) if number is None else number
        asked.append(Asked(rows, programs, size, tile, parts))
        return parts

    module.row_splits = told
    try:
        yield asked
    finally:
        module.row_splits = model


def in_parts(call: Callable[[], object], number: int) -> Callable[[], object]:
    """The same call with so many parts."""

    def run() -> object:
        with of_parts(number):
            return call()

    return run


def parts_row(splits: Sequence[Split], gain: float) -> Table:
    """The row of the table: launches that were faster in another number of parts than the model's, by the share
    ``gain``. No row where none was."""
    from ple_fast_kernels import Parts

    entries = {}
    for split in splits:
        (_, before), *_ = split.seconds.items()
        parts, after = min(split.seconds.items(), key=lambda item: item[1])
        if after <= (1 - gain) * before:
            entries[split[:4]] = Parts(*split[:4], parts)
    return {ROW: tuple(entries.values())} if entries else {}


def split_candidates(asked: Asked) -> list[int]:
    """Numbers worth measuring: the model's first, then around it, in parts that are not too short."""
    tiles: Any = importlib.import_module("ple_fast_kernels._tiles")
    most = min(tiles.MOST_SPLITS, max(asked.parts, asked.rows // tiles.MIN_SPLIT_ROWS))
    near = (asked.parts, asked.parts // 2, asked.parts - 1, asked.parts + 1, 3 * asked.parts // 2, 2 * asked.parts)
    return [number for number in dict.fromkeys(near) if 1 <= number <= most]

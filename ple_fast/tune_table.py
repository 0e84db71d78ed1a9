"""Part of ``ple_fast.tune``: what is measured of a launch, and the table that follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from .tune_library import ROWS, Compared, library_rows
from .tune_splits import Split, parts_row

if TYPE_CHECKING:
    from ple_fast_kernels import Table, Tile

GAIN = 0.02
"""A candidate must beat the shipped tile by so much: less is noise."""


class Measured(NamedTuple):
    """One launch: the row of the table, the amount of work, seconds per tile, the shipped tile first, and which it was
    (``Call.launch``)."""

    kind: str
    results: int
    seconds: dict[Tile, float]
    launch: str = ""


Entry = Measured | Compared | Split
"""What is measured of a launch."""


def best_table(measured: Sequence[Measured], processors: int) -> Table:
    """The fastest tiles as a table: per row and amount of work the tile with the least time in sum, from that amount
    on. The shipped tile stays unless another is faster by ``GAIN``."""
    from ple_fast_kernels import Class

    groups: dict[str, dict[int, list[Measured]]] = {}
    for entry in measured:
        # By the work that a table tells apart, in which an entry begins.
        groups.setdefault(entry.kind, {}).setdefault(entry.results * 128 // processors, []).append(entry)
    table: Table = {}
    for kind, by_work in groups.items():
        classes: list[Class] = []
        for work, entries in sorted(by_work.items()):
            common = [t for t in entries[0].seconds if all(t in entry.seconds for entry in entries)]
            if not common:  # each was cut to another size
                continue
            total = {t: sum(entry.seconds[t] for entry in entries) for t in common}
            shipped = next(iter(entries[0].seconds))
            tile = min(total, key=lambda t: total[t])
            if shipped in total and total[tile] > (1 - GAIN) * total[shipped]:
                tile = shipped
            if not classes or classes[-1].tile != tile:
                classes.append(Class(work if classes else 0, tile))
        if classes:
            table[kind] = tuple(classes)
    return table


def table_of(measured: Sequence[Entry], shipped: Table, processors: int) -> Table:
    """The rows that follow from all that was measured on a device whose table is ``shipped``."""
    rows = {kind: row for kind, row in shipped.items() if kind in ROWS}
    tiled = [entry for entry in measured if isinstance(entry, Measured)]
    compared = [entry for entry in measured if isinstance(entry, Compared)]
    splits = [entry for entry in measured if isinstance(entry, Split)]
    return {**best_table(tiled, processors), **library_rows(compared, rows, GAIN), **parts_row(splits, GAIN)}

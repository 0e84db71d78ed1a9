"""Part of ``ple_fast.tune``: from which amount of work on others than the kernels that load by pointers take a product,
measured: the library (cuBLAS) plain ones, programs that stay those that the tensor memory engine can load."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    from ple_fast_kernels import Class, Table
    from ple_fast_kernels._tile_files import Row

LIBRARY = ("library/half", "library/tf32")
STAYING = ("persistent_linear/half", "persistent_data_grad/half")
ROWS = LIBRARY + STAYING


class Compared(NamedTuple):
    """One launcher on one product: the row of the table and its field, the work as the row counts it, seconds in the
    kernels that load by pointers, with their fastest tile, and with the library, and which it was.

    In programs that stay: no field, and their seconds in the place of the library's.
    """

    kind: str
    product: str
    work: float
    kernels: float
    library: float
    launch: str = ""


def rows_from(least: int | None) -> Table:
    """Rows by which the library takes all plain products from so much work on; None: none. No programs stay."""
    from ple_fast_kernels import Library

    return {**{kind: Library(least, least, least) for kind in LIBRARY}, **dict.fromkeys(STAYING, ())}


def staying_rows(shipped: Mapping[str, Row]) -> Table:
    """Rows by which programs stay whatever the work, with the tiles of those that are shipped."""
    from ple_fast_kernels import Class

    return {kind: (Class(0, _classes(shipped[kind])[-1].tile),) for kind in STAYING if shipped.get(kind)}


def _classes(row: Row) -> tuple[Class, ...]:
    return cast("tuple[Class, ...]", row)


def plain_of(call: Callable[[], object]) -> Any:
    """The plain product of a launcher's call, as the table counts it; the call is run.

    None: it has none, or several, or one in a precision in which it stays in the kernels.
    """
    library: Any = importlib.import_module("ple_fast_kernels.library")
    library.asked = []
    try:
        call()
        found = library.asked
    finally:
        library.asked = None
    return found[0] if len(found) == 1 and found[0].kind in ROWS else None


def library_rows(compared: Sequence[Compared], shipped: Mapping[str, Row], gain: float) -> Table:
    """Rows of a table: the library, or programs that stay, from the work on from which they were faster, by the share
    ``gain``, at all that was measured. What was not measured stays as shipped: a product, and works between two that
    were won and lost."""
    from ple_fast_kernels import Class, Library

    table: Table = {}
    for kind in dict.fromkeys(entry.kind for entry in compared):
        row = shipped.get(kind, Library())
        if kind in STAYING:
            (first, *_) = _classes(row)
            least = _least([entry for entry in compared if entry.kind == kind], first.tiles, gain)
            table[kind] = () if least is None else (Class(least, first.tile),)
            continue
        assert isinstance(row, Library)
        for product in row._fields:
            mine = [entry for entry in compared if (entry.kind, entry.product) == (kind, product)]
            if mine:
                row = row._replace(**{product: _least(mine, getattr(row, product), gain)})
        table[kind] = row
    return table


def _least(compared: Sequence[Compared], shipped: int | None, gain: float) -> int | None:
    """From how much work on."""
    by_work: dict[int, list[Compared]] = {}
    for entry in compared:
        by_work.setdefault(int(entry.work), []).append(entry)
    wins = {
        work: sum(e.library for e in entries) <= (1 - gain) * sum(e.kernels for e in entries)
        for work, entries in by_work.items()
    }
    lost = max((work for work, is_won in wins.items() if not is_won), default=-1)
    won = min((work for work in wins if work > lost), default=None)
    if shipped is not None and shipped > lost and (won is None or shipped <= won):
        return shipped
    return won

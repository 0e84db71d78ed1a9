"""The table of products that this process takes, at each number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from . import product_files
from .processor import this_processor
from .product_table import DEFAULT, Limits, Table

_tables: dict[int, Table] = {}


def table(threads: int | None = None) -> Table:
    """The table in use with so many threads; default those of now. It is read once."""
    threads = torch.get_num_threads() if threads is None else threads
    found = _tables.get(threads)
    if found is None:
        found = _tables.setdefault(threads, product_files.table_of(this_processor(), threads))
    return found


def limits_of(x: Tensor) -> Limits:
    """Of calls on tensors like ``x``. Those of a processor say nothing of another device."""
    return table().limits if x.is_cpu else DEFAULT.limits


@lru_cache(maxsize=8192)
def way_of(kind: str, dtype: torch.dtype, rows: int, members: int, units: int, width: int, threads: int) -> str:
    """The way of a product by the table in use."""
    return table(threads).way(kind, str(dtype).removeprefix("torch."), rows, members, units, width)


def set_table(threads: int, found: Table) -> None:
    """Have products of so many threads take this table until ``reload_tables``."""
    _tables[threads] = found
    way_of.cache_clear()


@contextmanager
def using(found: Table) -> Iterator[None]:
    """Products at the present number of threads take this table meanwhile. Not for several threads of Python."""
    threads = torch.get_num_threads()
    before = _tables.get(threads)
    set_table(threads, found)
    try:
        yield
    finally:
        if before is None:
            del _tables[threads]
            way_of.cache_clear()
        else:
            set_table(threads, before)


def limited(**limits: int) -> AbstractContextManager[None]:
    """The table in use with some other limits meanwhile, as ``using`` has it."""
    found = table()
    return using(found._replace(limits=found.limits._replace(**limits)))


def reload_tables() -> None:
    """Read the files again at the next product: one of them has been written."""
    _tables.clear()
    way_of.cache_clear()

"""Data that comes in parts, because it does not fit into memory: told from one table, and read part by part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from .arguments import kind_of
from .columns import Encoded


class Parts(Protocol):
    """Tables one after the other, from the first one each time that it is iterated: a ``DataLoader``, a list,
    ``ParquetTables``, or an object of the user's. One of them may be ``(data, labels)`` or ``(data, labels,
    sample_weight)``. What has ``set_epoch`` (or a sampler that has it) is told the epoch before it is iterated.
    """

    def __iter__(self) -> Iterator[Any]: ...


class Part(NamedTuple):
    """One of them."""

    data: Any
    """A table, or encoded rows."""
    labels: Any = None
    """None: columns of ``data``."""
    sample_weight: Any = None


def is_parts(data: Any) -> bool:
    """Whether something is iterated for tables, and no table itself."""
    kind = type(data)
    if isinstance(data, (list, tuple)) and not isinstance(data, Encoded):
        return len(data) > 0 and _is_part(data[0])
    if isinstance(data, (Mapping, Encoded, str, bytes, set, frozenset, np.ndarray, Tensor)):
        return False
    if any(hasattr(kind, name) for name in ("columns", "column_names", "__array__", "collect")):
        return False  # a table, a column, or a table that waits for collect()
    is_table = hasattr(kind, "__getitem__") and hasattr(kind, "__contains__")
    return hasattr(kind, "__iter__") and not is_table


def _is_part(entry: Any) -> bool:
    if isinstance(entry, (list, tuple)) and not isinstance(entry, Encoded):
        return len(entry) in (2, 3) and _is_part(entry[0])
    if isinstance(entry, np.ndarray):
        return entry.dtype.names is not None
    return isinstance(entry, (Mapping, Encoded)) or any(
        hasattr(type(entry), name) for name in ("columns", "column_names")
    )


def parts_of(what: str, data: Parts) -> Iterator[Part]:
    """Its parts.

    Raises:
        TypeError: one of them is no table.
    """
    for place, entry in enumerate(data, 1):
        if isinstance(entry, (list, tuple)) and not isinstance(entry, Encoded):
            if not _is_part(entry):
                raise TypeError(
                    f"{what}: expected tables, (table, labels) or (table, labels, sample_weight), got {_kinds(entry)} "
                    f"as part {place}; a DataLoader's collate_fn can make one of a batch"
                )
            yield Part(*entry)
        else:
            yield Part(entry)


def _kinds(entry: Sequence[Any]) -> str:
    return f"{type(entry).__name__} of {', '.join(map(kind_of, entry[:4]))}" if entry else "an empty list"


def makes_batches(data: Any) -> bool:
    """Whether the parts are the batches to train on: a ``DataLoader`` has drawn and sized them."""
    return isinstance(data, DataLoader) and (data.batch_size is not None or data.batch_sampler is not None)


def is_read_once(data: Parts) -> bool:
    """Whether a second iteration would give nothing, or the rest: of a generator, a file."""
    return isinstance(data, Iterator)


def set_epoch(data: Parts, epoch: int) -> None:
    """Tells whoever decides the order of the parts which epoch begins, 0 the first."""
    batch_sampler = getattr(data, "batch_sampler", None)
    told: list[Any] = []
    for holder in (data, getattr(data, "dataset", None), getattr(data, "sampler", None), batch_sampler):
        for own in (holder, getattr(holder, "sampler", None)):
            if callable(getattr(own, "set_epoch", None)) and not any(own is one for one in told):
                told.append(own)
    for own in told:
        own.set_epoch(epoch)

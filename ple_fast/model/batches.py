"""The batches of an epoch: of rows in memory, of parts that are cut anew, or as a ``DataLoader`` makes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

from .columns import Encoded
from .labels import Labelled, joined
from .parts import makes_batches
from .rows import RowParts, Rows

BATCH_SIZE = 1024
"""Where the user gives none."""


class Batch(NamedTuple):
    """Rows of one step, on the CPU."""

    data: Encoded
    labels: Labelled


class Batches(Protocol):
    """What a training goes through, epoch by epoch."""

    count: int | None
    """Of an epoch; None before one has been read to its end."""
    batch_size: int | None
    """Rows; None where a ``DataLoader`` decides."""

    def epoch(self, generator: torch.Generator, epoch: int, skip: int) -> Iterator[Batch]:
        """The batches of an epoch, 0 the first one, from number ``skip`` on; ``generator`` decides their order."""


def batch_bounds(rows: int, batch_size: int) -> list[tuple[int, int]]:
    """Where batches begin and end. One row left over joins the batch before it: batch norm cannot train on one."""
    starts = list(range(0, rows, batch_size))
    if len(starts) > 1 and rows - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], rows], strict=True))


def rows_at_once(rows: Rows | RowParts, batch_size: int | None) -> int:
    """How many rows a step reads, as far as is known beforehand."""
    if isinstance(rows, Rows):
        return min(batch_size or BATCH_SIZE, len(rows.data))
    of_loader = getattr(rows.source, "batch_size", None)
    return batch_size or (of_loader if isinstance(of_loader, int) else BATCH_SIZE)


class WholeBatches:
    """Of rows in memory, in an order of all of them."""

    def __init__(self, rows: Rows, batch_size: int) -> None:
        self.rows, self.bounds = rows, batch_bounds(len(rows.data), batch_size)
        self.batch_size: int | None = batch_size
        self.count: int | None = len(self.bounds)

    def epoch(self, generator: torch.Generator, epoch: int, skip: int) -> Iterator[Batch]:
        order = torch.randperm(len(self.rows.data), generator=generator, device="cpu")
        for start, stop in self.bounds[skip:]:
            index = order[start:stop]
            yield Batch(self.rows.data.rows(index), self.rows.labels.rows(index))


class PartBatches:
    """Of rows that come in parts: those of each part in an order of their own, and what is left of one before the next.

    The parts of a ``DataLoader`` are batches as they are. One row at the end joins the batch before it.
    """

    def __init__(self, rows: RowParts, batch_size: int | None) -> None:
        self.rows = rows
        self.are_batches = makes_batches(rows.source)
        if self.are_batches and batch_size is not None:
            raise ValueError(
                "batch_size: expected none beside a DataLoader, which makes the batches, got "
                f"{batch_size}; give it to the DataLoader, or DataLoader(batch_size=None)"
            )
        self.batch_size: int | None = None if self.are_batches else batch_size or BATCH_SIZE
        self.count: int | None = None

    def epoch(self, generator: torch.Generator, epoch: int, skip: int) -> Iterator[Batch]:
        self.rows.set_epoch(epoch)
        place = 0
        for batch in self._as_they_come() if self.are_batches else self._cut(generator):
            place += 1
            if place > skip:
                yield batch
        self.count = place

    def _as_they_come(self) -> Iterator[Batch]:
        held: Batch | None = None
        for data, labels in self.rows:
            batch = Batch(data, labels)
            if held is not None and len(held.data) > 1 and len(data) == 1:
                batch = _joined(held, batch)
            elif held is not None:
                yield held
            held = batch
        if held is not None:
            yield held

    def _cut(self, generator: torch.Generator) -> Iterator[Batch]:
        left: Batch | None = None
        size = self.batch_size or BATCH_SIZE
        for data, labels in self.rows:
            order = torch.randperm(len(data), generator=generator, device="cpu")
            drawn = Batch(data.rows(order), labels.rows(order))
            rows = drawn if left is None else _joined(left, drawn)
            start = 0
            while len(rows.data) - start >= size + 2:  # never one row is left
                yield _some(rows, start, start + size)
                start += size
            left = _some(rows, start, len(rows.data))
        if left is not None:
            yield left


def _some(batch: Batch, start: int, stop: int) -> Batch:
    part = slice(start, stop)
    return Batch(batch.data.rows(part), batch.labels.rows(part))


def _joined(first: Batch, second: Batch) -> Batch:
    data = Encoded(*(torch.cat(pair) for pair in zip(first.data, second.data, strict=True)))
    return Batch(data, joined([first.labels, second.labels]))


def batches_of(rows: Rows | RowParts, batch_size: int | None) -> Batches:
    """The batches of rows; ``batch_size`` None: 1,024, or those of a ``DataLoader``."""
    if isinstance(rows, Rows):
        return WholeBatches(rows, BATCH_SIZE if batch_size is None else batch_size)
    return PartBatches(rows, batch_size)

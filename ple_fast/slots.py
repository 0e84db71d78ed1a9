"""The input of a level: few tensors, and for every slot where it lies in them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Groups = tuple[tuple[int, int, int], ...]
"""Runs ``(slot, first, last + 1)`` of members, or of rows of a weight, that read one slot."""


def first_of(x: Tensor | Sequence[Tensor]) -> Tensor:
    """An input, or the first of those of its slots."""
    return x if isinstance(x, Tensor) else x[0]


def rows_of(tensor: Tensor, rows: slice) -> Tensor:
    """Some rows of a tensor: itself where they are all of them, which takes no operator."""
    return tensor if rows.stop - rows.start == tensor.shape[0] else tensor[rows]


def with_shared(x: Tensor | Sequence[Tensor], slots: int, *, is_read: bool = True) -> Tensor | Sequence[Tensor]:
    """Each slot plus the last one, which stays as it is, or is anything where no gate reads it (``is_read``).

    Of several slots it has no tensor of ``x`` itself: compilers take none twice.
    """
    if slots == 1:
        return x
    if not isinstance(x, Tensor):
        sums = {id(slot): slot + x[-1] for slot in x[:-1]}  # one tensor may be several slots
        own = [sums[id(slot)] for slot in x[:-1]]
        return [*own, x[-1].view_as(x[-1]) if is_read else own[-1]]
    if x.dim() == 2:
        return [x + x] * (slots - 1) + [x.view_as(x)] if is_read else x + x
    return torch.cat((x[:, :-1] + x[:, -1:], x[:, -1:]), dim=1) if is_read else x + x[:, -1:]


class Place(NamedTuple):
    """A slot is ``tensors[tensor]``, ``(B, D)``, or ``tensors[tensor][:, column]`` of a ``(B, S, D)``."""

    tensor: int
    column: int


class Slots:
    """Input tensors, and the place of each slot. Slots with equal places share their input.

    Args:
        tensors: distinct tensors ``(B, D)`` or ``(B, S, D)``.
        places: per slot; the column is -1 in a ``(B, D)`` tensor.
    """

    __slots__ = ("places", "stacked", "tensors")

    def __init__(self, tensors: Sequence[Tensor], places: tuple[Place, ...]) -> None:
        self.tensors = tuple(tensors)
        self.places = places
        self.stacked = self._stack()
        """All slots as one ``(B, S, D)`` view, where they lie at even distances in one storage; else None."""

    def _stack(self) -> Tensor | None:
        first = self.tensors[0]
        if first.dim() == 3:
            return first
        if len(self.tensors) < 2 or len(self.tensors) != len(self.places):
            return None
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return None  # which know no places in memory
        # The parts of one split, say. Only a view of memory: gradients still go to each entry.
        if any(type(t) is not Tensor or t.stride() != first.stride() for t in self.tensors):
            return None
        storage = first.untyped_storage()._cdata
        if any(t.untyped_storage()._cdata != storage for t in self.tensors):
            return None
        starts = [t.storage_offset() for t in self.tensors]
        step = starts[1] - starts[0]
        if step <= 0 or any(b - a != step for a, b in pairwise(starts)):
            return None
        size, stride = first.shape, first.stride()
        return first.as_strided((size[0], len(starts), size[1]), (stride[0], step, stride[1]))

    @property
    def batch(self) -> int:
        return self.tensors[0].shape[0]

    def at(self, slot: int, rows: slice | None = None) -> Tensor:
        """Slot as ``(B, D)``, or some of its rows."""
        tensor, column = self.places[slot]
        x = self.tensors[tensor] if rows is None else rows_of(self.tensors[tensor], rows)
        return x if column < 0 else x.select(1, column)

    def groups(self, slots: tuple[int, ...]) -> Groups:
        """Runs of readers of the same input: ``(slot, first reader, last reader + 1)`` each."""
        return _cached_groups(self.places, slots)

    def even_stack(self, groups: Groups, rows: slice) -> Tensor | None:
        """``(rows, n, D)`` view for a grouped product, if the groups are n slots in order, and all of one size."""
        if self.stacked is None or not _are_even(groups):
            return None
        first, stack = groups[0][0], rows_of(self.stacked, rows)
        return stack if len(groups) == stack.shape[1] else stack[:, first : first + len(groups)]


def groups_of(places: tuple[Place, ...], slots: tuple[int, ...]) -> Groups:
    """Runs of readers of the same place."""
    runs: list[tuple[int, int, int]] = []
    for reader, slot in enumerate(slots):
        if runs and places[runs[-1][0]] == places[slot]:
            runs[-1] = (runs[-1][0], runs[-1][1], reader + 1)
        else:
            runs.append((slot, reader, reader + 1))
    return tuple(runs)


_cached_groups = lru_cache(maxsize=4096)(groups_of)


@lru_cache(maxsize=4096)
def _are_even(groups: Groups) -> bool:
    """Two groups or more, of consecutive slots and equal sizes."""
    slot, size = groups[0][0], groups[0][2] - groups[0][1]
    return len(groups) > 1 and all((s, b - a) == (slot + i, size) for i, (s, a, b) in enumerate(groups))

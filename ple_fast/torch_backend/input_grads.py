"""Gradients of a level's inputs, where they gather over slots, gates and row blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..slots import Place, Slots, rows_of
from .products import grouped_input_grad, linear_input_grad


class InputGrads:
    """Gradients of the tensors of a ``Slots``, written once per slot and accumulated after that.

    ``needed``: per tensor whether it is wanted. Memory is laid out ``(B, S, D)`` where the slots are evenly stacked.
    """

    __slots__ = ("_stacked", "_written", "grads", "needed", "slots")

    def __init__(self, slots: Slots, needed: Sequence[bool]) -> None:
        self.slots, self.needed = slots, tuple(needed)
        self._stacked: Tensor | None = None
        self.grads: list[Tensor | None] = [None] * len(slots.tensors)
        if slots.stacked is not None and all(self.needed):
            self._stacked = torch.empty(slots.stacked.shape, dtype=slots.stacked.dtype, device=slots.stacked.device)
            whole = slots.tensors[0].dim() == 3
            self.grads = [self._stacked] if whole else list(self._stacked.unbind(1))
        else:
            for i, (tensor, wanted) in enumerate(zip(slots.tensors, self.needed, strict=True)):
                if wanted:
                    self.grads[i] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        self._written: set[tuple[Place, int]] = set()

    def wants(self, slot: int) -> bool:
        return self.needed[self.slots.places[slot].tensor]

    def add(self, slot: int, rows: slice, d: Tensor, weight: Tensor) -> None:
        """Gradient of ``slot`` += ``d @ weight``: ``(rows, N) @ (N, D)``."""
        place = self.slots.places[slot]
        target = self._rows_of(place, rows)
        is_new = (place, rows.start) not in self._written
        self._written.add((place, rows.start))
        linear_input_grad(d, weight, target, adds=not is_new)

    def add_even(self, first: int, rows: slice, d: Tensor, weight: Tensor) -> None:
        """Gradients of n slots from ``first`` += ``d @ weight``: ``(rows, n, N)`` and ``(n, N, D)``."""
        assert self._stacked is not None
        last = first + d.shape[1]
        target = rows_of(self._stacked, rows)[:, first:last]
        places = self.slots.places[first:last]
        missing = [place for place in places if (place, rows.start) not in self._written]
        is_new = len(missing) == len(places)
        for place in () if is_new else missing:
            self._rows_of(place, rows).zero_()
        grouped_input_grad(d, weight, target, adds=not is_new)
        self._written.update((place, rows.start) for place in missing)

    def _rows_of(self, place: Place, rows: slice) -> Tensor:
        grad = self.grads[place.tensor]
        assert grad is not None
        grad = rows_of(grad, rows)
        return grad if place.column < 0 else grad.select(1, place.column)

    @property
    def is_even(self) -> bool:
        return self._stacked is not None

    def finish(self, blocks: Sequence[slice]) -> list[Tensor | None]:
        """The gradients; a slot that nothing read has gradient 0."""
        for place in set(self.slots.places):
            for rows in blocks if self.needed[place.tensor] else ():
                if (place, rows.start) not in self._written:
                    self._rows_of(place, rows).zero_()
        if self.slots.tensors[0].dim() == 3 and self.grads[0] is not None:
            unused = set(range(self.slots.tensors[0].shape[1])) - {p.column for p in self.slots.places}
            for column in unused:
                self.grads[0].select(1, column).zero_()
        return self.grads

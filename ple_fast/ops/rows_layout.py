"""What forward on the CPU keeps for backward, as whole tensors in shapes that are known before it runs.

Row blocks keep tensors of their own, and how many there are depends on the batch. An operator returns one tensor of
each kind instead: every block writes its rows, while they are in cache. Which kinds there are is found by a trial on a
few rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..torch_backend.level import (
    BlockKept,
    LevelInput,
    flatten_kept,
    level_forward,
    row_blocks,
    unflatten_kept,
)
from ..torch_backend.slots import rows_of
from .arguments import Arguments

_TRIALS = (2, 3)
"""Rows: as few as batch norm takes, and what depends on the rows differs between them."""


class Entry(NamedTuple):
    """A tensor that backward reads: ``(B, *shape)``, or ``shape`` unless it is ``by_row``."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    by_row: bool


class RowsLayout(NamedTuple):
    """What forward keeps, in order, each tensor once."""

    entries: tuple[Entry, ...]
    sources: tuple[int, ...]
    """Of each tensor of a row block's ``flatten_kept``: its entry; -1: it is None; -2 - i: it is statistic i."""

    def empty(self, like: Tensor, batch: int) -> list[Tensor]:
        """The entries, not filled."""
        return [
            like.new_empty((batch, *entry.shape) if entry.by_row else entry.shape, dtype=entry.dtype)
            for entry in self.entries
        ]


_found: dict[tuple[Any, ...], RowsLayout] = {}


def rows_layout(given: Arguments, needed: Sequence[bool]) -> RowsLayout:
    """The layout of a call in which ``needed`` of the tensors need a gradient."""
    # Widths of inputs do not matter: what is kept has those of the plan.
    dtypes = tuple(None if t is None else t.dtype for t in (*given.all_tensors, *given.statistics))
    places, state = (*given.places, -2, *given.gate_places), tuple(map(float, given.state))
    key = (given.plan, places, state, dtypes, tuple(needed))
    layout = _found.get(key)
    if layout is None:
        layout = _found[key] = _by_trial(given, tuple(needed))
    return layout


def _by_trial(given: Arguments, needed: tuple[bool, ...]) -> RowsLayout:
    def zeros(like: Tensor, *rows: int) -> Tensor:
        # Compilers may not know yet that a size is the number that the call's checks have compared it with.
        shape = map(int, like.shape[len(rows) :])
        return torch.zeros((*rows, *shape), dtype=like.dtype, device="cpu")

    found = []
    with unset_fake_temporarily(), torch.inference_mode(False), torch.no_grad():
        for rows in _TRIALS:
            trial = given._replace(
                x=[zeros(t, rows) for t in given.x],
                gate_x=[zeros(t, rows) for t in given.gate_x],
                tensors=[None if t is None else zeros(t) for t in given.tensors],
                statistics=[zeros(t) for t in given.statistics],
                seed=None if given.seed is None else zeros(given.seed),
                state=tuple(map(float, given.state)),
            )
            call = trial.call(moments=[torch.zeros_like(t) for t in trial.moving()])
            _, _, kept = level_forward(call.inputs(trial.all_tensors), call.needs(needed), listed=False)
            found.append((flatten_kept(kept), list(trial.statistics)))
    numbers: dict[int, int] = {}
    entries: list[Entry] = []
    sources: list[int] = []
    for first, second in zip(found[0][0], found[1][0], strict=True):
        if first is None or second is None:
            assert first is second
            sources.append(-1)
            continue
        statistic = next((i for i, t in enumerate(found[0][1]) if t is first), -1)
        if statistic >= 0:
            sources.append(-2 - statistic)
            continue
        if id(first) not in numbers:
            numbers[id(first)] = len(entries)
            by_row = first.shape != second.shape
            assert not by_row or (first.shape[0], second.shape[0]) == _TRIALS
            entries.append(Entry(tuple(first.shape[1:] if by_row else first.shape), first.dtype, by_row))
        sources.append(numbers[id(first)])
    return RowsLayout(tuple(entries), tuple(sources))


class Keeper:
    """Takes what each row block keeps, and has the entries in the end."""

    def __init__(self, layout: RowsLayout, inputs: LevelInput) -> None:
        self._layout = layout
        self._is_whole = len(row_blocks(inputs)) == 1
        self.entries = [] if self._is_whole else layout.empty(inputs.x.tensors[0], inputs.x.batch)

    def take(self, rows: slice, kept: BlockKept) -> None:
        """Writes the rows of a block. The only block's tensors are the entries themselves."""
        by_entry: dict[int, Tensor] = {}
        for source, tensor in zip(self._layout.sources, flatten_kept([kept]), strict=True):
            if source >= 0:
                assert tensor is not None
                by_entry[source] = tensor
        parts = [by_entry[number] for number in range(len(self._layout.entries))]
        if self._is_whole:
            # Results of an operator are contiguous, as tracers are told, and share no memory.
            assert all(part.is_contiguous() for part in parts)
            assert len({part.untyped_storage().data_ptr() for part in parts}) == len(parts)
            self.entries = parts
            return
        for entry, target, part in zip(self._layout.entries, self.entries, parts, strict=True):
            (rows_of(target, rows) if entry.by_row else target).copy_(part)


def blocks_of(layout: RowsLayout, inputs: LevelInput, entries: Sequence[Tensor],
              statistics: Sequence[Tensor]) -> list[BlockKept]:  # fmt: skip
    """What each row block kept, out of the entries."""

    def part(source: int, rows: slice) -> Tensor | None:
        if source == -1:
            return None
        if source < 0:
            return statistics[-2 - source]
        return rows_of(entries[source], rows) if layout.entries[source].by_row else entries[source]

    flat = [part(source, rows) for rows in row_blocks(inputs) for source in layout.sources]
    return unflatten_kept(inputs.plan, flat)

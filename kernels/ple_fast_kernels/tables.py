"""What a launcher must know of the wiring, as plain tuples: they become constants of the compiled kernel."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class _Table:
    """Compared by value, and hashed once: at every launch a table is part of what its constants are looked up by."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash(tuple(getattr(self, field.name) for field in fields(self))))

    def __hash__(self) -> int:
        found: int = self.__dict__["_hash"]
        return found


@dataclass(frozen=True)
class GateRuns(_Table):
    """Runs of rows of the gates' last weight ``(G, K)``; the rows of a run read one slot."""

    slot: tuple[int, ...]
    first: tuple[int, ...]
    sizes: tuple[int, ...]
    __hash__ = _Table.__hash__


NO_GATES = GateRuns((), (), ())

MAX_RUN = 64
"""Rows of a run at most: wider ones are cut, so that one tile covers a run."""


@dataclass(frozen=True)
class Readers(_Table):
    """The members that read each slot: ``order[first[s]:last[s]]``."""

    first: tuple[int, ...]
    last: tuple[int, ...]
    order: tuple[int, ...]
    """Empty where the members stand in the order of the slots."""
    __hash__ = _Table.__hash__

    @classmethod
    def build(cls, members: tuple[int, ...], slots: int) -> Readers:
        """Tables of members that read slots ``members``, of so many."""
        order = tuple(sorted(range(len(members)), key=members.__getitem__))
        last = tuple(sum(slot <= s for slot in members) for s in range(slots))
        return cls((0, *last[:-1]), last, () if order == tuple(range(len(members))) else order)


@dataclass(frozen=True)
class Mixtures(_Table):
    """Which experts every mixture weighs. Columns of ``P (B, weights)`` are in mixture order, static ones included."""

    experts: int
    weights: int
    logits: int
    weight_first: tuple[int, ...]
    """Per mixture its first column of P."""
    logit_first: tuple[int, ...]
    """Per mixture its first column of the logits; -1: static, its weights are 1."""
    sizes: tuple[int, ...]
    expert_first: tuple[int, ...]
    """Per expert its first entry below; E + 1 numbers."""
    entry_mixture: tuple[int, ...]
    """Entries sorted by expert: the mixture that weighs it,"""
    entry_weight: tuple[int, ...]
    """the column of P,"""
    entry_logit: tuple[int, ...]
    """the column of the logits (-1: static),"""
    entry_offset: tuple[int, ...]
    """the learned scalar that is added (-1: none),"""
    entry_stop: tuple[bool, ...]
    """and whether the mixture's gradient does not reach the expert."""
    entry_output: tuple[int, ...]
    """Of the same entries the output that its mixture is added to,"""
    entry_starts: tuple[bool, ...]
    """and whether it is the first"""
    entry_ends: tuple[bool, ...]
    """and the last of those of its expert and output, whose weights are added up."""
    outputs: int
    sigmoid: tuple[bool, ...]
    """Per mixture whether its weights are sigmoids of its logits."""
    __hash__ = _Table.__hash__

    @classmethod
    def build(
        cls,
        experts: int,
        mixture_experts: tuple[tuple[int, ...], ...],
        logit_first: tuple[int, ...],
        offsets: tuple[tuple[bool, ...], ...],
        stops: tuple[tuple[bool, ...], ...] | None = None,
        outputs: tuple[int, ...] | None = None,
        sigmoid: tuple[bool, ...] | None = None,
    ) -> Mixtures:
        """Tables of mixtures ``o`` that weigh ``mixture_experts[o]`` in order.

        ``offsets`` marks learned scalars, ``stops`` entries whose gradient does not reach the expert. ``outputs``: per
        mixture the one that it is added to; None: its own. ``sigmoid``: of each whether it is one.
        """
        rows: list[list[tuple[int, int, int, int, bool]]] = [[] for _ in range(experts)]
        column = scalar = 0
        first = []
        for o, mixed in enumerate(mixture_experts):
            first.append(column)
            for i, e in enumerate(mixed):
                marked = offsets[o][i]
                logit = logit_first[o] + i if logit_first[o] >= 0 else -1
                stop = stops is not None and stops[o][i]
                rows[e].append((o, column, logit, scalar if marked else -1, stop))
                column += 1
                scalar += marked
        entries = [entry for row in rows for entry in row]
        starts = [0]
        for row in rows:
            starts.append(starts[-1] + len(row))
        sizes = tuple(map(len, mixture_experts))
        logits = sum(n for n, at in zip(sizes, logit_first, strict=True) if at >= 0)
        outputs = tuple(range(len(sizes))) if outputs is None else outputs
        columns: list[Any] = [tuple(values) for values in zip(*entries, strict=True)]
        pairs = [(e, outputs[entry[0]]) for e, row in enumerate(rows) for entry in row]
        starts_run = tuple(i == 0 or pairs[i - 1] != pair for i, pair in enumerate(pairs))
        columns += [tuple(output for _, output in pairs), starts_run, (*starts_run[1:], True), outputs[-1] + 1]
        columns.append((False,) * len(sizes) if sigmoid is None else sigmoid)
        return cls(experts, column, logits, tuple(first), logit_first, sizes, tuple(starts), *columns)

    def dense(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Per mixture and expert, ``(O * E,)``: column of P, of the logits, learned scalar; -1 where there is none."""
        size = len(self.sizes) * self.experts
        weight, logit, offset = [-1] * size, [-1] * size, [-1] * size
        for e in range(self.experts):
            for i in range(self.expert_first[e], self.expert_first[e + 1]):
                at = self.entry_mixture[i] * self.experts + e
                weight[at], logit[at], offset[at] = self.entry_weight[i], self.entry_logit[i], self.entry_offset[i]
        return tuple(weight), tuple(logit), tuple(offset)

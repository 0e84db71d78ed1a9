"""Lists of penalised weights, ``(weights, l1, l2)`` per entry, while weights become parts of stacked parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..modules.unpack import Move
from .optimizers import by_new, successors

Entry = tuple[list[Any], float, float]
"""Weights are parameters, or pairs of a name and a parameter."""
Note = list[tuple[list[tuple[Any, str]], float, float]]
"""A list of entries with the names of the parameters in their places: it survives copies."""


def penalised(entries: Iterable[Entry]) -> Iterator[tuple[nn.Parameter, float, float]]:
    """Every occurrence of a parameter under a penalty that is not 0."""
    for weights, l1, l2 in entries:
        if l1 > 0 or l2 > 0:
            yield from ((_parameter(weight), l1, l2) for weight in weights)


def renewed(
    entries: Sequence[Entry],
    moves: Sequence[Move[nn.Parameter]],
    gone: Iterable[nn.Parameter],
    names: Mapping[int, str],
) -> list[Entry]:
    """The entries with new parameters in the place of old ones, each as often as its parts were.

    Args:
        entries: the list as it is, which is left alone.
        moves: what becomes of parameters.
        gone: parameters without penalty and without successor.
        names: of the old parameters, by id, for errors.

    Raises:
        ValueError: parameters under different penalties become one.
    """
    _check(entries, moves, names)
    dropped = {id(p) for p in gone}
    news = successors(moves)
    # The k-th time that a part is penalised is the k-th time for the whole; entries without penalty count apart.
    met: dict[tuple[bool, int], int] = {}
    placed: dict[tuple[bool, int], int] = {}
    made: list[Entry] = []
    for weights, l1, l2 in entries:
        free = not (l1 > 0 or l2 > 0)
        kept: list[Any] = []
        for weight in weights:
            old = _parameter(weight)
            if id(old) not in news:
                kept += [] if id(old) in dropped else [weight]
                continue
            times = met[free, id(old)] = met.get((free, id(old)), 0) + 1
            for new in news[id(old)]:
                if placed.get((free, id(new)), 0) < times:
                    placed[free, id(new)] = times
                    kept.append((weight[0], new) if isinstance(weight, tuple) else new)
        made.append((kept, l1, l2))
    return made


def noted(entries: Iterable[Entry], module: nn.Module) -> Note | None:
    """The entries by name; None where a parameter is not the module's."""
    names = {id(p): name for name, p in module.named_parameters(remove_duplicate=False)}
    note: Note = []
    for weights, l1, l2 in entries:
        rows = [(w[0] if isinstance(w, tuple) else None, names.get(id(_parameter(w)))) for w in weights]
        if any(name is None for _, name in rows):
            return None
        note.append(([(label, name) for label, name in rows if name is not None], l1, l2))
    return note


def recalled(note: Note, module: nn.Module) -> list[Entry]:
    """The entries that ``noted`` has described."""
    return [
        (
            [
                module.get_parameter(name) if label is None else (label, module.get_parameter(name))
                for label, name in rows
            ],
            l1,
            l2,
        )
        for rows, l1, l2 in note
    ]


def _parameter(weight: Any) -> Any:
    return weight[1] if isinstance(weight, tuple) else weight


def _check(entries: Sequence[Entry], moves: Sequence[Move[nn.Parameter]], names: Mapping[int, str]) -> None:
    found: dict[int, list[tuple[float, float]]] = {}
    for parameter, l1, l2 in penalised(entries):
        found.setdefault(id(parameter), []).append((l1, l2))
    for first, *others in by_new(moves):
        theirs = found.get(id(first.old), [])
        for move in others:
            ours = found.get(id(move.old), [])
            if ours != theirs:
                raise ValueError(
                    f"{names[id(first.old)]} and {names[id(move.old)]} become one stacked parameter and have different "
                    f"penalties (l1, l2): {theirs} and {ours}; add them to the regularisation with equal l1 and l2"
                )

"""Work on row blocks as generators, which pause where a norm waits for the statistics of all of them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Yields at every barrier, returns the result."""


def together(parts: Sequence[Steps[Any]]) -> Steps[list[Any]]:
    """Several parts of the work on one row block: whichever wait, wait at the same barrier."""
    results: list[Any] = [None] * len(parts)
    for _ in _rounds(parts, results):
        yield
    return results


def run_blocks(blocks: Sequence[Steps[T]]) -> list[T]:
    """The results of all row blocks, each run up to a barrier before any passes it."""
    results: list[Any] = [None] * len(blocks)
    for _ in _rounds(blocks, results):
        pass
    return results


def run_alone(block: Steps[T]) -> T:
    """The result of a row block that is the whole batch, or that needs no statistics of it."""
    (result,) = run_blocks([block])
    return result


def _rounds(parts: Sequence[Steps[Any]], results: list[Any]) -> Iterator[None]:
    """Advance every part by one step a round, and fill in the results; one item for each round that leaves some."""
    live = list(enumerate(parts))
    while live:
        paused = []
        for index, part in live:
            try:
                next(part)
                paused.append((index, part))
            except StopIteration as done:
                results[index] = done.value
        live = paused
        if live:
            yield

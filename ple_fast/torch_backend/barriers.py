"""Work on row blocks as generators, which pause where a norm waits for the statistics of all of them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Yields at every barrier, returns the result."""


def together(parts: Sequence[Steps[Any]]) -> Steps[list[Any]]:
    """Several parts of one piece of work: those that wait, wait at the same barrier, each run up to it before any goes
    on."""
    results: list[Any] = [None] * len(parts)
    live = list(enumerate(parts))
    while live:
        paused = []
        for index, part in live:
            try:
                next(part)
            except StopIteration as done:
                results[index] = done.value
            else:
                paused.append((index, part))
        if paused:
            yield
        live = paused
    return results


def run_steps(work: Steps[T]) -> T:
    """The result of work that waits for nobody else."""
    while True:
        try:
            next(work)
        except StopIteration as done:
            result: T = done.value
            return result


def run_blocks(blocks: Sequence[Steps[T]]) -> list[T]:
    """The results of all row blocks."""
    return run_steps(together(blocks))

"""What a section of the soak is, and how one is run: with a counter, lines as it goes, and its failures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

SILENCE = 5.0
"""Seconds between two lines."""


@dataclass(frozen=True)
class Section:
    """Trials of one kind. ``run(seed, trials, figures)`` yields None or what failed, once per trial."""

    name: str
    what: str
    trials: int
    """How many by default."""
    run: Callable[[int, int, dict[str, Any]], Iterator[str | None]]


@dataclass
class Outcome:
    """What a section found."""

    section: str
    seed: int
    trials: int = 0
    failures: int = 0
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    """What the section measured besides."""

    def line(self) -> str:
        return f"{self.section}: {self.trials:,} trials, {self.failures:,} failures, {self.seconds:.0f} s"


def run_section(section: Section, seed: int, trials: int, seconds: float | None, say: Callable[[str], None]) -> Outcome:
    """Runs until so many trials are done, or the time is up."""
    outcome = Outcome(section.name, seed)
    begin = last = time.perf_counter()
    say(f"{section.name}: {section.what}")
    runs = section.run(seed, trials, outcome.figures)
    try:
        for failure in runs:
            now = time.perf_counter()
            outcome.trials, outcome.seconds = outcome.trials + 1, now - begin
            if failure is not None:
                outcome.failures += 1
                say(f"FAILURE in {section.name}: {failure}")
            if now - last >= SILENCE:
                last = now
                say(f"{outcome.line()} of {trials:,}")
            if seconds is not None and now - begin >= seconds:
                break
    finally:
        runs.close()  # type: ignore[attr-defined]  # a generator, which ends its threads and processes
    say(outcome.line())
    return outcome

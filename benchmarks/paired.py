"""Paired, interleaved timing in one process: every round times every contestant once, so drift hits all alike."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.configs import MIN_SAMPLE_S, ROUNDS, WARMUP_ROUNDS


@dataclass(frozen=True)
class Paired:
    """Seconds per call, one entry per round, for each contestant."""

    samples: dict[str, list[float]]
    load: tuple[float, float]
    """One-minute load average before and after."""

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name])

    def iqr(self, name: str) -> float:
        """Distance between the quartiles; 0 for a single round."""
        if len(self.samples[name]) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples[name], n=4, method="inclusive")
        return high - low

    def ratio(self, slow: str, fast: str) -> float:
        """Median over the rounds of time(slow) / time(fast): above 1 where ``fast`` is faster."""
        return statistics.median(s / f for s, f in zip(self.samples[slow], self.samples[fast], strict=True))


Clock = Callable[[Callable[[], object], int], float]
"""Seconds per call over a number of calls."""


def time_paired(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = ROUNDS,
    warmup: int = WARMUP_ROUNDS,
    min_sample_s: float = MIN_SAMPLE_S,
    clock: Clock | None = None,
) -> Paired:
    """Time callables against one another.

    After ``warmup`` calls each contestant gets a number of repeats that makes a sample last ``min_sample_s``. The order
    is rotated from round to round. The garbage collector rests meanwhile. ``clock``: default the processor's.
    """
    names = list(contestants)
    if not names:
        raise ValueError("contestants: expected at least one, got none")
    if rounds < 1:
        raise ValueError(f"rounds: expected 1 or more, got {rounds}")
    sample = processor_clock if clock is None else clock
    repeats = {}
    for name, call in contestants.items():
        once = min(sample(call, 1) for _ in range(max(warmup, 1)))
        repeats[name] = max(1, round(min_sample_s / max(once, 1e-7)))
        if repeats[name] > 1:  # the first calls of a short function say little: measure again with what they suggest
            once = sample(call, repeats[name])
            repeats[name] = max(1, round(min_sample_s / max(once, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in names}
    before = os.getloadavg()[0]
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for r in range(rounds):
            start = r % len(names)
            for name in names[start:] + names[:start]:
                samples[name].append(sample(contestants[name], repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return Paired(samples, (before, os.getloadavg()[0]))


def processor_clock(call: Callable[[], object], repeats: int) -> float:
    """Seconds per call over ``repeats`` calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats

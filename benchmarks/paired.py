"""Paired, interleaved timing in one process: every round times every contestant once, so drift hits all alike.

What every result file says of a time (medians, ratios, rounds, load) and the clocks are here too.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.configs import MIN_SAMPLE_S, ROUNDS, WARMUP_ROUNDS

Clock = Callable[[Callable[[], object], int], float]
"""Seconds per call over a number of calls."""


def host_clock(call: Callable[[], object], repeats: int, read: Callable[[], float] = time.perf_counter) -> float:
    """Seconds per call over ``repeats`` calls, by a clock of the host."""
    start = read()
    for _ in range(repeats):
        call()
    return (read() - start) / repeats


def cuda_clock(call: Callable[[], object], repeats: int) -> float:
    """Seconds per call between two CUDA events."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3 / repeats


def clock_of(device: torch.device) -> Clock:
    """Events on a GPU, the host's clock elsewhere."""
    return cuda_clock if device.type == "cuda" else host_clock


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
        """Median over the rounds of time(slow) / time(fast), to four places: above 1 where ``fast`` is faster."""
        return round(statistics.median(s / f for s, f in zip(self.samples[slow], self.samples[fast], strict=True)), 4)

    def milliseconds(self, name: str) -> float:
        """The median, to four digits."""
        return milliseconds(self.median(name))

    def times(self, name: str, *others: str) -> dict[str, float]:
        """Of a result file: median and distance of the quartiles in ms, and ``ratio_to_NAME`` of each of ``others``."""
        found = {"median_ms": self.milliseconds(name), "iqr_ms": milliseconds(self.iqr(name))}
        return found | {f"ratio_to_{other}": self.ratio(name, other) for other in others}

    def about(self) -> dict[str, Any]:
        """Of a result file: rounds and load."""
        return {"rounds": len(next(iter(self.samples.values()))), "load": [round(value, 2) for value in self.load]}


def milliseconds(seconds: float) -> float:
    """Of seconds, to four digits."""
    return float(f"{seconds * 1e3:.4g}")


def time_paired(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = ROUNDS,
    warmup: int = WARMUP_ROUNDS,
    min_sample_s: float = MIN_SAMPLE_S,
    clock: Clock = host_clock,
) -> Paired:
    """Time callables against one another.

    After ``warmup`` calls each contestant gets a number of repeats that makes a sample last ``min_sample_s``. The order
    is rotated from round to round. The garbage collector rests meanwhile.
    """
    names = list(contestants)
    if not names:
        raise ValueError("contestants: expected at least one, got none")
    if rounds < 1:
        raise ValueError(f"rounds: expected 1 or more, got {rounds}")
    repeats = {}
    for name, call in contestants.items():
        once = min(clock(call, 1) for _ in range(max(warmup, 1)))
        repeats[name] = max(1, round(min_sample_s / max(once, 1e-7)))
        if repeats[name] > 1:  # the first calls of a short function say little: measure again with what they suggest
            once = clock(call, repeats[name])
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
                samples[name].append(clock(contestants[name], repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return Paired(samples, (before, os.getloadavg()[0]))

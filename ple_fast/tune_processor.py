"""Part of ``ple_fast.tune``: the table of products of the processor that runs it, and the limits beside them."""

from __future__ import annotations

import datetime
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .torch_backend.processor import processor_name, this_processor
from .torch_backend.product_files import write_table
from .torch_backend.product_table import DTYPES, LARGEST, Limits, Table
from .torch_backend.products import onednn_takes, watched_by
from .torch_backend.table_in_use import limited, reload_tables, using
from .tune_products import GAIN, Samples, rows_of_table
from .tune_trunks import build

MINUTES = 2.0
ROWS = (16, 48, 128, 256, 512, 1024, 4096)
"""Numbers of rows at which products are timed. Larger batches are cut into row blocks: of a wide trunk so are the last,
of a narrow one blocks have about as many as the last."""
SHARE = 0.6
"""Of the time, for products: the rest is for limits, and whole steps in the end."""
SAMPLES = 11
"""Of each way of a product."""
LIMIT_ROUNDS = 7
BLOCK_ROWS = (2048, 4096)
BLOCKS = tuple(Limits().block_values * share // 4 for share in (1, 2, 4, 8))
FEW = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
"""Numbers of rows at which the short path is held against the general one."""
WIDE = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TRUNKS: tuple[dict[str, Any], ...] = (
    {"in_features": 512, "num_tasks": 3, "expert_units": [256, 128]},
    {"in_features": 256, "num_tasks": 2, "expert_units": [128, 64]},
    {"in_features": 64, "num_tasks": 2, "expert_units": [64, 32]},
)
"""Measured unless ``--trunk`` says otherwise: a wide, a middle and a narrow trunk. The first sets the limits."""

Progress = Callable[[str, float], None]
"""Told what is done now, and which share of all is done."""


def dtypes_here() -> tuple[str, ...]:
    """Those that oneDNN computes on this processor; the others PyTorch emulates or computes by loops."""
    return tuple(name for name in DTYPES if onednn_takes(getattr(torch, name)))


def _step(about: dict[str, Any], rows: int, dtype: str, *, trains: bool) -> Callable[[], object]:
    trunk, x = build(about, rows, device="cpu", dtype=getattr(torch, dtype), requires_grad=trains)
    trunk.train(trains)
    leaves = [x, *trunk.parameters()]

    def train() -> object:
        y = trunk(x)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    def infer() -> Tensor:
        with torch.inference_mode():
            found: Tensor = trunk(x)
        return found

    return train if trains else infer


def _sample(samples: Samples, step: Callable[[], object], end: float) -> None:
    """Run the step, the general way, until each of its products has been timed often enough, or the time is over."""
    samples.met.clear()
    with limited(few_rows=0, few_rows_training=0), watched_by(samples):
        step()
        while not samples.enough(SAMPLES) and time.monotonic() < end:
            step()


def _seconds(step: Callable[[], object]) -> float:
    """Of one step, after another one."""
    step()
    begin = time.perf_counter()
    repeats = 0
    while repeats == 0 or time.perf_counter() - begin < 0.005:
        step()
        repeats += 1
    return (time.perf_counter() - begin) / repeats


def _faster(step: Callable[[], object], choices: Sequence[dict[str, int]], end: float) -> list[float]:
    """Medians of the step with each choice of limits, relative to the first, in alternation."""
    seconds: list[list[float]] = [[] for _ in choices]
    for _ in range(LIMIT_ROUNDS):
        for own, choice in zip(seconds, choices, strict=True):
            with limited(**choice):
                own.append(_seconds(step))
        if time.monotonic() > end:
            break
    return [statistics.median(a / b for a, b in zip(own, seconds[0], strict=False)) for own in seconds]


def _up_to(name: str, rows: Sequence[int], make: Callable[[int], Callable[[], object]], end: float) -> int:
    """The number of rows from which on the way beyond the limit ``name`` is to be taken: the steps of all ``rows``
    together then take the least, relative to the way within it. One more than the last if that is never.
    """
    most = getattr(LARGEST, name)
    choices = [{name: most}, {name: 0}]
    gains = [-math.log(_faster(make(count), choices, end)[1]) for count in rows]
    return best_limit(rows, gains)


def best_limit(rows: Sequence[int], gains: Sequence[float]) -> int:
    """The one of ``rows`` from which on the sum of gains is largest; one more than the last if it is never above 0."""
    total, best, limit = 0.0, 0.0, rows[-1] + 1
    for count, gain in zip(reversed(rows), reversed(gains), strict=True):
        total += gain
        if total > best:
            best, limit = total, count
    return limit


def measure_limits(about: dict[str, Any], say: Callable[[str], None], end: float) -> Limits:
    """The limits that go with the table in use, by the steps of one trunk in float32."""

    def infer(rows: int) -> Callable[[], object]:
        return _step(about, rows, "float32", trains=False)

    def train(rows: int) -> Callable[[], object]:
        return _step(about, rows, "float32", trains=True)

    own = Limits().block_values
    choices = [{"block_values": size} for size in BLOCKS]
    ratios = [_faster(make(rows), choices, end) for rows in BLOCK_ROWS for make in (infer, train)]
    sums = dict(zip(BLOCKS, map(sum, zip(*ratios, strict=True)), strict=True))
    size = min(sums, key=lambda size: sums[size])
    if sums[size] > (1 - GAIN / 2) * sums[own]:  # of four medians
        size = own
    say(f"row blocks of {size:,} activations")
    with limited(block_values=size):
        with limited(few_rows=LARGEST.few_rows):
            wide = _up_to("wide_rows", WIDE, infer, end) - 1
        say(f"the first layer expert by expert up to {wide} rows")
        with limited(wide_rows=wide):
            few = _up_to("few_rows", FEW, infer, end)
            say(f"inference takes the short path below {few} rows")
            few_training = _up_to("few_rows_training", FEW, train, end)
            say(f"training takes the short path below {few_training} rows")
    return Limits(few, few_training, wide, size)


def measure(
    trunks: Sequence[dict[str, Any]],
    dtypes: Sequence[str],
    minutes: float,
    progress: Progress,
    rows: Sequence[int] = ROWS,
) -> Table:
    """The table of products of this processor at the present number of threads; the one in use stays.

    Args:
        trunks: keywords of ``PLE``; a ``batch`` among them is one more number of rows.
        dtypes: names of those to measure.
        minutes: for all of it.
        progress: is told what is done.
    """
    begin = time.monotonic()
    end = begin + 60 * minutes
    samples = Samples()
    cells = [
        (about, dtype, count, trains)
        for about in trunks
        for dtype in dtypes
        for count in sorted({*rows, *([about["batch"]] if "batch" in about else [])})
        for trains in (False, True)
    ]
    share = SHARE * 60 * minutes / max(len(cells), 1)
    for number, (about, dtype, count, trains) in enumerate(cells):
        step = "a training step" if trains else "inference"
        progress(f"{dtype}, {count} rows, {step}", SHARE * number / len(cells))
        # Time that a cell has left over is the next one's.
        _sample(samples, _step(about, count, dtype, trains=trains), begin + share * (number + 1))
    found = Table("", Limits(), rows_of_table(samples.medians(), dtypes))

    def say(text: str) -> None:
        progress(text, min(0.99, (time.monotonic() - begin) / (60 * minutes)))

    with using(found):
        return found._replace(limits=measure_limits(trunks[0], say, end))


CHECKED_ROWS = (256, 4096)
CHECK_ROUNDS = 5
WORTH = 0.01
"""A table must save so much of the steps' time: less is noise."""


def is_faster(found: Table, trunks: Sequence[dict[str, Any]], dtypes: Sequence[str], progress: Progress) -> bool:
    """Whether whole steps of the first trunk take less with this table than with the one in use, in alternation: a
    machine that was busy meanwhile may have led to a wrong choice."""
    gains = []
    for dtype in dtypes:
        for rows in CHECKED_ROWS:
            for trains in (False, True):
                progress(f"the table in use against the new one: {dtype}, {rows} rows", 0.99)
                step = _step(trunks[0], rows, dtype, trains=trains)
                ratios = []
                for _ in range(CHECK_ROUNDS):
                    before = _seconds(step)
                    with using(found):
                        ratios.append(before / _seconds(step))
                gains.append(math.log(statistics.median(ratios)))
    return statistics.fmean(gains) > WORTH


def write(path: Path, found: Table, trunks: Sequence[dict[str, Any]]) -> None:
    """Write a table of this processor, whole or not at all, where it is read from now on."""
    about = {
        "name": processor_name(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "trunks": list(trunks),
    }
    write_table(path, this_processor(), torch.get_num_threads(), found, about)
    reload_tables()

"""``python -m soak``: random use against what is right, with a counter. Exit code 1 where anything failed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from soak import levels, memory, places, saves, swaps, threads
from soak.sections import Outcome, Section, run_section

SECTIONS = (
    Section("levels", "random levels and trunks against the reference in float64", 10_000, levels.run),
    Section("places", "one NaN or infinity in each, whose places must be the reference's", 3_000, places.run),
    Section("threads", "rounds of 8 threads that serve while one trains another model", 150, threads.run),
    Section("memory", "small steps with changing batches, whose memory must not grow", 20_000, memory.run),
    Section("saves", "kills of a process that saves, and loads while it does", 1_000, saves.run),
    Section(
        "swaps", "models changed at random, accelerated and restored, against themselves as they were", 2_000, swaps.run
    ),
)


def say(text: str) -> None:
    print(text, flush=True)


def table(outcomes: Sequence[Outcome]) -> str:
    """Sections, trials, failures, seconds, and what they measured besides."""
    rows = [("section", "trials", "failures", "seconds", "figures")]
    for o in outcomes:
        figures = ", ".join(f"{name} {value}" for name, value in o.figures.items())
        rows.append((o.section, f"{o.trials:,}", f"{o.failures:,}", f"{o.seconds:.0f}", figures))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the sections that are asked for."""
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--only", default=",".join(names), help=f"sections, of {', '.join(names)}; default all")
    parser.add_argument("--seed", type=int, help="of the first trial; alone it asks for one trial (default 0)")
    parser.add_argument("--trials", type=int, help="of each section; default its own number")
    parser.add_argument("--minutes", type=float, help="at most, for each section")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to a result file")
    options = parser.parse_args(arguments)
    chosen = options.only.split(",")
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"--only: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    for name in ("trials", "minutes"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            parser.error(f"--{name}: expected more than 0, got {getattr(options, name)}")
    torch.set_num_threads(1)  # tensors are small, and a fixed number gives the same sums everywhere
    one = options.seed is not None and options.trials is None and options.minutes is None
    seconds = None if options.minutes is None else 60 * options.minutes
    outcomes = [
        run_section(section, options.seed or 0, options.trials or (1 if one else section.trials), seconds, say)
        for section in SECTIONS
        if section.name in chosen
    ]
    say(table(outcomes))
    if options.json is not None:
        from benchmarks.result_files import write  # it asks git and the packages who they are

        write(options.json, "soak", {"results": [asdict(outcome) for outcome in outcomes]})
    return int(any(outcome.failures for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())

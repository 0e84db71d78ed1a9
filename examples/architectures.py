"""What each architecture brings over single tasks: synthetic tasks and a log like KuaiRand's, several seeds.

Two regression tasks of three correlations (``examples/seesaw.py``: trunks of as many parameters), and five signals of
the log that ``ple_fast.synthetic.synthetic_log`` draws (``MultiTaskModel``: embeddings, trunk, towers), where rows of
later days are for testing. A gain is said to be borne by the seeds where it has the same sign for all of them and is
more than twice its standard deviation. Writes its figures as JSON, from which docs/architectures.md has its tables.

    python examples/architectures.py            # minutes
    python examples/architectures.py --quick    # a minute: shows that it runs; its figures mean nothing
    python examples/architectures.py --write-page benchmarks/results/MACHINE/architectures.json
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import ROOT
from benchmarks.rendering import with_block
from benchmarks.result_files import read, write
from examples import seesaw
from examples.progress import console_for, progress
from ple_fast.losses import TaskLoss
from ple_fast.model import MultiTaskModel, columns_from
from ple_fast.synthetic import synthetic_log

Gains = dict[str, list[list[float]]]
"""By architecture: per seed the gain of each task over single tasks; those of single tasks themselves are values."""

CORRELATIONS = (0.0, 0.5, 1.0)
FEATURES = (
    "hour", "user_id", "user_active", "video_id", "author_id", "upload_type", "tags", "tab", "duration_ms",
)  # fmt: skip
TASKS = ("is_click", "long_view", "finish", "is_like", "is_profile_enter")
GROUPS = ((0, 1, 2), (3, 4))  # watching, and interacting
SINGLE = "single task"
BLOCK = "architectures"
"""Of the page, and the kind of the file."""


@dataclass(frozen=True)
class Architecture:
    """A trunk by its name in ``ple_fast.model``, and what else the model has."""

    trunk: str
    options: Mapping[str, Any]
    more: Mapping[str, Any] = field(default_factory=dict)


# Widths are such that trunks have about as many parameters; STEM's tables are six times as wide, which is its point.
PLE = {"num_levels": 2, "task_experts": 1, "shared_experts": 2, "expert_units": ((48, 32), (24, 32))}
ARCHITECTURES: dict[str, Architecture] = {
    SINGLE: Architecture("single_task", {"expert_units": (88, 32)}),
    "hard sharing": Architecture("hard_sharing", {"expert_units": (448, 32)}),
    "MMoE": Architecture("mmoe", {"experts": 8, "expert_units": (56, 32)}),
    "MMoE, 2 of 8, balanced": Architecture(
        "mmoe", {"experts": 8, "expert_units": (56, 32), "gate_top_k": 2, "gate_joint_k": 1}, {"balance": "level"}
    ),
    "CGC": Architecture("cgc", {"task_experts": 1, "shared_experts": 2, "expert_units": (64, 32)}),
    "PLE": Architecture("ple", PLE),
    "AdaTT": Architecture("adatt", {"num_levels": 1, "task_experts": 1, "shared_experts": 2, "expert_units": (64, 32)}),
    "STEM": Architecture(
        "stem", {"task_experts": 1, "shared_experts": 2, "expert_units": (64, 32)}, {"task_embeddings": True}
    ),
    "HoME": Architecture(
        "home",
        {
            "groups": GROUPS,
            "task_experts": 1,
            "group_experts": 1,
            "shared_experts": 1,
            "expert_units": ((60, 32), (36, 32)),
            "feature_gate_experts": 1,
            "feature_gate_rank": 8,
        },
    ),
    "PLE with PEPNet": Architecture(
        "ple", PLE, {"domain_columns": ("tab",), "personal_columns": ("user_id", "video_id", "author_id")}
    ),
}


@dataclass(frozen=True)
class Settings:
    """How much is trained."""

    seeds: int = 6
    rows: int = 120_000
    epochs: int = 4
    synthetic: seesaw.Settings = field(
        default_factory=lambda: seesaw.Settings(correlations=CORRELATIONS, seeds=6, epochs=20)
    )


QUICK = Settings(seeds=2, rows=6_000, epochs=1, synthetic=seesaw.QUICK)


def borne(gains: Sequence[float]) -> bool:
    """Whether seeds bear a gain: of one sign, and more than twice the standard deviation."""
    mean = statistics.fmean(gains)
    return len({math.copysign(1, gain) for gain in gains}) == 1 and abs(mean) > 2 * statistics.stdev(gains)


def synthetic(settings: Settings, console: Console) -> list[dict[str, Any]]:
    """Rows of the file: mean squared error of single tasks, and what others have less, by correlation."""
    trunks = seesaw.TRUNKS | seesaw.SUCCESSORS
    errors = seesaw.run_all(settings.synthetic, console, trunks)
    return [
        {
            "data": f"synthetic, correlation {correlation:g}",
            "measure": "mean squared error",
            "architecture": name,
            "parameters": sum(p.numel() for p in trunks[name]().parameters()),
            "values": runs,
            "gains": [
                [one - own for one, own in zip(*pair, strict=True)]
                for pair in zip(errors[seesaw.SINGLE][correlation], runs, strict=True)
            ],
        }
        for name, by_correlation in errors.items()
        for correlation, runs in by_correlation.items()
    ]


def parts(log: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Training, validation and test rows, by day."""
    day = np.asarray(log["day"])
    ends = np.quantile(day, (0.7, 0.8))
    masks = day <= ends[0], (day > ends[0]) & (day <= ends[1]), day > ends[1]
    found: list[dict[str, Any]] = []
    for mask in masks:
        rows = np.flatnonzero(mask)
        found.append({name: [values[i] for i in rows] if name == "tags" else np.asarray(values)[rows]
                      for name, values in log.items() if name in FEATURES + TASKS})  # fmt: skip
    return found[0], found[1], found[2]


def auc(architecture: Architecture, log: Mapping[str, Any], seed: int, epochs: int) -> tuple[list[float], int]:
    """AUC per task on the test days, each over its own sample space, and the number of parameters."""
    train, validation, test = parts(log)
    columns = columns_from(
        train, categorical=FEATURES[:-1], numeric=FEATURES[-1:], width=8, pooling={"tags": "mean"}, transform="log1p"
    )
    torch.manual_seed(seed)
    model = MultiTaskModel(
        columns,
        [TaskLoss(name) for name in TASKS],
        trunk=architecture.trunk,
        trunk_options=architecture.options,
        tower_units=(16,),
        **architecture.more,
    )
    model.fit(
        {name: train[name] for name in FEATURES},
        {name: train[name] for name in TASKS},
        epochs=epochs,
        batch_size=1024,
        lr=2e-3,
        validation=(
            {name: validation[name] for name in FEATURES},
            {name: validation[name] for name in TASKS},
        ),
        patience=1,
        seed=seed,
        progress=False,
    )
    found = model.evaluate(
        {name: test[name] for name in FEATURES}, {name: test[name] for name in TASKS}, metrics={"auc"}
    )
    values = [found.tasks[name].metrics["auc"] for name in TASKS]
    return [0.5 if value is None else value for value in values], sum(p.numel() for p in model.parameters())


def of_log(settings: Settings, console: Console) -> list[dict[str, Any]]:
    """Rows of the file: AUC of single tasks, and what others have more. A seed has the same log for all."""
    values: dict[str, list[list[float]]] = {name: [] for name in ARCHITECTURES}
    sizes: dict[str, int] = {}
    with progress(console, "training") as work:
        for seed in range(settings.seeds):
            log = synthetic_log(settings.rows, seed=seed)
            for name, architecture in ARCHITECTURES.items():
                done = settings.seeds * len(ARCHITECTURES)
                work.now(f"log, seed {seed + 1} of {settings.seeds}, {name}", work.completed, done)
                found, sizes[name] = auc(architecture, log, seed, settings.epochs)
                values[name].append(found)
                work.now(work.description, work.completed + 1)
    return [
        {
            "data": f"log like KuaiRand's, {settings.rows:,} rows",
            "measure": "AUC",
            "architecture": name,
            "parameters": sizes[name],
            "values": runs,
            "gains": [
                [own - one for one, own in zip(*pair, strict=True)] for pair in zip(values[SINGLE], runs, strict=True)
            ],
        }
        for name, runs in values.items()
    ]


def print_tables(results: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Per data set the mean over tasks, its gain, and for how many tasks the seeds bear a gain or a loss."""
    for data in dict.fromkeys(row["data"] for row in results):
        rows = [row for row in results if row["data"] == data]
        table = Table(f"{data}", box=None, padding=(0, 2, 0, 0))
        for heading in ("parameters", rows[0]["measure"], "gain", "tasks that gain", "that lose"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*cells(row))
        console.print(table)
        console.print()


def cells(row: Mapping[str, Any]) -> list[str]:
    """Of a table: name, parameters, mean, gain, and tasks whose gain or loss the seeds bear."""
    means = [statistics.fmean(run) for run in row["values"]]
    found = [row["architecture"], f"{row['parameters']:,}", f"{statistics.fmean(means):.4f}"]
    if row["architecture"] == SINGLE:
        return [*found, "", "", ""]
    gains = [statistics.fmean(run) for run in row["gains"]]
    per_task = [list(own) for own in zip(*row["gains"], strict=True)]
    up = sum(borne(own) and statistics.fmean(own) > 0 for own in per_task)
    down = sum(borne(own) and statistics.fmean(own) < 0 for own in per_task)
    spread = f"{statistics.fmean(gains):+.4f} ± {statistics.stdev(gains):.4f}"
    return [*found, spread, f"{up} of {len(per_task)}", f"{down} of {len(per_task)}"]


def markdown(content: Mapping[str, Any], file: str) -> str:
    """The tables of the page, one per data set, and where they are from."""
    about = content["environment"]
    lines = []
    for data in dict.fromkeys(row["data"] for row in content["results"]):
        rows = [row for row in content["results"] if row["data"] == data]
        lines += [
            f"| {data} | parameters | {rows[0]['measure']} | gain | tasks that gain | that lose |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            *(f"| {' | '.join(cells(row))} |" for row in rows),
            "",
        ]
    seeds = len(content["results"][0]["values"])
    lines.append(
        f"Means over tasks and {seeds} seeds; gain with its standard deviation over seeds. A task gains or loses where "
        f"all seeds agree and the mean is more than twice the standard deviation. {about['cpu']}, {about['threads']} "
        f"threads, torch {about['packages']['torch']}, commit {about['commit']}. Figures from {file}."
    )
    return "\n".join(lines) + "\n"


def write_page(file: Path) -> None:
    """Puts the tables of a file of figures into docs/architectures.md."""
    page = ROOT / "docs" / "architectures.md"
    own = markdown(read(file, BLOCK), file.resolve().relative_to(ROOT).as_posix())
    page.write_text(with_block(page.read_text(encoding="utf-8"), BLOCK, own), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of architectures.json (default: out)")
    parser.add_argument("--write-page", type=Path, metavar="FILE", help="only put a file's tables into the page")
    options = parser.parse_args(arguments)
    if options.write_page is not None:
        write_page(options.write_page)
        return
    settings, console = QUICK if options.quick else Settings(), console_for()
    results = synthetic(settings, console) + of_log(settings, console)
    console.print()
    print_tables(results, console)
    path = options.out / f"{BLOCK}.json"
    write(path, BLOCK, {"results": results})
    console.print(f"figures: {path}")


if __name__ == "__main__":
    main()

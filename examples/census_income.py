"""Trains five architectures on UCI Census-Income (KDD), the data set of the MMoE and PLE papers, and compares them.

Tasks: income above 50,000 dollars, never married. Models: single task, hard sharing, MMoE, CGC, PLE, with the same
towers and about as many parameters each. Prints AUC per task over several seeds, the gain over single task (PLE paper,
eq. 11) and the speed of a training step with the fused PLE and with the plain one; writes these figures as JSON, and
draws two pictures. Without ``--rows`` it trains on everything, which takes minutes.

Usage: python examples/census_income.py [--rows N] [--seeds N] [--epochs N] [--models ple,mmoe] [--out DIR]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

import torch
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from benchmarks.result_files import write
from examples.census_data import INCOME, NEVER_MARRIED, SPLITS, Data, about, load
from examples.census_pictures import draw
from examples.progress import Work, console_for, progress
from ple_fast.losses import TaskLoss
from ple_fast.model import MultiTaskModel, Step
from ple_fast.reference import PLEReference
from ple_fast.viz import gate_use

TASKS = (TaskLoss(INCOME), TaskLoss(NEVER_MARRIED))
FLOORS = {INCOME: 0.930, NEVER_MARRIED: 0.992}

# Every trunk hands 32 features per task to a tower of 16 units. Widths are such that the trunks have about as many
# parameters as PLE's.
TOWER_UNITS = (16,)
LEARNING_RATE = 2e-3
TIMED_ROUNDS = 15


class Architecture(NamedTuple):
    """A row of the comparison: its trunk, and whether each task has a model, or embeddings, of its own."""

    label: str
    trunk: str
    options: dict[str, Any]
    separate: bool = False
    task_embeddings: bool = False


MODELS = {
    "single_task": Architecture("single task", "single_task", {"expert_units": (256, 32)}, separate=True),
    "hard_sharing": Architecture("hard sharing", "hard_sharing", {"expert_units": (512, 32)}),
    "mmoe": Architecture("MMoE", "mmoe", {"experts": 6, "expert_units": (88, 32)}),
    "cgc": Architecture("CGC", "cgc", {"task_experts": 2, "shared_experts": 2, "expert_units": (88, 32)}),
    "ple": Architecture(
        "PLE", "ple", {"num_levels": 2, "task_experts": 2, "shared_experts": 2, "expert_units": (64, 32)}
    ),
}
SUCCESSORS = {
    "mmoe_top_k": Architecture(
        "MMoE, 2 of 6", "mmoe", {"experts": 6, "expert_units": (88, 32), "gate_top_k": 2, "gate_joint_k": 1}
    ),
    "adatt": Architecture(
        "AdaTT", "adatt", {"num_levels": 1, "task_experts": 2, "shared_experts": 2, "expert_units": (88, 32)}
    ),
    "stem": Architecture(
        "STEM", "stem", {"task_experts": 2, "shared_experts": 2, "expert_units": (88, 32)}, task_embeddings=True
    ),
    "home": Architecture(
        "HoME",
        "home",
        {
            "groups": ((0,), (1,)),
            "task_experts": 1,
            "group_experts": 1,
            "shared_experts": 1,
            "expert_units": ((88, 32), (72, 32)),
            "feature_gate_rank": 8,
        },
    ),
}
"""What came after PLE, where ``--models`` names it. STEM's tables are three times as wide, which is its point."""
KNOWN = MODELS | SUCCESSORS
GATED = ("mmoe", "cgc", "ple", *SUCCESSORS)


def aucs(predictions: dict[str, Any], labels: Any) -> dict[str, float]:
    """AUC of each task that was predicted."""
    return {name: float(roc_auc_score(labels[name], predicted)) for name, predicted in predictions.items()}


def mean_auc(predictions: dict[str, Any], labels: Any) -> float:
    """What chooses the epoch, on validation data."""
    return statistics.fmean(aucs(predictions, labels).values())


@dataclass
class Results:
    """What one architecture did, seed by seed."""

    auc: dict[str, list[float]] = field(default_factory=lambda: {task.name: [] for task in TASKS})
    seconds: list[float] = field(default_factory=list)
    parameters: int = 0
    first: MultiTaskModel | None = None


def run(architecture: Architecture, data: Data, seed: int, options: argparse.Namespace, bar: Trainings) -> Results:
    """Trains one architecture with one seed and scores it on the test data."""
    result = Results()
    begin = time.perf_counter()
    for number, tasks in enumerate([[task] for task in TASKS] if architecture.separate else [TASKS]):
        torch.manual_seed(1000 * seed + number)
        model = MultiTaskModel(
            data.columns,
            tasks,
            trunk=architecture.trunk,
            trunk_options=architecture.options,
            tower_units=TOWER_UNITS,
            task_embeddings=architecture.task_embeddings,
        )
        model.fit(
            *data.train,
            epochs=options.epochs,
            batch_size=batch_size(options, data),
            lr=LEARNING_RATE,
            validation=data.validation,
            score=mean_auc,
            patience=2,
            seed=seed,
            progress=bar.of(f"{architecture.label}, seed {seed + 1} of {options.seeds}"),
        )
        bar.finished(options.epochs)
        for name, auc in aucs(model.predict(data.test.rows), data.test.labels).items():
            result.auc[name].append(auc)
        result.parameters += sum(parameter.numel() for parameter in model.parameters())
        result.first = model
    result.seconds.append(time.perf_counter() - begin)
    return result


def batch_size(options: argparse.Namespace, data: Data) -> int:
    """What was asked for, otherwise 1024, or less so that an epoch has about 50 steps."""
    return options.batch_size or min(1024, max(64, len(data.train.rows) // 50))


class Trainings:
    """The batches of all trainings of a run, as one piece of work."""

    def __init__(self, work: Work, trainings: int) -> None:
        self.work, self.trainings, self.done, self.batches = work, trainings, 0, 0

    def of(self, label: str) -> Callable[[Step], None]:
        """The callback of one training, which begins."""
        self.work.now(label)

        def show(step: Step) -> None:
            assert step.batches is not None  # of rows in memory
            self.batches = step.batches
            self.work.now(
                f"{label}, epoch {step.epoch}/{step.epochs}",
                self.done + step.number,
                self.trainings * step.epochs * step.batches,
            )

        return show

    def finished(self, epochs: int) -> None:
        """One training is over, early or not."""
        self.done += epochs * self.batches
        self.work.now(self.work.description, self.done)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation}"


def table_of(results: dict[str, Results], seeds: int) -> Table:
    """AUC and gain over single task, per task and model; of the first seed alone where more of ``seeds`` will come."""
    done = len(next(iter(results.values())).seconds)
    words = f"mean ± standard deviation over {done} seeds" if done > 1 else "one seed"
    table = Table(title=f"AUC on the test data, {words if done == seeds else f'the first of {seeds} seeds'}")
    table.add_column("model")
    table.add_column("parameters", justify="right")
    baseline = results.get("single_task")
    for task in TASKS:
        table.add_column(task.name, justify="right")
        if baseline is not None:
            table.add_column("MTL gain", justify="right")
    table.add_column("seconds per run", justify="right")
    for key, result in results.items():
        cells = [KNOWN[key].label, f"{result.parameters:,}"]
        for task in TASKS:
            cells.append(spread(result.auc[task.name]))
            if baseline is not None:
                gain = statistics.fmean(result.auc[task.name]) - statistics.fmean(baseline.auc[task.name])
                cells.append("" if key == "single_task" else f"{gain:+.4f}")
        table.add_row(*cells, f"{statistics.fmean(result.seconds):.1f}")
    return table


def step_speed(model: MultiTaskModel, data: Data, size: int) -> dict[str, float]:
    """Samples per second of a whole training step (embeddings to optimizer), fused and plain, alternating.

    Both start from the same weights; their first losses must agree, otherwise the comparison would be of two models.
    """
    twins = {"fused": copy.deepcopy(model).train(), "plain": copy.deepcopy(model).train()}
    twins["plain"].trunk = PLEReference.like(twins["plain"].trunk)
    index = torch.randperm(len(data.train.rows), generator=torch.Generator().manual_seed(0))[:size]
    rows = data.train.rows.rows(index)
    labels = {name: torch.from_numpy(label)[index] for name, label in data.train.labels.items()}
    optimizers = {name: torch.optim.Adam(twin.parameters(), lr=LEARNING_RATE) for name, twin in twins.items()}

    def step(name: str) -> float:
        begin = time.perf_counter()
        loss = twins[name].joint_loss(twins[name](rows), labels).total
        optimizers[name].zero_grad(set_to_none=True)
        loss.backward()
        optimizers[name].step()
        losses[name] = float(loss.detach())
        return time.perf_counter() - begin

    losses: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in twins}
    for name in twins:
        step(name)
    if abs(losses["fused"] - losses["plain"]) > 1e-4 * abs(losses["plain"]):
        raise ValueError(f"expected the same loss with both trunks, got {losses}")
    for _ in range(2 + TIMED_ROUNDS):
        for name in twins:
            seconds[name].append(step(name))
    return {name: len(rows) / statistics.median(times[2:]) for name, times in seconds.items()}


def figures(
    results: dict[str, Results], data: Data, minutes: float, samples_per_second: dict[str, float]
) -> dict[str, Any]:
    """The figures of a run, seed by seed, and what the gates of the first seed weigh over the test rows."""
    rows = [
        {"model": KNOWN[key].label, "parameters": result.parameters, "auc": result.auc, "seconds": result.seconds}
        for key, result in results.items()
    ]
    gates = []
    for key in GATED:
        model = results[key].first if key in results else None
        if model is not None:
            weights = model.gate_weights(data.test.rows)
            for use in gate_use(weights, model.topologies, model.task_names, model=KNOWN[key].label):
                gates.append({name: _short(value) for name, value in asdict(use).items()})
    speeds = {name: round(speed) for name, speed in samples_per_second.items()}
    sizes = {name: len(getattr(data, name).rows) for name in SPLITS}
    return {
        "minutes": round(minutes, 1),
        "samples_per_second": speeds,
        "rows": sizes,
        "results": rows,
        "gates": gates,
    }


def _short(value: Any) -> Any:
    """Six digits of a weight are more than a picture shows."""
    return [round(v, 6) if isinstance(v, float) else v for v in value] if isinstance(value, tuple) else value


def note_floors(console: Console, results: dict[str, Results], options: argparse.Namespace) -> None:
    """Says where a mean is below what any of these architectures reaches on the full data."""
    if options.rows is not None:
        return
    for key, result in results.items():
        for name, floor in FLOORS.items():
            mean = statistics.fmean(result.auc[name])
            if mean < floor:
                console.print(f"Note: {KNOWN[key].label}: expected an AUC above {floor} for {name}, got {mean:.4f}.")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None, **least: int) -> argparse.Namespace:
    """The command line; an error where a number is below its ``least``."""
    options = parser.parse_args(argv)
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            parser.error(f"--{name.replace('_', '-')}: expected {bound} or more, got {value}")
    return options


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, help="train and test on about so many rows (default: all 299,285)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings per model (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=8, help="at most (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, help="default: 1024, less where that makes few steps per epoch")
    parser.add_argument(
        "--models", default=",".join(MODELS), help=f"comma-separated of {', '.join(KNOWN)} (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of all files (default: %(default)s)")
    options = parse(parser, argv, rows=1000, seeds=1, epochs=1, batch_size=2)
    options.models = list(dict.fromkeys(options.models.split(",")))
    unknown = [key for key in options.models if key not in KNOWN]
    if unknown:
        parser.error(f"--models: expected some of {', '.join(KNOWN)}, got {', '.join(unknown)}")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Loads, trains, prints, writes, draws."""
    options = arguments(argv)
    console = console_for()
    begin = time.perf_counter()
    trainings = options.seeds * sum(len(TASKS) if KNOWN[key].separate else 1 for key in options.models)
    results = {key: Results() for key in options.models}
    with progress(console, "loading") as work:
        data = load(options.rows)
        rows = about(data)
        console.print(rows if options.rows is None else f"{rows} make example-full takes all.")
        bar = Trainings(work, trainings)
        for seed in range(options.seeds):
            for key in options.models:
                one = run(KNOWN[key], data, seed, options, bar)
                for name, scores in one.auc.items():
                    results[key].auc[name] += scores
                results[key].seconds += one.seconds
                results[key].parameters = one.parameters
                results[key].first = results[key].first or one.first
            if seed == 0 and options.seeds > 1:
                console.print(table_of(results, options.seeds))
        seconds = time.perf_counter() - begin
        speed: dict[str, float] = {}
        size = min(batch_size(options, data), len(data.train.rows))
        if "ple" in results and (ple := results["ple"].first) is not None:
            work.now("timing a training step")
            speed = step_speed(ple, data, size)
        work.now("weighing the gates, drawing")
        content = figures(results, data, seconds / 60, speed)
        file = options.out / "census_income.json"
        write(file, "census_income", content)
        files = [file, *draw(content, options.out)]
    console.print(f"{rows} Trained in {seconds:.0f} s, {torch.get_num_threads()} threads.")
    console.print(table_of(results, options.seeds))
    note_floors(console, results, options)
    if speed:
        console.print(
            f"Training step of the PLE model, batch {size}, samples per second: "
            f"{speed['fused']:,.0f} fused, {speed['plain']:,.0f} plain ({speed['fused'] / speed['plain']:.2f}x)."
        )
    for file in files:
        console.print(f"Wrote {file}", soft_wrap=True)


if __name__ == "__main__":
    main()

"""The seesaw on synthetic tasks: what a trunk gains over single tasks, by how much the tasks have in common.

Two regression tasks of controlled correlation (``ple_fast.synthetic``), five trunks, several seeds, in a training loop
of its own: a trunk, a linear tower per task, ``JointLoss``. Prints a table per correlation and draws the picture of
``docs/images/seesaw.png``. A run in which one task gains and the other loses is the seesaw of the PLE paper.

All trunks have about as many parameters. They are few and the labels have many waves, so that tasks compete for units
and the effect shows in minutes.

    python examples/seesaw.py                # minutes on one core
    python examples/seesaw.py --successors   # and AdaTT, STEM, HoME, and gates that choose
    python examples/seesaw.py --quick        # seconds: shows that it runs; its figures mean nothing
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from examples.progress import console_for, progress
from ple_fast import CGC, PLE, STEM, AdaTT, HardSharing, HoME, MMoE, SingleTask
from ple_fast.losses import JointLoss, TaskLoss
from ple_fast.synthetic import synthetic_tasks
from ple_fast.viz import plot_lines

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "seesaw.png"
TASKS = ("task 1", "task 2")
IN_FEATURES = 32
SCALE = 2.0  # of the labels' sinusoids: enough waves for experts of this size to run short of units
SINGLE = "single task"
ACTIVATION = "silu"  # relu leaves some experts of so few units dead, and the spread is theirs


@dataclass(frozen=True)
class Settings:
    """How much is trained."""

    correlations: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    seeds: int = 8
    train_rows: int = 8000
    test_rows: int = 4000
    epochs: int = 30
    batch_size: int = 256
    learning_rate: float = 0.01


QUICK = Settings(correlations=(0.0, 1.0), seeds=2, train_rows=1024, test_rows=512, epochs=2)


# About 1100 parameters each: two experts of single tasks, one of hard sharing, three of MMoE, CGC and PLE, and the
# gates. PLE has the first layer of its experts on level 1 and the second on level 2.
TRUNKS: dict[str, Callable[[], nn.Module]] = {
    SINGLE: lambda: SingleTask(IN_FEATURES, 2, expert_units=(14, 6), activation=ACTIVATION),
    "hard sharing": lambda: HardSharing(IN_FEATURES, 2, expert_units=(25, 10), activation=ACTIVATION),
    "MMoE": lambda: MMoE(IN_FEATURES, 2, experts=3, expert_units=(8, 4), activation=ACTIVATION),
    "CGC": lambda: CGC(IN_FEATURES, 2, task_experts=1, shared_experts=1, expert_units=(8, 4), activation=ACTIVATION),
    "PLE": lambda: PLE(
        IN_FEATURES, 2, task_experts=1, shared_experts=1, expert_units=((8,), (4,)), activation=ACTIVATION
    ),
}

# The same number of parameters for what came after PLE. HoME's two levels are as deep as PLE's; each task is a group.
SUCCESSORS: dict[str, Callable[[], nn.Module]] = {
    "AdaTT": lambda: AdaTT(IN_FEATURES, 2, num_levels=1, task_experts=1, expert_units=(12, 6), activation=ACTIVATION),
    "MMoE, 2 of 5": lambda: MMoE(
        IN_FEATURES, 2, experts=5, expert_units=(4, 4), gate_top_k=2, gate_joint_k=1, activation=ACTIVATION
    ),
    "STEM": lambda: STEM(IN_FEATURES, 2, task_experts=1, shared_experts=1, expert_units=(8, 4), activation=ACTIVATION),
    "HoME": lambda: HoME(
        IN_FEATURES, 2, groups=[[0], [1]], task_experts=1, group_experts=1, shared_experts=1, expert_units=((4,), (4,)),
        feature_gate_experts=1, feature_gate_rank=1, norm=None, activation=ACTIVATION,
    ),
}  # fmt: skip


class Regressor(nn.Module):
    """A trunk ``(B, D) -> (B, T, H)`` and a linear tower per task."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.towers = nn.ModuleDict({task: nn.LazyLinear(1) for task in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        shared = self.trunk(x).unbind(1)  # one copy-free backward for all tasks, which y[:, k] has not
        return {task: tower(y) for (task, tower), y in zip(self.towers.items(), shared, strict=True)}


def train(model: Regressor, x: Tensor, labels: dict[str, Tensor], settings: Settings) -> None:
    """Adam on the joint loss, one cycle of learning rates."""
    joint_loss = JointLoss([TaskLoss(task, "regression") for task in TASKS])
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    batches = len(x) // settings.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.epochs * batches
    )
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(x))[: batches * settings.batch_size].split(settings.batch_size):
            loss = joint_loss(model(x[rows]), {task: label[rows] for task, label in labels.items()})
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
            schedule.step()
        joint_loss.step_epoch()


@torch.no_grad()
def test_errors(model: Regressor, x: Tensor, labels: dict[str, Tensor]) -> list[float]:
    """Mean squared error per task: the labels have variance 1, so 0 is perfect and 1 is the mean's."""
    predictions = model(x)
    return [float((predictions[task].squeeze(1) - labels[task]).square().mean()) for task in TASKS]


def run(trunk: Callable[[], nn.Module], correlation: float, seed: int, settings: Settings) -> list[float]:
    """Draws data, trains one model and tests it; a seed has the same data for every trunk."""
    rows = settings.train_rows
    x, y = synthetic_tasks(rows + settings.test_rows, IN_FEATURES, correlation=correlation, scale=SCALE, seed=seed)
    y = (y - y[:rows].mean(0)) / y[:rows].std(0)
    labels = dict(zip(TASKS, y.unbind(1), strict=True))
    torch.manual_seed(seed)
    model = Regressor(trunk())
    model(x[:2])  # the towers take their width
    train(model, x[:rows], {task: label[:rows] for task, label in labels.items()}, settings)
    return test_errors(model, x[rows:], {task: label[rows:] for task, label in labels.items()})


Errors = dict[str, dict[float, list[list[float]]]]
"""``errors[trunk][correlation][seed][task]``"""


def run_all(settings: Settings, console: Console, trunks: Mapping[str, Callable[[], nn.Module]] = TRUNKS) -> Errors:
    """Every trunk on every data set."""
    errors: Errors = {name: {c: [] for c in settings.correlations} for name in trunks}
    runs = settings.seeds * len(settings.correlations) * len(trunks)
    with progress(console, "training") as work:
        for seed in range(settings.seeds):
            for correlation in settings.correlations:
                for name, trunk in trunks.items():
                    work.now(f"correlation {correlation:.2f}, seed {seed}, {name:12}", work.completed, runs)
                    errors[name][correlation].append(run(trunk, correlation, seed, settings))
                    work.now(work.description, work.completed + 1)
    return errors


def spread(values: list[float], sign: str = "+") -> str:
    """Mean and standard deviation."""
    return f"{statistics.fmean(values):{sign}.4f}±{statistics.stdev(values):.4f}"


def print_tables(errors: Errors, console: Console) -> None:
    """Per correlation: error, gain per task (PLE paper, eq. 11: single-task error minus error), and who gains."""
    for name in errors:
        trunk = (TRUNKS | SUCCESSORS)[name]
        console.print(f"{name:12} {sum(p.numel() for p in trunk().parameters())} parameters in the trunk")
    console.print("\nMean±standard deviation over seeds; in how many both tasks gain, one, none")
    headings = ("test error", *(f"gain, {task}" for task in TASKS), "both/one/none")
    for correlation, single in errors[SINGLE].items():
        table = Table(f"correlation {correlation:.2f}", box=None, padding=(0, 2, 0, 0))
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for name in errors:
            runs = errors[name][correlation]
            cells = [name, spread([statistics.fmean(run) for run in runs], sign="")]
            if name != SINGLE:
                gains = [[s - e for s, e in zip(*pair, strict=True)] for pair in zip(single, runs, strict=True)]
                cells += [spread([gain[k] for gain in gains]) for k in range(len(TASKS))]
                gaining = [sum(g > 0 for g in gain) for gain in gains]
                cells.append("/".join(str(gaining.count(number)) for number in (2, 1, 0)))
            table.add_row(*cells)
        console.print()
        console.print(table)


def draw(errors: Errors, settings: Settings, path: Path) -> None:
    """Per task: how often the error is halved against single tasks, so that factors up and down are equally high."""
    path.parent.mkdir(parents=True, exist_ok=True)
    series = {
        task: {
            name: [
                [math.log2(single[k] / run[k]) for single, run in zip(errors[SINGLE][c], errors[name][c], strict=True)]
                for c in settings.correlations
            ]
            for name in errors
            if name != SINGLE
        }
        for k, task in enumerate(TASKS)
    }
    plot_lines(
        settings.correlations,
        series,
        xlabel="correlation of the two tasks' labels",
        ylabel="log2(single-task error / error)",
        baseline=0.0,
        title=f"Gain over single tasks, synthetic data: {settings.seeds} seeds, {settings.train_rows:,} training rows",
        path=path,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds; draws only where --image says")
    parser.add_argument(
        "--image", type=Path, help=f"where to draw (default: docs/images/{IMAGE.name}, and nowhere with --successors)"
    )
    parser.add_argument("--successors", action="store_true", help="also AdaTT, STEM, HoME and gates that choose")
    parser.add_argument("--seeds", type=int, help="number of seeds, at least 2")
    arguments = parser.parse_args()
    settings = QUICK if arguments.quick else Settings()
    if arguments.seeds is not None:
        if arguments.seeds < 2:
            parser.error(f"--seeds: expected at least 2, for a spread, got {arguments.seeds}")
        settings = Settings(**{**vars(settings), "seeds": arguments.seeds})
    torch.set_num_threads(1)  # the models are tiny: a second thread only costs
    console = console_for()
    errors = run_all(settings, console, TRUNKS | SUCCESSORS if arguments.successors else TRUNKS)
    print_tables(errors, console)
    path = arguments.image or (None if arguments.quick or arguments.successors else IMAGE)
    if path is not None:
        draw(errors, settings, path)
        console.print(f"picture: {path}")


if __name__ == "__main__":
    main()

"""From where on towers as one level take less: ``python benchmarks/towers.py [--rounds N] [--json PATH]``.

The towers of a model, one after the other, against the same as one level (``ple_fast/model/tower_stack.py``), alone and
in a training step and a prediction, by tasks, rows and widths. Nothing is timed before both have given the same outputs
and gradients. ``STACKED_PRODUCTS`` there follows from it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

import torch
from torch import Tensor, nn

from benchmarks import result_files
from benchmarks.configs import ROUNDS, SEED, TOWER_BATCHES, TOWER_TASKS, TOWERS, TowerConfig
from benchmarks.environment import ROOT, machine_name
from benchmarks.paired import Paired, time_paired
from benchmarks.steps import WrongResultError
from ple_fast.model import tower_stack
from ple_fast.model.tower_forms import read_tower
from ple_fast.model.towers import build_tower, run_one_by_one

MODES = ("train", "inference")
CONTESTANTS = ("one_by_one", "stacked")
TOLERANCE = 1e-9
"""Of the largest value, or of 1."""

Run = Callable[[nn.ModuleList, Tensor], Sequence[Tensor]]


def stacked(towers: nn.ModuleList, x: Tensor) -> Sequence[Tensor]:
    """As one level, whatever it takes."""
    read = [read_tower(tower) for tower in towers]
    return tower_stack._run_level([own for own in read if own is not None], x, (), 1.0)


def one_by_one(towers: nn.ModuleList, x: Tensor) -> Sequence[Tensor]:
    """One after the other."""
    return run_one_by_one(towers, x, (), 1.0)


RUNS: dict[str, Run] = {"one_by_one": one_by_one, "stacked": stacked}


def steps_of(config: TowerConfig, tasks: int, batch: int) -> dict[str, Callable[[], object]]:
    """A call by mode and contestant, checked.

    Raises:
        WrongResultError: the two do not compute the same.
    """
    torch.manual_seed(SEED)
    towers = nn.ModuleList(build_tower([config.in_features, *config.units], 1, "relu", 0.0) for _ in range(tasks))
    x = torch.randn(batch, tasks, config.in_features)
    dy = torch.randn(tasks, batch, 1).unbind(0)

    def train(run: Run, towers: nn.ModuleList = towers, x: Tensor = x, dy: Sequence[Tensor] = dy) -> list[Tensor]:
        own = x.detach().requires_grad_()
        outputs = list(run(towers, own))
        return [*outputs, *torch.autograd.grad(outputs, [own, *towers.parameters()], dy)]

    @torch.inference_mode()
    def infer(run: Run) -> Sequence[Tensor]:
        return run(towers, x)

    # In float64, where rounding takes no row across a kink of ReLU.
    exact = copy.deepcopy(towers).double(), x.double(), [own.double() for own in dy]
    for ours, theirs in zip(*(train(run, *exact) for run in RUNS.values()), strict=True):
        error = (ours - theirs).detach().abs().max() / ours.detach().abs().max().clamp(min=1.0)  # sums that cancel
        if not error <= TOLERANCE:
            raise WrongResultError(f"{tasks} tasks, {batch} rows: the two differ by {float(error):.2g}")
    calls: dict[str, Callable[[], object]] = {}
    for name, run in RUNS.items():
        calls[f"train {name}"] = lambda run=run: train(run)  # type: ignore[misc]  # the default binds it
        calls[f"inference {name}"] = lambda run=run: infer(run)  # type: ignore[misc]
    return calls


def entries(config: TowerConfig, tasks: int, batch: int, paired: Paired) -> list[dict[str, Any]]:
    """Of a result file: per mode the times, and how many times as long towers one after the other take."""
    widths = [config.in_features, *config.units, 1]
    products = batch * tasks * sum(a * b for a, b in itertools.pairwise(widths))
    return [
        {
            "mode": mode, "in_features": config.in_features, "units": list(config.units), "tasks": tasks,
            "batch": batch, "products": products, **paired.about(),
            "contestants": {name: paired.times(f"{mode} {name}") for name in CONTESTANTS},
            "one_by_one_over_stacked": paired.ratio(f"{mode} one_by_one", f"{mode} stacked"),
        }
        for mode in MODES
    ]  # fmt: skip


def measure(
    configs: Sequence[TowerConfig] = TOWERS,
    tasks: Sequence[int] = TOWER_TASKS,
    batches: Sequence[int] = TOWER_BATCHES,
    *,
    rounds: int = ROUNDS,
) -> list[dict[str, Any]]:
    """Entries by widths, tasks and rows."""
    found = []
    for config, count, batch in itertools.product(configs, tasks, batches):
        found += entries(config, count, batch, time_paired(steps_of(config, count, batch), rounds=rounds))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="default benchmarks/results/<machine>/towers.json")
    options = parser.parse_args(arguments)
    results = measure(rounds=options.rounds)
    for own in sorted(results, key=lambda own: (own["mode"], own["products"])):
        print(
            f"{own['mode']}, {own['in_features']} to {own['units']}, {own['tasks']} tasks, {own['batch']} rows, "
            f"{own['products'] / 1e6:.3g} million multiply-adds: {own['one_by_one_over_stacked']:.2f}"
        )
    path = options.json or ROOT / "benchmarks" / "results" / machine_name() / "towers.json"
    result_files.write(path, "towers", {"results": results})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

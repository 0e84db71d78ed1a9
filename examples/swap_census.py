"""What the two swap examples share: Census-Income as plain arrays, the command line, the comparison they print."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from examples.census_data import DATA, INCOME, NEVER_MARRIED, NO_FEATURES, NUMERIC
from examples.census_income import parse
from examples.progress import Work

TASKS = (INCOME, NEVER_MARRIED)
Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Rows:
    """One split: a column per feature, categories as numbers and the rest standardised, and labels ``(N, 2)``."""

    features: Columns
    labels: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Census:
    """Both splits. Category 0 stands for what the training rows do not have."""

    train: Rows
    test: Rows
    categories: dict[str, int]
    """Per categorical feature the number of codes."""


def load(rows: int | None, seed: int = 0) -> Census:
    """The official split, of about ``rows`` rows where given."""
    frame = pd.read_parquet(DATA)
    if rows is not None:
        frame = frame.sample(n=min(rows, len(frame)), random_state=seed)
    parts = {name: frame[frame["split"] == name] for name in ("train", "test")}
    columns: dict[str, Columns] = {name: {} for name in parts}
    categories: dict[str, int] = {}
    for feature in frame.columns:
        if feature in NO_FEATURES:
            continue
        if feature in NUMERIC:
            logs = {name: np.log1p(part[feature].to_numpy(np.float32)) for name, part in parts.items()}
            mean, deviation = logs["train"].mean(), logs["train"].std() + 1e-6
            for name, values in logs.items():
                columns[name][feature] = (values - mean) / deviation
        else:
            known = {value: code for code, value in enumerate(parts["train"][feature].astype(str).unique(), 1)}
            categories[feature] = len(known) + 1
            for name, part in parts.items():
                codes = part[feature].astype(str).map(known).fillna(0)
                columns[name][feature] = codes.to_numpy(np.int64)
    labels = {
        name: np.stack([part["income"] == "50000+.", part["marital_stat"] == "Never married"], 1).astype(np.float32)
        for name, part in parts.items()
    }
    train, test = (Rows(columns[name], labels[name]) for name in ("train", "test"))
    return Census(train, test, categories)


@dataclass
class Contestant:
    """A model with its library's own training."""

    epoch: Callable[[], object]
    """Trains once over the training rows."""
    predict: Callable[[], npt.NDArray[Any]]
    """Probabilities ``(N, 2)`` of the test rows."""
    seconds: list[float] = field(default_factory=list)

    def auc(self, test: Rows) -> list[float]:
        """Of each task."""
        predicted = self.predict()
        return [float(roc_auc_score(test.labels[:, t], predicted[:, t])) for t in range(len(TASKS))]


def alternate(contestants: dict[str, Contestant], epochs: int, work: Work) -> None:
    """Trains all of them, an epoch of each in turn, and takes the time."""
    parts = epochs * len(contestants)
    for epoch in range(epochs):
        for number, (name, contestant) in enumerate(contestants.items()):
            work.now(f"training, {name}, epoch {epoch + 1}/{epochs}", epoch * len(contestants) + number, parts)
            begin = time.perf_counter()
            contestant.epoch()
            contestant.seconds.append(time.perf_counter() - begin)
    work.now("scoring", parts)


def compare(
    library: str,
    census: Census,
    contestants: dict[str, Contestant],
    swapped: Sequence[float],
    tolerance: float,
    console: Console,
) -> None:
    """Prints scores and speed.

    Args:
        contestants: ``"original"`` and ``"accelerated"``, both trained from the same weights on the same batches.
        swapped: AUC per task of the original's trained weights, predicted by the fused levels.
        tolerance: between two trainings that add up in another order.

    Raises:
        SystemExit: scores differ by more than that; with the same weights by more than rounding can do.
    """
    scores = {name: contestant.auc(census.test) for name, contestant in contestants.items()}
    speeds = {
        name: len(census.train) / statistics.median(contestant.seconds) for name, contestant in contestants.items()
    }
    table = Table(title=f"{library} on Census-Income: AUC on the test rows, and its own training")
    for heading in ("", *TASKS, "samples per second"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("original", *(f"{auc:.5f}" for auc in scores["original"]), f"{speeds['original']:,.0f}")
    table.add_row("the same weights, accelerated", *(f"{auc:.5f}" for auc in swapped), "")
    table.add_row(
        "trained accelerated", *(f"{auc:.5f}" for auc in scores["accelerated"]), f"{speeds['accelerated']:,.0f}"
    )
    console.print(f"Rows: {len(census.train):,} train, {len(census.test):,} test.")
    console.print(table)
    ratios = [a / b for a, b in zip(*(contestants[name].seconds for name in ("original", "accelerated")), strict=True)]
    console.print(
        f"Speed-up of the whole training: {statistics.median(ratios):.2f}x, median of {len(ratios)} pairs of epochs."
    )
    for task, before, same, after in zip(TASKS, scores["original"], swapped, scores["accelerated"], strict=True):
        if abs(before - same) > 1e-4:
            raise SystemExit(f"{task}: expected the AUC {before:.6f} of the same weights, got {same:.6f}")
        if abs(before - after) > tolerance:
            raise SystemExit(f"{task}: expected an AUC within {tolerance} of {before:.6f}, got {after:.6f}")


def arguments(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", type=int, help="about so many rows, two thirds for training (default: all 299,285)")
    parser.add_argument("--epochs", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=1024, help="default: %(default)s")
    return parse(parser, argv, rows=1000, epochs=1, batch_size=2)

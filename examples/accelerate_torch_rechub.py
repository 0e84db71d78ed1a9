"""torch-rechub's own PLE on Census-Income with its own trainer, as it is and after ``ple_fast.accelerate``.

Both start from the same weights and see the same batches. Prints AUC per task, and the speed of whole epochs.

Usage: python examples/accelerate_torch_rechub.py [--rows N] [--epochs N] [--batch-size N]
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder
os.environ.setdefault("TQDM_DISABLE", "1")  # the trainer's own bars: this example says itself how far it is

import numpy as np
import numpy.typing as npt
import torch
from torch_rechub.basic.features import DenseFeature, SparseFeature
from torch_rechub.models.multi_task import PLE
from torch_rechub.trainers import MTLTrainer

import ple_fast
from examples.progress import console_for, progress
from examples.swap_census import Census, Contestant, Rows, alternate, arguments, compare, load

TASK_TYPES = ["classification", "classification"]
EXPERTS = {"dims": [256, 128], "activation": "relu", "dropout": 0.0}
TOLERANCE = 0.01
"""Between the AUCs of two trainings: as far apart as two orders of summation get."""


def build(census: Census) -> torch.nn.Module:
    """Embeddings of width 8, two levels with two experts per task and two shared ones, towers of 32 units."""
    features = [
        SparseFeature(name, vocab_size=census.categories[name], embed_dim=8)
        if name in census.categories
        else DenseFeature(name)
        for name in census.train.features
    ]
    model: torch.nn.Module = PLE(
        features, TASK_TYPES, n_level=2, n_expert_specific=2, n_expert_shared=2, expert_params=EXPERTS,
        tower_params_list=[{"dims": [32]}, {"dims": [32]}],
    )  # fmt: skip
    return model


def batches(rows: Rows, order: npt.NDArray[np.int64], size: int) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """What the trainer takes in place of a DataLoader: ready batches, so that no loader is timed."""
    columns = {name: torch.from_numpy(column[order]) for name, column in rows.features.items()}
    labels = torch.from_numpy(rows.labels[order])
    # Batch norm has no statistics of a last batch of one row.
    starts = range(0, len(order) - 1, size)
    return [({name: column[i : i + size] for name, column in columns.items()}, labels[i : i + size]) for i in starts]


def contestant(model: torch.nn.Module, train: list[Any], test: list[Any]) -> Contestant:
    """A model with a trainer of torch-rechub."""
    trainer = MTLTrainer(model, TASK_TYPES, optimizer_params={"lr": 1e-3})
    features = [x for x, _ in test]
    return Contestant(
        epoch=lambda: trainer.train_one_epoch(train), predict=lambda: np.array(trainer.predict(model, features))
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Trains both, compares."""
    options = arguments((__doc__ or "").partition("\n")[0], argv)
    torch.manual_seed(0)
    console = console_for()
    with progress(console, "torch-rechub: loading") as work:
        census = load(options.rows)
        original = build(census)
        fused = copy.deepcopy(original)
        print(ple_fast.accelerate(fused, strict=True))  # the one line

        train = batches(census.train, np.random.default_rng(0).permutation(len(census.train)), options.batch_size)
        test = batches(census.test, np.arange(len(census.test)), options.batch_size)
        contestants = {
            "original": contestant(original, train, test),
            "accelerated": contestant(fused, train, test),
        }
        alternate(contestants, options.epochs, work)

        swapped = copy.deepcopy(original)
        ple_fast.accelerate(swapped)
        again = contestant(swapped, train, test).auc(census.test)
        compare("torch-rechub", census, contestants, again, TOLERANCE, console)


if __name__ == "__main__":
    main()

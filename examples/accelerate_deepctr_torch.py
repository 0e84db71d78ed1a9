"""DeepCTR-Torch's own PLE on Census-Income with its own ``fit``, as it is and after ``ple_fast.accelerate``.

Both start from the same weights and see the same batches. Prints AUC per task, and the speed of whole epochs.

Usage: python examples/accelerate_deepctr_torch.py [--rows N] [--epochs N] [--batch-size N]
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

import torch
from deepctr_torch.inputs import DenseFeat, SparseFeat
from deepctr_torch.models import PLE

import ple_fast
from examples.progress import console_for, progress
from examples.swap_census import TASKS, Census, Contestant, alternate, arguments, compare, load

TOLERANCE = 0.01
"""Between the AUCs of two trainings: as far apart as two orders of summation get."""


def build(census: Census) -> Any:
    """Embeddings of width 8, two levels with two experts per task and two shared ones, the library's own widths."""
    features = [
        SparseFeat(name, vocabulary_size=census.categories[name], embedding_dim=8)
        if name in census.categories
        else DenseFeat(name, 1)
        for name in census.train.features
    ]
    # Its default deviation of the initial weights, 1e-4, needs far more steps than an example has.
    return PLE(features, shared_expert_num=2, specific_expert_num=2, num_levels=2, task_names=TASKS, init_std=0.05)


def contestant(model: Any, census: Census, size: int) -> Contestant:
    """A model with its own ``compile``, ``fit`` and ``predict``."""
    model.compile("adam", loss=["binary_crossentropy"] * len(TASKS))
    epochs: list[int] = []

    def epoch() -> None:
        torch.manual_seed(len(epochs))  # of the shuffling
        epochs.append(model.fit(dict(census.train.features), census.train.labels, size, epochs=1, verbose=0))

    return Contestant(epoch=epoch, predict=lambda: model.predict(dict(census.test.features), size))


def main(argv: Sequence[str] | None = None) -> None:
    """Trains both, compares."""
    options = arguments((__doc__ or "").partition("\n")[0], argv)
    console = console_for()
    with progress(console, "DeepCTR-Torch: loading") as work:
        census = load(options.rows)
        original = build(census)
        fused = copy.deepcopy(original)
        print(ple_fast.accelerate(fused, strict=True))  # the one line

        contestants = {
            "original": contestant(original, census, options.batch_size),
            "accelerated": contestant(fused, census, options.batch_size),
        }
        alternate(contestants, options.epochs, work)

        swapped = copy.deepcopy(original)
        swapped.optim = None  # it holds the parameters of this copy, which is not going to train
        ple_fast.accelerate(swapped)
        again = contestant(swapped, census, options.batch_size).auc(census.test)
        compare("DeepCTR-Torch", census, contestants, again, TOLERANCE, console)


if __name__ == "__main__":
    main()

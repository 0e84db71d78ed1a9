"""Trains PLE on Census-Income in Lightning: its Trainer and checkpoints, torchmetrics' AUC, our trunk and joint loss.

The trunk is an ordinary module: Lightning moves it, wraps it for DDP, saves and loads it as it does any other. What is
not Lightning's is three lines: ``PLE``, ``JointLoss``, and ``step_epoch`` at the end of an epoch.

Usage: python examples/train_lightning.py [--rows N] [--epochs N] [--batch-size N] [--precision bf16-mixed] [--out DIR]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryAUROC

from examples.census_data import Split, about, load
from examples.census_income import LEARNING_RATE, MODELS, TASKS, TOWER_UNITS, parse
from examples.progress import Work, console_for, progress
from ple_fast import PLE
from ple_fast.losses import JointLoss
from ple_fast.model import Encoded
from ple_fast.model.embedding import FeatureEmbedding
from ple_fast_encoder import Column

WATCHED = "validation AUC"
SEED = 0


class CensusPLE(lightning.LightningModule):  # type: ignore[misc]  # untyped to mypy, which skips it
    """Embeddings, PLE, and a tower per task.

    Args:
        columns: what encoded the data.
        learning_rate: of Adam.
    """

    def __init__(self, columns: Sequence[Column], learning_rate: float = LEARNING_RATE) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.embedding = FeatureEmbedding(columns)
        self.trunk = PLE(self.embedding.out_features, len(TASKS), **MODELS["ple"].options)
        units = self.trunk.out_features, *TOWER_UNITS
        self.towers = nn.ModuleList(nn.Sequential(nn.Linear(*units), nn.ReLU(), nn.Linear(units[-1], 1)) for _ in TASKS)
        self.joint_loss = JointLoss(TASKS)
        # One per task and split: torchmetrics gathers what all ranks saw.
        names = [f"{split} {task.name}" for split in ("validation", "test") for task in TASKS]
        self.aucs = nn.ModuleDict({name: BinaryAUROC() for name in names})

    def forward(self, codes: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """Logits ``(B,)`` by task."""
        mixtures = self.trunk(self.embedding(Encoded(codes, numbers))).unbind(1)
        return {
            task.name: tower(mixture).squeeze(1)
            for task, tower, mixture in zip(TASKS, self.towers, mixtures, strict=True)
        }

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        codes, numbers, *labels = batch
        joint = self.joint_loss(self(codes, numbers), _by_task(labels))
        self.log("training loss", joint.total.detach(), batch_size=len(codes))
        total: Tensor = joint.total
        return total

    def on_train_epoch_end(self) -> None:
        self.joint_loss.step_epoch()  # the tasks' weights may change per epoch (PLE paper, eq. 10)

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self._count("validation", batch)

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self._count("test", batch)

    def _count(self, split: str, batch: tuple[Tensor, ...]) -> None:
        codes, numbers, *labels = batch
        outputs = self(codes, numbers)
        for name, label in _by_task(labels).items():
            metric: Any = self.aucs[f"{split} {name}"]
            metric.update(outputs[name].float(), label.long())

    def on_validation_epoch_end(self) -> None:
        self.log(WATCHED, torch.stack(list(self._scores("validation").values())).mean(), prog_bar=True)

    def on_test_epoch_end(self) -> None:
        self.log_dict({f"test AUC, {name}": auc for name, auc in self._scores("test").items()})

    def _scores(self, split: str) -> dict[str, Tensor]:
        scores = {}
        for task in TASKS:
            metric: Any = self.aucs[f"{split} {task.name}"]
            scores[task.name] = metric.compute()
            metric.reset()
        return scores

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class Shown(Callback):  # type: ignore[misc]  # untyped to mypy, which skips it
    """Tells what the examples show of a run."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        epoch, batches = trainer.current_epoch + 1, trainer.num_training_batches
        self.work.now(f"training, epoch {epoch}", trainer.global_step, trainer.max_epochs * batches)


def _by_task(labels: Sequence[Tensor]) -> dict[str, Tensor]:
    return {task.name: label for task, label in zip(TASKS, labels, strict=True)}


def loader(split: Split, batch_size: int, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of codes, numbers and the labels of each task. Encoded rows are tensors, so no worker would help."""
    labels = (torch.from_numpy(split.labels[task.name]) for task in TASKS)
    return DataLoader(TensorDataset(*split.rows, *labels), batch_size, shuffle=shuffle, drop_last=shuffle)


def main(argv: Sequence[str] | None = None) -> None:
    """Load, train, test the best epoch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, help="train and test on about so many rows (default: all 299,285)")
    parser.add_argument("--epochs", type=int, default=4, help="at most; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=1024, help="default: %(default)s")
    precisions = ("32-true", "bf16-mixed")
    parser.add_argument("--precision", default="32-true", choices=precisions, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/lightning"), help="folder (default: %(default)s)")
    options = parse(parser, argv, rows=1000, epochs=1, batch_size=2)
    size = options.batch_size
    console = console_for()
    lightning.seed_everything(SEED, verbose=False)
    best = ModelCheckpoint(options.out, "best", monitor=WATCHED, mode="max", enable_version_counter=False)
    with progress(console, "loading") as work:
        data = load(options.rows)
        trainer = lightning.Trainer(
            max_epochs=options.epochs,
            precision=options.precision,
            callbacks=[best, EarlyStopping(WATCHED, patience=2, mode="max"), Shown(work)],
            logger=CSVLogger(options.out, name=None, version=""),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        model = CensusPLE(data.columns)
        trainer.fit(model, loader(data.train, size, shuffle=True), loader(data.validation, size))
        work.now("scoring")
        (found,) = trainer.test(model, loader(data.test, size), ckpt_path="best", verbose=False)
    console.print(about(data))
    console.print(f"Best {WATCHED}: {best.best_model_score:.4f}", soft_wrap=True)
    for name, auc in found.items():
        console.print(f"{name}: {auc:.4f}")
    console.print(f"Wrote best.ckpt and metrics.csv to {options.out}.", soft_wrap=True)


if __name__ == "__main__":
    main()

"""Trains PLE on Census-Income on any number of ranks (DistributedDataParallel), and goes on where a run was stopped.

A step takes one batch, of which each rank computes a share; the joint loss counts labels over all ranks. So the loss
curve does not depend on the number of ranks, but for rounding and for what dropout draws. A run that was killed goes on
from its last checkpoint, in mid-epoch: on as many ranks as before with the same numbers as if nothing had happened.

Usage: torchrun --standalone --nproc-per-node 2 examples/train_distributed.py [--rows N] [--epochs N] [--out DIR]
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from examples.census_data import Data, about, load
from examples.census_income import LEARNING_RATE, MODELS, TASKS, TOWER_UNITS, Trainings, aucs, parse
from examples.progress import Work, console_for, progress
from ple_fast.model import Checkpoint, MultiTaskModel, Step

CHECKPOINT, CURVE, MODEL = "checkpoint.pt", "losses.csv", "model"
SETTINGS = ("rows", "batch_size", "dropout")
"""What the loss curve depends on: a checkpoint is not continued with others."""
SEED = 0


class Training:
    """What a checkpoint holds, as one rank has it: model, optimizer, the losses so far, and the state of dropout."""

    def __init__(self, data: Data, options: argparse.Namespace, device: torch.device) -> None:
        self.device, self.rank, self.ranks = device, dist.get_rank(), dist.get_world_size()
        self.rows = data.train.rows
        self.batch_size, self.epochs = options.batch_size, options.epochs
        self.batches = -(-len(self.rows) // self.batch_size)
        self.labels = {name: torch.from_numpy(label) for name, label in data.train.labels.items()}
        self.checkpoint = Checkpoint(options.out / CHECKPOINT, {name: getattr(options, name) for name in SETTINGS})
        self.losses: list[Tensor] = []
        torch.manual_seed(SEED)
        self.model = MultiTaskModel(
            data.columns,
            TASKS,
            trunk=MODELS["ple"].trunk,
            trunk_options={**MODELS["ple"].options, "dropout": options.dropout},
            tower_units=TOWER_UNITS,
            tower_dropout=options.dropout,
            process_group=dist.group.WORLD,
        ).to(device)
        # Every parameter takes part in every step, so there are no unused ones to look for.
        self.parallel = DistributedDataParallel(self.model, device_ids=[device] if device.type == "cuda" else None)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)
        # DDP lays out its buckets anew after the first backward, and a sum over three ranks or more rounds by layout.
        # With that one done here, the first step of a resumed run rounds as the same step of a run that goes through.
        self.backward(torch.arange(self.ranks))
        torch.manual_seed(SEED + 1 + self.rank)  # from here on each rank drops units of its own

    def backward(self, batch: Tensor) -> Tensor:
        """Gradients of the rows ``batch``, of which each rank has a share (of a small last batch maybe an empty one).

        Returns:
            The loss over all ranks.
        """
        share = batch.tensor_split(self.ranks)[self.rank]
        labels = {name: label[share].to(self.device) for name, label in self.labels.items()}
        loss = self.model.joint_loss(self.parallel(self.rows.rows(share).to(self.device)), labels).total
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        mean: Tensor = loss.detach() / self.ranks
        dist.all_reduce(mean)
        return mean

    def save(self) -> None:
        """One file for all ranks, which rank 0 writes. It is replaced at once: a kill leaves the old one or the new."""
        generators: list[Any] = [None] * self.ranks
        own = [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [])]
        dist.gather_object(own, generators if self.rank == 0 else None)
        if self.rank:
            return
        self.checkpoint.write(
            {
                "losses": torch.stack(self.losses).cpu(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "generators": generators,
            }
        )

    def resume(self) -> None:
        """Goes on where :meth:`save` was called, if it was: on as many ranks, or on others. Rank 0 reads the file.

        Raises:
            SystemExit: the checkpoint is one of other settings, or of more epochs.
        """
        read: list[Any] = [self.checkpoint.read() if self.rank == 0 else None]
        dist.broadcast_object_list(read)
        (state,) = read
        if state is None:
            return
        try:
            self.checkpoint.check(state)  # on every rank: none goes on alone
        except ValueError as error:
            raise SystemExit(str(error)) from error
        begun = -(-len(state["losses"]) // self.batches)
        if begun > self.epochs:
            file = self.checkpoint.file
            raise SystemExit(f"{file}: expected --epochs {begun} or more, which it has begun, got {self.epochs}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = list(state["losses"].to(self.device))
        if self.rank < len(state["generators"]):  # a rank that was not there keeps the seed that it has
            own = state["generators"][self.rank]
            torch.set_rng_state(own[0])
            if self.device.type == "cuda" and len(own) > 1:
                torch.cuda.set_rng_state(own[1], self.device)


def train(training: Training, options: argparse.Namespace, work: Work) -> None:
    """To the end of the last epoch, from wherever ``training`` is."""
    losses, batches = training.losses, training.batches
    show = Trainings(work, 1).of(f"PLE, {training.device.type} ranks: {training.ranks}")
    for epoch in range(len(losses) // batches, options.epochs):
        generator = torch.Generator().manual_seed(SEED + epoch)  # the same order on every rank, in every run
        order = torch.randperm(len(training.rows), generator=generator)
        for batch in order.split(training.batch_size)[len(losses) % batches :]:
            losses.append(training.backward(batch))
            training.optimizer.step()
            at = len(losses) - epoch * batches
            if at == batches:
                training.model.joint_loss.step_epoch()  # the tasks' weights may change per epoch (eq. 10)
            if at == batches or len(losses) % options.checkpoint_every == 0:
                training.save()
            show(Step(epoch + 1, options.epochs, at, batches, losses[-1]))


def predictions(training: Training, data: Data) -> dict[str, Any] | None:
    """Of all test rows, on rank 0; each rank predicts its share."""
    share = torch.arange(len(data.test.rows)).tensor_split(training.ranks)[training.rank]
    own = training.model.predict(data.test.rows.rows(share))
    parts: list[Any] = [None] * training.ranks
    dist.gather_object(own, parts if training.rank == 0 else None)
    return None if training.rank else {name: np.concatenate([part[name] for part in parts]) for name in own}


def run(options: argparse.Namespace, device: torch.device) -> None:
    """One rank's part of everything: load, resume, train, score, write."""
    console = console_for(quiet=dist.get_rank() > 0)
    options.out.mkdir(parents=True, exist_ok=True)
    with progress(console, "loading") as work:
        data = load(options.rows)
        training = Training(data, options, device)
        training.resume()
        if training.losses:
            console.print(f"Resumed after {len(training.losses)} batches.")
        train(training, options, work)
        work.now("scoring")
        predicted = predictions(training, data)
    if predicted is None:
        return
    console.print(about(data))
    for name, auc in aucs(predicted, data.test.labels).items():
        console.print(f"AUC on the test data, {name}: {auc:.4f}")
    lines = [f"{number},{float(loss):.9g}" for number, loss in enumerate(training.losses, 1)]
    (options.out / CURVE).write_text("\n".join(["batch,loss", *lines, ""]), encoding="utf-8")
    training.model.save(options.out / MODEL)
    console.print(f"Wrote {CURVE} and {MODEL} to {options.out}.", soft_wrap=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, help="train and test on about so many rows (default: all 299,285)")
    parser.add_argument("--epochs", type=int, default=2, help="default: %(default)s; more of them go on with a run")
    parser.add_argument("--batch-size", type=int, default=1024, help="of all ranks together (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.1, help="in experts and towers (default: %(default)s)")
    parser.add_argument("--checkpoint-every", type=int, default=50, help="batches (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if each rank has a GPU, else cpu")
    parser.add_argument("--out", type=Path, default=Path("out/distributed"), help="folder (default: %(default)s)")
    options = parse(parser, argv, rows=1000, epochs=1, batch_size=1, checkpoint_every=1)
    if not 0.0 <= options.dropout < 1.0:
        parser.error(f"--dropout: expected 0 or more and less than 1, got {options.dropout:g}")
    if "LOCAL_WORLD_SIZE" not in os.environ:
        parser.error("expected torchrun around it: torchrun --standalone --nproc-per-node 2 " + sys.argv[0])
    ranks, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if options.device == "cuda" and gpus < ranks:
        parser.error(f"--device cuda: expected a GPU for each of the {ranks} ranks of this machine, got {gpus}")
    options.device = options.device or ("cuda" if gpus >= ranks else "cpu")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """One rank, as torchrun starts it."""
    options = arguments(argv)
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        run(options, device)
    finally:
        # Model and DDP hold the group, in cycles. Threads of gloo that outlive the interpreter may abort the process.
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

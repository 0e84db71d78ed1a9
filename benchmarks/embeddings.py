"""What a training step costs by the number of ids: ``python benchmarks/embeddings.py [--rounds N] [--json PATH]``.

A whole step as ``fit`` makes it (look-up, trunk, towers, joint loss, backward, Adam), with dense gradients of tables
under Adam and with sparse ones under SparseAdam, for a table of 20 thousand to 2 million ids, drawn uniformly or by
Zipf's law (the k-th id as often as 1 / k). Every step has a batch of its own, so that rows come from where a training
finds them and not from a cache that the step before has filled. One thread, and the process's own time of the
processor. Nothing is timed before the first losses with both kinds of gradients have agreed.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

import torch
from torch import Tensor

from benchmarks import result_files
from benchmarks.configs import EMBEDDING_BATCH, EMBEDDING_ROWS, EMBEDDINGS, ROUNDS, SEED, ModelConfig
from benchmarks.environment import ROOT, machine_name
from benchmarks.paired import Paired, host_clock, time_paired
from benchmarks.steps import WrongResultError
from ple_fast.losses import TaskLoss
from ple_fast.model import Categorical, Encoded, MultiTaskModel
from ple_fast.model.run import run_for
from ple_fast.model.updates import Updates

GRADIENTS = ("dense", "sparse")
IDS = ("uniform", "zipf")
BATCHES = 64
"""That steps take in turn."""
SAMPLE_S = 0.2
"""Of several steps, with a batch each."""
TOLERANCE = 1e-5
"""Relative, of the first loss."""


def case(gradients: str, ids: str, rows: int) -> str:
    """The name of what is timed."""
    return f"{gradients}, {ids}, {rows:,} ids"


def draw(ids: str, rows: int, count: int, generator: torch.Generator) -> Tensor:
    """int32 ``(count,)``: codes 1 to ``rows``, scattered over the table."""
    if ids == "uniform":
        return torch.randint(1, rows + 1, (count,), generator=generator, dtype=torch.int32)
    shares = torch.arange(1, rows + 1, dtype=torch.float64).reciprocal().cumsum(0)
    ranks = torch.searchsorted(shares, torch.rand(count, generator=generator, dtype=torch.float64) * shares[-1])
    places = torch.randperm(rows, generator=generator)  # else the frequent ids would share their pages of memory
    return (places[ranks.clamp(max=rows - 1)] + 1).int()


def batches(config: ModelConfig, ids: str, batch: int) -> list[tuple[Encoded, dict[str, Tensor]]]:
    """Rows and labels of ``BATCHES`` steps."""
    generator = torch.Generator().manual_seed(SEED)
    count = BATCHES * batch
    (_, rows), *others = config.fields
    codes = [draw(ids, rows, count, generator)]
    codes += [torch.randint(1, size + 1, (count,), generator=generator, dtype=torch.int32) for _, size in others]
    labels = torch.randint(0, 2, (config.num_tasks, count), generator=generator).float()
    every, names = torch.stack(codes, dim=1), [f"task{t}" for t in range(config.num_tasks)]
    return [
        (Encoded(part, torch.empty(batch, 0)), dict(zip(names, own, strict=True)))
        for part, own in zip(every.split(batch), labels.split(batch, dim=1), strict=True)
    ]


def make_model(config: ModelConfig, gradients: str) -> MultiTaskModel:
    """From seeded weights."""
    torch.manual_seed(SEED)
    return MultiTaskModel(
        [Categorical(name, size=rows, width=config.width) for name, rows in config.fields],
        [TaskLoss(f"task{t}") for t in range(config.num_tasks)],
        trunk_options={
            "num_levels": config.num_levels,
            "task_experts": config.task_experts,
            "shared_experts": config.shared_experts,
            "expert_units": config.units,
        },
        tower_units=config.tower_units,
        sparse_embeddings=gradients == "sparse",
    )


def make_steps(config: ModelConfig, gradients: str, batch: int) -> dict[str, Callable[[], Tensor]]:
    """A step by ``IDS``, on one model; each call takes the next batch and gives its loss."""
    model = make_model(config, gradients)
    updates = Updates(run_for(None, model, torch.optim.Adam, seed=SEED, lr=1e-3))
    updates.begin()

    def step(turn: itertools.cycle[tuple[Encoded, dict[str, Tensor]]]) -> Tensor:
        rows, labels = next(turn)
        loss: Tensor = model.joint_loss(model(rows), labels).total
        updates.step(loss)
        return loss.detach()

    return {ids: partial(step, itertools.cycle(batches(config, ids, batch))) for ids in IDS}


def measure(
    config: ModelConfig = EMBEDDINGS,
    rows: Sequence[int] = EMBEDDING_ROWS,
    batch: int = EMBEDDING_BATCH,
    *,
    rounds: int = ROUNDS,
    sample_s: float = SAMPLE_S,
) -> Paired:
    """Seconds of the processor per step of every ``case``, interleaved.

    Raises:
        WrongResultError: the first losses with dense and with sparse gradients differ.
    """
    steps: dict[str, Callable[[], object]] = {}
    for count in rows:
        sized = dataclasses.replace(config, fields=((config.fields[0][0], count), *config.fields[1:]))
        made = {gradients: make_steps(sized, gradients, batch) for gradients in GRADIENTS}
        dense, sparse = (float(own[IDS[0]]()) for own in made.values())
        if not abs(dense - sparse) <= TOLERANCE * abs(dense):
            raise WrongResultError(f"{count:,} ids: expected the same first loss, got {dense} and {sparse}")
        steps |= {case(gradients, ids, count): step for gradients, own in made.items() for ids, step in own.items()}
    gc.collect()
    clock = partial(host_clock, read=time.process_time)
    return time_paired(steps, rounds=rounds, min_sample_s=sample_s, clock=clock)


def entries(paired: Paired, rows: Sequence[int] = EMBEDDING_ROWS, batch: int = EMBEDDING_BATCH) -> list[dict[str, Any]]:
    """Of a result file: for each kind of ids and number of them the times of a step, with its growth from the least."""
    found = []
    for ids in IDS:
        for count in rows:
            times = {}
            for gradients in GRADIENTS:
                own, least = case(gradients, ids, count), case(gradients, ids, rows[0])
                times[gradients] = {**paired.times(own), "growth": paired.ratio(own, least)}
            found.append({"ids": ids, "rows": count, "batch": batch, **paired.about(), "contestants": times})
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="default benchmarks/results/<machine>/embeddings.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = entries(measure(rounds=options.rounds))
    for entry in results:
        for gradients, own in entry["contestants"].items():
            print(
                f"{case(gradients, entry['ids'], entry['rows'])}: {own['median_ms']:.4g} ms, {own['growth']:.2f} x "
                f"{EMBEDDING_ROWS[0]:,} ids"
            )
    path = options.json or ROOT / "benchmarks" / "results" / machine_name() / "embeddings.json"
    result_files.write(path, "embeddings", {"results": results})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

"""What a step of a whole ``MultiTaskModel`` takes: ``python benchmarks/model_steps.py [--rounds N] [--json PATH]``.

Columns like those of KuaiRand's log, six tasks: PLE with its towers one by one and as one level, and what came after
PLE. A training step is look-up, trunk, towers, joint loss, backward and Adam; a prediction is forward alone. Trunks of
one kind of expert are as wide as PLE's, so what a gate, embeddings of tasks or a prior cost is seen beside it. Nothing
is timed before both kinds of towers have given the same loss.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

import torch
from torch import Tensor

from benchmarks import result_files
from benchmarks.configs import KUAIRAND, MODEL_STEPS, ROUNDS, SEED, ModelConfig
from benchmarks.environment import ROOT, machine_name
from benchmarks.paired import Paired, time_paired
from benchmarks.steps import WrongResultError
from ple_fast.losses import TaskLoss
from ple_fast.model import Categorical, Encoded, MultiTaskModel, tower_stack

MODEL = dataclasses.replace(KUAIRAND, num_tasks=6)
TOLERANCE = 1e-5
"""Relative, of the first loss."""
BASE = "PLE"
ONE_BY_ONE = "PLE, towers one by one"


@contextmanager
def one_by_one() -> Iterator[None]:
    """No batch is large enough to stack towers."""
    before = tower_stack.STACKED_PRODUCTS
    tower_stack.STACKED_PRODUCTS = sys.maxsize
    try:
        yield
    finally:
        tower_stack.STACKED_PRODUCTS = before


def models(config: ModelConfig) -> dict[str, MultiTaskModel]:
    """By name, each from the same seed."""
    levels = {"num_levels": config.num_levels}
    experts = {"task_experts": config.task_experts, "shared_experts": config.shared_experts}
    units = {"expert_units": config.units}
    names = [name for name, _ in config.fields]
    tasks = range(config.num_tasks)
    groups = (tuple(tasks[::2]), tuple(tasks[1::2]))
    of_home = {"groups": groups, "group_experts": config.shared_experts, **experts, **units}
    made: dict[str, Mapping[str, Any]] = {
        ONE_BY_ONE: {"trunk_options": levels | experts | units},
        BASE: {"trunk_options": levels | experts | units},
        "PLE with PEPNet": {
            "trunk_options": levels | experts | units, "domain_columns": names[-1:], "personal_columns": names[:2]
        },
        "PLE, embeddings of tasks": {"trunk_options": levels | experts | units, "task_embeddings": True},
        "STEM": {"trunk": "stem", "trunk_options": experts | units, "task_embeddings": True},
        "HoME": {"trunk": "home", "trunk_options": of_home},
    }  # fmt: skip
    found = {}
    for name, more in made.items():
        torch.manual_seed(SEED)
        found[name] = MultiTaskModel(
            [Categorical(field, size=rows, width=config.width) for field, rows in config.fields],
            [TaskLoss(f"task{t}") for t in range(config.num_tasks)],
            tower_units=config.tower_units,
            **more,
        )
    return found


def rows(config: ModelConfig, batch: int) -> tuple[Encoded, dict[str, Tensor]]:
    """A batch and its labels."""
    generator = torch.Generator().manual_seed(SEED)
    codes = [torch.randint(1, size + 1, (batch,), generator=generator, dtype=torch.int32) for _, size in config.fields]
    labels = torch.randint(0, 2, (config.num_tasks, batch), generator=generator).float()
    named = {f"task{t}": own for t, own in enumerate(labels)}
    return Encoded(torch.stack(codes, dim=1), torch.empty(batch, 0)), named


def steps_of(config: ModelConfig, mode: str, batch: int) -> dict[str, Callable[[], object]]:
    """A step by contestant, checked.

    Raises:
        WrongResultError: the two kinds of towers do not give the same loss.
    """
    data, labels = rows(config, batch)
    losses: dict[str, float] = {}
    steps: dict[str, Callable[[], object]] = {}
    for name, model in models(config).items():
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

        def train(name: str, model: MultiTaskModel, optimizer: torch.optim.Optimizer) -> float:
            with one_by_one() if name == ONE_BY_ONE else nullcontext():
                loss: Tensor = model.joint_loss(model(data), labels).total
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            return float(loss.detach())

        @torch.inference_mode()
        def infer(name: str, model: MultiTaskModel) -> object:
            with one_by_one() if name == ONE_BY_ONE else nullcontext():
                return model(data)

        with torch.no_grad(), one_by_one() if name == ONE_BY_ONE else nullcontext():
            losses[name] = float(model.joint_loss(model(data), labels).total)
        if mode == "train":
            steps[name] = partial(train, name, model, optimizer)
        else:
            steps[name] = partial(infer, name, model.eval())
    if not abs(losses[BASE] - losses[ONE_BY_ONE]) <= TOLERANCE * abs(losses[BASE]):
        raise WrongResultError(f"{batch} rows: expected one loss, got {losses[BASE]} and {losses[ONE_BY_ONE]}")
    return steps


def entry(config: ModelConfig, mode: str, batch: int, paired: Paired) -> dict[str, Any]:
    """Of a result file: times, and each over PLE's."""
    times = {name: paired.times(name, BASE) for name in paired.samples}
    return {"mode": mode, "batch": batch, "tasks": config.num_tasks, **paired.about(), "contestants": times}


def measure(
    config: ModelConfig = MODEL,
    cases: Sequence[tuple[str, int]] = MODEL_STEPS,
    *,
    rounds: int = ROUNDS,
) -> list[dict[str, Any]]:
    """Entries by mode and rows."""
    return [
        entry(config, mode, batch, time_paired(steps_of(config, mode, batch), rounds=rounds)) for mode, batch in cases
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="default benchmarks/results/<machine>/model_steps.json")
    options = parser.parse_args(arguments)
    results = measure(rounds=options.rounds)
    for own in results:
        for name, times in own["contestants"].items():
            ratio = times[f"ratio_to_{BASE}"]
            print(f"{own['mode']}, {own['batch']} rows, {name}: {times['median_ms']:.4g} ms, {ratio:.2f} of PLE")
    path = options.json or ROOT / "benchmarks" / "results" / machine_name() / "model_steps.json"
    result_files.write(path, "model_steps", {"results": results})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

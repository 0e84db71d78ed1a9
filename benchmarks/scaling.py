"""Weak scaling of DistributedDataParallel on a CPU: a whole model's training step on one rank and on more, each rank
with the same batch and one thread, with the fused trunk and with the plain loop.

All ranks are started once, and a round times every number of ranks and both trunks, one after the other; ranks that a
case does not use wait. Nothing is timed before both trunks have given the same losses of two steps.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.configs import SEED, ModelConfig, TrunkConfig
from benchmarks.contestants import BASELINE, build
from benchmarks.paired import Paired, host_clock, time_paired
from benchmarks.steps import WrongResultError
from ple_fast.losses import TaskLoss
from ple_fast.model import Categorical, Encoded, MultiTaskModel

TRUNKS = ("fast", BASELINE)
TOLERANCE = 1e-4
"""Relative, in float32, of the losses of the first two steps."""


def case(trunk: str, batch: int, ranks: int, *, apart: bool = False) -> str:
    """The name of what is timed. ``apart``: ranks at the same time that know nothing of one another, each training a
    model of its own: what the machine itself takes from them."""
    return f"{trunk}, {batch} on each of {ranks}{' apart' if apart else ''}"


class Stacked(nn.Module):
    """A trunk that returns T tensors (B, H), as a model takes it: (B, T, H)."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(list(self.trunk(x)), dim=1)


def make_model(trunk: str, config: ModelConfig, group: dist.ProcessGroup) -> MultiTaskModel:
    """The model with one of ``TRUNKS``, from the same weights."""
    size = TrunkConfig(
        "scaling", 1, len(config.fields) * config.width, config.num_tasks, config.task_experts, config.shared_experts,
        config.units, config.num_levels,
    )  # fmt: skip
    made = build(trunk, size)
    inner = made.trunk if trunk == "fast" else Stacked(made)
    assert isinstance(inner, nn.Module)
    torch.manual_seed(SEED)
    return MultiTaskModel(
        [Categorical(name, size=rows, width=config.width) for name, rows in config.fields],
        [TaskLoss(f"task{t}") for t in range(config.num_tasks)],
        trunk=inner,
        tower_units=config.tower_units,
        process_group=group,
    )


def make_step(trunk: str, config: ModelConfig, batch: int, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """A training step of this rank, embeddings to optimizer; it returns the rank's loss."""
    model = make_model(trunk, config, group)
    parallel = DistributedDataParallel(model, process_group=group)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(SEED + dist.get_rank())
    codes = [torch.randint(1, size + 1, (batch,), generator=generator) for _, size in config.fields]
    rows = Encoded(torch.stack(codes, dim=1).int(), torch.empty(batch, 0))
    labels = {name: torch.randint(0, 2, (batch,), generator=generator).float() for name in model.task_names}

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = model.joint_loss(parallel(rows), labels).total
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def together(call: Callable[[], object], repeats: int) -> float:
    """Seconds per call, after all ranks have met."""
    dist.barrier()
    return host_clock(call, repeats)


def _checked(config: ModelConfig, batch: int, group: dist.ProcessGroup) -> dict[str, Callable[[], Tensor]]:
    """The step with each trunk."""
    made = {trunk: make_step(trunk, config, batch, group) for trunk in TRUNKS}
    losses = {trunk: torch.stack([step(), step()]) for trunk, step in made.items()}
    fast, loop = losses.values()
    if not float((fast - loop).norm()) <= TOLERANCE * float(loop.norm()):
        ranks = dist.get_world_size(group)
        raise WrongResultError(f"{batch} rows on each of {ranks} ranks: expected the same losses, got {losses}")
    return made


def time_ranks(config: ModelConfig, batches: Sequence[int], counts: Sequence[int], rounds: int) -> Paired:
    """What one rank measures; the times of rank 0, which takes part in every case, are those that count.

    Raises:
        WrongResultError: the first losses with the two trunks differ.
    """
    rank = dist.get_rank()
    alone = [dist.new_group([number]) for number in range(max(counts))][rank]
    groups = {count: dist.new_group(range(count)) for count in counts if count > 1}
    steps: dict[str, Callable[[], object]] = {}

    def add(made: dict[str, Callable[[], Tensor]], batch: int, count: int, *, apart: bool = False) -> None:
        for trunk, step in made.items():
            steps[case(trunk, batch, count, apart=apart)] = step if rank < count else lambda: None

    for batch in batches:
        single = _checked(config, batch, alone)
        add(single, batch, 1)
        for count, group in groups.items():
            add(_checked(config, batch, group) if rank < count else single, batch, count)
            add(single, batch, count, apart=True)
    # One call per sample: every rank must make as many, or a sum over ranks waits for ever.
    return time_paired(steps, rounds=rounds, min_sample_s=0.0, clock=together)


def _rank(rank: int, folder: str, ranks: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    paired = time_ranks(*arguments)
    if rank == 0:
        content = {"samples": paired.samples, "load": paired.load}
        (Path(folder) / "paired.json").write_text(json.dumps(content), encoding="utf-8")
    dist.barrier()
    gc.collect()  # models hold the group, whose threads must end before the interpreter does
    dist.destroy_process_group()


def measure(config: ModelConfig, batches: Sequence[int], counts: Sequence[int], rounds: int) -> Paired:
    """Seconds per step of every ``case`` of ``batches`` (rows on each rank) and ``counts`` (of ranks, 1 among them)."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (folder, max(counts), (config, batches, counts, rounds)), nprocs=max(counts))
        found = json.loads((Path(folder) / "paired.json").read_text(encoding="utf-8"))
    before, after = found["load"]
    return Paired(found["samples"], (before, after))

"""TorchRec: the page about it on two ranks, held to one process with whole tables and the whole batch."""

from __future__ import annotations

import gc
import platform
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from tests.documents import run_document
from tests.helpers import assert_close
from tests.ranks import run_ranks

PAGE = "docs/torchrec.md"
RANKS, ROWS, STEPS = 2, 12, 3
SHARDINGS = {"some by rows": ("rows", 0, 1), "all by rows": ("rows", "rows", "rows"), "whole tables": (1, 0, 1)}
"""Per table: divided by rows, or the rank that has it."""


def share(scope: dict[str, Any], step: int, rank: int, ranks: int) -> tuple[Any, Tensor]:
    """Ids, 0 to 3 per feature and sample, and labels of a rank's samples."""
    generator = torch.Generator().manual_seed(step)
    rows = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    lengths, values = [], []
    for size in scope["SIZES"].values():
        counts = torch.randint(4, (ROWS,), generator=generator)
        ids = torch.randint(size, (int(counts.sum()),), generator=generator).split(counts.tolist())
        lengths.append(counts[rows])
        values += ids[rows]
    labels = torch.randint(2, (ROWS, 2), generator=generator).float()
    ids = scope["torchrec"].KeyedJaggedTensor(list(scope["SIZES"]), torch.cat(values), lengths=torch.cat(lengths))
    return ids, labels[rows]


def whole(state: dict[str, Any]) -> dict[str, Tensor]:
    """A state dict with the tables gathered from all ranks."""
    found = {}
    for name, value in state.items():
        found[name] = torch.zeros(tuple(value.shape))
        if hasattr(value, "local_shards"):
            for shard in value.local_shards():
                place = zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
                found[name][tuple(slice(start, start + size) for start, size in place)] = shard.tensor
            dist.all_reduce(found[name])
        else:
            found[name].copy_(value)
    return found


def trained(scope: dict[str, Any], model: Any, trains: list[Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """Loss and gradients of the trunk and the towers at every step."""
    optimizer, found = torch.optim.SGD(trains, lr=scope["RATE"]), {}
    for step in range(STEPS):
        ids, labels = share(scope, step, rank, ranks)
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(model(ids), labels)
        loss.backward()
        optimizer.step()
        found[f"step {step}, loss"] = loss.detach()
        for name, parameter in model.named_parameters():
            if not name.startswith("tables."):
                found[f"step {step}, {name}.grad"] = parameter.grad.clone()
    return found


def torchrec_rank() -> None:
    compare_with_one_process()
    gc.collect()  # models hold the process group in cycles, and gloo's threads must not outlive it


def compare_with_one_process() -> None:
    """Raises where a step differs from that of one process, which every rank makes for itself."""
    scope, _ = run_document(PAGE)
    rows, table, alone = scope["row_wise"], scope["table_wise"], scope["Model"]()
    for case, places in SHARDINGS.items():
        kinds = [rows(compute_kernel="fused") if at == "rows" else table(at, compute_kernel="fused") for at in places]
        model = scope["shard"](scope["Model"](), dict(zip(scope["SIZES"], kinds, strict=True)))
        alone.load_state_dict(whole(model.state_dict()))
        dense = [p for name, p in model.named_parameters() if not name.startswith("tables.")]
        found = trained(scope, model, dense, dist.get_rank(), RANKS)
        for name, value in found.items():
            if name.endswith("loss"):  # a rank's own; gradients are averaged already
                dist.all_reduce(value)
                value /= RANKS
        expected = trained(scope, alone, list(alone.parameters()), 0, 1) | alone.state_dict()
        found |= whole(model.state_dict())
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(f"{case}, {name}", found[name], value, 1e-6)


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64" or not torch.__version__.startswith("2.13."),
    reason="fbgemm-gpu-cpu 1.8, on which TorchRec 1.8 runs here, is built for x86-64 Linux and torch 2.13",
)
def test_sharded_tables_and_the_trunk_train_as_one_process() -> None:
    run_ranks(RANKS, torchrec_rank, timeout=240.0)

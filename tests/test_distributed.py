"""DistributedDataParallel and SyncBatchNorm: ranks together compute what one process computes on the whole batch."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.nn.functional import all_reduce
from torch.fx import GraphModule
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ple_fast import PLE, STEM, ExtractionNetwork, GateSpec, HoME, MLPSpec, Topology
from tests.helpers import assert_close
from tests.ranks import run_ranks

RANKS = 2
ROWS = 6
STEPS = 3
MICRO_BATCHES = 2
NORMED = {"norm": "layer", "gate_units": (5,), "activation": "prelu"}

DDP_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "static graph": ({}, {"static_graph": True}),
    "layer norm, gradients as views": (NORMED, {"gradient_as_bucket_view": True}),
    "recomputed, static graph": ({**NORMED, "recompute": True}, {"static_graph": True}),
    "HoME": ({"groups": ((0, 2), (1,)), "norm": None, "feature_gate_rank": 3}, {}),
    "STEM": ({"trunk": STEM, "num_levels": 2}, {}),
}
"""Keywords of the trunk, and of DDP. None looks for unused parameters: a second step then fails if there is one."""


def trained(trunk: nn.Module, model: nn.Module, rank: int, ranks: int, sync_first: bool) -> dict[str, Tensor]:
    """Every gradient and parameter after steps of several micro-batches, on the share of a rank."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    generator = torch.Generator().manual_seed(2)
    found = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(MICRO_BATCHES):
            x = torch.randn(RANKS * ROWS, 7, dtype=torch.float64, generator=generator)
            keeps_back = micro < MICRO_BATCHES - 1 and not (sync_first and step == 0)
            with model.no_sync() if isinstance(model, DistributedDataParallel) and keeps_back else nullcontext():
                (model(x.chunk(ranks)[rank]).square().mean() / MICRO_BATCHES).backward()
        for name, parameter in trunk.named_parameters():
            assert parameter.grad is not None, f"{name}: expected a gradient"
            found[f"step {step}, {name}.grad"] = parameter.grad.clone()
        optimizer.step()
    return found | {name: parameter.detach().clone() for name, parameter in trunk.named_parameters()}


def ddp_trunk(options: dict[str, Any]) -> PLE | HoME | STEM:
    torch.manual_seed(1)
    options = {"expert_units": (6, 4), **options}
    trunk = options.pop("trunk", HoME if "groups" in options else PLE)
    made: PLE | HoME | STEM = trunk(7, 3, task_experts=[2, 1, 3], shared_experts=2, dtype=torch.float64, **options)
    return made


def ddp_rank() -> dict[str, dict[str, Tensor]]:
    results = {}
    for case, (options, ddp) in DDP_CASES.items():
        trunk = ddp_trunk(options)
        model = DistributedDataParallel(trunk, **ddp)
        # DDP learns a static graph from its first backward, which no_sync would take from it, whatever the model is.
        results[case] = trained(trunk, model, dist.get_rank(), RANKS, sync_first="static_graph" in ddp)
    return results


def test_ddp_with_accumulated_gradients_trains_as_one_process() -> None:
    ranks = run_ranks(RANKS, ddp_rank)
    for case, (options, _) in DDP_CASES.items():
        trunk = ddp_trunk(options)
        for name, expected in trained(trunk, trunk, 0, 1, False).items():
            for rank in range(RANKS):
                assert_close(f"{case}, rank {rank}, {name}", ranks[rank][case][name], expected, 1e-12)


WIDE: dict[str, Any] = {"expert_units": (256, 128)}


def compiled_rank() -> dict[str, tuple[int, dict[str, Tensor]]]:
    """Graphs and results. Both ways PyTorch cuts the trunk's graph where gradients fill a bucket."""
    graphs: list[GraphModule] = []

    def counting(graph: GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    results = {}
    for case in ("around DDP", "inside DDP"):
        graphs.clear()
        torch.compiler.reset()
        trunk = ddp_trunk(WIDE)
        model: Any = trunk if case == "around DDP" else torch.compile(trunk, backend=counting)
        model = DistributedDataParallel(model, bucket_cap_mb=1)
        if case == "around DDP":
            model = torch.compile(model, backend=counting)
        found = trained(trunk, model, dist.get_rank(), RANKS, sync_first=True)
        results[case] = len(graphs), found
    return results


@pytest.mark.slow
def test_compiled_ddp_trains_as_one_process() -> None:
    ranks = run_ranks(RANKS, compiled_rank)
    trunk = ddp_trunk(WIDE)
    expected = trained(trunk, trunk, 0, 1, False)
    for rank in ranks:
        for case, (graphs, found) in rank.items():
            assert graphs > 1
            for name, value in expected.items():
                assert_close(f"{case}, {name}", found[name], value, 1e-12)


# SyncBatchNorm

SHARES = (5, 3)


def sync_level(device: torch.device) -> ExtractionNetwork:
    """Every place that a batch norm can have: experts' layers, dice, the gates' hidden layer and logits."""
    torch.manual_seed(1)
    return ExtractionNetwork(
        7,
        Topology.ple(2, [2, 1], 2, last=False),
        experts=MLPSpec((6, 4), ("relu", "dice"), norm=("batch", None)),
        gate=GateSpec((5,), norm="batch", logits_norm="batch"),
        device=device,
        dtype=torch.float64,
    )


def sync_batch(device: torch.device) -> Tensor:
    return torch.randn(sum(SHARES), 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(device)


def sync_results(level: ExtractionNetwork, x: Tensor) -> dict[str, Tensor]:
    """Two steps in train mode, then eval mode: outputs, gradients of the mean over all ranks, running statistics."""
    x = x.clone().requires_grad_()
    for _ in range(2):
        level.zero_grad()
        x.grad = None
        y = level(x)
        (y.sin().sum() / sum(SHARES)).backward()
    assert x.grad is not None
    found = {"y": y.detach(), "x.grad": x.grad}
    found |= {f"{name}.grad": p.grad for name, p in level.named_parameters() if p.grad is not None}
    found |= dict(level.named_buffers())
    with torch.no_grad():
        return found | {"y in eval mode": level.eval()(x)}


def sync_batch_norm_on_cpu(self: nn.SyncBatchNorm, z: Tensor) -> Tensor:
    """What ``nn.SyncBatchNorm`` computes on a GPU; it refuses tensors of a CPU."""
    if not self.training:
        return F.batch_norm(z, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
    assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
    assert self.momentum is not None
    count = all_reduce(z.new_tensor(z.shape[0]))
    mean = all_reduce(z.sum(0)) / count
    var = all_reduce((z - mean).square().sum(0)) / count
    with torch.no_grad():
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * count / (count - 1), self.momentum)
    weight: Tensor | None = self.weight
    out: Tensor = (z - mean) * (var + self.eps).rsqrt()
    return out if weight is None else out * weight + self.bias


def sync_rank(device: torch.device) -> dict[str, Tensor]:
    level = sync_level(device)
    nn.SyncBatchNorm.convert_sync_batchnorm(level)
    assert sum(type(module) is nn.SyncBatchNorm for module in level.modules()) == 4
    if device.type == "cpu":
        pytest.MonkeyPatch().setattr(nn.SyncBatchNorm, "forward", sync_batch_norm_on_cpu)
    found = sync_results(level, sync_batch(device).split(SHARES)[dist.get_rank()])
    for name, _ in level.named_parameters():
        dist.all_reduce(found[f"{name}.grad"])  # DDP would do it, but refuses this norm on a CPU
    return found


@pytest.mark.slow
def test_sync_batch_norm_is_that_of_one_process_with_the_whole_batch(device: torch.device) -> None:
    """In experts, dice and gates, with shares of different sizes. On a CPU the norm's own arithmetic is a stand-in."""
    ranks = run_ranks(RANKS, sync_rank, device)
    for name, expected in sync_results(sync_level(device), sync_batch(device)).items():
        if name in ("y", "x.grad", "y in eval mode"):  # the others are the same on every rank
            assert_close(name, torch.cat([rank[name] for rank in ranks]), expected, 1e-11)
            continue
        for rank in ranks:
            assert_close(name, rank[name].to(expected.dtype), expected, 1e-11)


# What a rank raises, and a rank that hangs


def raising() -> None:
    if dist.get_rank() == 1:
        raise ValueError("expected nothing, got rank 1")


def hanging() -> None:
    if dist.get_rank() == 0:
        time.sleep(60.0)


@pytest.mark.slow
def test_ranks_that_fail_or_hang_fail_the_test() -> None:
    with pytest.raises(RuntimeError, match="ValueError: expected nothing, got rank 1"):
        run_ranks(RANKS, raising)
    with pytest.raises(TimeoutError, match="expected 2 ranks to end within 3 s"):
        run_ranks(RANKS, hanging, timeout=3.0)

"""FSDP2 per level, and checkpoints that ranks write together and others read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from ple_fast import PLE
from ple_fast.reference import PLEReference
from tests.helpers import assert_close
from tests.ranks import run_ranks

ROWS = 12
WIDTH = 7


def trunk(dtype: torch.dtype = torch.float64, **options: Any) -> PLE:
    """Blocks of 5 and of 2 experts: neither divides by 2 or 3 ranks, and the third rank has no part of the second."""
    torch.manual_seed(1)
    return PLE(
        WIDTH, 3, task_experts=[2, 1, 2], shared_experts=2, expert_units=(6, 4), shared_expert_units=(5, 4),
        activation="prelu", norm="layer", gate_units=(5,), dtype=dtype, **options,
    )  # fmt: skip


def shard(model: nn.Module, levels: Iterable[nn.Module], **how: Any) -> None:
    """As a user does: every level, then what is left."""
    how["mesh"] = init_device_mesh("cpu", (dist.get_world_size(),))
    for level in levels:
        fully_shard(level, **how)
    fully_shard(model, **how)


def batch(step: int = 0) -> Tensor:
    return torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def share(step: int = 0) -> Tensor:
    return batch(step).chunk(dist.get_world_size())[dist.get_rank()]


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# Equal to one process

FSDP_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "resharded after forward": ({}, {"reshard_after_forward": True}),
    "kept after forward": ({}, {"reshard_after_forward": False}),
    "resharded, recomputed": ({"recompute": True}, {"reshard_after_forward": True}),
}
"""Keywords of the trunk, and of fully_shard."""


def two_steps(model: nn.Module, x: Iterable[Tensor]) -> dict[str, Tensor]:
    """Gradients of the first step, their clipped norm, and the parameters after the second."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    found: dict[str, Tensor] = {}
    for rows in x:
        optimizer.zero_grad()
        model(rows).square().mean().backward()
        if not found:
            found = {f"{name}.grad": whole(parameter.grad).clone() for name, parameter in model.named_parameters()}
            found["norm"] = whole(clip_grad_norm_(model.parameters(), 0.01))
        optimizer.step()
    return found | {name: whole(parameter.detach()).clone() for name, parameter in model.named_parameters()}


def fsdp_rank() -> dict[str, dict[str, Tensor]]:
    results = {}
    for case, (options, how) in FSDP_CASES.items():
        model = trunk(**options)
        shard(model, model.levels, **how)
        parameter = next(model.parameters())
        assert isinstance(parameter, DTensor) and parameter.to_local().shape != parameter.shape
        results[case] = two_steps(model, (share(step) for step in range(2)))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_fully_sharded_levels_train_as_one_process(ranks: int) -> None:
    found = run_ranks(ranks, fsdp_rank)
    for case, (options, _) in FSDP_CASES.items():
        expected = two_steps(trunk(**options), (batch(step) for step in range(2)))
        for rank in range(ranks):
            for name, value in expected.items():
                assert_close(f"{case}, rank {rank}, {name}", found[rank][case][name], value, 1e-11)


# Mixed precision


def errors(model: nn.Module, exact: nn.Module, x: Tensor, scale: float) -> dict[str, float]:
    """Root mean square of the errors of output, input gradient and all parameter gradients, against float64."""
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {"parameters": []}
    low, high = x.float().requires_grad_(), x.clone().requires_grad_()
    outputs = model(low), exact(high)
    outputs[0].square().sum().mul(scale).backward()
    outputs[1].square().sum().mul(scale).backward()
    pairs["y"] = [outputs]
    pairs["x"] = [(low.grad, high.grad)]  # type: ignore[list-item]  # both got one
    for own, other in zip(model.parameters(), exact.parameters(), strict=True):
        gradient = whole(other.grad)
        dist.all_reduce(gradient)
        pairs["parameters"].append((whole(own.grad), gradient / dist.get_world_size()))
    return {
        kind: torch.cat([(a.double() - b).flatten() for a, b in rows]).square().mean().sqrt().item()
        for kind, rows in pairs.items()
    }


def mixed_rank(reshard: bool) -> tuple[dict[str, float], dict[str, float], torch.dtype]:
    """Errors of ours and of plain PyTorch's under the same policy."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    how = {"reshard_after_forward": reshard, "mp_policy": policy}
    ours = trunk(torch.float32)
    plain = PLEReference.like(ours)
    exact, plain_exact = trunk(), PLEReference.like(trunk())
    for model, source in ((exact, ours), (plain_exact, plain)):
        model.load_state_dict({name: value.double() for name, value in source.state_dict().items()})
    shard(ours, ours.levels, **how)
    shard(plain, plain.levels, **how)
    scale = 1 / ROWS
    own = errors(ours, exact, share(), scale)
    return own, errors(plain, plain_exact, share(), scale), ours(share().float()).dtype


@pytest.mark.slow
@pytest.mark.parametrize("reshard", [True, False])
def test_mixed_precision_errs_no_more_than_twice_what_plain_modules_do(reshard: bool) -> None:
    for ours, plain, dtype in run_ranks(2, mixed_rank, reshard):
        assert dtype is torch.bfloat16
        for kind, error in ours.items():
            assert 0 < error <= 2 * plain[kind], f"{kind}: error {error:.3g}, plain PyTorch {plain[kind]:.3g}"


# Built on the meta device


def meta_rank() -> dict[str, Tensor]:
    with torch.device("meta"):
        model = trunk()
    shard(model, model.levels)
    model.to_empty(device="cpu")
    torch.manual_seed(dist.get_rank())  # a CPU draws each shard from its rank's own generator
    model.reset_parameters()
    return {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}


@pytest.mark.slow
def test_a_trunk_of_the_meta_device_is_initialised_in_shards() -> None:
    ranks = run_ranks(2, meta_rank)
    likeness = trunk().state_dict()
    for name, value in ranks[0].items():
        assert torch.equal(value, ranks[1][name])
        assert torch.isfinite(value).all()
        if ".norm." in name or ".activation." in name:  # ones, zeros, and the slope's first value
            assert torch.equal(value, likeness[name])
            continue
        assert value.unique().numel() == value.numel(), f"{name}: shards repeat each other"
        if name.endswith("weight"):
            bound = value.shape[-1] ** -0.5
            assert 0.7 * bound < value.abs().max().item() <= bound


# Checkpoints


def train_from(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, own: bool) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(share(step) if own else batch(step)).square().mean().backward()
        optimizer.step()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.05)


def saving_rank(folder: Path) -> None:
    model = trunk()
    shard(model, model.levels)
    optimizer = adam(model)
    train_from(model, optimizer, range(2), own=True)
    parameters, state = get_state_dict(model, optimizer)
    save({"model": parameters, "optimizer": state}, checkpoint_id=folder)


def restored(folder: Path, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer, with the state of both loaded in place; the weights start as others."""
    optimizer = adam(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    parameters, state = get_state_dict(model, optimizer)
    load({"model": parameters, "optimizer": state}, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=parameters, optim_state_dict=state)
    return optimizer


def loading_rank(folder: Path) -> dict[str, Tensor]:
    model = trunk()
    shard(model, model.levels)
    train_from(model, restored(folder, model), range(2, 4), own=True)
    return {name: whole(parameter.detach()).clone() for name, parameter in model.named_parameters()}


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_is_read_by_one_process_and_by_three(tmp_path: Path) -> None:
    """Training goes on in each as if nothing had happened: weights, Adam's moments and its step are all there."""
    straight = trunk()
    train_from(straight, adam(straight), range(4), own=False)
    expected = dict(straight.named_parameters())
    run_ranks(2, saving_rank, tmp_path)
    alone = trunk()
    train_from(alone, restored(tmp_path, alone), range(2, 4), own=False)
    for found in (dict(alone.named_parameters()), *run_ranks(3, loading_rank, tmp_path)):
        for name, value in expected.items():
            assert_close(name, found[name], value, 1e-11)

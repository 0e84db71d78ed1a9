"""What works by being called on its own is refused inside a level, with what to do instead."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, size_based_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from ple_fast import PLE, ExtractionNetwork
from ple_fast.modules.layers import ExpertBlock, Gate, StackedLayer
from ple_fast.modules.norms import StackedBatchNorm, StackedLayerNorm

INSIDE = [ExpertBlock, Gate, StackedLayer, StackedLayerNorm]


@pytest.fixture(autouse=True)
def two_ranks() -> Iterator[None]:
    """The first of two ranks, whose other one does nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield
    finally:
        dist.destroy_process_group()


def trunk(**options: Any) -> PLE:
    return PLE(16, 2, expert_units=(8, 4), **{"norm": "layer", **options})


def first(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    return next(child for child in module.modules() if isinstance(child, kind))


def wrapped(module: nn.Module, policy: Any) -> nn.Module:
    return FullyShardedDataParallel(module, auto_wrap_policy=policy, device_id=torch.device("cpu"))


@pytest.mark.parametrize("kind", INSIDE, ids=lambda kind: kind.__name__)
def test_sharding_a_part_of_a_level_is_refused(kind: type[nn.Module]) -> None:
    ple = trunk()
    with pytest.raises(TypeError, match=f"FSDPState on {kind.__name__}.* levels are the unit.*call fully_shard"):
        fully_shard(first(ple, kind), mesh=init_device_mesh("cpu", (2,)))
    assert not any(isinstance(parameter, DTensor) for parameter in ple.parameters())
    assert ple(torch.randn(5, 16)).shape == (5, 2, 4)


@pytest.mark.parametrize("kind", INSIDE, ids=lambda kind: kind.__name__)
def test_wrapping_a_part_of_a_level_is_refused(kind: type[nn.Module]) -> None:
    expected = f"FullyShardedDataParallel around {kind.__name__}.* levels are the unit.*ExtractionNetwork"
    with pytest.raises(TypeError, match=expected):
        wrapped(trunk(), ModuleWrapPolicy({kind}))
    ple = trunk()
    parts = {name: child for name, child in ple.named_modules() if isinstance(child, kind)}
    path, part = next(iter(parts.items()))
    parent = ple.get_submodule(path.rpartition(".")[0])
    with pytest.raises(TypeError, match=f"DistributedDataParallel around {kind.__name__}"):
        setattr(parent, path.rpartition(".")[2], DistributedDataParallel(part))


@pytest.mark.parametrize("size", [1, 100, 1000])
def test_wrapping_by_size_is_refused_and_the_way_out_works(size: int) -> None:
    by_size: Any = functools.partial(size_based_auto_wrap_policy, min_num_params=size)
    with pytest.raises(TypeError, match="force_leaf_modules"):
        wrapped(trunk(), by_size)
    levels: Any = {ExtractionNetwork}
    for policy, units in ((functools.partial(by_size, force_leaf_modules=levels), 1), (ModuleWrapPolicy(levels), 3)):
        model = wrapped(nn.Sequential(trunk(), nn.Flatten()), policy)
        found = [module.module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
        assert sum(isinstance(module, (ExtractionNetwork, PLE, nn.Sequential)) for module in found) == len(found)
        assert len(found) >= units


def test_a_batch_norm_is_called_where_it_is_wrapped_or_sharded() -> None:
    ple = trunk(norm="batch")
    with pytest.warns(UserWarning, match="this hook never runs"):
        fully_shard(first(ple, StackedBatchNorm), mesh=init_device_mesh("cpu", (2,)))
    assert wrapped(trunk(norm="batch"), ModuleWrapPolicy({StackedBatchNorm})) is not None

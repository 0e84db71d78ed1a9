"""Tools that take a module as a whole: files, copies, worker processes, checkpointing, ``torch.func``."""

from __future__ import annotations

import copy
import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ple_fast import PLE
from ple_fast.modules.layers import StackedLayer
from ple_fast.reference import PLEReference, correspondence
from tests.helpers import assert_close, randomise
from tests.ranks import run_ranks

WIDTH = 7


def trunk(dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> PLE:
    torch.manual_seed(seed)  # two of one seed are equal
    module = PLE(WIDTH, 2, task_experts=1, shared_experts=1, expert_units=(5, 4), dtype=dtype, **options)
    randomise(module, seed)
    return module


def batch(rows: int = 9, dtype: torch.dtype = torch.float64, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, WIDTH, dtype=torch.float64, generator=generator).to(dtype)


def layer_of(module: PLE, level: int = 0, index: int = 0) -> StackedLayer:
    found = module.get_submodule(f"levels.{level}.blocks.0.layers.{index}")
    assert isinstance(found, StackedLayer)
    return found


def first_weight_grads(reference: PLEReference) -> Tensor:
    """Of the first layer of every expert of the first level, stacked as the fused level has them."""
    experts: Any = reference.levels[0].experts
    return torch.stack([expert[0][0].weight.grad for expert in experts])


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_safetensors(dtype: torch.dtype, tmp_path: Path) -> None:
    module, other = (trunk(dtype, seed, norm="batch", activation="dice", gate_units=(5,)) for seed in range(2))
    safetensors.torch.save_model(module, str(tmp_path / "model.safetensors"))
    missing, unexpected = safetensors.torch.load_model(other, tmp_path / "model.safetensors")
    assert not missing and not unexpected
    x = batch(dtype=dtype)
    assert torch.equal(other.eval()(x), module.eval()(x))
    safetensors.torch.save_file(module.state_dict(), tmp_path / "state.safetensors")
    other = trunk(dtype, 2, norm="batch", activation="dice", gate_units=(5,))
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "state.safetensors"))
    assert torch.equal(other.eval()(x), module(x))


# Copies and worker processes


def step(module: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32):
        loss: Tensor = module(x).float().square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", torch.float32), ("torch", torch.float64), ("triton", torch.float32)],
    ids=["torch, autocast", "torch, float64", "triton, autocast"],
    indirect=["backend"],
)
def test_a_copy_in_the_middle_of_training_goes_on_alike(dtype: torch.dtype, backend: str) -> None:
    """Copied with an optimizer, between a forward and its backward: casts and saved tensors are there."""
    module = trunk(dtype, norm="batch", dropout=0.25)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    step(module, batch(dtype=dtype), optimizer)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        y = module(batch(dtype=dtype))
    whole = copy.deepcopy((module, optimizer))
    before = copy.deepcopy(module.state_dict())
    torch.manual_seed(5)
    losses = [step(whole[0], batch(dtype=dtype, seed=seed), whole[1]) for seed in range(2)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    y.sum().backward()
    torch.manual_seed(5)
    assert losses == [step(module, batch(dtype=dtype, seed=seed), optimizer) for seed in range(2)]


def test_a_file_of_the_whole_module() -> None:
    module, file = trunk(norm="batch", dropout=0.25), io.BytesIO()
    module(batch()).sum().backward()
    torch.save(module, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert torch.equal(other.eval()(batch()), module.eval()(batch()))


def train_in_turns(module: PLE) -> None:
    """Each rank makes a step on what the ranks before it have written into the memory of the module."""
    for rank in range(dist.get_world_size()):
        if rank == dist.get_rank():
            step(module, batch(seed=rank), torch.optim.SGD(module.parameters(), lr=0.1))
        dist.barrier()


def test_worker_processes_train_one_module_in_shared_memory() -> None:
    """As Hogwild does: a module that is sent to processes is theirs and the sender's."""
    module = trunk(norm="layer", activation="prelu")
    alone = copy.deepcopy(module)
    run_ranks(2, train_in_turns, module.share_memory())
    for seed in range(2):
        step(alone, batch(seed=seed), torch.optim.SGD(alone.parameters(), lr=0.1))
    for (name, p), q in zip(module.named_parameters(), alone.parameters(), strict=True):
        assert_close(name, p, q, 1e-12)


# torch.utils.checkpoint


@pytest.mark.parametrize(
    ("backend", "part", "recompute"),
    [*itertools.product(["torch"], ["trunk", "level"], [False, True]), ("triton", "trunk", False)],
    indirect=["backend"],
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant: bool, part: str, recompute: bool, backend: str) -> None:
    """Dropout of the repeated forward is that of the first, wherever the generator stands when backward runs."""
    found = []
    for saves in (True, False):
        module = trunk(norm="layer", dropout=0.5, recompute=recompute)
        x = batch().requires_grad_()
        torch.manual_seed(7)
        if saves:
            y = module(x)
        elif part == "trunk":
            y = checkpoint(module, x, use_reentrant=reentrant)
        else:
            y = module.levels[1](checkpoint(module.levels[0], x, use_reentrant=reentrant))
        after = torch.get_rng_state()
        torch.manual_seed(11)
        y.square().sum().backward()
        found.append([y, x.grad, after.double(), *(p.grad for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        assert_close("checkpoint", a, b, 1e-13)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_moves_running_statistics_as_in_pytorch(reentrant: bool) -> None:
    """Twice: a repeated forward is one more batch to a batch norm, ours or PyTorch's. ``recompute`` moves them once."""
    fused = trunk(norm="batch")
    reference, recomputing = PLEReference.like(fused), trunk(norm="batch", recompute=True)
    for module in (fused, reference):
        checkpoint(module, batch().requires_grad_(), use_reentrant=reentrant).sum().backward()
    recomputing(batch().requires_grad_()).sum().backward()
    for pair in correspondence(fused, reference):
        if not isinstance(pair.reference, nn.Parameter):
            assert_close(pair.name, pair.fused[pair.part], pair.reference, 1e-12)
    counts = [
        module.get_buffer("levels.0.blocks.0.layers.0.norm.num_batches_tracked") for module in (fused, recomputing)
    ]
    assert [int(count) for count in counts] == [2, 1]


# torch.func, where test_transforms.py leaves off


def test_functional_call_in_kernels_reads_the_weights_it_is_given(backend: str) -> None:
    module, other = trunk(norm="layer"), trunk(norm="layer", seed=1)
    state = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    y = torch.func.functional_call(module, state, (batch(),))
    reference = PLEReference.like(other)
    expected = reference(batch())
    assert_close("y", y, expected, 1e-11)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert_close("gradient", state["levels.0.blocks.0.layers.0.weight"].grad, first_weight_grads(reference), 1e-10)
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("train", [True, False])
def test_ensembles_with_batch_norm(train: bool) -> None:
    """Each member moves the running statistics of its own."""
    members = [trunk(norm="batch", seed=seed).train(train) for seed in range(2)]
    parameters, buffers = torch.func.stack_module_state(members)
    skeleton = copy.deepcopy(members[0]).to("meta")

    x = batch()

    def one(parameters: Any, buffers: Any) -> Any:
        return torch.func.functional_call(skeleton, (parameters, buffers), (x,))

    together = torch.func.vmap(one)(parameters, buffers)
    for i, member in enumerate(members):
        assert_close("y", together[i], PLEReference.like(member)(x), 1e-11)
        member(x)
        for name, buffer in member.named_buffers():
            assert_close(name, buffers[name][i], buffer, 1e-12)


def test_what_batch_norm_cannot_do_under_vmap_says_why() -> None:
    module, x = trunk(norm="batch"), batch(12).view(3, 4, WIDTH)
    with pytest.raises(
        RuntimeError, match="running_mean or running_var, which will be updated in place, were not batched"
    ):
        torch.func.vmap(module)(x)
    with pytest.raises(ValueError, match="batch norm needs a batch of 2 or more in train mode"):
        torch.func.vmap(module)(x[:, :1])
    torch.func.replace_all_batch_norm_modules_(module)
    assert_close("y", torch.func.vmap(module)(x), torch.stack([module(rows) for rows in x]), 1e-12)

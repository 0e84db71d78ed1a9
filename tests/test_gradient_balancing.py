"""Methods that read gradients per task: many passes through one graph, their norms derived, Jacobians by torchjd."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchjd.aggregation import MGDA, AlignedMTL
from torchjd.autogram import Engine
from torchjd.autojac import backward as jacobian_backward
from torchjd.autojac import jac_to_grad, mtl_backward

from ple_fast import PLE
from ple_fast.reference import PLEReference, correspondence
from tests.helpers import assert_close, randomise
from tests.product_helpers import blocks_of

TASKS, WIDTH, UNITS = 2, 7, 4
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer norm": {"norm": "layer", "activation": "prelu", "gate_units": (5,)},
    "batch norm": {"norm": "batch", "activation": "gelu"},
    "dice": {"activation": "dice"},
    "dropout": {"norm": "layer", "dropout": 0.4},
}
FEW, MANY = 6, 100
"""Rows on both sides of the short path of plain trunks."""


RUNS = [*itertools.product(["torch"], [FEW, MANY], [False, True]), ("triton", FEW, False)]
SIZES: dict[str, dict[str, Any]] = {
    "torch": {"task_experts": [2, 1], "expert_units": (6, UNITS)},
    "triton": {"task_experts": 1, "shared_experts": 1, "expert_units": (UNITS,)},
}


def trunk(backend: str, **options: Any) -> PLE:
    module = PLE(WIDTH, TASKS, dtype=torch.float64, last_shared=True, **SIZES[backend], **options)
    randomise(module)
    return module


def towers() -> nn.ModuleList:
    torch.manual_seed(1)
    return nn.ModuleList(nn.Linear(UNITS, 1, dtype=torch.float64) for _ in range(TASKS))


def batch(rows: int) -> Tensor:
    return torch.randn(rows, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def losses_of(features: Sequence[Tensor], heads: nn.ModuleList) -> list[Tensor]:
    """One per task, of very different sizes; the shared mixture enters none."""
    return [
        (head(y) - 1).square().mean() * 10.0**k for k, (head, y) in enumerate(zip(heads, features[:TASKS], strict=True))
    ]


Gradients = Sequence[Tensor | None]


def per_task(losses: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Gradients of each loss, through a graph that is kept."""
    return [torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True) for loss in losses]


def opposite(
    fused: PLE, reference: PLEReference, ours: Gradients, theirs: Gradients
) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """Name, ours and theirs of a value per parameter of each, in the order of ``parameters()``."""
    own = {id(p): value for p, value in zip(fused.parameters(), ours, strict=True)}
    other = {id(p): value for p, value in zip(reference.parameters(), theirs, strict=True)}
    for pair in correspondence(fused, reference):
        if isinstance(pair.reference, nn.Parameter):
            value = own[id(pair.fused)]
            yield pair.name, None if value is None else value[pair.part], other[id(pair.reference)]


def twins(backend: str, **options: Any) -> tuple[PLE, PLEReference]:
    fused = trunk(backend, **options)
    return fused, PLEReference.like(fused)


@pytest.mark.parametrize(("backend", "rows", "recompute"), RUNS, indirect=["backend"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_per_task_are_those_of_the_reference(
    case: str, rows: int, recompute: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the input and of parameters, task after task through one graph, twice; then the whole loss frees it."""
    blocks_of(48, monkeypatch)  # many rows are several blocks, which share buffers
    fused, heads = trunk(backend, recompute=recompute, **CASES[case]), towers()
    x = batch(rows).requires_grad_()
    losses, inputs = losses_of(fused(x).unbind(1), heads), [x, *fused.parameters()]
    first, again = (per_task(losses, inputs) for _ in range(2))
    whole = torch.autograd.grad(torch.stack(losses).sum(), inputs)
    for n, total in enumerate(whole):
        parts = [row[n] for row in first]
        assert all(torch.equal(part, row[n]) for part, row in zip(parts, again, strict=True))
        assert_close("sum of the tasks", torch.stack(parts).sum(0), total, 1e-11)
    if "dropout" in CASES[case]:
        return  # the reference draws other masks
    reference = PLEReference.like(fused)
    x = batch(rows).requires_grad_()
    expected = per_task(losses_of(reference(x).unbind(1), heads), [x, *reference.parameters()])
    for k, (ours, theirs) in enumerate(zip(first, expected, strict=True)):
        assert_close(f"task {k}, x", ours[0], theirs[0], 1e-11)
        for name, a, b in opposite(fused, reference, ours[1:], theirs[1:]):
            assert_close(f"task {k}, {name}", a, b, 1e-11)


@pytest.mark.parametrize("case", ["plain", "layer norm", "batch norm"])
def test_grad_norm(case: str, backend: str) -> None:
    """GradNorm (Chen et al., ICML 2018): the norm of each task's gradient at the last level, derived by the weights."""
    fused, reference = twins(backend, **CASES[case])
    heads, found = towers(), []
    for model in (fused, reference):
        weights = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
        losses = weights * torch.stack(losses_of(model(batch(FEW)).unbind(1), heads))
        last = list(model.levels[-1].parameters())
        norms = []
        for loss in losses:
            grads = torch.autograd.grad(loss, last, create_graph=True, materialize_grads=True)
            norms.append(torch.cat([grad.flatten() for grad in grads]).norm())
        norm = torch.stack(norms)
        distance = (norm - norm.mean().detach()).abs().sum()
        found.append((norm, torch.autograd.grad(distance, [weights, *model.parameters()], allow_unused=True)))
    (ours, (own, *derived)), (theirs, (other, *expected)) = found
    assert_close("norms", ours, theirs, 1e-11)
    assert_close("weights", own, other, 1e-11)
    for name, a, b in opposite(fused, reference, derived, expected):
        assert_close(name, a, b, 1e-9)


def jacobians(model: nn.Module, chunk: int | None, *, features: bool, rows: int = FEW) -> list[Tensor]:
    """One row per task of every parameter, by torchjd."""
    heads = towers()
    outputs = model(batch(rows)).unbind(1)[:TASKS]
    losses = losses_of(outputs, heads)
    parameters = list(model.parameters())
    if features:
        mtl_backward(losses, features=outputs, shared_params=parameters, parallel_chunk_size=chunk)
        assert all(head.grad is not None and bool(head.grad.any()) for head in heads.parameters())
    else:
        jacobian_backward(losses, inputs=parameters, parallel_chunk_size=chunk)
    return [parameter.jac for parameter in parameters]  # type: ignore[attr-defined]  # torchjd adds it


@pytest.mark.parametrize(
    ("backend", "chunk", "features"),
    [*itertools.product(["torch"], [None, 1], [True, False]), ("triton", None, True)],
    indirect=["backend"],
)
@pytest.mark.parametrize("case", ["plain", "layer norm", "batch norm"])
def test_jacobians_of_torchjd(case: str, chunk: int | None, features: bool, backend: str) -> None:
    fused, reference = twins(backend, **CASES[case])
    ours, theirs = (jacobians(model, chunk, features=features) for model in (fused, reference))
    for k in range(TASKS):
        for name, a, b in opposite(fused, reference, [row[k] for row in ours], [row[k] for row in theirs]):
            assert_close(f"task {k}, {name}", a, b, 1e-11)


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("case", ["dropout", "recompute"])
def test_jacobians_at_once_are_those_one_by_one(case: str, rows: int) -> None:
    """Where the reference draws other masks, and where backward runs the forward again."""
    module = trunk("torch", **CASES.get(case, {"recompute": True}))
    found = []
    for chunk in (None, 1):
        torch.manual_seed(3)
        found.append(jacobians(module, chunk, features=True, rows=rows))
        for parameter in module.parameters():
            del parameter.jac  # type: ignore[attr-defined]  # torchjd has added it
    for a, b in zip(*found, strict=True):
        assert_close("jacobian", a, b, 1e-13)


def test_jacobians_at_once_take_the_backward_by_hand(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The composed level would run the forward again, and then a backward of tensors with one more dimension."""
    monkeypatch.setattr("ple_fast.autograd.run_differentiable", None)
    jacobians(trunk(backend, **CASES["layer norm"]), None, features=True)


@pytest.mark.parametrize("aggregator", [MGDA(), AlignedMTL()], ids=repr)
def test_aggregated_jacobians_of_torchjd(aggregator: Any) -> None:
    """The step of a Pareto method is that of the reference."""
    fused, reference = twins("torch", **CASES["layer norm"])
    found: list[Gradients] = []
    for model in (fused, reference):
        jacobians(model, None, features=True)
        jac_to_grad(list(model.parameters()), aggregator)
        found.append([parameter.grad for parameter in model.parameters()])
    for name, a, b in opposite(fused, reference, *found):
        assert_close(name, a, b, 1e-9)


def test_jacobians_of_gate_weights(backend: str) -> None:
    """Losses of the gates alone: the output of the level gets no gradient at all."""
    fused, reference = twins(backend)
    found = []
    for model in (fused, reference):
        _, gates = model(batch(FEW), return_gates=True)
        entropies = [-(gate * gate.log()).sum(1).mean() for gate in gates[1]]
        parameters = list(model.parameters())
        jacobian_backward(entropies, inputs=parameters)
        found.append([parameter.jac for parameter in parameters])  # type: ignore[attr-defined]  # torchjd adds it
    for k in range(TASKS + 1):
        for name, a, b in opposite(fused, reference, *([row[k] for row in rows] for rows in found)):
            assert_close(f"mixture {k}, {name}", a, b, 1e-11)


def test_batched_gradients_that_are_derived_again(backend: str) -> None:
    module, x = trunk(backend, **CASES["layer norm"]), batch(FEW).requires_grad_()
    y = module(x)
    directions = torch.randn(3, *y.shape, dtype=torch.float64)

    def pull(direction: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, direction, create_graph=True)[0]

    together, alone = torch.vmap(pull)(directions), torch.stack([pull(direction) for direction in directions])
    assert_close("gradients", together, alone, 1e-12)
    second, expected = (torch.autograd.grad(g.square().sum(), x, retain_graph=True)[0] for g in (together, alone))
    assert_close("second derivatives", second, expected, 1e-11)


def test_jacobians_through_a_compiled_trunk_come_one_by_one() -> None:
    """PyTorch refuses a batch of gradients there, and says so; several passes it wants to be told of."""
    module = trunk("torch", **CASES["layer norm"])
    expected = jacobians(module, None, features=True)
    for parameter in module.parameters():
        del parameter.jac  # type: ignore[attr-defined]  # torchjd has added it
    compiled: Any = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch._functorch.config.patch(donated_buffer=False):
        with pytest.raises(RuntimeError, match="compiled backward function within vmap"):
            jacobians(compiled, None, features=True)
        for a, b in zip(jacobians(compiled, 1, features=True), expected, strict=True):
            assert_close("jacobian", a, b, 1e-12)


def test_autogram_of_torchjd_is_told_that_its_hooks_never_run() -> None:
    with pytest.warns(UserWarning, match="forward hook on (StackedLayer|Gate): .* never runs"):
        Engine(trunk("torch"), batch_dim=0)

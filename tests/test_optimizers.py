"""Optimizers, clipping, averaging and flat vectors of parameters: as on the reference, whose parameters are apart."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import (
    clip_grad_norm_,
    clip_grad_value_,
    get_total_norm,
    parameters_to_vector,
    vector_to_parameters,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from ple_fast import PLE
from ple_fast.reference import PLEReference, correspondence
from tests.helpers import assert_close
from tests.test_module_tools import batch, trunk

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": lambda p, **how: torch.optim.Adam(p, lr=0.05, weight_decay=0.01, **how),
    "AdamW": lambda p, **how: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, amsgrad=True, **how),
    "SGD": lambda p, **how: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, **how),
}
WAYS: dict[str, dict[str, Any]] = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer norm": {"norm": "layer", "activation": "prelu", "gate_units": (5,)},
    "batch norm": {"norm": "batch", "activation": "dice"},
}
STEPS = 3
ROWS = (9, 100)
"""On both sides of the short path of plain trunks."""


def assert_same(fused: PLE, reference: PLEReference, tolerance: float) -> None:
    """Of every parameter, its gradient, and every buffer."""
    for pair in correspondence(fused, reference):
        assert_close(pair.name, pair.fused[pair.part], pair.reference, tolerance)
        if isinstance(pair.reference, nn.Parameter):
            assert pair.fused.grad is not None
            assert_close(f"{pair.name}.grad", pair.fused.grad[pair.part], pair.reference.grad, tolerance)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    rows: int = 9,
    set_to_none: bool = True,
    before_step: Callable[[], Any] | None = None,
) -> None:
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=set_to_none)
        model(batch(rows, seed=step)).square().mean().backward()
        if before_step is not None:
            before_step()
        optimizer.step()


@pytest.mark.parametrize(
    ("backend", "rows", "way"),
    [*itertools.product(["torch"], ROWS, WAYS), ("triton", ROWS[0], "fused")],
    indirect=["backend"],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_of_optimizers(name: str, way: str, rows: int, backend: str) -> None:
    fused = trunk(**SPECS["layer norm"])
    reference = PLEReference.like(fused)
    for model in (fused, reference):
        train(model, OPTIMIZERS[name](model.parameters(), **WAYS[way]), rows=rows, set_to_none=way != "loop")
    assert_same(fused, reference, 1e-9)


@pytest.mark.parametrize(
    ("backend", "rows"), [*itertools.product(["torch"], ROWS), ("triton", ROWS[0])], indirect=["backend"]
)
@pytest.mark.parametrize("spec", SPECS)
def test_gradients_lie_in_memory_as_their_parameters_do(spec: str, rows: int, backend: str) -> None:
    """What fused kernels ask for to take their fast path, and what accumulation keeps."""
    module = trunk(**SPECS[spec])
    for _ in range(2):
        module(batch(rows)).sum().backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.stride() == parameter.stride(), name
            assert parameter.grad.is_contiguous(), name


def test_an_optimizer_that_runs_in_backward(backend: str) -> None:
    """Each parameter is stepped, and its gradient freed, as soon as it has been accumulated."""
    fused = trunk(**SPECS["layer norm"])
    expected = copy.deepcopy(fused)
    train(expected, torch.optim.SGD(expected.parameters(), lr=0.1))

    def step_and_free(parameter: torch.Tensor) -> None:
        optimizers[id(parameter)].step()
        optimizers[id(parameter)].zero_grad()

    optimizers = {id(parameter): torch.optim.SGD([parameter], lr=0.1) for parameter in fused.parameters()}
    for parameter in fused.parameters():
        parameter.register_post_accumulate_grad_hook(step_and_free)
    for step in range(STEPS):
        fused(batch(seed=step)).square().mean().backward()
    for (name, p), q in zip(fused.named_parameters(), expected.parameters(), strict=True):
        assert p.grad is None
        assert_close(name, p, q, 1e-12)


CLIPPING: dict[str, Callable[[nn.Module], Any]] = {
    "norm, foreach": lambda model: clip_grad_norm_(model.parameters(), 0.05, foreach=True),
    "norm, loop": lambda model: clip_grad_norm_(model.parameters(), 0.05, foreach=False),
    "norm, largest": lambda model: clip_grad_norm_(model.parameters(), 0.01, norm_type=float("inf")),
    "value, foreach": lambda model: clip_grad_value_(model.parameters(), 0.001, foreach=True),
    "value, loop": lambda model: clip_grad_value_(model.parameters(), 0.001, foreach=False),
}


@pytest.mark.parametrize("how", CLIPPING)
def test_clipping(how: str) -> None:
    """The norm of all stacked gradients together is that of the gradients apart, and so is what is clipped."""
    fused = trunk(**SPECS["layer norm"])
    reference, found = PLEReference.like(fused), []
    for model in (fused, reference):
        model(batch()).square().mean().backward()
        whole = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        norm = CLIPPING[how](model)
        clipped = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        assert clipped < whole
        found.append((norm, whole, clipped))
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        assert_close("norm", ours, theirs, 1e-12)
    assert_same(fused, reference, 1e-12)


@pytest.mark.parametrize("foreach", [False, True])
def test_training_with_clipping(foreach: bool) -> None:
    fused = trunk(**SPECS["batch norm"])
    reference = PLEReference.like(fused)

    def clip(model: nn.Module) -> Callable[[], Any]:
        return lambda: clip_grad_norm_(model.parameters(), 0.05, foreach=foreach)

    for model in (fused, reference):
        train(model, OPTIMIZERS["Adam"](model.parameters(), foreach=foreach), before_step=clip(model))
    assert_same(fused, reference, 1e-8)


def test_averaged_models() -> None:
    """Exponential moving average of the weights, and statistics of batch norms estimated again for it."""
    fused = trunk(**SPECS["batch norm"])
    reference = PLEReference.like(fused)

    def averaged_output(model: nn.Module) -> torch.Tensor:
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        train(model, optimizer, before_step=lambda: averaged.update_parameters(model))
        update_bn([batch(seed=seed) for seed in range(2)], averaged)
        y: torch.Tensor = averaged.eval()(batch())
        assert not torch.allclose(y, model.eval()(batch()))
        return y

    assert_close("y", averaged_output(fused), averaged_output(reference), 1e-10)


def test_flat_vectors_of_parameters() -> None:
    """Parameters that become views of one vector, and train on as such."""
    module, x = trunk(**SPECS["layer norm"]), batch()
    apart = copy.deepcopy(module)
    before = module(x)
    vector = parameters_to_vector(module.parameters()).detach()
    vector_to_parameters(2 * vector, module.parameters())
    assert_close("y", module(x), PLEReference.like(module)(x), 1e-11)
    vector_to_parameters(vector, module.parameters())
    assert torch.equal(module(x), before)
    for model in (module, apart):
        train(model, OPTIMIZERS["Adam"](model.parameters(), fused=True))
    assert_close("vector", vector, parameters_to_vector(apart.parameters()), 1e-12)


def test_an_optimizer_of_matrices_refuses_stacks_of_them() -> None:
    with pytest.raises(ValueError, match="2D parameters"):
        torch.optim.Muon(trunk().parameters())

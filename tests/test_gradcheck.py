"""First and second derivatives against finite differences, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ple_fast import GateSpec, MLPSpec, Topology
from tests.helpers import TOPOLOGIES, assert_close, level

SMALL = Topology.ple(2, [1, 2], 1, last=False)
WIRINGS = {
    "ple": SMALL,
    "adatt": TOPOLOGIES["adatt"],
    "static-offsets": TOPOLOGIES["static-offsets"],
    "mixed-kinds": TOPOLOGIES["mixed-kinds"],
}
CASES: dict[str, tuple[MLPSpec, GateSpec]] = {
    "relu": (MLPSpec((3, 2)), GateSpec()),
    "leaky": (MLPSpec((3, 2), "leaky_relu"), GateSpec(temperature=0.5)),
    "prelu": (MLPSpec((3, 2), "prelu"), GateSpec((2,), "prelu")),
    "gelu": (MLPSpec((3, 2), "gelu"), GateSpec((2,), "gelu")),
    "gelu-tanh": (MLPSpec((3, 2), "gelu_tanh"), GateSpec((2,), "gelu_tanh")),
    "silu": (MLPSpec((3, 2), "silu"), GateSpec((2,), "silu")),
    "tanh": (MLPSpec((3, 2), "tanh", bias=False), GateSpec((2,), "tanh", bias=False)),
    "sigmoid": (MLPSpec((3, 2), "sigmoid"), GateSpec((2,), "sigmoid")),
    "identity": (MLPSpec((2,), "identity"), GateSpec((2,), "identity")),
    "dice": (MLPSpec((3, 2), "dice"), GateSpec((2,), "dice")),
    "row-dice": (MLPSpec((3, 2), "row_dice"), GateSpec((2,), "row_dice")),
    "batch-norm": (MLPSpec((3, 2), "silu", norm="batch"), GateSpec((2,), "tanh", norm="batch", logits_norm="batch")),
    "batch-norm-after": (MLPSpec((3, 2), "silu", norm="batch", norm_position="after"), GateSpec()),
    "layer-norm": (MLPSpec((3, 2), "gelu", norm="layer"), GateSpec((3,), "silu", norm="layer")),
    "layer-norm-after": (MLPSpec((3, 3), "tanh", norm="layer", norm_position="after"), GateSpec()),
    "dropout": (MLPSpec((3, 2), "silu", dropout=0.4), GateSpec((3,), "tanh", dropout=0.4)),
    "dropout-batch-norm": (MLPSpec((3, 2), "tanh", norm="batch", dropout=(0.4, 0.0)), GateSpec()),
}


def _function(
    topology: Topology,
    experts: MLPSpec,
    gate: GateSpec,
    *,
    train: bool = True,
    return_gates: bool = True,
    **kwargs: Any,
) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """The level as a function of its input and of all its parameters; a fixed seed repeats the dropout mask."""
    module = level(topology, experts, gate, in_features=3, **kwargs).train(train)
    names = [name for name, _ in module.named_parameters()]
    x = torch.randn(5, topology.num_slots or 1, 3, dtype=torch.float64, requires_grad=True)
    parameters = tuple(p.detach().clone().requires_grad_() for p in module.parameters())

    def function(x: Tensor, *values: Tensor) -> Any:
        torch.manual_seed(3)
        y = torch.func.functional_call(
            module, dict(zip(names, values, strict=True)), (x,), {"return_gates": return_gates}
        )
        return (y[0], *(g for g in y[1] if g.requires_grad)) if return_gates else y

    return function, (x, *parameters)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_every_spec(case: str, train: bool) -> None:
    """Along random directions; entry by entry in the slow test below."""
    function, inputs = _function(SMALL, *CASES[case], train=train)
    assert torch.autograd.gradcheck(function, inputs, nondet_tol=0.0, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_entry_of_the_gradients_of_every_spec(case: str) -> None:
    function, inputs = _function(SMALL, *CASES[case])
    assert torch.autograd.gradcheck(function, inputs, nondet_tol=0.0)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_gradients_of_every_wiring(wiring: str, recompute: bool) -> None:
    function, inputs = _function(WIRINGS[wiring], *CASES["silu"], recompute=recompute)
    assert torch.autograd.gradcheck(function, inputs, nondet_tol=0.0)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "case", ["relu", "prelu", "tanh", "dice", "row-dice", "batch-norm", "layer-norm-after", "dropout"]
)
def test_second_derivatives_of_specs(case: str, recompute: bool) -> None:
    function, inputs = _function(Topology.ple(1, 1, 1, last=False), *CASES[case], recompute=recompute)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_second_derivatives_of_wirings(wiring: str) -> None:
    function, inputs = _function(WIRINGS[wiring], MLPSpec((2,), "tanh"), GateSpec())
    assert torch.autograd.gradgradcheck(function, inputs)


def test_second_derivatives_do_not_move_the_running_statistics_again() -> None:
    module = level(SMALL, *CASES["batch-norm"], in_features=3).train()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    grad.square().sum().backward()
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]), name
        if name.endswith("num_batches_tracked"):
            assert buffer.item() == 1, name


def test_gradient_penalty_equals_that_of_the_reference() -> None:
    from ple_fast.reference import ExtractionNetworkReference

    module = level(SMALL, *CASES["layer-norm"], in_features=3)
    reference = ExtractionNetworkReference.like(module)
    x = torch.randn(5, 3, dtype=torch.float64)

    def penalty(network: nn.Module) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(network(leaf).square().sum(), leaf, create_graph=True)
        loss = grad.square().sum()
        return loss, torch.autograd.grad(loss, leaf)[0]

    for name, ours, theirs in zip(("penalty", "x.grad"), penalty(module), penalty(reference), strict=True):
        assert_close(name, ours, theirs, 1e-10)


def test_batched_gradients_are_right() -> None:
    module = level(SMALL, *CASES["silu"], in_features=3)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y = module(x)
    directions = torch.randn(4, *y.shape, dtype=torch.float64)
    one_by_one = torch.stack([torch.autograd.grad(y, x, d, retain_graph=True)[0] for d in directions])
    (batched,) = torch.autograd.grad(y, x, directions, is_grads_batched=True)
    assert_close("batched", batched, one_by_one, 1e-12)

"""Whole levels in Triton kernels against the float64 reference, under Triton's interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from ple_fast import PLE, GateSpec, MLPSpec, Topology, last_backend, use_backend
from ple_fast.reference import correspondence
from tests.helpers import (
    EXPERTS,
    GATES,
    TOPOLOGIES,
    assert_close,
    compare,
    compare_low_precision,
    draw,
    has_dropout,
    level,
    randomise,
    reference_of,
)
from tests.test_level import BLOCKS
from tests.test_properties import configurations, hold_drawn

pytest.importorskip("triton")

CASES = [
    *((topology, experts, "plain") for topology in TOPOLOGIES for experts in ("1-layer", "2-layers")),
    *(("ple-even", experts, "plain") for experts in EXPERTS if experts not in ("1-layer", "2-layers")),
    *((topology, "2-layers", gate) for topology in ("ple-even", "unordered") for gate in GATES if gate != "plain"),
]


@pytest.fixture(autouse=True)
def _in_kernels() -> Iterator[None]:
    with use_backend("triton"):
        yield


def assert_in_kernels() -> None:
    """The last call ran in kernels."""
    choice = last_backend()
    assert choice is not None and choice.name == "triton"


def check(
    topology: str,
    experts: Any,
    gate: GateSpec | None = None,
    *,
    device: torch.device,
    form: str = "stacked",
    batch: int = 5,
    in_features: int = 7,
    recompute: bool = False,
    **how: Any,
) -> None:
    module = level(TOPOLOGIES[topology], experts, gate, in_features=in_features, recompute=recompute).to(device)
    slots = module.topology.num_slots
    assert slots is not None
    if has_dropout(experts, gate if gate is not None else GateSpec()):
        how["train"] = False
    leaves = [leaf.to(device) for leaf in draw(form, batch, slots, in_features)]
    compare(module, leaves, form=form, slots=slots, **how)
    assert_in_kernels()


@pytest.mark.parametrize(("topology", "experts", "gate"), CASES)
def test_a_level_equals_the_reference(topology: str, experts: str, gate: str, device: torch.device) -> None:
    check(topology, EXPERTS[experts], GATES[gate], device=device)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["ple", "mixed-kinds", "static-offsets"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("experts", ["1-layer", "gelu", "per-layer", "prelu-norms"])
def test_more_levels_equal_the_reference(topology: str, experts: str, gate: str, device: torch.device) -> None:
    for form in ("stacked", "list"):
        check(topology, EXPERTS[experts], GATES[gate], device=device, form=form, batch=33, common_scale=True)


@pytest.mark.parametrize("gate", ["plain", "hidden"])
def test_widths_beyond_a_tile(gate: str, device: torch.device) -> None:
    check("no-own-expert", MLPSpec((37, 33)), GATES[gate], device=device, batch=37, in_features=35)


def test_an_empty_batch_goes_to_pytorch(device: torch.device) -> None:
    module = level(TOPOLOGIES["ple"], EXPERTS["2-layers"]).to(device)
    y = module(torch.zeros(0, 7, dtype=torch.float64, device=device))
    assert y.shape == (0, module.topology.num_mixtures, 4)
    choice = last_backend()
    assert choice is not None and choice.name == "torch" and "empty" in choice.reason


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_other_specs(name: str, device: torch.device) -> None:
    check("ple", BLOCKS[name], device=device, form="list", batch=9)


@pytest.mark.parametrize("gate", ["plain", "hidden"])
@pytest.mark.parametrize("frozen", ["blocks.0", "blocks.1", "blocks.0.layers.0", "gate"])
def test_partly_frozen_blocks(frozen: str, gate: str, device: torch.device) -> None:
    module = level(TOPOLOGIES["ple"], BLOCKS["task-and-shared"], GATES[gate]).to(device)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    leaves = [leaf.to(device) for leaf in draw("stacked", 9, 4, module.in_features)]
    for input_grad in (True, False):
        compare(module, leaves, form="stacked", slots=4, input_grad=input_grad)
    assert all(p.grad is None for name, p in module.named_parameters() if name.startswith(frozen))


@pytest.mark.parametrize("recompute", [False, True])
def test_two_levels(recompute: bool, device: torch.device) -> None:
    module = PLE(
        5, 2, num_levels=2, task_experts=[[1, 2], [2, 1]], shared_experts=1, expert_units=[(6, 4), (3,)],
        gate_units=(4,), dtype=torch.float64, recompute=recompute,
    ).to(device)  # fmt: skip
    randomise(module)
    for form in ("one", "stacked"):
        leaves = [leaf.to(device) for leaf in draw(form, 5, 3, 5)]
        compare(module, leaves, form=form, slots=3)
    assert_in_kernels()


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("gate", ["hidden", "logits-norm"])
@pytest.mark.parametrize("norm", ["batch", "layer", None])
def test_low_precision_with_norms(
    norm: Any, gate: str, dtype: torch.dtype, autocast: bool, device: torch.device
) -> None:
    """Norms of experts and of logits, several blocks, gradients of the input in several parts."""
    specs = (MLPSpec((48, 32), "silu", norm=norm),) * 2 + (MLPSpec((24, 32)),) * 4
    module = level(TOPOLOGIES["ple-even"], specs, GATES[gate], in_features=40).to(device)
    leaves = [leaf.to(device) for leaf in draw("one", 64, 1, 40)]
    compare_low_precision(module, leaves, dtype=dtype, autocast=autocast, slots=3)
    assert_in_kernels()


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_low_precision_of_a_batch_norm_that_the_mixtures_do(
    dtype: torch.dtype, position: Any, device: torch.device
) -> None:
    spec = MLPSpec((24, 32), "silu", norm="batch", norm_position=position)
    module = level(TOPOLOGIES["no-own-expert"], spec, in_features=20).to(device)
    leaves = [leaf.to(device) for leaf in draw("one", 64, 1, 20)]
    compare_low_precision(module, leaves, dtype=dtype, slots=3)
    assert_in_kernels()


def _hold_on(device: torch.device, configuration: dict[str, Any], train: bool) -> None:
    with use_backend("triton"):
        hold_drawn(configuration, device=device, train=train)


NOT_SLOW = settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


@NOT_SLOW
@given(configurations())
def test_any_level_trains_like_the_reference(device: torch.device, configuration: dict[str, Any]) -> None:
    _hold_on(device, configuration, train=True)


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False])
@settings(NOT_SLOW, max_examples=100)
@given(configuration=configurations())
def test_many_levels_are_like_the_reference(device: torch.device, train: bool, configuration: dict[str, Any]) -> None:
    _hold_on(device, configuration, train=train)


def test_more_logits_of_a_slot_than_a_run_has(device: torch.device) -> None:
    module = level(Topology.mmoe(5, 15), EXPERTS["2-layers"]).to(device)
    compare(module, [leaf.to(device) for leaf in draw("one", 5, 1, 7)])
    assert_in_kernels()


def test_weights_may_lie_in_any_memory(device: torch.device) -> None:
    """Transposed, as a loaded or tied parameter may be."""
    module = level(TOPOLOGIES["ple-even"], EXPERTS["2-layers"], GATES["hidden"]).to(device)
    for parameter in module.parameters():
        if parameter.dim() >= 2:
            parameter.data = parameter.data.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not all(parameter.is_contiguous() for parameter in module.parameters())
    compare(module, [leaf.to(device) for leaf in draw("one", 5, 1, 7)], slots=3)


def test_views_may_come_more_than_once(device: torch.device) -> None:
    """A list that names a tensor twice, and gates that read the very tensor of the experts as an input of their own."""
    module = level(TOPOLOGIES["ple"], EXPERTS["2-layers"], GateSpec((5,), input="raw"), gate_features=7).to(device)
    base = draw("stacked", 5, 2, 7)[0].to(device)
    grads = []
    for backend in ("triton", "torch"):
        leaf = base.clone().requires_grad_()
        a, b = leaf.unbind(1)
        with use_backend(backend):
            module([a, b, a, b], b).square().sum().backward()
        grads.append(leaf.grad)
    assert_close("x.grad", grads[0], grads[1], 1e-12)


def test_overflow_spreads_as_in_the_reference(device: torch.device) -> None:
    """From an infinite expert to the mixtures that weigh it and their gates, forward and backward, and no further."""
    module = level(TOPOLOGIES["ple"], EXPERTS["2-layers"]).to(device)
    with torch.no_grad():
        module.get_parameter("blocks.0.layers.1.bias")[0, 1] = float("inf")
    reference = reference_of(module)
    untouched = [o for o, mixed in enumerate(module.topology.mixture_experts) if 0 not in mixed]
    outcomes = []
    for network in (module, reference):
        x = draw("one", 5, 1, 7)[0].to(device).requires_grad_()
        y = network(x)
        assert bool(y[:, untouched].isfinite().all()) and not bool(y.isfinite().all())
        y[:, untouched].square().sum().backward()
        outcomes.append({"y": y, "x.grad": x.grad})
    for pair in correspondence(module, reference):
        if isinstance(pair.reference, nn.Parameter) and pair.reference.grad is not None:
            assert pair.fused.grad is not None
            outcomes[0][pair.name], outcomes[1][pair.name] = pair.fused.grad[pair.part], pair.reference.grad
    for name, expected in outcomes[1].items():
        torch.testing.assert_close(outcomes[0][name], expected, equal_nan=True, msg=name)

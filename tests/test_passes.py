"""Levels whose mixtures pass their one expert on, as stacked towers do: nothing is mixed, kept or launched for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ple_fast import ExtractionNetwork, GateSpec, MLPSpec, Topology, use_backend
from ple_fast.plan import LevelPlan
from tests.helpers import assert_close, by_route, compare, compare_low_precision, draw, level, reference_of, saved

TOWERS = Topology((0, 1, 2), (0, 1, 2), ((0,), (1,), (2,)), mixture_kind=("static",) * 3)
SPECS: dict[str, MLPSpec] = {
    "linear": MLPSpec((2,), last_activation="identity"),
    "one output": MLPSpec((6, 1), last_activation="identity"),
    "three layers": MLPSpec((6, 5, 2), "silu", last_activation="identity"),
    "learned": MLPSpec((6, 2), "prelu", last_activation="identity"),
    "norms": MLPSpec((6, 2), norm=("batch", None), last_activation="identity"),
}


def passes(topology: Topology, experts: MLPSpec) -> bool:
    return level(topology, experts)._plan.passes


def test_which_levels_pass() -> None:
    spec = SPECS["one output"]
    assert all(passes(TOWERS, own) for own in SPECS.values())
    turned = Topology((0, 1), (0, 1), ((1,), (0,)), mixture_kind=("static", "static"))
    offset = Topology((0,), (0,), ((0,),), mixture_kind=("static",), mixture_offset=((True,),))
    gated = Topology((0, 1), (0, 1), ((0,), (1,)))
    two: dict[str, Any] = {"mixture_kind": ("static", "static")}
    added = Topology((0, 1), (0, 1), ((0,), (1,)), mixture_output=(0, 0), **two)
    for other in (turned, offset, gated, added, Topology.hard_sharing(2)):
        assert not passes(other, spec)
    for own in (MLPSpec((6, 1)), MLPSpec((6, 1), "identity", norm="batch"), MLPSpec((6, 1), "identity", dropout=0.5)):
        assert not passes(TOWERS, own)
    plan = level(TOWERS, spec)._plan
    assert LevelPlan.from_text(plan.text) is plan


@pytest.mark.parametrize("form", ["stacked", "list", "one"])
@pytest.mark.parametrize("name", SPECS)
def test_they_are_the_reference(name: str, form: str, backend: str, device: torch.device) -> None:
    module = level(TOWERS, SPECS[name]).to(device)
    leaves = [leaf.to(device) for leaf in draw(form, 9, 3, module.in_features)]
    compare(module, leaves, form=form, slots=3)


@pytest.mark.parametrize("batch", [0, 1, 700])
def test_numbers_of_rows(batch: int, device: torch.device) -> None:
    module = level(TOWERS, SPECS["three layers"]).to(device)
    compare(
        module, [leaf.to(device) for leaf in draw("stacked", batch, 3, module.in_features)], form="stacked", slots=3
    )


@pytest.mark.parametrize("autocast", [True, False])
def test_low_precision(autocast: bool, backend: str, device: torch.device) -> None:
    module = level(TOWERS, SPECS["one output"]).to(device)
    leaves = [leaf.to(device) for leaf in draw("stacked", 9, 3, module.in_features)]
    compare_low_precision(module, leaves, dtype=torch.bfloat16, autocast=autocast, form="stacked", slots=3)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("frozen", ["nothing", "weights", "all", "input", "input and all but the last bias"])
def test_only_what_is_wanted(frozen: str, recompute: bool, backend: str, device: torch.device) -> None:
    for name in SPECS:
        module = level(TOWERS, SPECS[name]).to(device)
        module.recompute = recompute
        for key, parameter in module.named_parameters():
            is_last = key.endswith(f"{len(SPECS[name].units) - 1}.bias")
            if (
                frozen == "all"
                or (frozen == "weights" and key.endswith("weight"))
                or (frozen.endswith("bias") and not is_last)
            ):
                parameter.requires_grad_(False)
        x = draw("stacked", 9, 3, module.in_features)[0].to(device)
        x = x.detach().requires_grad_(not frozen.startswith("input"))
        given = torch.randn(9, 3, module.out_features, dtype=torch.float64, device=device)
        leaves = [t for t in (x, *module.parameters()) if t.requires_grad]
        y, expected = module(x), reference_of(module)(x)
        assert_close("y", y, expected, 1e-10)
        with use_backend("torch"), by_route("differentiable"):
            theirs = list(torch.autograd.grad(module(x), leaves, given))
        for own, other in zip(torch.autograd.grad(y, leaves, given), theirs, strict=True):
            assert_close(name, own, other, 1e-10)


def test_listed_weights_are_ones(backend: str, device: torch.device) -> None:
    module = level(TOWERS, SPECS["one output"]).to(device)
    x = torch.randn(5, 3, module.in_features, dtype=torch.float64, device=device, requires_grad=True)
    y, gates = module(x, return_gates=True)
    assert all(torch.equal(gate, torch.ones_like(gate)) for gate in gates)
    y.sum().backward()
    with torch.inference_mode():
        assert torch.equal(module(x), y)


def test_a_user_may_write_to_the_output_and_to_its_gradient(backend: str, device: torch.device) -> None:
    module = level(TOWERS, SPECS["one output"]).to(device)
    x = torch.randn(5, 3, module.in_features, dtype=torch.float64, device=device, requires_grad=True)
    given = torch.randn(5, 3, 1, dtype=torch.float64, device=device)
    (expected,) = torch.autograd.grad(module(x), x, given)
    kept = given.clone()
    y = module(x)
    y.add_(1.0)
    (found,) = torch.autograd.grad(y, x, given)
    assert torch.equal(found, expected) and torch.equal(given, kept)


def test_nothing_is_kept_of_the_mixing(device: torch.device) -> None:
    module = level(TOWERS, SPECS["linear"]).float().to(device)
    x = torch.randn(50, 3, module.in_features, device=device, requires_grad=True)
    with saved() as tensors:
        module(x)
    own = {id(tensor) for tensor in (x, *module.parameters())}
    assert all(id(tensor) in own for tensor in tensors)


@pytest.mark.parametrize(("name", "forward", "backward"), [("linear", 1, 3), ("three layers", 3, 7)])
def test_launches(name: str, forward: int, backward: int, device: torch.device) -> None:
    """A launch per layer forward; two per layer backward, and one that adds up the parts of the weights' gradients."""
    pytest.importorskip("triton")
    from ple_fast_kernels import launches

    module = level(TOWERS, SPECS[name]).float().to(device)
    x = torch.randn(5, 3, module.in_features, device=device, requires_grad=True)
    with use_backend("triton"):
        before = launches()
        y = module(x)
        assert launches() - before == forward
        before = launches()
        y.sum().backward()
        assert launches() - before == backward


def test_compiled_it_is_the_same(device: torch.device) -> None:
    module = level(TOWERS, SPECS["one output"]).float().to(device)
    x = torch.randn(5, 3, module.in_features, device=device, requires_grad=True)
    compiled: Any = torch.compile(module, backend="aot_eager", fullgraph=True)
    y, expected = compiled(x), module(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), [x, *module.parameters()]),
        torch.autograd.grad(expected.sum(), [x, *module.parameters()]),
    )


def test_a_trunk_of_linear_towers_is_exported_without_this_library() -> None:
    module = ExtractionNetwork(4, TOWERS, experts=SPECS["one output"], gate=GateSpec()).for_inference()
    x = torch.randn(5, 3, 4)
    program = torch.export.export(module, (x,))
    assert all("ple_fast" not in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), module(x))

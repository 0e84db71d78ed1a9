"""Entries whose gradient stops before the expert: exactly zero where it stops, all else as without, on every route."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ple_fast import ExtractionNetwork, GateSpec, MLPSpec, Topology, use_backend
from ple_fast.plan import LevelPlan
from ple_fast.reference import ExtractionNetworkReference
from ple_fast.torch_backend import mix
from tests.helpers import EXPERTS, TOPOLOGIES, by_route, compare, draw, level

INF, NAN = float("inf"), float("nan")
OPEN = Topology((0, 0, 1, 1, 2, 2), (0, 1, 2), (tuple(range(6)),) * 3)
STOPS = Topology(
    OPEN.expert_slot,
    OPEN.mixture_slot,
    OPEN.mixture_experts,
    mixture_stop=tuple(tuple(e // 2 not in (t, 2) for e in range(6)) for t in range(3)),
)
"""Task 0's experts, task 1's, shared ones; mixture 2 is open to the shared ones alone."""


def expert_grads(module: ExtractionNetwork) -> Tensor:
    """Per expert the largest gradient of its parameters."""
    rows = []
    for name, parameter in module.named_parameters():
        if name.startswith("blocks."):
            assert parameter.grad is not None
            rows.append(parameter.grad.abs().flatten(1).amax(1))
    return torch.stack(rows).amax(0)


@pytest.mark.parametrize("rows", [1, 3, 700])
@pytest.mark.parametrize("units", [(4,), (5, 4)])
def test_gradients_are_exactly_zero_where_they_stop(
    rows: int, units: tuple[int, ...], backend: str, device: torch.device
) -> None:
    module = level(STOPS, MLPSpec(units, "tanh"), dtype=torch.float32).to(device)
    for task, reached in enumerate(([0, 1, 4, 5], [2, 3, 4, 5], [4, 5])):
        module.zero_grad()
        x = torch.randn(rows, 3, 7, device=device, requires_grad=True)
        module(x)[:, task].square().sum().backward()
        found = expert_grads(module)
        assert [e for e in range(6) if found[e] != 0] == reached
        assert module.gate.weight is not None and module.gate.weight.grad is not None and x.grad is not None
        own = module.gate.weight.grad.view(3, 6, 7).abs().amax(2)
        assert (own[task] > 0).all(), "the weights of stopped entries are learned"
        assert not own[[t for t in range(3) if t != task]].any()
        slots = {e // 2 for e in reached} | {task}
        assert [s for s in range(3) if x.grad[:, s].any()] == sorted(slots)


@pytest.mark.parametrize("route", ["by hand", "few rows", "differentiable"])
@pytest.mark.parametrize("name", ["stops", "ragged-stops"])
@pytest.mark.parametrize("rows", [1, 5])
def test_every_route_follows_the_reference(route: str, name: str, rows: int) -> None:
    topology = STOPS if route == "few rows" else TOPOLOGIES[name]  # which has no static mixture and no offsets
    module = level(topology, EXPERTS["2-layers"])
    slots = topology.num_slots
    assert slots is not None
    with by_route(route):
        compare(module, draw("stacked", rows, slots, 7), form="stacked", slots=slots, ask_gates=route != "few rows")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("spec", ["batch-norm", "layer-norm-after", "prelu", "no-last-activation", "silu"])
def test_make_ups_of_experts(spec: str, recompute: bool, backend: str) -> None:
    for name in ("stops", "ragged-stops"):
        module = level(TOPOLOGIES[name], EXPERTS[spec], GateSpec((5,), logits_norm="batch"), recompute=recompute)
        slots = TOPOLOGIES[name].num_slots
        assert slots is not None
        compare(module, draw("stacked", 6, slots, 7), form="stacked", slots=slots)


def test_no_row(backend: str) -> None:
    module = level(TOPOLOGIES["stops"], MLPSpec((4,)))
    x = torch.zeros(0, 3, 7, dtype=torch.float64, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("name", ["stops", "ragged-stops"])
def test_what_is_not_finite_does_not_pass_a_stopped_entry(name: str, value: float, dtype: torch.dtype) -> None:
    """0 times infinity is NaN: what is stopped is left out, not weighed with 0."""
    topology = TOPOLOGIES[name]
    plan = LevelPlan.build(topology, [(0, topology.num_experts, MLPSpec((3,)))], GateSpec())
    stops = topology.mixture_stop
    assert stops is not None
    wide = torch.promote_types(dtype, torch.float32)
    weights = torch.rand(2, topology.num_mixtures, topology.num_experts, dtype=wide)
    for o in range(topology.num_mixtures):
        dy: Tensor = torch.ones(2, topology.num_mixtures, 3).to(dtype)
        dy[0, o, 1] = value
        found = mix.combine_backward(plan, weights, dy)
        reached = {e for e, stop in zip(topology.mixture_experts[o], stops[o], strict=True) if not stop}
        assert {e for e in range(topology.num_experts) if not found[0, e, 1].isfinite()} == reached
        assert found[1].isfinite().all() and found[0, :, [0, 2]].isfinite().all()


def test_kernels_leave_out_what_is_stopped() -> None:
    pytest.importorskip("triton")
    from ple_fast_kernels import gate_combine_bwd
    from tests.kernel_helpers import mixtures_of

    topology = TOPOLOGIES["stops"]
    p, h = torch.rand(5, topology.num_weights), torch.randn(5, topology.num_experts, 6)
    dy = torch.ones(5, topology.num_mixtures, 6)
    dy[:, 1] = NAN
    dh, dp, _ = gate_combine_bwd(dy, None, h, p, mixtures_of(topology), 6, torch.float32)
    assert dh is not None and dp is not None
    assert dh.isnan().flatten(2).any(2)[0].tolist() == [False, False, True, True]
    assert dp[:, 4:8].isnan().all(), "the gradients of the weights are"


def test_derivatives_of_second_order_stop_where_the_first_do(backend: str) -> None:
    module = level(STOPS, MLPSpec((3,), "tanh"), in_features=4)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    reference = ExtractionNetworkReference.like(module)
    found = []
    for own in (module, reference):
        (first,) = torch.autograd.grad(own(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        found.append((first, second))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_transforms_and_compilers_stop_it_too() -> None:
    module = level(STOPS, MLPSpec((5, 4), "tanh"))
    x = torch.randn(4, 3, 7, dtype=torch.float64, requires_grad=True)

    def loss(own: Tensor) -> Tensor:
        out: Tensor = module(own)[:, 0].square().sum()
        return out

    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    per_row = torch.func.vmap(torch.func.grad(lambda row: loss(row.unsqueeze(0))))(x.detach())
    torch.testing.assert_close(per_row, expected)
    tangent = torch.randn_like(x)
    along = torch.func.jvp(loss, (x.detach(),), (tangent,))[1]
    torch.testing.assert_close(along, (expected * tangent).sum())
    per_task = module(x).square().sum((0, 2))
    one_by_one = [torch.autograd.grad(own, x, retain_graph=True)[0] for own in per_task]
    (batched,) = torch.autograd.grad(per_task, x, torch.eye(3, dtype=x.dtype), is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack(one_by_one))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x)[:, 0].square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_an_exported_program_that_is_trained_stops_it() -> None:
    module = level(STOPS, MLPSpec((4,), "tanh"), dtype=torch.float32)
    x = torch.randn(4, 3, 7, requires_grad=True)
    (expected,) = torch.autograd.grad(module(x)[:, 0].square().sum(), x)
    exported = torch.export.export(module, (x,)).module()
    (found,) = torch.autograd.grad(exported(x)[:, 0].square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_kernels_take_no_launch_more_and_pytorch_one_mask(device: torch.device) -> None:
    modules = [level(t, MLPSpec((5, 4)), dtype=torch.float32).to(device) for t in (OPEN, STOPS)]
    x = torch.randn(6, 3, 7, device=device)

    def operators(module: ExtractionNetwork) -> Counter[str]:
        with use_backend("torch"), profile(activities=[ProfilerActivity.CPU]) as profiled:
            module(x).sum().backward()
        return Counter({event.key: event.count for event in profiled.key_averages() if event.key.startswith("aten::")})

    operators(modules[0])
    found = [operators(module) for module in modules]
    masks = "aten::masked_fill", "aten::index_select"
    assert [[own[name] for name in masks] for own in found] == [[0, 0], [1, 0]]
    pytest.importorskip("triton")
    from ple_fast_kernels import launches

    counts = []
    for module in modules:
        start = launches()
        with use_backend("triton"):
            module(x).sum().backward()
        counts.append(launches() - start)
    assert counts[0] == counts[1] > 0


def test_nothing_stopped_is_the_plan_without() -> None:
    nothing = tuple((False,) * 6 for _ in range(3))
    same = Topology(OPEN.expert_slot, OPEN.mixture_slot, OPEN.mixture_experts, mixture_stop=nothing)
    assert same == OPEN and same.mixture_stop is None
    spec = MLPSpec((4,))
    assert level(same, spec)._plan is level(OPEN, spec)._plan
    assert "true" not in level(OPEN, spec)._plan.text.split("],[[")[0]


def test_plans_tell_levels_that_stop_from_others_and_old_texts_are_read() -> None:
    plain, stops = level(OPEN, MLPSpec((4,)))._plan, level(STOPS, MLPSpec((4,)))._plan
    assert plain.text != stops.text
    assert LevelPlan.from_text(stops.text) is stops and LevelPlan.from_text(plain.text) is plain
    old = '[[[0,0],[0],[[0,1]],["softmax"],[[false,false]],1],[[0,2,[[4,["relu",0.0],null,"before",true,0.0]]]],'
    assert plain.text.startswith("[[[0,0,1,1,2,2],")
    gate = plain.text[plain.text.rindex('{"units"') :]
    assert LevelPlan.from_text(old + gate).topology.mixture_stop is None


WIRING: dict[str, Any] = {"expert_slot": (0, 0), "mixture_slot": (0, 0), "mixture_experts": ((0, 1), (1,))}


@pytest.mark.parametrize(
    ("stop", "error", "message"),
    [
        (((True,), (True,)), ValueError, r"mixture_stop: .*lengths \(2, 1\), got \(1, 1\)"),
        ((True, True), TypeError, r"mixture_stop\[0\]: expected a sequence of bools"),
        (((0.5, False), (True,)), TypeError, r"mixture_stop\[0\]: expected bools, got"),
        ("ab", TypeError, "mixture_stop: expected a sequence of tuples"),
        (((False, True), (True,)), ValueError, r"stop before experts \[1\], which would never learn"),
    ],
)
def test_stops_that_do_not_fit_are_refused(stop: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Topology(**WIRING, mixture_stop=stop)

"""Drawn wirings, specs, sizes and input forms, held to the float64 reference: forward, every gradient, every buffer."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ple_fast import PLE, GateSpec, MLPSpec, Topology
from ple_fast.modules.norms import StackedLayerNorm
from ple_fast.reference import PLEReference
from ple_fast.specs import ACTIVATIONS, Activation
from tests.helpers import FORMS, compare, compare_low_precision, draw, level, randomise

FEW = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
FEWER = settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def topologies(draw_: st.DrawFn) -> Topology:
    """Any wiring of up to 4 slots, 6 experts and 4 mixtures."""
    slots = draw_(st.integers(1, 4))
    expert_slot = sorted(draw_(st.lists(st.integers(0, slots - 1), min_size=1, max_size=6)))
    count = len(expert_slot)
    mixture_slot = draw_(st.lists(st.integers(0, slots - 1), min_size=1, max_size=4))
    some = st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True)
    mixed = [draw_(some) for _ in mixture_slot]
    for expert in sorted(set(range(count)) - {e for row in mixed for e in row}):
        mixed[draw_(st.integers(0, len(mixed) - 1))].append(expert)
    kinds = draw_(st.none() | st.tuples(*[st.sampled_from(["softmax", "static", "sigmoid"])] * len(mixed)))
    offsets = draw_(st.none() | st.tuples(*[st.tuples(*[st.booleans()] * len(row)) for row in mixed]))
    stops = outputs = None
    if draw_(st.booleans()):  # each expert is open to the first mixture that weighs it
        closed = draw_(st.tuples(*[st.tuples(*[st.booleans()] * len(row)) for row in mixed]))
        first = {e: next(o for o, row in enumerate(mixed) if e in row) for e in range(count)}
        pairs = [zip(row, own, strict=True) for row, own in zip(mixed, closed, strict=True)]
        stops = tuple(tuple(stop and first[e] != o for e, stop in row) for o, row in enumerate(pairs))
    elif draw_(st.booleans()):
        outputs = tuple(accumulate((0, *draw_(st.tuples(*[st.integers(0, 1)] * (len(mixed) - 1))))))
    return Topology(
        tuple(expert_slot),
        tuple(mixture_slot),
        tuple(map(tuple, mixed)),
        kinds,
        offsets,
        num_slots=slots,
        mixture_stop=stops,
        mixture_output=outputs,
    )


ACTIVATION = st.sampled_from(ACTIVATIONS) | st.floats(-1.0, 1.5).map(lambda slope: Activation("leaky_relu", slope))
NORM = st.sampled_from([None, None, "batch", "layer"])


@st.composite
def experts(draw_: st.DrawFn, out_features: int) -> MLPSpec:
    """Any make-up of an expert of up to 4 layers, without dropout."""
    units = (*draw_(st.lists(st.integers(1, 6), max_size=3)), out_features)

    def per_layer(values: st.SearchStrategy[Any]) -> tuple[Any, ...]:
        return tuple(draw_(values) for _ in units)

    return MLPSpec(
        units,
        activation=per_layer(ACTIVATION),
        norm=per_layer(NORM),
        norm_position=per_layer(st.sampled_from(["before", "after"])),
        bias=per_layer(st.booleans()),
    )


@st.composite
def gates(draw_: st.DrawFn) -> GateSpec:
    """Any gate of up to 2 hidden layers, without dropout."""
    units = tuple(draw_(st.lists(st.integers(1, 5), max_size=2)))
    return GateSpec(
        units,
        activation=tuple(draw_(ACTIVATION) for _ in units),
        norm=tuple(draw_(NORM) for _ in units),
        bias=draw_(st.booleans()),
        logits_norm=draw_(st.sampled_from([None, None, "batch"])),
        temperature=draw_(st.sampled_from([1.0, 0.5, 2.0])),
        input=draw_(st.sampled_from(["previous", "with_shared", "raw"])),
    )


@st.composite
def configurations(draw_: st.DrawFn) -> dict[str, Any]:
    """A level with its specs, and sizes and forms of its inputs."""
    topology = draw_(topologies())
    out = draw_(st.integers(1, 6))
    one = draw_(st.booleans())
    specs = draw_(experts(out)) if one else tuple(draw_(experts(out)) for _ in range(topology.num_experts))
    gate = draw_(gates())
    raw = gate.input == "raw"
    form = draw_(st.sampled_from(sorted(FORMS)))
    return {
        "topology": topology,
        "experts": specs,
        "gate": gate,
        "in_features": draw_(st.integers(1, 8)),
        "gate_features": draw_(st.integers(1, 5)) if raw else None,
        "batch": 5 if form == "expanded" else draw_(st.integers(3, 12)),
        "form": form,
        "gate_form": draw_(st.sampled_from(sorted(set(FORMS) - {"expanded"}))) if raw else None,
        "recompute": draw_(st.booleans()),
        "seed": draw_(st.integers(0, 2**16)),
    }


def _calm(module: nn.Module) -> nn.Module:
    """Norms whose eps keeps features without variance (one unit, dead ones) from amplifying rounding 300 times each."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm1d | StackedLayerNorm):
            child.eps = 0.01
    return module


def hold_drawn(c: dict[str, Any], device: torch.device | str = "cpu", **how: Any) -> None:
    """A drawn level against the reference."""
    module = level(
        c["topology"],
        c["experts"],
        c["gate"],
        in_features=c["in_features"],
        gate_features=c["gate_features"],
        recompute=c["recompute"],
        seed=c["seed"],
    ).to(device)
    slots = c["topology"].num_slots
    leaves = [t.to(device) for t in draw(c["form"], c["batch"], slots, c["in_features"], seed=c["seed"] + 1)]
    if c["gate_form"] is not None:
        how["gate_form"] = c["gate_form"]
        gate_leaves = draw(c["gate_form"], c["batch"], slots, c["gate_features"], seed=c["seed"] + 2)
        how["gate_leaves"] = [t.to(device) for t in gate_leaves]
    # Norms over few samples divide by variances near 0 and so amplify rounding: errors count against the whole step.
    compare(_calm(module), leaves, form=c["form"], slots=slots, tolerance=1e-8, common_scale=True, **how)


@FEW
@given(configurations())
def test_any_level_trains_like_the_reference(configuration: dict[str, Any]) -> None:
    hold_drawn(configuration)


@FEWER
@given(configurations(), st.booleans())
def test_any_level_evaluates_like_the_reference(configuration: dict[str, Any], gates_enter_loss: bool) -> None:
    hold_drawn(configuration, train=False, gates_enter_loss=gates_enter_loss)


@FEWER
@given(configurations(), st.data())
def test_any_level_with_frozen_parts(configuration: dict[str, Any], data: st.DataObject) -> None:
    c = configuration
    module = level(
        c["topology"], c["experts"], c["gate"], in_features=c["in_features"], gate_features=c["gate_features"]
    )
    parameters = list(module.parameters())
    kept = data.draw(st.lists(st.booleans(), min_size=len(parameters), max_size=len(parameters)))
    for parameter, flag in zip(parameters, kept, strict=True):
        parameter.requires_grad_(flag)
    how: dict[str, Any] = {}
    slots = c["topology"].num_slots
    if c["gate_form"] is not None:
        how["gate_form"] = c["gate_form"]
        how["gate_leaves"] = draw(c["gate_form"], c["batch"], slots, c["gate_features"])
    leaves = draw(c["form"], c["batch"], slots, c["in_features"])
    compare(_calm(module), leaves, form=c["form"], slots=slots, tolerance=1e-8, common_scale=True, **how)
    for parameter, flag in zip(parameters, kept, strict=True):
        assert parameter.grad is None or flag


@FEWER
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.data(),
    st.sampled_from(["all", "shared"]),
    st.sampled_from([None, "batch", "layer"]),
    st.sampled_from(["relu", "silu", "prelu"]),
    st.sampled_from(["one", "list", "stacked"]),
)
def test_any_ple(
    num_tasks: int, num_levels: int, data: st.DataObject, scope: Any, norm: Any, activation: str, form: str
) -> None:
    shared = [data.draw(st.integers(0, 3)) for _ in range(num_levels)]
    if 0 in shared:  # a level without shared experts hands on no shared slot
        shared = [0] * num_levels
    lowest = 0 if shared[0] else 1
    counts = [[data.draw(st.integers(lowest, 3)) for _ in range(num_tasks)] for _ in range(num_levels)]
    units = [tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))) for _ in range(num_levels)]
    module = PLE(
        5,
        num_tasks,
        num_levels=num_levels,
        task_experts=counts,
        shared_experts=shared,
        expert_units=units,
        gate_units=tuple(data.draw(st.lists(st.integers(1, 4), max_size=1))),
        shared_gate_scope=scope,
        norm=norm,
        activation=activation,
        last_shared=data.draw(st.booleans()) if shared[0] else False,
        dtype=torch.float64,
    )
    randomise(_calm(module))
    slots = num_tasks + (shared[0] > 0)
    compare(module, draw(form, 7, slots, 5), form=form, slots=slots, tolerance=1e-8, common_scale=True)
    assert isinstance(PLEReference.like(module), nn.Module)


@FEWER
@given(topologies(), st.sampled_from(["relu", "silu", "tanh"]), st.sampled_from([torch.bfloat16, torch.float16]))
def test_any_wiring_in_low_precision(topology: Topology, activation: str, dtype: torch.dtype) -> None:
    module = level(topology, MLPSpec((24, 16), activation), GateSpec((12,), activation), in_features=32)
    slots = topology.num_slots or 1
    compare_low_precision(module, draw("stacked", 48, slots, 32), dtype=dtype, form="stacked", slots=slots)

"""A training step of few rows: the short path against the float64 reference, and which calls take it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ple_fast.autograd
from ple_fast import PLE, ExtractionNetwork, GateSpec, MLPSpec, Topology
from ple_fast.torch_backend.few_rows import few_rows_train_backward, few_rows_train_forward, serves
from ple_fast.torch_backend.product_table import LARGEST, Limits
from ple_fast.torch_backend.table_in_use import limited
from tests.helpers import (
    TOPOLOGIES,
    assert_close,
    assert_derivatives_agree,
    compare,
    compare_low_precision,
    draw,
    level,
    saved_bytes,
)
from tests.product_helpers import ways

__all__ = ["ways"]

MAX_TRAIN_ROWS = Limits().few_rows_training
WIRINGS: dict[str, Topology] = {
    "ple": TOPOLOGIES["ple"],
    "ple-even": TOPOLOGIES["ple-even"],
    "ple-last": Topology.ple(2, 2, 2, last=True),
    "mmoe": TOPOLOGIES["mmoe"],
    "one-expert": TOPOLOGIES["one-expert"],
    "all-to-all": Topology((0, 1, 2), (0, 1), ((0, 1, 2),) * 2),
    "unordered": Topology((0, 0, 1, 1), (0, 1), ((3, 0, 2), (2, 1, 3))),
    "stem": Topology.stem(2, 2, 2, last=True),
}
EXPERTS: dict[str, MLPSpec] = {
    "1-layer": MLPSpec((4,)),
    "1-layer-no-bias": MLPSpec((4,), bias=False),
    "1-layer-gelu": MLPSpec((4,), "gelu"),
    "1-layer-identity": MLPSpec((4,), "identity"),
    "2-layers-tanh": MLPSpec((6, 4), "tanh"),
    "2-layers-sigmoid-leaky": MLPSpec((6, 4), ("sigmoid", "leaky_relu")),
    "3-layers": MLPSpec((5, 3, 4)),
    "3-layers-mixed": MLPSpec((5, 3, 4), ("silu", "relu", "gelu_tanh"), bias=(True, False, True)),
    "4-layers": MLPSpec((6, 2, 5, 4), last_activation="identity"),
    "4-layers-negative-leaky": MLPSpec((6, 2, 5, 4), nn.LeakyReLU(-0.5), bias=False),
}
"""Derivatives that follow from the output, from the input, and both within one expert."""


class Calls(list[tuple[str, int]]):
    """``("forward" or "backward", rows)`` of every call of the short training path."""

    def took(self, rows: int, levels: int = 1) -> None:
        """Every level of one step went this way, forward and backward; forgets the calls."""
        assert list(self) == [("forward", rows)] * levels + [("backward", rows)] * levels
        self.clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    seen = Calls()

    def forward(plan: Any, layers: Any, gate: Any, x: Tensor) -> Any:
        seen.append(("forward", x.shape[0]))
        return few_rows_train_forward(plan, layers, gate, x)

    def backward(plan: Any, layers: Any, gate: Any, x: Tensor, *rest: Any, **wanted: Any) -> Any:
        seen.append(("backward", x.shape[0]))
        return few_rows_train_backward(plan, layers, gate, x, *rest, **wanted)

    monkeypatch.setattr(ple_fast.autograd, "few_rows_train_forward", forward)
    monkeypatch.setattr(ple_fast.autograd, "few_rows_train_backward", backward)
    return seen


def _slots(topology: Topology) -> int:
    assert topology.num_slots is not None
    return topology.num_slots


@pytest.mark.parametrize("gate_bias", [True, False])
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("topology", WIRINGS)
def test_a_step_equals_the_reference(topology: str, experts: str, gate_bias: bool, calls: Calls) -> None:
    wiring = WIRINGS[topology]
    module, slots = level(wiring, EXPERTS[experts], GateSpec(bias=gate_bias)), _slots(wiring)
    for form in ("one", "stacked"):
        if not serves(module._plan, form == "stacked"):
            assert form == "stacked" and topology in ("ple", "ple-even", "mmoe")
            continue
        for batch in (1, 2, 31):
            compare(module, draw(form, batch, slots, 7), form=form, slots=slots, ask_gates=False)
            calls.took(batch)
            assert all(p.grad is not None and p.grad.is_contiguous() for p in module.parameters())


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("gate_bias", [True, False])
def test_gates_that_read_the_shared_slot_too(last: bool, gate_bias: bool, calls: Calls) -> None:
    """Of STEM: the last level has no gate that reads the shared slot alone."""
    wiring = Topology.stem(2, 2, 2, last=last)
    module = level(wiring, EXPERTS["1-layer"], GateSpec(bias=gate_bias, input="with_shared"))
    for form in ("stacked", "slots-first", "column-slice"):
        for batch in (1, 2, 31):
            compare(module, draw(form, batch, 3, 7), form=form, slots=3, ask_gates=False)
            calls.took(batch)
    assert_derivatives_agree(module, torch.randn(4, 3, 7, dtype=torch.float64), 1e-9)
    for dtype in (torch.float32, torch.bfloat16):
        compare_low_precision(module, draw("stacked", 20, 3, 7), dtype=dtype, form="stacked", slots=3, ask_gates=False)
    compare_low_precision(
        module, draw("stacked", 20, 3, 7), dtype=torch.bfloat16, autocast=True, form="stacked", slots=3, ask_gates=False
    )
    with torch.inference_mode():
        x = torch.randn(5, 3, 7, dtype=torch.float64)
        assert_close("y", module(x), module(list(x.unbind(1))), 1e-12)


@pytest.mark.parametrize("experts", ["1-layer", "3-layers-mixed"])
@pytest.mark.parametrize(
    "form", ["every-second-row", "transposed", "expanded", "expanded-slots", "slots-first", "column-slice"]
)
@pytest.mark.parametrize("topology", ["ple-last", "all-to-all"])
def test_inputs_that_are_not_contiguous(topology: str, form: str, experts: str, calls: Calls) -> None:
    wiring = WIRINGS[topology]
    module, slots = level(wiring, EXPERTS[experts]), _slots(wiring)
    for batch in (1, 5):
        compare(module, draw(form, batch, slots, 7), form=form, slots=slots, ask_gates=False)
        calls.took(5 if form == "expanded" else batch)


@pytest.mark.parametrize("experts", ["1-layer", "2-layers-tanh", "3-layers-mixed"])
@pytest.mark.parametrize("form", ["one", "stacked"])
def test_an_input_without_gradient(form: str, experts: str, calls: Calls) -> None:
    module = level(WIRINGS["ple-last"], EXPERTS[experts])
    ours, _ = compare(module, draw(form, 3, 3, 7), form=form, slots=3, ask_gates=False, input_grad=False)
    assert ours.x_grads == [None]
    calls.took(3)


@pytest.mark.parametrize("form", ["one", "stacked"])
@pytest.mark.parametrize("batch", [1, 4])
def test_output_gradients_that_are_not_contiguous(batch: int, form: str, calls: Calls) -> None:
    module = level(WIRINGS["ple-last"], EXPERTS["2-layers-tanh"])
    (x,) = draw(form, batch, 3, 7)
    leaves = [x.requires_grad_(), *module.parameters()]
    y = module(x)
    one = torch.ones((), dtype=torch.float64)
    for dy in (one.expand(y.shape), torch.randn(4, 2, batch, dtype=torch.float64).permute(2, 1, 0)):
        strided = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        for a, b in zip(strided, torch.autograd.grad(y, leaves, dy.contiguous(), retain_graph=True), strict=True):
            assert_close("gradient", a, b, 1e-14)
    assert [kind for kind, _ in calls] == ["forward"] + ["backward"] * 4


@pytest.mark.parametrize("units", [(4,), (6, 5, 4)])
@pytest.mark.parametrize("batch", [1, 2, 31, MAX_TRAIN_ROWS - 1])
def test_a_whole_ple(batch: int, units: tuple[int, ...], calls: Calls) -> None:
    module = PLE(7, 3, task_experts=2, shared_experts=2, expert_units=units, activation="silu", dtype=torch.float64)
    compare(module, draw("one", batch, 4, 7), ask_gates=False)
    calls.took(batch, levels=2)


@pytest.mark.parametrize("form", ["one", "stacked"])
@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("wide_rows", [0, LARGEST.wide_rows])
@pytest.mark.usefixtures("ways")
def test_float32_by_each_way_of_the_products(batch: int, form: str, wide_rows: int, calls: Calls) -> None:
    module = level(WIRINGS["ple-last"], MLPSpec((256, 16)), in_features=256)
    with limited(wide_rows=wide_rows):
        leaves = draw(form, batch, 3, 256)
        compare_low_precision(module, leaves, dtype=torch.float32, form=form, slots=3, ask_gates=False)
    assert calls[0] == ("forward", batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("experts", ["1-layer", "1-layer-no-bias", "1-layer-gelu", "2-layers-tanh", "3-layers-mixed"])
@pytest.mark.parametrize("topology", ["ple", "ple-last", "all-to-all"])
@pytest.mark.usefixtures("ways")
def test_low_precision(topology: str, experts: str, autocast: bool, dtype: torch.dtype, calls: Calls) -> None:
    wiring = WIRINGS[topology]
    module, slots = level(wiring, EXPERTS[experts], in_features=32), _slots(wiring)
    for form, batch, wide_rows in (("one", 1, 0), ("one", 9, 0), ("one", 9, 1 << 12), ("stacked", 9, 0)):
        if serves(module._plan, form == "stacked"):
            with limited(wide_rows=wide_rows):
                leaves = draw(form, batch, slots, 32)
                how: dict[str, Any] = {"dtype": dtype, "autocast": autocast, "form": form, "slots": slots}
                compare_low_precision(module, leaves, ask_gates=False, **how)
                calls.took(batch)
                compare_low_precision(module, leaves, ask_gates=False, train=False, **how)
                calls.clear()


def _leaves(module: ExtractionNetwork, batch: int = 3) -> list[Tensor]:
    (x,) = draw("one", batch, 3, 7)
    return [x.requires_grad_(), *module.parameters()]


def test_a_graph_serves_two_backward_passes(calls: Calls) -> None:
    for experts in EXPERTS.values():
        module = level(WIRINGS["ple-last"], experts)
        leaves = _leaves(module)
        y = module(leaves[0])
        dy = torch.randn_like(y)
        kept = dy.clone()
        first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        second = torch.autograd.grad(y, leaves, dy)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert torch.equal(dy, kept)
    assert calls.count(("backward", 3)) == 2 * len(EXPERTS)


def test_gradients_are_those_that_were_asked_for(calls: Calls) -> None:
    module = level(WIRINGS["ple-last"], EXPERTS["3-layers-mixed"])
    leaves = _leaves(module)
    y = module(leaves[0])
    dy = torch.randn_like(y)
    everything = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    for leaf, expected in zip(leaves, everything, strict=True):
        assert_close("gradient", torch.autograd.grad(y, [leaf], dy, retain_graph=True)[0], expected, 1e-14)
    assert calls.count(("backward", 3)) == 1 + len(leaves)


@pytest.mark.parametrize("experts", ["1-layer-gelu", "3-layers-mixed"])
@pytest.mark.parametrize("form", ["one", "stacked"])
def test_derivatives_of_gradients_and_batched_gradients(form: str, experts: str, calls: Calls) -> None:
    module = level(WIRINGS["ple-last"], EXPERTS[experts])
    (x,) = draw(form, 2, 3, 7)
    x.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, *_: module(x), (x, *module.parameters()))
    y = module(x)
    dys = torch.randn(3, *y.shape, dtype=torch.float64)
    (batched,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    for dy, row in zip(dys, batched, strict=True):
        assert_close("x.grad", row, torch.autograd.grad(y, x, dy, retain_graph=True)[0], 1e-12)
    assert ("backward", 2) in calls


def test_backward_within_an_autocast_region(calls: Calls) -> None:
    module = level(WIRINGS["ple-last"], EXPERTS["3-layers-mixed"], dtype=torch.float32)
    x = torch.randn(3, 7)
    grads = []
    for enabled in (False, True):
        y = module(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(y.sum(), list(module.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert len(calls) == 4


def test_a_frozen_tensor_takes_the_general_way(calls: Calls) -> None:
    module = level(WIRINGS["ple-last"], EXPERTS["2-layers-tanh"])
    assert module.gate.bias is not None
    module.gate.bias.requires_grad_(False)
    compare(module, draw("one", 3, 3, 7), ask_gates=False)
    assert calls == []


@pytest.mark.parametrize("experts", ["1-layer-gelu", "2-layers-tanh", "3-layers-mixed"])
@pytest.mark.parametrize("form", ["one", "stacked"])
def test_recomputation_keeps_inputs_alone(form: str, experts: str, calls: Calls) -> None:
    module = level(WIRINGS["ple-last"], EXPERTS[experts])
    module.recompute = True
    compare(module, draw(form, 3, 3, 7), form=form, slots=3, ask_gates=False)
    assert [kind for kind, _ in calls[:3]] == ["forward", "forward", "backward"]
    (x,) = draw(form, 3, 3, 7)
    assert saved_bytes(module, x.requires_grad_()) == 0
    module.recompute = False
    assert saved_bytes(module, x) > 0


def test_autocast_casts_a_parameter_once_in_a_region(calls: Calls) -> None:
    module = level(WIRINGS["ple-last"], EXPERTS["2-layers-tanh"], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        first, second = module(torch.randn(3, 7)), module(torch.randn(3, 7))
    assert first.dtype == torch.bfloat16
    kept: list[list[Tensor]] = [[t for t in y.grad_fn.saved_tensors if t is not None] for y in (first, second)]
    casts = [{t.data_ptr() for t in saved if t.dim() == 3 and t.shape[2] == 7} for saved in kept]
    assert casts[0] == casts[1] and len(casts[0]) == 1
    assert len(calls) == 2


def test_gates_more_rows_and_lists_take_the_general_way(calls: Calls) -> None:
    module = level(WIRINGS["ple-last"], EXPERTS["2-layers-tanh"])
    compare(module, draw("one", 3, 3, 7))
    compare(module, draw("one", MAX_TRAIN_ROWS, 3, 7), ask_gates=False)
    compare(module, draw("list", 3, 3, 7), form="list", slots=3, ask_gates=False)
    (x,) = draw("one", 3, 3, 7)
    assert_close("y", module(x, x.clone()), module.eval()(x, x), 1e-12)
    assert calls == []

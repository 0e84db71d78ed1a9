"""Tables of the Triton level: precision of products, sources of inputs, runs of gates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ple_fast import GateSpec, MLPSpec, Topology
from ple_fast.plan import LevelPlan
from ple_fast.slots import Place, Slots

pytest.importorskip("triton")

from ple_fast.triton_backend.inputs import gate_runs, matmul_precision, source_grads, source_of


@pytest.fixture
def _precision_is_restored() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("_precision_is_restored")
def test_float32_products_follow_pytorchs_setting() -> None:
    for setting, expected in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
        torch.set_float32_matmul_precision(setting)
        assert matmul_precision() == expected
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert matmul_precision() == "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert matmul_precision() == "tf32"


def test_inputs_are_copied_only_where_they_are_apart() -> None:
    whole = torch.randn(5, 3, 4)
    one = source_of(Slots([whole[:, 0]], (Place(0, -1),) * 3))
    assert (one.columns, one.is_copy) == ((0, 0, 0), False)
    assert one.tensor.data_ptr() == whole.data_ptr()
    views = Slots(whole.unbind(1), tuple(Place(i, -1) for i in range(3)))
    stacked = source_of(views)
    assert (stacked.columns, stacked.is_copy) == ((0, 1, 2), False)
    assert stacked.tensor.data_ptr() == whole.data_ptr()
    apart = [torch.randn(5, 4), torch.randn(5, 4)]
    twice = Slots(apart, (Place(0, -1), Place(1, -1), Place(0, -1)))
    copy = source_of(twice)
    assert (copy.columns, copy.is_copy) == ((0, 1, 2), True)
    dx = torch.randn(5, 3, 4)
    first, second = source_grads(twice, copy, dx)
    torch.testing.assert_close(first, dx[:, 0] + dx[:, 2])
    torch.testing.assert_close(second, dx[:, 1])


def test_gate_rows_of_one_slot_are_one_run_and_wide_runs_are_cut() -> None:
    plan = LevelPlan.build(Topology.mmoe(3, 30), [(0, 30, MLPSpec((4,)))], GateSpec())
    runs = gate_runs(plan, (0, 0, 0))
    assert (runs.slot, runs.first, runs.sizes) == ((0, 0), (0, 64), (64, 26))
    runs = gate_runs(plan, (0, 1, 2))
    assert (runs.slot, runs.first, runs.sizes) == ((0, 1, 2), (0, 30, 60), (30, 30, 30))


def test_a_plan_survives_its_text() -> None:
    experts = MLPSpec((6, 4), ("gelu", "leaky_relu"), norm=("layer", None), bias=(True, False), dropout=(0.0, 0.5))
    topology = Topology((0, 0, 1), (0, 1), ((0, 2), (1, 2)), mixture_offset=((True, False), (False, False)))
    gate = GateSpec((5,), "tanh", temperature=0.5, bias=False)
    plan = LevelPlan.build(topology, [(0, 2, experts), (2, 3, MLPSpec((4,)))], gate)
    again = LevelPlan.from_text(plan.text)
    assert again.text == plan.text
    assert (again.topology, again.blocks, again.gate, again.gate_spec) == (
        plan.topology, plan.blocks, plan.gate, plan.gate_spec
    )  # fmt: skip

"""The softmax of the gates and the mixtures of the torch backend, where several ways lead to one result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ple_fast import GateSpec, MLPSpec, Topology
from ple_fast.plan import LevelPlan
from ple_fast.torch_backend import mix
from tests.helpers import TOPOLOGIES


def plan_of(topology: Topology) -> LevelPlan:
    return LevelPlan.build(topology, [(0, topology.num_experts, MLPSpec((4,)))], GateSpec())


@pytest.mark.parametrize("topology", ["ple", "ple-even", "mmoe", "unordered", "one-expert"])
@pytest.mark.parametrize("rows", [1, 40, mix.NARROW_ELEMENTS])
def test_softmax_of_few_experts_is_pytorchs(topology: str, rows: int) -> None:
    plan = plan_of(TOPOLOGIES[topology])
    logits = 20 * torch.randn(rows, plan.topology.num_logits)
    for row, value in enumerate((torch.inf, -torch.inf, torch.nan)):
        if row < rows:
            logits[row, 0] = value
    before = logits.clone()
    found = mix.gate_softmax(plan, logits)
    expected = mix.gate_softmax(plan, logits.double(), is_traced=True)
    torch.testing.assert_close(logits, before, equal_nan=True)
    torch.testing.assert_close(found.double(), expected, rtol=5e-6, atol=1e-30, equal_nan=True)


def test_what_is_traced_is_one_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(TOPOLOGIES["ple"])
    logits = torch.randn(mix.NARROW_ELEMENTS, plan.topology.num_logits)
    seen: list[str] = []

    def softmax(x: Tensor, dim: int) -> Tensor:
        seen.append("softmax")
        return x.softmax(dim)

    monkeypatch.setattr(torch, "softmax", softmax)
    mix.gate_softmax(plan, logits)
    assert not seen
    mix.gate_softmax(plan, logits, is_traced=True)
    assert seen == ["softmax"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [1.0, torch.inf])
def test_a_mixture_goes_into_memory_that_is_given(value: float, dtype: torch.dtype) -> None:
    plan = plan_of(TOPOLOGIES["ple"])
    rows, mixtures, experts = 5, plan.topology.num_mixtures, plan.topology.num_experts
    h: Tensor = torch.randn(rows, experts, 4).to(dtype)
    h[0, 0, 0] = value
    weights = mix.gate_softmax(plan, torch.randn(rows, plan.topology.num_logits)).to(
        torch.promote_types(dtype, torch.float32)
    )
    out = torch.full((rows, mixtures, 4), torch.nan, dtype=dtype)
    expected = mix.combine(plan, weights, h)
    assert mix.combine(plan, weights, h, out) is out
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert not out.isnan().any(), "0 times infinity is nobody's"

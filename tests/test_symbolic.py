"""``torch.fx.symbolic_trace`` on trunks and on models that hold one: a level is one node."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ple_fast import PLE, GateSpec, Topology
from tests.helpers import EXPERTS, GATES, TOPOLOGIES, assert_close, level, randomise


class Model(nn.Module):
    """An embedding, a trunk, towers: what a recommender library traces as a whole."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Linear(5, 7, dtype=torch.float64)
        self.trunk = trunk
        self.towers = nn.ModuleList(nn.Linear(4, 1, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        mixtures = self.trunk(torch.relu(self.embedding(x))).unbind(1)
        return torch.cat([tower(mixtures[k]) for k, tower in enumerate(self.towers)], 1)


def trunk(**options: Any) -> PLE:
    module = PLE(7, 2, expert_units=(6, 4), dtype=torch.float64, **options)
    randomise(module)
    return module


TRUNKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norms": {"norm": "batch", "activation": "dice", "gate_units": (5,)},
    "recompute": {"recompute": True, "norm": "layer"},
}


def step(module: Any, x: Tensor) -> list[Tensor]:
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    y.square().sum().backward()
    assert leaf.grad is not None
    return [y, leaf.grad, *(p.grad for p in module.parameters() if p.grad is not None), *module.buffers()]


def assert_same_step(traced: nn.Module, eager: nn.Module, x: Tensor) -> None:
    assert set(traced.state_dict()) == set(eager.state_dict())
    ours, theirs = step(traced, x), step(eager, x)
    for a, b in zip(ours, theirs, strict=True):
        assert_close("step", a, b, 0.0)


@pytest.mark.parametrize("options", TRUNKS.values(), ids=TRUNKS)
def test_a_traced_model_trains_like_the_model(options: dict[str, Any]) -> None:
    model = Model(trunk(**options))
    traced = fx.symbolic_trace(copy.deepcopy(model))
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["embedding", "trunk.levels.0", "trunk.levels.1", "towers.0", "towers.1"]
    for rows in (9, 4):
        assert_same_step(traced, model, torch.randn(rows, 5, dtype=torch.float64))
    x = torch.randn(9, 5, dtype=torch.float64)
    assert torch.equal(traced.eval()(x), model.eval()(x))


@pytest.mark.parametrize("options", TRUNKS.values(), ids=TRUNKS)
def test_a_trace_is_traced_again_compiled_and_exported(options: dict[str, Any]) -> None:
    model = Model(trunk(**options))
    again = fx.symbolic_trace(fx.symbolic_trace(copy.deepcopy(model)))
    assert_same_step(again, model, torch.randn(9, 5, dtype=torch.float64))
    compiled = torch.compile(copy.deepcopy(again), fullgraph=True, backend="aot_eager")
    x = torch.randn(9, 5, dtype=torch.float64)
    for a, b in zip(step(compiled, x), step(model, x), strict=True):
        assert_close("step", a, b, 1e-10)
    again.eval()
    program = torch.export.export(again, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for rows in (1, 9):
        x = torch.randn(rows, 5, dtype=torch.float64)
        assert_close("y", program.module()(x), again(x), 1e-12)


def test_a_traced_trunk_has_its_keywords() -> None:
    ple = trunk()
    x = torch.randn(9, 7, dtype=torch.float64)
    traced = fx.symbolic_trace(ple)
    assert torch.equal(traced(x), ple(x))
    with pytest.raises(AssertionError, match="return_gates: this graph was traced for False"):
        traced(x, return_gates=True)
    both = fx.symbolic_trace(ple, concrete_args={"return_gates": True})
    y, gates = both(x, True)  # fx makes it positional
    expected, expected_gates = ple(x, return_gates=True)
    assert torch.equal(y, expected)
    for own, other in zip(gates, expected_gates, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))


def test_a_trunk_that_leaves_out_mixtures_and_gates_that_read_the_raw_input() -> None:
    first = level(TOPOLOGIES["ple-even"], EXPERTS["2-layers"])
    second = level(
        Topology.ple(2, 1, 1, last=False), EXPERTS["1-layer"], GateSpec(input="raw"), in_features=4, gate_features=7
    )
    ple = PLE.from_levels([first, second], num_tasks=2)
    traced = fx.symbolic_trace(ple)
    x = torch.randn(9, 7, dtype=torch.float64)
    assert traced(x).shape == (9, 2, 4)
    assert torch.equal(traced(x), ple(x))


def test_a_list_of_inputs() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.level = level(TOPOLOGIES["ple-even"], EXPERTS["2-layers"], GATES["everything"])

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            y: Tensor = self.level([x, other, torch.tanh(x)])
            return y

    module = Split().eval()
    x, other = (torch.randn(9, 7, dtype=torch.float64) for _ in range(2))
    assert torch.equal(fx.symbolic_trace(module)(x, other), module(x, other))


def test_a_level_is_no_root_of_a_trace() -> None:
    module = level(TOPOLOGIES["ple"], EXPERTS["2-layers"])
    with pytest.raises(ValueError, match=r"trace PLE.from_levels\(\[level\]\)"):
        fx.symbolic_trace(module)
    x = torch.randn(9, 7, dtype=torch.float64)
    assert torch.equal(fx.symbolic_trace(nn.Sequential(module))(x), module(x))

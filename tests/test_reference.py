"""The reference against the formulas of the paper, written out once more with loops over samples and numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ple_fast import GateSpec, MLPSpec, Topology
from ple_fast.reference import Dice, ExtractionNetworkReference, PLEReference, RowDice


def _linear(module: Any, x: list[float]) -> list[float]:
    """``W x + b`` in Python floats."""
    bias = [0.0] * module.out_features if module.bias is None else module.bias.tolist()
    return [
        sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(module.weight.tolist(), bias, strict=True)
    ]


def _softmax(logits: list[float]) -> list[float]:
    exponentials = [math.exp(v) for v in logits]
    return [v / sum(exponentials) for v in exponentials]


def _network(
    topology: Topology, width: int, units: int, gate: GateSpec | None = None, gate_features: int | None = None
) -> ExtractionNetworkReference:
    gate = gate if gate is not None else GateSpec()
    return ExtractionNetworkReference(width, topology, MLPSpec((units,)), gate, gate_features).double()


def _paper_level(level: Any, slots: list[list[float]]) -> list[list[float]]:
    """Mixtures of one sample by eq. 2-4: one ReLU layer per expert, ``softmax(W x)`` over the chosen experts."""
    topology = level.topology
    experts = [
        [max(v, 0.0) for v in _linear(expert[0][0], slots[s])]
        for expert, s in zip(level.experts, topology.expert_slot, strict=True)
    ]
    mixtures = []
    for gate, slot, mixed in zip(level.gates, topology.mixture_slot, topology.mixture_experts, strict=True):
        weights = _softmax(_linear(gate[0], slots[slot]))
        mixtures.append(
            [sum(w * experts[e][h] for w, e in zip(weights, mixed, strict=True)) for h in range(len(experts[0]))]
        )
    return mixtures


def test_two_levels_equal_the_equations_of_the_paper() -> None:
    first, last = Topology.ple(2, [2, 1], 2, last=False), Topology.ple(2, [1, 2], 1, last=True)
    ple = PLEReference([_network(first, 4, 3), _network(last, 3, 5)], num_tasks=2)
    x = torch.randn(6, 4, dtype=torch.float64)
    y = ple(x)
    assert y.shape == (6, 2, 5)
    for sample, row in zip(x.tolist(), y.tolist(), strict=True):
        expected = _paper_level(ple.levels[1], _paper_level(ple.levels[0], [sample] * 3))
        torch.testing.assert_close(torch.tensor(row), torch.tensor(expected), rtol=0, atol=1e-6)


def test_a_gate_by_hand() -> None:
    """Experts 2x and 3x, gate logits log 3 and 0: weights 3/4 and 1/4."""
    level = ExtractionNetworkReference(
        1, Topology.mmoe(1, 2), MLPSpec((1,), "identity", bias=False), GateSpec()
    ).double()
    with torch.no_grad():
        for expert, weight in zip(level.experts, (2.0, 3.0), strict=True):
            expert[0][0].weight.fill_(weight)  # type: ignore[index]  # Sequential of Layer of Linear
        level.gates[0][0].weight.zero_()  # type: ignore[index]
        level.gates[0][0].bias.copy_(torch.tensor([math.log(3.0), 0.0]))  # type: ignore[index]
    y, gates = level(torch.tensor([[4.0]], dtype=torch.float64), return_gates=True)
    torch.testing.assert_close(gates[0], torch.tensor([[0.75, 0.25]], dtype=torch.float64))
    torch.testing.assert_close(y, torch.tensor([[[0.75 * 8.0 + 0.25 * 12.0]]], dtype=torch.float64))


def test_temperature_divides_the_logits() -> None:
    hot = _network(Topology.mmoe(2, 3), 4, 3, GateSpec(temperature=2.0))
    plain = _network(Topology.mmoe(2, 3), 4, 3)
    plain.load_state_dict(hot.state_dict())
    with torch.no_grad():
        for gate in plain.gates:
            for parameter in gate.parameters():
                parameter.div_(2.0)
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(hot(x), plain(x))


def test_static_mixtures_add_and_offsets_are_added_to_the_weights() -> None:
    kinds: Any = ("static", "softmax")
    wiring = {"expert_slot": (0, 0), "mixture_slot": (0, 0), "mixture_experts": ((0, 1), (1, 0)), "mixture_kind": kinds}
    plain = _network(Topology(**wiring), 3, 2)
    marked = _network(Topology(**wiring, mixture_offset=((False, True), (True, False))), 3, 2)
    marked.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(4, 3, dtype=torch.float64)
    hidden = [expert(x) for expert in plain.experts]
    torch.testing.assert_close(plain(x)[:, 0], hidden[0] + hidden[1])
    torch.testing.assert_close(marked(x), plain(x))  # the scalars start at 0
    assert isinstance(marked.offset, nn.Parameter)
    with torch.no_grad():
        marked.offset.copy_(torch.tensor([0.5, -2.0]))
    y, gates = marked(x, return_gates=True)
    torch.testing.assert_close(y[:, 0], hidden[0] + 1.5 * hidden[1])
    torch.testing.assert_close(y[:, 1], plain(x)[:, 1] - 2.0 * hidden[1])
    torch.testing.assert_close(gates[1].sum(1), torch.full((4,), -1.0, dtype=torch.float64))


def test_the_forms_of_the_input_agree() -> None:
    level = _network(Topology.ple(2, 2, 1, last=False), 4, 3)
    x = torch.randn(5, 4, dtype=torch.float64)
    stacked = x[:, None].expand(-1, 3, -1)
    assert torch.equal(level(x), level(stacked))
    assert torch.equal(level(x), level([x, x, x]))
    with pytest.raises(ValueError, match="expected 3 slots, got 2"):
        level([x, x])


def test_each_expert_and_gate_reads_its_own_slot() -> None:
    level = _network(Topology.ple(2, 1, 1, last=False), 4, 3)
    slots = [torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    y = level(slots)
    for mixture, read in enumerate([{0, 2}, {1, 2}, {0, 1, 2}]):
        grads = torch.autograd.grad(y[:, mixture].sum(), slots, retain_graph=True, materialize_grads=True)
        assert {s for s, g in enumerate(grads) if g.any()} == read


def test_raw_gates_read_the_models_input_at_every_level() -> None:
    raw = GateSpec(input="raw")
    first = _network(Topology.ple(2, 1, 1, last=False), 4, 3, raw)
    last = _network(Topology.ple(2, 1, 1, last=True), 3, 3, raw, gate_features=4)
    ple = PLEReference([first, last], num_tasks=2)
    x = torch.randn(5, 4, dtype=torch.float64)
    _, gates = ple(x, return_gates=True)
    gate: Any = last.gates[1]
    torch.testing.assert_close(gates[1][1], torch.softmax(gate[0](x), dim=1))


def test_last_shared_keeps_the_shared_mixture() -> None:
    level = _network(Topology.ple(2, 1, 1, last=False), 4, 3)
    x = torch.randn(5, 4, dtype=torch.float64)
    kept, dropped = PLEReference([level], 2, last_shared=True), PLEReference([level], 2)
    assert kept(x).shape == (5, 3, 3)
    assert torch.equal(kept(x)[:, :2], dropped(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gates_are_float32_or_wider_and_sum_to_one(dtype: torch.dtype) -> None:
    level = _network(Topology.ple(2, 2, 1, last=False), 4, 3).to(dtype)
    y, gates = level(torch.randn(5, 4).to(dtype), return_gates=True)
    assert y.dtype == dtype
    for gate in gates:
        assert gate.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(gate.sum(1), torch.ones(5, dtype=gate.dtype))


@pytest.mark.parametrize("train", [True, False])
def test_dice_by_hand(train: bool) -> None:
    dice = Dice(3).double().train(train)
    with torch.no_grad():
        dice.alpha.copy_(torch.tensor([0.1, 0.2, 0.3]))
    x = torch.randn(6, 3, dtype=torch.float64)
    normalised: Tensor = (
        (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-8).sqrt() if train else x / math.sqrt(1 + 1e-8)
    )
    p = 1 / (1 + (-normalised).exp())
    torch.testing.assert_close(dice(x), p * x + (1 - p) * torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64) * x)


def test_row_dice_by_hand() -> None:
    dice = RowDice(0.01).double()
    with torch.no_grad():
        dice.alpha.fill_(0.3)
    x = torch.randn(4, 3, dtype=torch.float64)
    for row, got in zip(x.tolist(), dice(x).tolist(), strict=True):
        mean = sum(row) / 3
        scatter = math.sqrt(sum((value - mean) ** 2 + 0.01 for value in row))
        for value, out in zip(row, got, strict=True):
            p = 1 / (1 + math.exp(-(value - mean) / scatter))
            assert math.isclose(out, value * (p + (1 - p) * 0.3), rel_tol=1e-12)


def test_norm_position_and_the_order_within_a_layer() -> None:
    def layer(position: Any) -> list[str]:
        spec = MLPSpec((3,), norm="batch", norm_position=position, dropout=0.5)
        level = ExtractionNetworkReference(2, Topology.mmoe(1, 1), spec, GateSpec())
        expert: Any = level.experts[0]
        return [type(module).__name__ for module in expert[0]]

    assert layer("before") == ["Linear", "BatchNorm1d", "ReLU", "Dropout"]
    assert layer("after") == ["Linear", "ReLU", "BatchNorm1d", "Dropout"]

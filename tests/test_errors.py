"""Every mistake at the public boundary: an error that says what was expected, what came, and how to mend it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ple_fast import CGC, PLE, ExtractionNetwork, GateSpec, MLPSpec, MMoE, Topology, set_backend, use_backend

PLE_LEVEL = Topology.ple(2, 1, 1, last=False)


def _level(**changes: Any) -> ExtractionNetwork:
    arguments: dict[str, Any] = {"experts": MLPSpec((6, 4)), "gate": GateSpec()} | changes
    in_features = arguments.pop("in_features", 5)
    topology = arguments.pop("topology", PLE_LEVEL)
    return ExtractionNetwork(in_features, topology, **arguments)


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (_x(8, 6), ValueError, ("5", "6")),
        (_x(8, 3, 6), ValueError, ("5", "6")),
        (_x(8, 4, 5), ValueError, ("3", "4")),
        (_x(5), ValueError, ("(5,)",)),
        (_x(2, 8, 3, 5), ValueError, ("(2, 8, 3, 5)",)),
        ([_x(8, 5)] * 2, ValueError, ("3", "2")),
        ([_x(8, 5), _x(8, 5), _x(8, 6)], ValueError, ("(8, 5)", "(8, 6)")),
        ([_x(8, 5), _x(8, 5), _x(7, 5)], ValueError, ("8", "7")),
        ([_x(8, 5), _x(8, 5), _x(8, 1, 5)], ValueError, ("(8, 1, 5)",)),
        ([_x(8, 5), _x(8, 5), None], TypeError, ("NoneType",)),
        ([], ValueError, ("3", "0")),
        ("x", TypeError, ("str",)),
        (None, TypeError, ("NoneType",)),
        (_x(8, 5).numpy(), TypeError, ("ndarray",)),
        (_x(8, 5, dtype=torch.float64), TypeError, ("float32", "float64")),
        (_x(8, 5, dtype=torch.bfloat16), TypeError, ("float32", "bfloat16", "autocast")),
        (_x(8, 5, dtype=torch.int64), TypeError, ("float32", "int64")),
        (_x(8, 5, dtype=torch.bool), TypeError, ("float32", "bool")),
        ([_x(8, 5), _x(8, 5), _x(8, 5, dtype=torch.float64)], TypeError, ("float32", "float64")),
        (torch.empty(8, 5, device="meta"), ValueError, ("cpu", "meta")),
        ([_x(8, 5), _x(8, 5), torch.empty(8, 5, device="meta")], ValueError, ("cpu", "meta")),
        (_x(8, 5).to_sparse(), (TypeError, ValueError), ("sparse",)),
    ],
)
def test_an_input_that_does_not_fit(x: Any, error: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        _level()(x)
    for word in words:
        assert word in str(caught.value), f"{word!r} is missing: {caught.value}"
    assert str(caught.value).startswith(("x:", "x[", "x ")), f"names no argument: {caught.value}"


@pytest.mark.parametrize(
    ("gate_input", "error", "words"),
    [
        (_x(8, 5), ValueError, ("3", "5")),
        (_x(7, 3), ValueError, ("8", "7")),
        (_x(8, 2, 3), ValueError, ("3", "2")),
        (_x(8, 3, dtype=torch.float64), TypeError, ("float32", "float64")),
        ("x", TypeError, ("str",)),
    ],
)
def test_a_gate_input_that_does_not_fit(gate_input: Any, error: type[Exception], words: tuple[str, ...]) -> None:
    module = _level(gate=GateSpec(input="raw"), gate_features=3)
    module(_x(8, 5), _x(8, 3))
    with pytest.raises(error) as caught:
        module(_x(8, 5), gate_input)
    for word in (*words, "gate_input"):
        assert word in str(caught.value), f"{word!r} is missing: {caught.value}"


def test_gates_of_another_width_need_their_input() -> None:
    with pytest.raises(ValueError, match="gate_input"):
        _level(gate=GateSpec(input="raw"), gate_features=3)(_x(8, 5))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"in_features": 0}, ValueError, ("in_features", "0")),
        ({"in_features": 5.0}, TypeError, ("in_features", "5.0")),
        ({"in_features": True}, TypeError, ("in_features",)),
        ({"gate": GateSpec(input="raw"), "gate_features": 0}, ValueError, ("gate_features", "0")),
        ({"topology": ((0,), (0,), ((0,),))}, TypeError, ("topology", "Topology", "tuple")),
        ({"experts": (6, 4)}, TypeError, ("experts", "MLPSpec")),
        ({"experts": {"units": (6, 4)}}, TypeError, ("experts", "MLPSpec", "dict")),
        ({"experts": [MLPSpec((6, 4))] * 2}, ValueError, ("experts", "3", "2")),
        ({"experts": []}, ValueError, ("experts", "3", "0")),
        ({"experts": [MLPSpec((4,)), MLPSpec((4,)), MLPSpec((6,))]}, ValueError, ("experts", "4", "6")),
        ({"gate": (4,)}, TypeError, ("gate", "GateSpec")),
        ({"dtype": torch.int64}, TypeError, ("dtype", "int64")),
        ({"dtype": torch.complex64}, TypeError, ("dtype", "complex64")),
    ],
)
def test_a_level_that_cannot_be(changes: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        _level(**changes)
    for word in words:
        assert word in str(caught.value), f"{word!r} is missing: {caught.value}"


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"num_tasks": 0}, ValueError, ("num_tasks", "0")),
        ({"num_tasks": 2.0}, TypeError, ("num_tasks", "2.0")),
        ({"num_levels": 0}, ValueError, ("num_levels", "0")),
        ({"in_features": -1}, ValueError, ("in_features", "-1")),
        ({"task_experts": -1}, ValueError, ("task_experts", "-1")),
        ({"task_experts": [1, 2, 3]}, ValueError, ("task_experts", "2", "3")),
        ({"task_experts": [[1, 2]]}, ValueError, ("task_experts", "2", "1")),
        ({"task_experts": "2"}, TypeError, ("task_experts",)),
        ({"shared_experts": -1}, ValueError, ("shared_experts", "-1")),
        ({"shared_experts": [1, 1, 1]}, ValueError, ("shared_experts", "2", "3")),
        ({"task_experts": 0, "shared_experts": 0}, ValueError, ("shared",)),
        ({"expert_units": ()}, ValueError, ("units",)),
        ({"expert_units": (8, 0)}, ValueError, ("units", "0")),
        ({"expert_units": [(8,), (8,), (8,)]}, ValueError, ("expert_units", "2", "3")),
        ({"shared_expert_units": (8, 5)}, ValueError, ("5",)),
        ({"gate_units": (0,)}, ValueError, ("gate", "0")),
        ({"activation": "mish"}, ValueError, ("activation", "mish", "relu")),
        ({"activation": nn.Softmax}, ValueError, ("activation", "Softmax", "relu")),
        ({"norm": "group"}, ValueError, ("norm", "group", "batch")),
        ({"dropout": 1.5}, ValueError, ("dropout", "1.5")),
        ({"shared_gate_scope": "task"}, ValueError, ("shared_gate_scope", "task")),
        ({"last_shared": True, "shared_experts": 0}, ValueError, ("last_shared", "shared_experts")),
        ({"shared_experts": [1, 0]}, ValueError, ("shared",)),
        ({"shared_experts": [0, 1]}, ValueError, ("shared",)),
    ],
)
def test_a_ple_that_cannot_be(changes: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
    arguments: dict[str, Any] = {"in_features": 5, "num_tasks": 2, "expert_units": (8, 4)} | changes
    with pytest.raises(error) as caught:
        PLE(arguments.pop("in_features"), arguments.pop("num_tasks"), **arguments)
    for word in words:
        assert word in str(caught.value), f"{word!r} is missing: {caught.value}"


def test_the_other_trunks_name_their_arguments_too() -> None:
    with pytest.raises(ValueError, match=r"experts.*0"):
        MMoE(5, 2, experts=0)
    with pytest.raises(ValueError, match=r"num_tasks.*0"):
        MMoE(5, 0)
    with pytest.raises(ValueError, match=r"task_experts.*3"):
        CGC(5, 2, task_experts=[1, 1, 1])
    with pytest.raises(TypeError, match="num_levels"):
        CGC(5, 2, num_levels=2)  # type: ignore[call-arg]  # that is the test


@pytest.mark.parametrize("trunk", [PLE, CGC, MMoE])
def test_the_input_of_a_trunk(trunk: Any) -> None:
    module = trunk(5, 2, expert_units=(4,))
    with pytest.raises(ValueError, match=r"x.*5.*6|x.*6.*5"):
        module(_x(8, 6))
    with pytest.raises(TypeError, match=r"x.*float"):
        module(_x(8, 5, dtype=torch.float64))


def test_levels_that_do_not_fit_together() -> None:
    first = _level()  # 3 mixtures of width 4
    with pytest.raises(ValueError, match=r"4.*6|6.*4"):
        PLE.from_levels([first, _level(in_features=6)])
    with pytest.raises(ValueError, match=r"slots|mixtures"):
        PLE.from_levels([first, _level(in_features=4, topology=Topology.ple(3, 1, 1, last=True))])
    with pytest.raises(ValueError, match="level"):
        PLE.from_levels([])
    with pytest.raises(TypeError, match="ExtractionNetwork"):
        PLE.from_levels([nn.Linear(3, 4)])  # type: ignore[list-item]  # that is the test


def test_an_unknown_backend() -> None:
    words = r"auto.*triton.*torch.*cuda"
    with pytest.raises(ValueError, match=words):
        set_backend("cuda")  # type: ignore[arg-type]  # that is the test
    with pytest.raises(ValueError, match=words), use_backend("cuda"):  # type: ignore[arg-type]
        pass


def test_triton_on_cpu_tensors_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    module = _level()
    with use_backend("triton"), pytest.raises((RuntimeError, ValueError), match=r"(?i)triton.*(cpu|not)"):
        module(_x(8, 5))


def _snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: PLE(6, 2, expert_units=(6, 4)), "levels.0.blocks.0.layers.0.weight"),
        (lambda: PLE(5, 2, expert_units=(7, 4)), "levels.0.blocks.0.layers.0.weight"),
        (lambda: PLE(5, 2, expert_units=(6, 4), task_experts=3), "levels.0.blocks.0.layers.0.weight"),
        (lambda: PLE(5, 3, expert_units=(6, 4)), "levels.0.gate.weight"),
    ],
)
def test_a_state_of_another_configuration_changes_nothing(other: Any, named: str, strict: bool) -> None:
    module = PLE(5, 2, expert_units=(6, 4))
    before = _snapshot(module)
    with pytest.raises((RuntimeError, ValueError)) as caught:
        module.load_state_dict(other().state_dict(), strict=strict)
    assert named in str(caught.value)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: PLE(5, 2, expert_units=(6, 4), norm="batch"), "norm"),
        (lambda: PLE(5, 2, expert_units=(6, 4, 4)), "layers.2"),
        (lambda: PLE(5, 2, expert_units=(6, 4), num_levels=3), "levels.2"),
        (lambda: PLE(5, 2, expert_units=(6, 4), gate_bias=False), "gate.bias"),
        (lambda: PLE(5, 2, expert_units=(6, 4), gate_units=(3,)), "gate.layers.0"),
        (lambda: PLE(5, 2, expert_units=(6, 4), activation="prelu"), "activation"),
    ],
)
def test_missing_and_unexpected_entries_are_named_and_change_nothing(other: Any, named: str) -> None:
    for module, state in [
        (PLE(5, 2, expert_units=(6, 4)), other().state_dict()),
        (other(), PLE(5, 2, expert_units=(6, 4)).state_dict()),
    ]:
        before = _snapshot(module)
        with pytest.raises((RuntimeError, ValueError)) as caught:
            module.load_state_dict(state)
        assert named in str(caught.value)
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, before[name]), name


def test_a_level_refuses_the_state_of_another_level() -> None:
    module = _level()
    before = _snapshot(module)
    with pytest.raises((RuntimeError, ValueError), match=r"gate\.weight"):
        module.load_state_dict(_level(topology=Topology.ple(2, 1, 1, last=True)).state_dict())
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name

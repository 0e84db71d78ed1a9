"""Numbers, flags and sequences of NumPy are taken everywhere, and none is kept: modules are as those of Python's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ple_fast import (
    CGC,
    PLE,
    STEM,
    AdaTT,
    AsymmetricSharing,
    CrossStitch,
    CustomizedSharing,
    ExtractionNetwork,
    GateSpec,
    HardSharing,
    MLMMoE,
    MLPSpec,
    MMoE,
    SingleTask,
    Topology,
    pack,
)
from ple_fast.convert import Dice, RowDice
from ple_fast.modules.plain import Temperature, WeightOffset
from ple_fast.scalars import check_count, check_flag, check_number, is_sequence
from ple_fast.specs import Activation


def of_numpy(value: Any) -> Any:
    """A value as NumPy has it: scalars, arrays where lists are regular, the rest entry by entry."""
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, int):
        return np.int64(value)
    if isinstance(value, float):
        return np.float32(value)
    if isinstance(value, str):
        return np.str_(value)
    if isinstance(value, dict):
        return {key: of_numpy(entry) for key, entry in value.items()}
    if not isinstance(value, list):
        return value
    regular = all(not isinstance(entry, list) for entry in value) or len({len(entry) for entry in value}) == 1
    return np.array(value) if regular else [of_numpy(entry) for entry in value]


def of_tensors(value: Any) -> Any:
    """Counts and rates as tensors."""
    if isinstance(value, dict):
        return {key: of_tensors(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [of_tensors(entry) for entry in value]
    return torch.tensor(value) if isinstance(value, (int, float)) else value


def foreign(thing: Any, path: str = "") -> Iterator[str]:
    """Attributes, at any depth, that hold something of NumPy, or a tensor outside parameters and buffers."""
    if isinstance(thing, (np.generic, np.ndarray, Tensor)):
        yield f"{path}: {type(thing).__name__}"
    elif isinstance(thing, dict):
        for key, value in thing.items():
            yield from foreign(value, f"{path}.{key}")
    elif isinstance(thing, (list, tuple, set, frozenset)):
        for place, value in enumerate(thing):
            yield from foreign(value, f"{path}[{place}]")
    elif isinstance(thing, nn.Module):
        own = {k: v for k, v in vars(thing).items() if k not in ("_parameters", "_buffers")}
        yield from foreign(own, f"{path}{type(thing).__name__}")
    elif dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        yield from foreign(vars(thing), f"{path}{type(thing).__name__}")


# float32 holds these rates exactly, so that both builds are equal.
MODULES: list[tuple[Callable[..., nn.Module], dict[str, Any]]] = [
    (
        PLE,
        {
            "in_features": 5,
            "num_tasks": 2,
            "num_levels": 2,
            "task_experts": [[1, 2], [2, 1]],
            "shared_experts": [1, 2],
            "expert_units": [[8, 4], [6, 4]],
            "shared_expert_units": [3, 4],
            "gate_units": [4],
            "gate_bias": False,
            "activation": ["relu", "tanh"],
            "norm": ["batch", "layer"],
            "dropout": [0.25, 0.5],
            "last_shared": True,
            "recompute": True,
        },
    ),
    (PLE, {"in_features": 5, "num_tasks": 2, "expert_units": [[8], [6, 4]], "task_experts": [1, 2]}),
    (CGC, {"in_features": 5, "num_tasks": 2, "shared_experts": 0, "task_experts": 3, "expert_units": 4}),
    (CGC, {"in_features": 5, "num_tasks": 2, "shared_experts": 1, "last_shared": True, "shared_gate_scope": "shared"}),
    (MMoE, {"in_features": 5, "num_tasks": 2, "experts": 3, "expert_units": [4], "dropout": 0.5}),
    (MLMMoE, {"in_features": 5, "num_tasks": 2, "num_levels": 3, "experts": 3, "expert_units": [4]}),
    (AdaTT, {"in_features": 5, "num_tasks": 2, "num_levels": 2, "task_experts": [2, 1], "shared_experts": 1}),
    (STEM, {"in_features": 5, "num_tasks": 2, "num_levels": 2, "task_experts": [2, 1], "shared_experts": 1}),
    (CrossStitch, {"in_features": 5, "num_tasks": 2, "num_levels": 1, "expert_units": [4], "own_weight": 0.75}),
    (HardSharing, {"in_features": 5, "num_tasks": 2, "expert_units": [4], "recompute": True}),
    (CustomizedSharing, {"in_features": 5, "num_tasks": 2, "expert_units": 4}),
    (SingleTask, {"in_features": 5, "num_tasks": 2, "expert_units": [4]}),
    (AsymmetricSharing, {"in_features": 5, "num_tasks": 2, "sources": [[0], [0, 1]], "expert_units": [4]}),
    (Dice, {"units": 4, "eps": 0.5, "momentum": 0.25}),
    (RowDice, {"eps": 0.5}),
    (Temperature, {"value": 0.5}),
    (WeightOffset, {"columns": [True, False]}),
]


@pytest.mark.parametrize("of", [of_numpy, of_tensors])
@pytest.mark.parametrize(("build", "arguments"), MODULES, ids=[build.__name__ for build, _ in MODULES])
def test_a_module_built_of_foreign_scalars_is_the_one_built_of_pythons(
    build: Callable[..., nn.Module], arguments: dict[str, Any], of: Callable[[Any], Any]
) -> None:
    torch.manual_seed(0)
    expected = build(**arguments)
    torch.manual_seed(0)
    module = build(**of(arguments))
    assert repr(module) == repr(expected)
    for (name, tensor), other in zip(module.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    assert [*foreign(module)] == []
    for level, other_level in zip(getattr(module, "levels", ()), getattr(expected, "levels", ()), strict=True):
        assert isinstance(level, ExtractionNetwork) and isinstance(other_level, ExtractionNetwork)
        assert level.topology == other_level.topology
        assert level.expert_specs == other_level.expert_specs
        assert json.dumps([spec.to_config() for spec in level.expert_specs])
        assert hash((level.topology, level.gate_spec)) == hash((other_level.topology, other_level.gate_spec))


SPECS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (
        MLPSpec,
        {
            "units": [8, 4],
            "activation": ["silu", "gelu"],
            "norm": "batch",
            "norm_position": ["after", "before"],
            "bias": [True, False],
            "dropout": [0.0, 0.5],
        },
    ),
    (MLPSpec, {"units": 8, "bias": False, "dropout": 0.5, "last_activation": "tanh"}),
    (
        GateSpec,
        {
            "units": [4],
            "norm": "layer",
            "dropout": 0.5,
            "bias": False,
            "logits_norm": "batch",
            "temperature": 2.0,
            "input": "raw",
        },
    ),
    (GateSpec, {"temperature": 2}),
]


@pytest.mark.parametrize(("build", "arguments"), SPECS)
def test_a_spec_of_numpy_is_the_one_of_python_and_is_json(build: Callable[..., Any], arguments: dict[str, Any]) -> None:
    spec, expected = build(**of_numpy(arguments)), build(**arguments)
    assert spec == expected
    assert hash(spec) == hash(expected)
    assert json.dumps(spec.to_config()) == json.dumps(expected.to_config())
    assert [*foreign(spec)] == []


def test_constants_of_activations_are_pythons() -> None:
    given = Activation(np.str_("leaky_relu"), np.float32(0.5)), nn.LeakyReLU(np.float32(0.25)), nn.PReLU(init=1)  # type: ignore[arg-type]  # what users pass
    spec = MLPSpec((4, 4, 4), activation=given)
    assert spec.activation == (Activation("leaky_relu", 0.5), Activation("leaky_relu", 0.25), Activation("prelu", 1.0))
    assert [*foreign(spec)] == []
    assert json.loads(json.dumps(spec.to_config()))["activation"][0] == ["leaky_relu", 0.5]


def test_a_topology_of_arrays_and_ranges_is_the_one_of_tuples() -> None:
    arrays = Topology(
        np.array([0, 1], np.uint8),  # type: ignore[arg-type]  # what users pass
        range(2),  # type: ignore[arg-type]
        np.array([[0, 1], [1, 0]]),  # type: ignore[arg-type]
        mixture_kind=np.array(["softmax", "static"]),  # type: ignore[arg-type]
        mixture_offset=np.array([[True, False], [False, False]]),  # type: ignore[arg-type]
        num_slots=np.int32(3),  # type: ignore[arg-type]
    )
    tuples = Topology(
        (0, 1), (0, 1), ((0, 1), (1, 0)), ("softmax", "static"), ((True, False), (False, False)), num_slots=3
    )
    assert arrays == tuples
    assert hash(arrays) == hash(tuples)
    assert [*foreign(arrays)] == []
    ple: Any = Topology.ple
    assert ple(np.int64(3), range(1, 4), np.int8(1), last=False) == Topology.ple(3, (1, 2, 3), 1, last=False)


def test_what_is_packed_of_modules_with_numpys_settings_keeps_pythons() -> None:
    """An operator takes no scalar of NumPy, so a level that kept one could not be compiled."""
    half: Any = np.float32(0.5)

    def expert() -> nn.Module:
        norm, other = nn.BatchNorm1d(4, eps=half, momentum=half), nn.LayerNorm(4, eps=half)
        return nn.Sequential(
            nn.Linear(of_numpy(5), of_numpy(4)), norm, nn.LeakyReLU(half), nn.Dropout(half), nn.Linear(4, 4), other
        )

    level = pack([expert(), expert()], [nn.Linear(5, 2), nn.Linear(5, 2)], Topology.mmoe(2, 2))
    assert [*foreign(level)] == []
    assert level.expert_specs[0].dropout == (0.5, 0.0)
    assert level.expert_specs[0].activation[0] == Activation("leaky_relu", 0.5)


def test_units_may_be_a_range_or_a_tensor() -> None:
    assert MLPSpec(range(2, 5)).units == (2, 3, 4)  # type: ignore[arg-type]  # what users pass
    assert MLPSpec(torch.tensor([4, 8])).units == (4, 8)  # type: ignore[arg-type]
    assert GateSpec(np.empty(0, int)).units == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value",
    [
        True,
        np.True_,
        torch.tensor(True),
        2.0,
        np.float32(2),
        "2",
        None,
        np.array([2]),
        torch.tensor(2.0),
        np.timedelta64(2, "ns"),
        np.datetime64(2, "ns"),
        Decimal(2),
    ],
    ids=repr,
)
def test_what_is_no_int_is_no_count(value: Any) -> None:
    with pytest.raises(TypeError, match=r"n: expected an int, got .*" + type(value).__name__):
        check_count("n", value)


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3), np.array(3), torch.tensor(3)], ids=repr)
def test_a_count_is_pythons(value: Any) -> None:
    assert check_count("n", value) == 3
    assert type(check_count("n", value)) is int
    with pytest.raises(ValueError, match="n: expected 4 or more, got 3"):
        check_count("n", value, least=4)


@pytest.mark.parametrize("value", [0.5, np.float16(0.5), np.longdouble(0.5), Decimal("0.5"), torch.tensor(0.5)])
def test_a_number_is_pythons(value: Any) -> None:
    assert check_number("x", value) == 0.5
    assert type(check_number("x", value)) is float


@pytest.mark.parametrize(
    "value",
    ["0.5", b"1", True, np.True_, None, 1j, np.complex64(1), np.array([0.5]), torch.tensor([0.5]), 10**400],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="x: expected a number, got"):
        check_number("x", value)


def test_only_bools_are_flags() -> None:
    assert check_flag("f", np.True_) is True
    for value in (1, 0.0, "yes", None, np.int64(1), np.array([True])):
        with pytest.raises(TypeError, match="f: expected a bool, got"):
            check_flag("f", value)


def test_what_is_several() -> None:
    assert all(map(is_sequence, ([], (1,), range(2), np.zeros(1), torch.zeros(2, 2))))
    assert not any(map(is_sequence, ("ab", b"ab", 3, None, {1}, np.int64(1), np.array(1), torch.tensor(1), {"a": 1})))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PLE(5, np.True_), "num_tasks: expected an int"),  # type: ignore[arg-type]  # the mistakes under test
        (lambda: PLE(5, 2, recompute="no"), "recompute: expected a bool, got 'no'"),  # type: ignore[arg-type]
        (lambda: PLE(5, 2, last_shared=1), "last_shared: expected a bool, got 1"),  # type: ignore[arg-type]
        (lambda: PLE(5, 2, expert_units={8}), "units: expected a tuple of layer widths, got .8"),  # type: ignore[arg-type]
        (lambda: PLE(5, 2, expert_units=np.array([8.0])), r"units\[0\]: expected an int, got 8.0"),  # type: ignore[arg-type]
        (lambda: CrossStitch(5, 2, own_weight="1"), "own_weight: expected a number, got '1'"),  # type: ignore[arg-type]
        (lambda: WeightOffset([1, 0]), r"columns\[0\]: expected a bool, got 1"),  # type: ignore[list-item]
        (lambda: WeightOffset(True), "columns: expected one bool per column, got True"),  # type: ignore[arg-type]
    ],
)
def test_mistakes_are_named(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        make()

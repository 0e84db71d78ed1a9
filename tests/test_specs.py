"""What an expert and a gate are made of: parsing, one value per layer, JSON, and every value that is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from torch import nn

from ple_fast import GateSpec, MLPSpec
from ple_fast.convert import RowDice
from ple_fast.specs import ACTIVATIONS, Activation, parse_activation


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("relu", Activation("relu")),
        ("ReLU", Activation("relu")),
        (nn.ReLU, Activation("relu")),
        (nn.ReLU(inplace=True), Activation("relu")),
        (nn.LeakyReLU, Activation("leaky_relu", 0.01)),
        (nn.LeakyReLU(0.3), Activation("leaky_relu", 0.3)),
        (nn.PReLU, Activation("prelu", 0.25)),
        (nn.PReLU(init=0.1), Activation("prelu", 0.1)),
        (nn.GELU(), Activation("gelu")),
        (nn.GELU(approximate="tanh"), Activation("gelu_tanh")),
        ("swish", Activation("silu")),
        (nn.SiLU, Activation("silu")),
        (nn.Tanh(), Activation("tanh")),
        (nn.Sigmoid(), Activation("sigmoid")),
        ("dice", Activation("dice", 1e-8)),
        ("row_dice", Activation("row_dice", 1e-3)),
        (RowDice(eps=0.1), Activation("row_dice", 0.1)),
        (nn.Identity, Activation("identity")),
        (None, Activation("identity")),
        ("linear", Activation("identity")),
        (Activation("leaky_relu", 0.7), Activation("leaky_relu", 0.7)),
    ],
)
def test_an_activation_is_a_name_a_class_or_an_instance(given: Any, expected: Activation) -> None:
    assert parse_activation(given) == expected


def test_every_listed_activation_parses_to_itself() -> None:
    assert [parse_activation(name).name for name in ACTIVATIONS] == list(ACTIVATIONS)


@pytest.mark.parametrize("unknown", ["mish", nn.Softmax, nn.Mish(), 3, Activation("mish"), max])
def test_an_unknown_activation_is_refused_with_the_list_of_known_ones(unknown: Any) -> None:
    with pytest.raises(ValueError, match=r"expected one of identity, relu.* got"):
        parse_activation(unknown)


def test_an_activation_that_only_makes_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        parse_activation(nn.LeakyReLU(float("nan")))
    with pytest.raises(ValueError, match="num_parameters=4"):
        parse_activation(nn.PReLU(4))


def test_a_scalar_goes_to_every_layer_and_a_sequence_layer_by_layer() -> None:
    spec = MLPSpec((8, 4), activation="tanh", last_activation="identity", norm=("batch", None), dropout=[0.1, 0])
    first, last = spec.layers
    assert (first.units, first.activation.name, first.norm, first.bias, first.dropout) == (
        8,
        "tanh",
        "batch",
        True,
        0.1,
    )
    assert (last.units, last.activation.name, last.norm, last.dropout) == (4, "identity", None, 0.0)
    assert MLPSpec(8).layers[0].units == MLPSpec([8]).layers[0].units == 8  # type: ignore[arg-type]  # both are taken


def test_gate_layers_have_a_bias_and_their_norm_before_the_activation() -> None:
    (layer,) = GateSpec((8,), norm="batch", bias=False).layers
    assert (layer.bias, layer.norm, layer.norm_position) == (True, "batch", "before")
    assert GateSpec().layers == ()


@pytest.mark.parametrize(
    "spec",
    [
        MLPSpec((8, 4), activation=(nn.LeakyReLU(0.3), "prelu"), norm=("layer", "batch"), norm_position="after"),
        MLPSpec((8,), bias=False, dropout=0.25, last_activation="identity"),
        GateSpec(),
        GateSpec((4,), "dice", "batch", 0.5, False, "batch", 2.0, "raw"),
    ],
)
def test_json_round_trip(spec: MLPSpec | GateSpec) -> None:
    config = json.loads(json.dumps(spec.to_config()))
    again = type(spec).from_config(config)
    assert again == spec
    assert hash(again) == hash(spec)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"units": ()}, ValueError, "at least one layer width"),
        ({"units": (4, 0)}, ValueError, r"units\[1\]: expected 1 or more, got 0"),
        ({"units": (4.0,)}, TypeError, r"units\[0\]: expected an int, got 4.0"),
        ({"units": "44"}, TypeError, "units: expected a tuple of layer widths, got '44'"),
        ({"activation": ("relu",)}, ValueError, r"activation: expected one value or one per layer \(2\), got 1"),
        ({"norm": "group"}, ValueError, "norm: expected one of None, 'batch', 'layer', got 'group'"),
        ({"norm_position": "around"}, ValueError, "norm_position: expected one of 'before', 'after', got 'around'"),
        ({"bias": 1}, TypeError, "bias: expected a bool, got 1"),
        ({"dropout": 1.0}, ValueError, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"dropout": float("nan")}, ValueError, "dropout"),
        ({"dropout": -0.1}, ValueError, "dropout"),
        ({"dropout": "a"}, TypeError, "dropout: expected a probability, got 'a'"),
        ({"dropout": True}, TypeError, "dropout: expected a probability, got True"),
    ],
)
def test_an_expert_that_cannot_be_is_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MLPSpec(**{"units": (4, 4), **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"units": None}, TypeError, "gate units"),
        ({"norm": "group", "units": (4,)}, ValueError, "gate norm: expected one of None, 'batch', 'layer'"),
        ({"logits_norm": "layer"}, ValueError, "logits_norm: expected one of None, 'batch', got 'layer'"),
        ({"input": "next"}, ValueError, "gate input: expected one of 'previous', 'with_shared', 'raw', got 'next'"),
        ({"bias": "yes"}, TypeError, "gate bias: expected a bool, got 'yes'"),
        ({"temperature": 0}, ValueError, "temperature: expected a positive finite number, got 0: .* NaN"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"temperature": "hot"}, TypeError, "temperature: expected a number, got 'hot'"),
        ({"dropout": 1.0, "units": (4,)}, ValueError, "gate dropout"),
    ],
)
def test_a_gate_that_cannot_be_is_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GateSpec(**arguments)

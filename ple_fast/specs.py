"""What an expert and a gate are made of: two frozen dataclasses, no tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from .scalars import as_tuple, check_count, check_counts, check_flag, check_number, is_sequence, shown

Norm = Literal["batch", "layer"] | None
NormPosition = Literal["before", "after"]
T = TypeVar("T")

ACTIVATIONS = (
    "identity",
    "relu",
    "leaky_relu",
    "prelu",
    "gelu",
    "gelu_tanh",
    "silu",
    "tanh",
    "sigmoid",
    "dice",
    "row_dice",
)


class Activation(NamedTuple):
    """An activation by name with its constant: the slope of leaky_relu, the initial slope of prelu, the epsilon of dice
    and row_dice."""

    name: str
    value: float = 0.0


LEARNED = ("prelu", "dice", "row_dice")
"""Activations that have a learned parameter."""


def from_output(activation: Activation) -> bool:
    """Whether the derivative follows from the output, so that the input need not be kept."""
    name, value = activation
    return name in ("identity", "relu", "tanh", "sigmoid") or (name == "leaky_relu" and value > 0)


_DEFAULT_VALUE = {"leaky_relu": 0.01, "prelu": 0.25, "dice": 1e-8, "row_dice": 1e-3}
_ALIASES = {
    "linear": "identity",
    "none": "identity",
    "leakyrelu": "leaky_relu",
    "swish": "silu",
    "gelu_erf": "gelu",
    "rowdice": "row_dice",
}


def parse_activation(activation: Any) -> Activation:
    """``Activation`` from a name, a class or an instance of ``torch.nn`` (or anything with such a class name).

    Raises:
        ValueError: the activation is unknown.
    """
    if isinstance(activation, Activation):
        if activation.name not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation.name!r}")
        value = check_number(f"activation: the constant of {activation.name}", activation.value)
        if not math.isfinite(value):
            raise ValueError(f"activation: expected a finite constant, got {activation}: the outputs would be NaN")
        if activation.name == "row_dice" and value <= 0.0:
            raise ValueError(
                f"activation: row_dice expects an epsilon above 0, got {value}: a row of equal values would give NaN"
            )
        return Activation(str(activation.name), value)
    if activation is None:
        return Activation("identity")
    if isinstance(activation, str):
        name = activation.lower()
    else:
        name = (activation if isinstance(activation, type) else type(activation)).__name__.lower()
        if name == "gelu" and getattr(activation, "approximate", "none") == "tanh":
            name = "gelu_tanh"
    name = _ALIASES.get(name, name)
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {shown(activation)}")
    value = _DEFAULT_VALUE.get(name, 0.0)
    if name == "leaky_relu":
        value = getattr(activation, "negative_slope", value)
    if name == "prelu":
        if getattr(activation, "num_parameters", 1) != 1:
            raise ValueError(
                f"activation: prelu has one slope per expert layer, got num_parameters={activation.num_parameters}"
            )
        value = getattr(activation, "init", value)
    if name == "row_dice":
        value = getattr(activation, "eps", value)
    return parse_activation(Activation(name, value))


def _per_layer(name: str, value: T | Sequence[T], layers: int) -> tuple[T, ...]:
    if is_sequence(value) and not isinstance(value, Activation):
        row = as_tuple(value)
        if len(row) != layers:
            raise ValueError(f"{name}: expected one value or one per layer ({layers}), got {len(row)}: {shown(value)}")
        return row
    return (value,) * layers  # type: ignore[return-value]  # a scalar T after the branch above


def _check_units(name: str, units: Any, *, allow_empty: bool) -> tuple[int, ...]:
    if is_sequence(units):
        widths = check_counts(name, units)
        if not widths and not allow_empty:
            raise ValueError(f"{name}: expected at least one layer width, got none")
        return widths
    try:
        return (check_count(name, units),)
    except TypeError as error:
        raise TypeError(f"{name}: expected a tuple of layer widths, got {shown(units)}") from error


def _check_choice(name: str, value: Any, choices: tuple[T, ...]) -> T:
    """The choice that a value equals."""
    found = [choice for choice in choices if isinstance(value, type(choice)) and value == choice]
    if not found:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {shown(value)}")
    return found[0]


def _check_dropout(name: str, p: Any) -> float:
    rate = check_number(name, p, "a probability")
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {shown(p)}")
    return rate


def _check_norm(name: str, norm: Any) -> Norm:
    choices: tuple[Norm, ...] = (None, "batch", "layer")
    return _check_choice(name, norm, choices)


class LayerSpec(NamedTuple):
    """One layer of an expert or gate: linear, then norm and activation as ``norm_position`` says, then dropout."""

    units: int
    activation: Activation
    norm: Norm
    norm_position: NormPosition
    bias: bool
    dropout: float


@dataclass(frozen=True)
class MLPSpec:
    """An expert: ``linear -> [norm] -> activation -> [norm] -> dropout`` per layer.

    Args:
        units: output width of each layer.
        activation: one, or one per layer; names in ``ACTIVATIONS``, or a ``torch.nn`` class or instance. ``"dice"`` is
            that of the paper (Zhou et al., KDD 2018), over the batch; ``"row_dice"`` that of torch-rechub, over a row.
        last_activation: replaces the activation of the last layer (``"identity"`` removes it); None keeps it.
        norm: None, ``"batch"`` or ``"layer"``; one, or one per layer.
        norm_position: ``"before"`` or ``"after"`` the activation; one, or one per layer.
        bias: of the linear layers; one, or one per layer.
        dropout: probability after each layer; one, or one per layer.

    Raises:
        TypeError, ValueError: a value is not one of the above; the message names it.
    """

    units: tuple[int, ...]
    activation: Any = "relu"
    last_activation: Any = None
    norm: Any = None
    norm_position: Any = "before"
    bias: Any = True
    dropout: Any = 0.0

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        units = _check_units("units", self.units, allow_empty=False)
        n = len(units)
        activations = [parse_activation(a) for a in _per_layer("activation", self.activation, n)]
        if self.last_activation is not None:
            activations[-1] = parse_activation(self.last_activation)
        put("units", units)
        put("activation", tuple(activations))
        put("last_activation", None)
        put("norm", tuple(_check_norm("norm", norm) for norm in _per_layer("norm", self.norm, n)))
        positions = _per_layer("norm_position", self.norm_position, n)
        put("norm_position", tuple(_check_choice("norm_position", place, ("before", "after")) for place in positions))
        put("bias", tuple(check_flag("bias", bias) for bias in _per_layer("bias", self.bias, n)))
        put("dropout", tuple(_check_dropout("dropout", p) for p in _per_layer("dropout", self.dropout, n)))

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The layers, first to last."""
        return tuple(
            LayerSpec(*row)
            for row in zip(
                self.units, self.activation, self.norm, self.norm_position, self.bias, self.dropout, strict=True
            )
        )

    def to_config(self) -> dict[str, Any]:
        """JSON-ready keywords that rebuild this spec."""
        return {
            "units": list(self.units),
            "activation": [list(a) for a in self.activation],
            "norm": list(self.norm),
            "norm_position": list(self.norm_position),
            "bias": list(self.bias),
            "dropout": list(self.dropout),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MLPSpec:
        """The spec that ``to_config`` described."""
        return cls(**{**config, "activation": tuple(Activation(*a) for a in config["activation"])})


@dataclass(frozen=True)
class GateSpec:
    """A gate: hidden layers (as in ``MLPSpec``), a final linear layer, optional batch norm on the logits, a softmax.

    Args:
        units: widths of the hidden layers; ``()`` is the paper's single linear layer (eq. 3).
        activation: of the hidden layers; one, or one per layer.
        norm: of the hidden layers, before their activation: None, ``"batch"`` or ``"layer"``.
        dropout: after each hidden layer.
        bias: of the final linear layer (hidden layers always have one).
        logits_norm: None or ``"batch"``: batch norm on the logits.
        temperature: the logits are divided by it before the softmax; positive and finite.
        input: ``"previous"`` (the level's slots, as in the paper), ``"with_shared"`` (each slot plus the last, shared
            one, which stays as it is: STEM-Net) or ``"raw"`` (the model's input). ``gate_input`` of a call replaces
            it.
        top_k: the softmax is over this many of a mixture's experts, those of the row's largest logits (of equal ones
            the first), and the others weigh 0 (Shazeer et al., ICLR 2017, eq. 3-5, without noise). Gradients reach the
            chosen ones alone. None, and a mixture of no more experts: over all of them.
        joint_k: this many of the ``top_k`` are chosen for all gates of the level together, among the experts that each
            of them weighs: those of the largest sum over gates of the softmax over all experts (SMES, arXiv 2602.09386,
            with equal weights of tasks). Each gate chooses the others by itself. A row then reads at most
            ``joint_k + gates * (top_k - joint_k)`` experts. 0: every gate chooses by itself.

    Raises:
        TypeError, ValueError: a value is not one of the above; the message names it.
    """

    units: tuple[int, ...] = ()
    activation: Any = "relu"
    norm: Any = None
    dropout: Any = 0.0
    bias: bool = True
    logits_norm: Literal["batch"] | None = None
    temperature: float = 1.0
    input: Literal["previous", "with_shared", "raw"] = "previous"
    top_k: int | None = None
    joint_k: int = 0

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        units = _check_units("gate units", self.units, allow_empty=True)
        n = len(units)
        put("units", units)
        put("activation", tuple(parse_activation(a) for a in _per_layer("gate activation", self.activation, n)))
        put("norm", tuple(_check_norm("gate norm", norm) for norm in _per_layer("gate norm", self.norm, n)))
        put("dropout", tuple(_check_dropout("gate dropout", p) for p in _per_layer("gate dropout", self.dropout, n)))
        put("bias", check_flag("gate bias", self.bias))
        put("logits_norm", _check_choice("logits_norm", self.logits_norm, (None, "batch")))
        put("input", _check_choice("gate input", self.input, ("previous", "with_shared", "raw")))
        temperature = check_number("temperature", self.temperature)
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(
                f"temperature: expected a positive finite number, got {self.temperature}: the logits would be NaN"
            )
        put("temperature", temperature)
        put("top_k", None if self.top_k is None else check_count("top_k", self.top_k))
        put("joint_k", check_count("joint_k", self.joint_k, least=0))
        if self.joint_k > (self.top_k or 0):
            raise ValueError(
                f"joint_k: expected at most top_k, of which it is a part, got {self.joint_k} with top_k={self.top_k}"
            )

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The hidden layers, first to last."""
        return tuple(
            LayerSpec(units, activation, norm, "before", True, dropout)
            for units, activation, norm, dropout in zip(
                self.units, self.activation, self.norm, self.dropout, strict=True
            )
        )

    def to_config(self) -> dict[str, Any]:
        """JSON-ready keywords that rebuild this spec."""
        return {
            "units": list(self.units),
            "activation": [list(a) for a in self.activation],
            "norm": list(self.norm),
            "dropout": list(self.dropout),
            "bias": self.bias,
            "logits_norm": self.logits_norm,
            "temperature": self.temperature,
            "input": self.input,
            **({} if self.top_k is None else {"top_k": self.top_k}),
            **({"joint_k": self.joint_k} if self.joint_k else {}),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GateSpec:
        """The spec that ``to_config`` described."""
        return cls(**{**config, "activation": tuple(Activation(*a) for a in config["activation"])})

"""One call of a level: what it consists of besides its tensors, its tensors, and which gradients are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from .plan import LevelPlan
from .slots import Place, Slots
from .state import LevelState
from .tensors import WIDTH, GateTensors, LayerTensors, unflatten


class LayerWants(NamedTuple):
    """Which gradients backward will be asked for at one layer."""

    weight: bool
    bias: bool
    norm_weight: bool
    norm_bias: bool
    slope: bool
    below: bool
    """Of the layer's input."""
    output: bool
    """Anything of this layer or below: whether the gradient must come this far at all."""

    @property
    def affine(self) -> bool:
        """Of the norm's weight or bias."""
        return self.norm_weight or self.norm_bias


class GateWants(NamedTuple):
    """The same at the gates' end."""

    weight: bool
    bias: bool
    norm_weight: bool
    norm_bias: bool
    offset: bool

    @property
    def affine(self) -> bool:
        """Of the norm's weight or bias."""
        return self.norm_weight or self.norm_bias


@dataclass(frozen=True, eq=False)
class Wants:
    """Which gradients backward will be asked for. Equal ones are one object, and told from others by identity."""

    layers: tuple[LayerWants, ...]
    """Of the level, in the order of ``flatten``."""
    gate: GateWants
    x: tuple[bool, ...]
    """Of each input tensor."""
    gate_x: tuple[bool, ...]
    logits: bool
    """The gradient must reach the logits."""
    weights: bool
    """It must reach the mixtures' weights."""
    experts: bool
    """It must reach the experts' outputs."""


@lru_cache(maxsize=1024)
def wants_of(
    plan: LevelPlan,
    places: tuple[Place, ...],
    gate_places: tuple[Place, ...],
    x: tuple[bool, ...],
    gate_x: tuple[bool, ...],
    tensors: tuple[bool, ...],
) -> Wants:
    """Wants from those of the input tensors, the gate inputs and the flat tuple of the level's tensors.

    ``places``: of the slots among the input tensors; ``gate_places``: among the gate inputs.
    """
    rows = [tensors[i : i + WIDTH] for i in range(0, len(tensors), WIDTH)]
    layers: list[LayerWants] = []
    for mlp in plan.mlps():
        at, needed = (gate_places, gate_x) if mlp is plan.gate else (places, x)
        below = any(needed[at[slot].tensor] for slot in mlp.slots)
        for row in rows[mlp.position : mlp.position + len(mlp.layers)]:
            output = below or any(row)
            layers.append(LayerWants(*row, below, output))  # type: ignore[call-arg]  # five in a row
            below = output
    gate = GateWants(*rows[-1])
    logits = below or any(rows[-1][:4])  # ``below`` is that of the gates, the last of all
    experts = any(layers[block.position + len(block.layers) - 1].output for block in plan.blocks)
    return Wants(tuple(layers), gate, x, gate_x, logits, logits or gate.offset, experts)


@lru_cache(maxsize=1024)
def nothing_wanted(plan: LevelPlan) -> Wants:
    """Of a forward pass that no backward follows."""
    layer = LayerWants(False, False, False, False, False, False, False)
    gate = GateWants(False, False, False, False, False)
    return Wants((layer,) * plan.num_layers, gate, (), (), False, False, False)


class LevelInput(NamedTuple):
    """Everything a level computes from."""

    plan: LevelPlan
    layers: Sequence[LayerTensors]
    gate: GateTensors
    state: LevelState
    x: Slots
    gate_x: Slots


class LevelCall(NamedTuple):
    """What one call of a level consists of besides its tensors."""

    plan: LevelPlan
    state: LevelState
    places: tuple[Place, ...]
    """Of the slots, among the first tensors."""
    num_x: int
    gate_places: tuple[Place, ...] | None
    """Of the gates' slots, among the tensors that follow; None where the gates read what the experts read."""
    num_gate_x: int
    listed: bool
    """Whether the weights are an output."""
    recompute: bool
    backend: str = "torch"
    """``"torch"`` or ``"triton"``; backward runs where forward ran."""
    few_rows: bool = False
    """The short path: one input tensor, weights not listed, and every tensor of the level requires a gradient."""

    def inputs(self, tensors: Sequence[Tensor | None]) -> LevelInput:
        """The call with its tensors: those of ``x``, those of the gates' input, the flat tuple of the level."""
        start = self.num_x + self.num_gate_x
        return self.inputs_of(tensors[:start], *unflatten(tensors[start:]))  # type: ignore[arg-type]  # inputs are never None

    def inputs_of(self, given: Sequence[Tensor], layers: Sequence[LayerTensors], gate: GateTensors) -> LevelInput:
        """The same; ``given``: the tensors of ``x`` and those of the gates' input."""
        x = gate_x = Slots(given[: self.num_x], self.places)
        if self.gate_places is not None:
            gate_x = Slots(given[self.num_x :], self.gate_places)
        return LevelInput(self.plan, layers, gate, self.state, x, gate_x)

    def wants(self, needed: tuple[bool, ...]) -> Wants:
        """Wants of backward, from one bool per tensor."""
        start = self.num_x + self.num_gate_x
        x = needed[: self.num_x]
        gate_x = x if self.gate_places is None else needed[self.num_x : start]
        return wants_of(self.plan, self.places, self.gate_places or self.places, x, gate_x, needed[start:])

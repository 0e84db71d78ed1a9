"""What a backend needs to know of a level besides its tensors: derived once per module, without tensors itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from .specs import Activation, GateSpec, LayerSpec, MLPSpec
from .topology import Topology

LAYOUT = 3
"""Counts the changes of ``saved.py``. Compilers keep on disk what they made of a program, strides of saved tensors
among it, and find it by the program's text, where the plan stands in full."""


class MLPPlan(NamedTuple):
    """``n`` MLPs of equal make-up, stacked."""

    layers: tuple[LayerSpec, ...]
    slots: tuple[int, ...]
    """Slot that each of them reads."""
    start: int
    """Number of the first: expert of the level, or row among its gated mixtures."""
    position: int
    """Number of the first layer among all layers of the level."""


@dataclass(frozen=True, eq=False)
class LevelPlan:
    """A level without its tensors. Levels of equal make-up share one plan, which is told from others by identity."""

    topology: Topology
    blocks: tuple[MLPPlan, ...]
    gate: MLPPlan
    """Hidden layers of the gates, one MLP per gated mixture; it may have no layer."""
    gate_spec: GateSpec
    num_layers: int = field(init=False)
    dense_logit: tuple[int, ...] = field(init=False)
    """Logit column of each entry of the dense ``(O_gated, E)`` weights; ``G`` where the mixture has no such expert."""
    is_absent: tuple[bool, ...] = field(init=False)
    """Of each entry of the dense ``(O_gated, E)`` weights, whether the mixture has no such expert."""
    weight_entry: tuple[int, ...] = field(init=False)
    """Entry of the dense ``(O, E)`` weights that each of the ``num_weights`` columns stands for."""
    logit_entry: tuple[int, ...] = field(init=False)
    """Entry of the dense ``(O_gated, E)`` weights that each of the ``G`` logits stands for."""
    static_entry: tuple[int, ...] = field(init=False)
    """Entries of the dense ``(O, E)`` weights that are the constant 1."""
    offset_entry: tuple[int, ...] = field(init=False)
    """Entries of the dense ``(O, E)`` weights that a learned scalar is added to."""
    is_stopped: tuple[bool, ...] = field(init=False)
    """Of each entry of the dense ``(O, E)`` weights, whether the gradient stops before the expert; empty where none
    does."""
    text: str = field(init=False)
    """The plan as JSON, for programs that outlive this process; ``from_text`` reads it."""
    has_norms: bool = field(init=False)
    """Of layers or of the logits."""
    has_state: bool = field(init=False)
    """A level has norms or drops: there may be something in its state that backward reads."""
    is_dense: bool = field(init=False)
    """Every mixture is gated and weighs all experts in order: logits are dense as they are."""
    top_k: int = field(init=False)
    """Experts of the largest logits that a gate chooses from; 0 where no gated mixture has more."""
    joint: tuple[int, ...] = field(init=False)
    """Experts that gates choose from together: those that each of them weighs; empty where each chooses alone."""
    weighs_all: bool = field(init=False)
    """Every output weighs all experts, in whatever order."""
    sigmoid_rows: tuple[int, ...] = field(init=False)
    """Numbers of the sigmoid mixtures among the gated ones."""
    outputs: tuple[int, ...] = field(init=False)
    """Per mixture the output that it is added to; empty where each is an output of its own."""
    passes: bool = field(init=False)
    """Mixture o is expert o as its last product leaves it, as in towers: there is nothing to mix, and no backward reads
    the output, so that a user may write to it."""
    is_unweighed: tuple[bool, ...] = field(init=False)
    """Where mixtures share outputs: of each entry of their dense ``(O, E)`` weights, whether there is none."""

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        t = self.topology
        assert t.mixture_kind is not None and t.mixture_offset is not None
        experts, gated = t.num_experts, t.gated_mixtures
        row = {o: i for i, o in enumerate(gated)}
        dense_logit = [t.num_logits] * (len(gated) * experts)
        logit_entry, weight_entry, static_entry, offset_entry = [], [], [], []
        stopped = [False] * (t.num_mixtures * experts if t.mixture_stop is not None else 0)
        for o, mixed in enumerate(t.mixture_experts):
            for i, e in enumerate(mixed):
                weight_entry.append(o * experts + e)
                if t.mixture_kind[o] != "static":
                    dense_logit[row[o] * experts + e] = t.logit_offset[o] + i
                    logit_entry.append(row[o] * experts + e)
                else:
                    static_entry.append(o * experts + e)
                if t.mixture_offset[o][i]:
                    offset_entry.append(o * experts + e)
                if t.mixture_stop is not None:
                    stopped[o * experts + e] = t.mixture_stop[o][i]
        put("num_layers", sum(len(block.layers) for block in self.blocks) + len(self.gate.layers))
        put("dense_logit", tuple(dense_logit))
        put("is_absent", tuple(column == t.num_logits for column in dense_logit))
        put("weight_entry", tuple(weight_entry))
        put("logit_entry", tuple(logit_entry))
        put("static_entry", tuple(static_entry))
        put("offset_entry", tuple(offset_entry))
        put("is_stopped", tuple(stopped))
        put("text", self._to_text())
        most = max((len(t.mixture_experts[o]) for o in gated), default=0)
        top_k = self.gate_spec.top_k
        put("top_k", 0 if top_k is None or top_k >= most else top_k)
        joint = joint_experts(t) if self.top_k and self.gate_spec.joint_k else ()
        put("joint", joint)
        put("weighs_all", sum(map(len, t.output_experts)) == t.num_outputs * experts)
        put("sigmoid_rows", tuple(i for i, o in enumerate(gated) if t.mixture_kind[o] == "sigmoid"))
        put("outputs", t.mixture_output or ())
        present = set(weight_entry)
        put("is_unweighed", tuple(i not in present for i in range(t.num_mixtures * experts)) if self.outputs else ())
        specs = [spec for mlp in self.mlps() for spec in mlp.layers]
        put("passes", self._passes())
        put("has_norms", self.gate_spec.logits_norm is not None or any(spec.norm is not None for spec in specs))
        put("has_state", self.has_norms or any(spec.dropout or spec.activation.name == "dice" for spec in specs))
        put("is_dense", t.num_logits == t.num_mixtures * experts and dense_logit == list(range(t.num_logits)))

    @classmethod
    def build(cls, topology: Topology, blocks: Sequence[tuple[int, int, MLPSpec]], gate: GateSpec) -> LevelPlan:
        """Plan of a level whose experts ``start`` to ``stop`` (exclusive) share a spec, per block."""
        plans, position = [], 0
        for start, stop, spec in blocks:
            plans.append(MLPPlan(spec.layers, topology.expert_slot[start:stop], start, position))
            position += len(spec.layers)
        return cls._of(topology, tuple(plans), gate, position)

    def _to_text(self) -> str:
        t = self.topology
        wiring: list[Any] = [
            t.expert_slot, t.mixture_slot, t.mixture_experts, t.mixture_kind, t.mixture_offset, t.num_slots
        ]  # fmt: skip
        if t.mixture_stop is not None or t.mixture_output is not None:  # a text without them is what it was before
            wiring.append(t.mixture_stop)
        if t.mixture_output is not None:
            wiring.append(t.mixture_output)
        blocks = [[block.start, len(block.slots), block.layers] for block in self.blocks]
        return json.dumps([wiring, blocks, self.gate_spec.to_config(), LAYOUT], separators=(",", ":"))

    @classmethod
    @lru_cache(maxsize=1024)
    def from_text(cls, text: str) -> LevelPlan:
        """The plan that ``text`` describes."""
        wiring, blocks, gate, *_ = json.loads(text)  # without a layout from before there were several
        topology = Topology(*(_tuples(value) for value in wiring))
        plans, position = [], 0
        for start, count, rows in blocks:
            layers = tuple(LayerSpec(units, Activation(*activation), *rest) for units, activation, *rest in rows)
            plans.append(MLPPlan(layers, topology.expert_slot[start : start + count], start, position))
            position += len(layers)
        return cls._of(topology, tuple(plans), GateSpec.from_config(gate), position)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies, and what is unpickled, are the same plan again: caches by plan do not grow with them.
        return LevelPlan.from_text, (self.text,)

    @classmethod
    @lru_cache(maxsize=1024)
    def _of(cls, topology: Topology, blocks: tuple[MLPPlan, ...], gate: GateSpec, position: int) -> LevelPlan:
        slots = tuple(topology.mixture_slot[o] for o in topology.gated_mixtures)
        # Without a gated mixture there is no gate, hidden layers or not.
        return cls(topology, blocks, MLPPlan(gate.layers if slots else (), slots, 0, position), gate)

    def _passes(self) -> bool:
        t = self.topology
        assert t.mixture_kind is not None
        in_order = t.mixture_experts == tuple((e,) for e in range(t.num_experts)) and not self.offset_entry
        last = self.blocks[0].layers[-1]
        in_order = in_order and t.mixture_output is None and t.mixture_stop is None
        plain = last.activation.name == "identity" and last.norm is None and not last.dropout
        return in_order and plain and len(self.blocks) == 1 and set(t.mixture_kind) == {"static"}

    def mlps(self) -> Iterator[MLPPlan]:
        """Blocks, then gates."""
        yield from self.blocks
        yield self.gate


def joint_experts(topology: Topology) -> tuple[int, ...]:
    """The experts that every gated mixture weighs."""
    rows = [set(topology.mixture_experts[o]) for o in topology.gated_mixtures]
    return tuple(e for e in range(topology.num_experts) if rows and all(e in row for row in rows))


def _tuples(value: Any) -> Any:
    """Lists, and lists in them, as tuples."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value

"""What a backend needs to know of a level besides its tensors: derived once per module, without tensors itself.

The differentiable tensors of a level are one flat tuple (``flatten``): five per layer of every block, then five per
hidden layer of the gates, then the five of the gates' end. An absent tensor is None and keeps its place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from .specs import Activation, GateSpec, LayerSpec, MLPSpec
from .topology import Topology


class LayerTensors(NamedTuple):
    """Differentiable tensors of one layer of ``n`` stacked MLPs."""

    weight: Tensor
    """``(n, H_out, H_in)``."""
    bias: Tensor | None
    """``(n, H_out)``."""
    norm_weight: Tensor | None
    """``(n * H_out,)`` for batch norm, ``(n, H_out)`` for layer norm."""
    norm_bias: Tensor | None
    slope: Tensor | None
    """prelu and row_dice: ``(n,)``; dice: ``(n, H_out)``."""


class GateTensors(NamedTuple):
    """Differentiable tensors that end the gates of a level."""

    weight: Tensor | None
    """``(G, K)``; None where every mixture is static."""
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    offset: Tensor | None
    """One learned scalar per marked weight, in the order of the mixtures."""


WIDTH = len(LayerTensors._fields)


class NormState(NamedTuple):
    """A norm's settings and buffers at one call, read from the module that owns them."""

    kind: str
    eps: float
    batch: bool = False
    """Batch norm: normalise by the statistics of this batch."""
    factor: float = 0.0
    """Weight of this batch in the running statistics."""
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    module: nn.Module | None = None
    """A norm that somebody put in the place of ours (synchronised over ranks, say): it is called as it is."""

    @property
    def moves(self) -> bool:
        """Whether running statistics take up those of this batch."""
        return self.batch and self.factor > 0.0 and self.running_mean is not None


class LayerState(NamedTuple):
    """What one layer reads at one call besides its differentiable tensors."""

    norm: NormState | None
    dice: NormState | None
    dropout: float
    """Probability, 0 outside training."""


NO_STATE = LayerState(None, None, 0.0)
"""Of a layer without norms that drops nothing."""


class LevelState(NamedTuple):
    """The states of all layers, in the order of ``flatten``, and what the level draws at one call."""

    layers: tuple[LayerState, ...]
    gate_norm: NormState | None
    seed: int | Tensor | None
    """Seed of the dropout masks; None where nothing is dropped. A tensor: one int64 on the device of kernels."""

    @property
    def uses_batch(self) -> bool:
        """Whether any norm reads statistics of the whole batch."""
        return any(n is not None and n.batch for n in self.norms())

    @property
    def is_plain(self) -> bool:
        """Whether there are no norms and no dropout: nothing that a call changes or draws."""
        return all(n is None for n in self.norms()) and not any(layer.dropout for layer in self.layers)

    @property
    def has_foreign_norm(self) -> bool:
        """Whether any norm is not ours."""
        for layer in self.layers:  # plain loops: every call waits for this
            for norm in (layer.norm, layer.dice):
                if norm is not None and norm.module is not None:
                    return True
        return self.gate_norm is not None and self.gate_norm.module is not None

    def read_by_backward(self) -> list[Tensor]:
        """Tensors that a backward reads: running statistics that stood in for the batch's, and a seed on a device."""
        found: list[Tensor] = []
        norms = [self.gate_norm]  # plain loops: a small batch waits for this
        for layer in self.layers:
            norms += (layer.norm, layer.dice)
        for norm in norms:
            if norm is not None and not norm.batch and norm.running_mean is not None:
                found += (norm.running_mean, norm.running_var)  # type: ignore[arg-type]  # it has both
        if isinstance(self.seed, Tensor):
            found.append(self.seed)
        return found

    def form(self) -> tuple[tuple[Any, ...], list[Tensor]]:
        """All that the arithmetic reads of the state: settings, to compare by, and tensors."""
        settings: list[Any] = []
        tensors: list[Tensor] = []
        for layer in self.layers:
            if layer is not NO_STATE:
                settings += (layer.dropout, _form_of(layer.norm, tensors), _form_of(layer.dice, tensors))
            else:
                settings.append(None)
        settings.append(_form_of(self.gate_norm, tensors))
        if isinstance(self.seed, Tensor):
            tensors.append(self.seed)
        return tuple(settings), tensors

    def with_saved(self, tensors: Sequence[Tensor]) -> LevelState:
        """The same state with these in the place of those that are ``read_by_backward``."""
        given = iter(tensors)

        def norm(own: NormState | None) -> NormState | None:
            if own is None or own.batch or own.running_mean is None:
                return own
            return own._replace(running_mean=next(given), running_var=next(given))

        gate_norm = norm(self.gate_norm)
        layers = tuple(layer._replace(norm=norm(layer.norm), dice=norm(layer.dice)) for layer in self.layers)
        return LevelState(layers, gate_norm, next(given) if isinstance(self.seed, Tensor) else self.seed)

    def norms(self) -> Iterator[NormState | None]:
        """Every norm, in order."""
        for layer in self.layers:
            yield layer.norm
            yield layer.dice
        yield self.gate_norm


def _form_of(norm: NormState | None, tensors: list[Tensor]) -> tuple[Any, ...] | None:
    if norm is None:
        return None
    running = [t for t in (norm.running_mean, norm.running_var) if t is not None]
    tensors += running
    return norm.kind, norm.eps, norm.batch, norm.factor, len(running)


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
    text: str = field(init=False)
    """The plan as JSON, for programs that outlive this process; ``from_text`` reads it."""
    has_state: bool = field(init=False)
    """A level has norms or drops: there may be something in its state that backward reads."""
    is_dense: bool = field(init=False)
    """Every mixture is gated and weighs all experts in order: logits are dense as they are."""
    weighs_all: bool = field(init=False)
    """Every mixture weighs all experts, in whatever order."""

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        t = self.topology
        assert t.mixture_kind is not None and t.mixture_offset is not None
        experts, gated = t.num_experts, t.gated_mixtures
        row = {o: i for i, o in enumerate(gated)}
        dense_logit = [t.num_logits] * (len(gated) * experts)
        logit_entry, weight_entry, static_entry, offset_entry = [], [], [], []
        for o, mixed in enumerate(t.mixture_experts):
            for i, e in enumerate(mixed):
                weight_entry.append(o * experts + e)
                if t.mixture_kind[o] == "softmax":
                    dense_logit[row[o] * experts + e] = t.logit_offset[o] + i
                    logit_entry.append(row[o] * experts + e)
                else:
                    static_entry.append(o * experts + e)
                if t.mixture_offset[o][i]:
                    offset_entry.append(o * experts + e)
        put("num_layers", sum(len(block.layers) for block in self.blocks) + len(self.gate.layers))
        put("dense_logit", tuple(dense_logit))
        put("is_absent", tuple(column == t.num_logits for column in dense_logit))
        put("weight_entry", tuple(weight_entry))
        put("logit_entry", tuple(logit_entry))
        put("static_entry", tuple(static_entry))
        put("offset_entry", tuple(offset_entry))
        put("text", self._to_text())
        put("weighs_all", len(weight_entry) == t.num_mixtures * experts)
        specs = [spec for mlp in self.mlps() for spec in mlp.layers]
        has_norms = any(spec.norm is not None or spec.activation.name == "dice" for spec in specs)
        has_norms = has_norms or self.gate_spec.logits_norm is not None
        put("has_state", has_norms or any(spec.dropout for spec in specs))
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
        wiring = [
            t.expert_slot, t.mixture_slot, t.mixture_experts, t.mixture_kind, t.mixture_offset, t.num_slots
        ]  # fmt: skip
        blocks = [[block.start, len(block.slots), block.layers] for block in self.blocks]
        return json.dumps([wiring, blocks, self.gate_spec.to_config()], separators=(",", ":"))

    @classmethod
    @lru_cache(maxsize=1024)
    def from_text(cls, text: str) -> LevelPlan:
        """The plan that ``text`` describes."""
        wiring, blocks, gate = json.loads(text)
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

    def mlps(self) -> Iterator[MLPPlan]:
        """Blocks, then gates."""
        yield from self.blocks
        yield self.gate


def _tuples(value: Any) -> Any:
    """Lists, and lists in them, as tuples."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def flatten(layers: Sequence[LayerTensors], gate: GateTensors) -> tuple[Tensor | None, ...]:
    """The flat tuple of a level's differentiable tensors."""
    flat: list[Tensor | None] = []
    for row in layers:
        flat += row
    return *flat, *gate


def unflatten(flat: Sequence[Tensor | None]) -> tuple[list[LayerTensors], GateTensors]:
    """Layers and gate ends of what ``flatten`` made."""
    rows = [flat[i : i + WIDTH] for i in range(0, len(flat), WIDTH)]
    return [LayerTensors(*row) for row in rows[:-1]], GateTensors(*rows[-1])  # type: ignore[arg-type]  # None only where allowed


class RowShapes(NamedTuple):
    """The shapes of the tensors of a layer, or of those that end the gates; None where there is none."""

    weight: tuple[int, ...]
    bias: tuple[int, ...]
    norm: tuple[int, ...] | None
    last: tuple[int, ...] | None
    """Of the slope, or the offset."""


@lru_cache(maxsize=1024)
def shapes_of(plan: LevelPlan, in_features: int, gate_features: int) -> tuple[RowShapes, ...]:
    """The shapes of what ``flatten`` takes, row by row."""
    rows = []
    width = gate_features
    for mlp in plan.mlps():
        width, count = gate_features if mlp is plan.gate else in_features, len(mlp.slots)
        for spec in mlp.layers:
            units = (count, spec.units)
            norm = (count * spec.units,) if spec.norm == "batch" else units if spec.norm else None
            slope = {"prelu": (count,), "row_dice": (count,), "dice": units}.get(spec.activation.name)
            rows.append(RowShapes((*units, width), units, norm, slope))
            width = spec.units
    logits = (plan.topology.num_logits,)
    return (*rows, RowShapes((*logits, width), logits, logits, (len(plan.offset_entry),)))


def check_shapes(
    plan: LevelPlan, layers: Sequence[LayerTensors], gate: GateTensors, in_features: int, gate_features: int
) -> None:
    """Looks at the shapes of all tensors of a level: what reads them by their sizes alone would not.

    Raises:
        ValueError: somebody put a tensor of another shape in the place of one.
    """
    expected = shapes_of(plan, in_features, gate_features)
    # Written out, because a small batch waits for this.
    for (weight, bias, norm_weight, norm_bias, last), shapes in zip((*layers, gate), expected, strict=True):
        if (
            (weight is not None and weight.shape != shapes[0])
            or (bias is not None and bias.shape != shapes[1])
            or (norm_weight is not None and norm_weight.shape != shapes[2])
            or (norm_bias is not None and norm_bias.shape != shapes[2])
            or (last is not None and last.shape != shapes[3])
        ):
            _refuse_shapes(plan, layers, gate, expected)


def _refuse_shapes(
    plan: LevelPlan, layers: Sequence[LayerTensors], gate: GateTensors, expected: Sequence[RowShapes]
) -> None:
    """Finds the tensor again, and its name."""
    rows = zip((*layers, gate), expected, strict=True)
    for number, (row, (weight, bias, norm, last)) in enumerate(rows):
        for place, (tensor, shape) in enumerate(zip(row, (weight, bias, norm, norm, last), strict=True)):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"{_name(plan, number, place)}: size mismatch, expected shape {shape}, which the level was built "
                    f"with, got {tuple(tensor.shape)}"
                )


def _name(plan: LevelPlan, number: int, place: int) -> str:
    """The name of an entry of ``flatten`` in the level's state dict."""
    rows = [f"blocks.{block}.layers.{i}" for block, mlp in enumerate(plan.blocks) for i in range(len(mlp.layers))]
    rows += [*(f"gate.layers.{i}" for i in range(len(plan.gate.layers))), "gate"]
    last = "offset" if number == len(rows) - 1 else "activation"
    return f"{rows[number]}.{('weight', 'bias', 'norm.weight', 'norm.bias', last)[place]}"

"""The paper (Tang et al., RecSys 2020, eq. 2-7), one expert at a time, in plain PyTorch: slow, short, obviously right.

The oracle of the tests and the baseline of the benchmarks. Nothing in the library imports it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import EllipsisType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .specs import Activation, GateSpec, LayerSpec, MLPSpec
from .topology import Topology

Input = Tensor | Sequence[Tensor]


class Dice(nn.Module):
    """``p x + (1 - p) alpha x``, ``p = sigmoid(batch_norm(x))``, one alpha per unit (Zhou et al., KDD 2018, eq. 3)."""

    def __init__(self, units: int, eps: float = 1e-8) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(units, eps=eps, affine=False)
        self.alpha = nn.Parameter(torch.zeros(units))

    def forward(self, x: Tensor) -> Tensor:
        p = torch.sigmoid(self.norm(x))
        return p * x + (1 - p) * self.alpha * x


class RowDice(nn.Module):
    """The ``Dice`` of torch-rechub, which compares each row with its own mean; one alpha."""

    def __init__(self, eps: float = 1e-3) -> None:
        super().__init__()
        self.eps = eps
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        p = torch.sigmoid((x - mean) / torch.sqrt(((x - mean) ** 2 + self.eps).sum(1, keepdim=True)))
        return p * x + (1 - p) * self.alpha * x


def activation_module(activation: Activation, units: int) -> nn.Module:
    """The ordinary module of an activation over ``units`` features."""
    name, value = activation
    modules: dict[str, Any] = {
        "identity": nn.Identity,
        "relu": nn.ReLU,
        "leaky_relu": lambda: nn.LeakyReLU(value),
        "prelu": lambda: nn.PReLU(init=value),
        "gelu": nn.GELU,
        "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
        "silu": nn.SiLU,
        "tanh": nn.Tanh,
        "sigmoid": nn.Sigmoid,
        "dice": lambda: Dice(units, eps=value),
        "row_dice": lambda: RowDice(value),
    }
    module: nn.Module = modules[name]()
    return module


class Layer(nn.Sequential):
    """``linear -> [norm] -> activation -> [norm] -> dropout`` on ``(B, in_features)``."""

    def __init__(self, in_features: int, spec: LayerSpec) -> None:
        linear = nn.Linear(in_features, spec.units, bias=spec.bias)
        norm = {None: None, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}[spec.norm]
        norms: list[nn.Module] = [] if norm is None else [norm(spec.units)]
        activation = [activation_module(spec.activation, spec.units)]
        body = norms + activation if spec.norm_position == "before" else activation + norms
        super().__init__(linear, *body, nn.Dropout(spec.dropout))
        self.spec = spec

    @property
    def norm(self) -> nn.Module | None:
        if self.spec.norm is None:
            return None
        return self[1] if self.spec.norm_position == "before" else self[2]

    @property
    def activation(self) -> nn.Module:
        return self[2] if self.spec.norm is not None and self.spec.norm_position == "before" else self[1]


def _mlp(in_features: int, specs: Sequence[LayerSpec]) -> list[Layer]:
    widths = [in_features, *(spec.units for spec in specs)]
    return [Layer(width, spec) for width, spec in zip(widths[:-1], specs, strict=True)]


def _slots(x: Input, num_slots: int) -> list[Tensor]:
    """One ``(B, D)`` tensor per slot, from ``(B, D)`` (every slot reads it), ``(B, S, D)`` or a list of S tensors."""
    if not isinstance(x, Tensor):
        slots = list(x)
    else:
        slots = [x] * num_slots if x.dim() == 2 else list(x.unbind(1))
    if len(slots) != num_slots:
        raise ValueError(f"x: expected {num_slots} slots, got {len(slots)}")
    return slots


class ExtractionNetworkReference(nn.Module):
    """One extraction network: ``y_o = sum_{e in A(o)} softmax(gate_o(x_t(o)))_e MLP_e(x_s(e))`` (paper eq. 2-4).

    Args:
        in_features: input width ``D``.
        topology: the wiring.
        experts: one spec for all experts, or one per expert; all with the same last width ``H``.
        gate: spec of the gates.
        gate_features: width of what the gates read; default ``in_features``.
    """

    def __init__(
        self,
        in_features: int,
        topology: Topology,
        experts: MLPSpec | Sequence[MLPSpec],
        gate: GateSpec,
        gate_features: int | None = None,
    ) -> None:
        super().__init__()
        assert topology.mixture_kind is not None and topology.mixture_offset is not None
        gate_features = in_features if gate_features is None else gate_features
        specs = (experts,) * topology.num_experts if isinstance(experts, MLPSpec) else tuple(experts)
        self.topology, self.gate_spec = topology, gate
        self.experts = nn.ModuleList(
            nn.Sequential(*_mlp(in_features, specs[e].layers)) for e in range(topology.num_experts)
        )
        self.gates = nn.ModuleList()
        for kind, mixed in zip(topology.mixture_kind, topology.mixture_experts, strict=True):
            if kind == "static":
                self.gates.append(nn.Identity())
                continue
            width = gate.units[-1] if gate.units else gate_features
            logits: list[nn.Module] = [nn.Linear(width, len(mixed), bias=gate.bias)]
            if gate.logits_norm == "batch":
                logits.append(nn.BatchNorm1d(len(mixed)))
            self.gates.append(nn.Sequential(*_mlp(gate_features, gate.layers), *logits))
        # AdaTT's scalars: one per marked weight, in the order of the mixtures.
        marked = sum(map(sum, topology.mixture_offset))
        self.offset = nn.Parameter(torch.zeros(marked)) if marked else None

    def _logits(self, o: int, gate_input: Tensor) -> Tensor | None:
        """Logits of mixture ``o`` over the temperature, ``(B, |A(o)|)``, float32 or wider; None: it is static."""
        assert self.topology.mixture_kind is not None
        if self.topology.mixture_kind[o] == "static":
            return None
        logits: Tensor = self.gates[o](gate_input)
        return logits.to(torch.promote_types(gate_input.dtype, torch.float32)) / self.gate_spec.temperature

    def _weights(self, o: int, logits: Tensor | None, together: list[set[int]], like: Tensor) -> Tensor:
        """Weights of mixture ``o``, ``(B, |A(o)|)``, float32 or wider; ``together``: what all choose, per row."""
        assert self.topology.mixture_offset is not None
        wide = torch.promote_types(like.dtype, torch.float32)
        mixed = self.topology.mixture_experts[o]
        if logits is None:
            weights = torch.ones(like.shape[0], len(mixed), dtype=wide, device=like.device)
        elif self.gate_spec.top_k is None:
            weights = self._squashed(o, logits)
        else:
            weights = self._chosen(o, logits, [[e in row for e in mixed] for row in together])
        if self.offset is None:
            return weights
        columns, position = [], sum(map(sum, self.topology.mixture_offset[:o]))
        for column, marked in zip(weights.unbind(1), self.topology.mixture_offset[o], strict=True):
            columns.append(column + self.offset[position].to(wide) if marked else column)
            position += marked
        return torch.stack(columns, dim=1)

    def _squashed(self, o: int, logits: Tensor) -> Tensor:
        """Weights out of the logits of mixture ``o``, along their last axis."""
        assert self.topology.mixture_kind is not None
        return torch.sigmoid(logits) if self.topology.mixture_kind[o] == "sigmoid" else torch.softmax(logits, dim=-1)

    def _chosen(self, o: int, logits: Tensor, before: list[list[bool]]) -> Tensor:
        """Weights out of the largest logits of each row, of equal ones the first; 0 for the others.

        ``before``: per row, which have been chosen already.
        """
        rows = []
        for row, is_before in zip(logits.unbind(0), before, strict=True):
            values = row.tolist()
            ranked = sorted(range(len(values)), key=values.__getitem__, reverse=True)
            chosen = sorted(ranked, key=is_before.__getitem__, reverse=True)[: self.gate_spec.top_k]
            places = (torch.tensor(chosen, device=row.device),)
            rows.append(torch.zeros_like(row).index_put(places, self._squashed(o, row[chosen])))
        return torch.stack(rows) if rows else torch.zeros_like(logits)

    def _together(self, gates: Sequence[Tensor | None], batch: int) -> list[set[int]]:
        """Per row the experts that all gates choose together: those of the largest sum of the gates' softmaxes."""
        if not self.gate_spec.joint_k:
            return [set()] * batch
        mixed = self.topology.mixture_experts
        gated = {o: torch.softmax(logits, dim=1).tolist() for o, logits in enumerate(gates) if logits is not None}
        common = [e for e in range(self.topology.num_experts) if all(e in mixed[o] for o in gated)]
        chosen = []
        for row in range(batch):
            sums = {e: sum(shares[row][mixed[o].index(e)] for o, shares in gated.items()) for e in common}
            chosen.append(set(sorted(common, key=sums.__getitem__, reverse=True)[: self.gate_spec.joint_k]))
        return chosen

    def forward(self, x: Input, gate_input: Input | None = None, *, return_gates: bool = False) -> Any:
        """``x``: ``(B, D)``, ``(B, S, D)`` or S tensors ``(B, D)``; ``gate_input`` likewise, default ``x``.

        Returns:
            ``(B, O, H)``; with ``return_gates`` also the weights, per mixture ``(B, |A(o)|)``.
        """
        num_slots = self.topology.num_slots
        assert num_slots is not None
        slots = _slots(x, num_slots)
        gate_slots = slots if gate_input is None else _slots(gate_input, num_slots)
        if gate_input is None and self.gate_spec.input == "with_shared":
            gate_slots = [slot + slots[-1] for slot in slots[:-1]] + slots[-1:]
        hidden = [expert(slots[s]) for expert, s in zip(self.experts, self.topology.expert_slot, strict=True)]
        logits = [self._logits(o, gate_slots[slot]) for o, slot in enumerate(self.topology.mixture_slot)]
        together = self._together(logits, slots[0].shape[0])
        gates = [self._weights(o, own, together, gate_slots[0]) for o, own in enumerate(logits)]
        stops = self.topology.mixture_stop or [(False,) * len(mixed) for mixed in self.topology.mixture_experts]
        outputs = self.topology.mixture_output or range(len(gates))
        shares: dict[int, dict[int, Tensor]] = {}  # per output the weight of each expert, added up over its mixtures
        reads: dict[tuple[int, int], Tensor] = {}
        for o, mixed in enumerate(self.topology.mixture_experts):
            share = shares.setdefault(outputs[o], {})
            for e, weight, stop in zip(mixed, gates[o].unbind(1), stops[o], strict=True):
                share[e] = share[e] + weight if e in share else weight
                reads[outputs[o], e] = hidden[e].detach() if stop else hidden[e]
        mixtures = []
        for output, share in shares.items():
            terms = [weight[:, None] * reads[output, e] for e, weight in share.items()]
            mixtures.append(torch.stack(terms).sum(0).to(hidden[0].dtype))
        y = torch.stack(mixtures, dim=1)
        return (y, gates) if return_gates else y

    @classmethod
    def like(cls, level: Any) -> ExtractionNetworkReference:
        """The reference of an ``ExtractionNetwork``: same wiring, same weights and buffers (copied), same mode."""
        reference = cls(level.in_features, level.topology, level.expert_specs, level.gate_spec, level.gate_features)
        weight = level.blocks[0].layers[0].weight
        reference.to(device=weight.device, dtype=weight.dtype)
        for norm, module in _norms(level, reference):
            module.eps, module.momentum = norm.eps, getattr(norm, "momentum", None)
        with torch.no_grad():
            for pair in correspondence(level, reference):
                pair.reference.copy_(pair.fused[pair.part])
        return reference.train(level.training)


class PLEReference(nn.Module):
    """A stack of extraction networks (paper section 4.2): the mixtures of one level are the slots of the next.

    Args:
        levels: the extraction networks; at the first one every slot reads ``x`` when ``x`` is ``(B, D)``.
        num_tasks: ``T``.
        last_shared: keep what the last level mixes beyond the tasks.
        parts: mixtures per task, concatenated (customized sharing has 2).
    """

    def __init__(
        self,
        levels: Sequence[ExtractionNetworkReference],
        num_tasks: int,
        *,
        last_shared: bool = False,
        parts: int = 1,
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.num_tasks, self.last_shared, self.parts = num_tasks, last_shared, parts

    def forward(self, x: Input, *, return_gates: bool = False) -> Any:
        """``x``: ``(B, D)``, ``(B, S, D)`` or S tensors. Returns ``(B, T, H)``, and all weights on request."""
        first = self.levels[0]
        assert isinstance(first, ExtractionNetworkReference)
        raw_input = _slots(x, 1)[0] if first.topology.num_slots == 1 else x
        y: Input = x
        gates = []
        for level in self.levels:
            assert isinstance(level, ExtractionNetworkReference)
            reads_raw = level.gate_spec.input == "raw"
            y, weights = level(y, raw_input if reads_raw else None, return_gates=True)
            gates.append(weights)
        assert isinstance(y, Tensor)
        out = y if self.last_shared else y[:, : self.num_tasks * self.parts]
        if self.parts > 1:
            out = out.unflatten(1, (self.num_tasks, self.parts)).flatten(2)
        return (out, gates) if return_gates else out

    @classmethod
    def like(cls, module: Any) -> PLEReference:
        """The reference of a trunk (what has ``levels`` and ``num_tasks``), weights copied."""
        levels = [ExtractionNetworkReference.like(level) for level in module.levels]
        reference = cls(
            levels,
            module.num_tasks,
            last_shared=getattr(module, "last_shared", False),
            parts=getattr(module, "parts", 1),
        )
        return reference.train(module.training)


class Pair(NamedTuple):
    """A tensor of the reference, and which part of which tensor of the fused module it corresponds to."""

    name: str
    fused: Tensor
    part: int | slice | EllipsisType
    reference: Tensor


def correspondence(fused: Any, reference: ExtractionNetworkReference | PLEReference) -> Iterator[Pair]:
    """Every parameter and buffer of ``reference``, with its place in an ``ExtractionNetwork`` or a stack of them."""
    if isinstance(reference, PLEReference):
        for number, (level, own) in enumerate(zip(fused.levels, reference.levels, strict=True)):
            assert isinstance(own, ExtractionNetworkReference)
            for pair in correspondence(level, own):
                yield pair._replace(name=f"levels.{number}.{pair.name}")
        for number, own in enumerate(getattr(reference, "feature_gates", ())):  # of HoME
            for pair in correspondence(fused.feature_gates[number].network, own):
                yield pair._replace(name=f"feature_gates.{number}.network.{pair.name}")
        return
    for name, layer, row, own in _layers(fused, reference):
        yield from _layer_pairs(name, layer, row, own)
    topology = fused.topology
    for o in topology.gated_mixtures:
        first = topology.logit_offset[o]
        rows = slice(first, first + len(topology.mixture_experts[o]))
        modules = list(reference.gates[o].children())[len(fused.gate_spec.units) :]
        for key, value in modules[0].named_parameters():
            yield Pair(f"gates.{o}.{key}", getattr(fused.gate, key), rows, value)
        if len(modules) > 1:
            yield from _batch_norm_pairs(f"gates.{o}.norm", fused.gate.norm, rows, modules[1])
    if reference.offset is not None:
        yield Pair("offset", fused.gate.offset, ..., reference.offset)


def _layers(level: Any, reference: ExtractionNetworkReference) -> Iterator[tuple[str, Any, int, Layer]]:
    """Name, fused layer, row in it, and layer of the reference: of every expert, then of every gate's hidden layers."""
    for block in level.blocks:
        start, stop = block.experts
        for e in range(start, stop):
            expert = reference.experts[e]
            assert isinstance(expert, nn.Sequential)
            for i, own in enumerate(expert):
                assert isinstance(own, Layer)
                yield f"experts.{e}.{i}", block.layers[i], e - start, own
    for row, o in enumerate(level.topology.gated_mixtures):
        gate = reference.gates[o]
        assert isinstance(gate, nn.Sequential)
        for i, own in enumerate(gate):
            if isinstance(own, Layer):
                yield f"gates.{o}.{i}", level.gate.layers[i], row, own


def _layer_pairs(name: str, layer: Any, row: int, own: Layer) -> Iterator[Pair]:
    units = own.spec.units
    for key, value in own[0].named_parameters():
        yield Pair(f"{name}.{key}", getattr(layer, key), row, value)
    columns = slice(row * units, (row + 1) * units)
    if own.spec.norm == "batch":
        yield from _batch_norm_pairs(f"{name}.norm", layer.norm, columns, own.norm)
    elif own.norm is not None:
        for key, value in own.norm.named_parameters():
            yield Pair(f"{name}.norm.{key}", getattr(layer.norm, key), row, value)
    if isinstance(own.activation, nn.PReLU):
        yield Pair(f"{name}.slope", layer.activation.weight, slice(row, row + 1), own.activation.weight)
    elif isinstance(own.activation, RowDice):
        yield Pair(f"{name}.alpha", layer.activation.alpha, slice(row, row + 1), own.activation.alpha)
    elif isinstance(own.activation, Dice):
        yield Pair(f"{name}.alpha", layer.activation.alpha, row, own.activation.alpha)
        yield from _batch_norm_pairs(f"{name}.dice_norm", layer.activation.norm, columns, own.activation.norm)


def _batch_norm_pairs(name: str, norm: Any, columns: slice, own: nn.Module | None) -> Iterator[Pair]:
    assert own is not None
    for key, value in [*own.named_parameters(), *own.named_buffers()]:
        yield Pair(f"{name}.{key}", getattr(norm, key), columns if value.dim() else ..., value)


def _norms(level: Any, reference: ExtractionNetworkReference) -> Iterator[tuple[Any, Any]]:
    """Every norm of the reference behind its fused counterpart, for the settings that are no tensors."""
    for _, layer, _, own in _layers(level, reference):
        if own.norm is not None:
            yield layer.norm, own.norm
        if isinstance(own.activation, Dice):
            yield layer.activation.norm, own.activation.norm
    for o in level.topology.gated_mixtures:
        last = list(reference.gates[o].children())[-1]
        if isinstance(last, nn.BatchNorm1d):
            yield level.gate.norm, last

"""AdaTT (facebookresearch/AdaTT, ``mtl_lib.py``): its PLE, AdaTTSp, AdaTTWSharedExps, MLMMoE and CrossStitch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import PLE, AdaTT, CrossStitch, ExtractionNetwork, MLMMoE
from ..modules.unpack import Index
from ..topology import Topology, check_task_counts
from .adatt_common import AdaTTLibrary, core, made, offset, stacks
from .adatt_stitch import CrossStitchConverter
from .converter import LevelSource, register
from .library import Library, PlainLevel, ple_wiring, tree
from .plain_layers import PlainStack


def from_adatt(
    source: nn.Module | Mapping[str, Tensor],
    *,
    like: PLE | MLMMoE | AdaTT | CrossStitch | None = None,
    prefix: str = "",
) -> PLE:
    """The fused trunk of a model of AdaTT's library, with its weights.

    Args:
        source: ``PLE``, ``AdaTTSp``, ``AdaTTWSharedExps``, ``MLMMoE`` or ``CrossStitch`` of ``mtl_lib``, a
            ``CentralTaskArch`` that has one as ``mtl_arch``, or the state dict of one of the five, which also needs
            ``like``.
        like: a trunk of the configuration of the state dict; it stays as it is.
        prefix: what stands before ``experts`` in the names of the state dict (``mtl_arch.`` in a ``CentralTaskArch``).

    Returns:
        A trunk whose first level has a slot per task (and one for what is shared), or one for all in ``MLMMoE``. The
        one of a ``CrossStitch`` keeps each weight ``a`` as ``a - 1``, which is rounded; everything else is bit for bit.

    Raises:
        TypeError, ValueError: it is something else, or of another configuration.
    """
    if isinstance(source, nn.Module):
        library = _of_model(source)
    else:
        library = LIBRARIES["PLE"] if like is None else _of_trunk(like)
    return library.to_ours(source, like, prefix)


def to_adatt(ple: PLE | MLMMoE | AdaTT | CrossStitch, target: nn.Module | None = None) -> nn.Module:
    """A trunk as AdaTT's library has it.

    Args:
        ple: a trunk of ours.
        target: a model of AdaTT's library of the same configuration, whose trunk gets the weights; default a tree of
            ordinary modules whose ``state_dict()`` is that of the class that computes what the trunk does.

    Raises:
        ValueError: AdaTT's library cannot represent the trunk, or ``target`` is of another configuration.
    """
    if target is None:
        return _of_trunk(ple).to_theirs(ple, None)
    _of_model(target).to_theirs(ple, core(target))
    return target


def _forward(self: Any, inputs: Tensor) -> Tensor:
    for level in self.ple_fast.levels:
        inputs = level(inputs)
    return inputs


def _forward_raw(self: Any, input: Tensor) -> Tensor:
    first, *others = self.ple_fast.levels
    x: Tensor = first(input)
    for level in others:
        x = level(x, input)
    return x


def _adatt_wiring(num_tasks: int, counts: Sequence[int], mixtures: int, *, residual: bool) -> Topology:
    """A level in which every mixture weighs all experts, of ``counts`` per unit: a task, or what is shared."""
    if residual:
        return Topology.adatt(num_tasks, counts[:num_tasks], sum(counts[num_tasks:]), last=mixtures == num_tasks)
    slots = tuple(u for u, count in enumerate(counts) for _ in range(count))
    every = tuple(range(len(slots)))
    return Topology(slots, tuple(range(mixtures)), (every,) * mixtures, num_slots=len(counts))


class PLEConverter(AdaTTLibrary):
    """``mtl_lib.PLE``."""

    class_name = "PLE"
    children = ("experts", "gate_weights")
    methods = (("forward", _forward),)
    attributes = ("num_tasks", "num_task_experts", "num_shared_experts")

    def slots(self, site: Any) -> int:
        return int(site.num_tasks) + 1

    def read(self, site: Any) -> list[LevelSource]:
        own, shared = site.num_task_experts, site.num_shared_experts
        own = check_task_counts("num_task_experts", own, site.num_tasks)
        if not shared:
            raise ValueError("expected shared experts, got num_shared_experts=0: AdaTT's own forward fails then")
        return [
            LevelSource(ple_wiring(own, shared, shared_gate=len(gates) > len(own)), stacks(experts), list(gates))
            for experts, gates in zip(site.experts, site.gate_weights, strict=True)
        ]

    def write(self, levels: list[PlainLevel]) -> nn.Module:
        *own, shared = self.written_counts(levels)
        return made(self.lists(levels), num_tasks=len(own), num_task_experts=own, num_shared_experts=shared)


class AdaTTSpConverter(AdaTTLibrary):
    """``mtl_lib.AdaTTSp``: scalars per level, ``(T, experts per task)``."""

    class_name = "AdaTTSp"
    children = ("experts", "gate_weights", "self_exp_weights")
    methods = (("forward", _forward),)
    attributes = ("num_tasks", "num_task_experts", "self_exp_res_connect", "self_exp_weights")

    def counts(self, site: Any) -> list[int]:
        """Experts per unit."""
        return list(check_task_counts("num_task_experts", site.num_task_experts, site.num_tasks))

    def place(self, level: int, unit: int) -> tuple[int, int]:
        """Which of ``self_exp_weights`` has a unit's scalars at a level, and in which row."""
        return level, unit

    def read(self, site: Any) -> list[LevelSource]:
        counts, residual, found = self.counts(site), site.self_exp_res_connect, []
        for i, (experts, gates) in enumerate(zip(site.experts, site.gate_weights, strict=True)):
            topology = _adatt_wiring(site.num_tasks, counts, len(gates), residual=residual)
            ends: list[Any] = list(gates)
            offsets: dict[int, tuple[str, Index]] = {}
            assert topology.mixture_offset is not None
            for o, columns in enumerate(topology.mixture_offset if residual else ()):
                weight = gates[o][0].weight
                if len(site.self_exp_weights):
                    index, inside = self.place(i, o)
                    own = site.self_exp_weights[index]
                    scalars = offset(columns, own[inside], own.requires_grad)
                    offsets[o] = f"self_exp_weights.{index}", inside
                else:  # one expert per unit: it is added as it is
                    scalars = offset(columns, weight.new_ones(sum(columns)), False)
                ends[o] = [gates[o], scalars]
            found.append(LevelSource(topology, stacks(experts), ends, offsets=offsets, constant=1.0))
        found[-1].unread = [p for p in getattr(site, "self_exp_weights", ()) if not p.numel()]
        return found

    def write(self, levels: list[PlainLevel]) -> nn.Module:
        counts = self.written_counts(levels)
        if len(set(counts)) > 1:
            self.cannot(f"every task has as many experts, got {counts}")
        scalars = [torch.stack(row) for row in self.scalars(levels, counts)]
        return self.with_scalars(levels, scalars, num_tasks=len(counts), num_task_experts=counts[0])

    def scalars(self, levels: list[PlainLevel], counts: Sequence[int]) -> list[list[Tensor]]:
        """The learned scalars per level and mixture; none where they are constants 1, or where there are none."""
        offsets = [[gate.offset for gate in level.gates] for level in levels]
        if all(offset is None for row in offsets for offset in row):
            return []
        found = [[offset.weight.detach() for offset in row if offset is not None] for row in offsets]
        if [len(row) for row in found] != [len(row) for row in offsets]:
            self.cannot("its mixtures have scalars for their own experts everywhere, or nowhere")
        if any(count != 1 for count in counts):
            return found
        if any(offset is not None and offset.weight.requires_grad for row in offsets for offset in row) or any(
            bool((weight != 1).any()) for row in found for weight in row
        ):
            self.cannot("where every unit has one expert, its scalars are constants 1")
        return []

    def with_scalars(self, levels: list[PlainLevel], scalars: list[Tensor], **attributes: Any) -> nn.Module:
        """What ``write`` gives."""
        content: dict[str, Any] = {**self.lists(levels), "self_exp_weights": nn.ParameterList(scalars)}
        residual = any(level.level.topology.has_offsets for level in levels)
        return made(content, self_exp_res_connect=residual, **attributes)


class AdaTTWSharedExpsConverter(AdaTTSpConverter):
    """``mtl_lib.AdaTTWSharedExps``: scalars per unit, ``(levels, its experts)``."""

    class_name = "AdaTTWSharedExps"
    attributes = ("num_tasks", "num_expert_list", "self_exp_res_connect", "self_exp_weights")

    def slots(self, site: Any) -> int:
        return int(site.num_tasks) + 1

    def counts(self, site: Any) -> list[int]:
        # A list that was passed for a second model has grown since.
        return list(site.num_expert_list[: site.num_tasks + 1])

    def place(self, level: int, unit: int) -> tuple[int, int]:
        return unit, level

    def write(self, levels: list[PlainLevel]) -> nn.Module:
        counts = self.written_counts(levels)
        rows, scalars = self.scalars(levels, counts), []
        for unit, count in enumerate(counts if rows else ()):
            own = [row[unit] for row in rows if unit < len(row)]  # the shared unit has none at the last level
            scalars.append(torch.stack(own) if own else rows[0][0].new_empty(0, count))
        return self.with_scalars(levels, scalars, num_tasks=len(counts) - 1, num_expert_list=counts)


class MLMMoEConverter(AdaTTLibrary):
    """``mtl_lib.MLMMoE``: levels of MMoE, whose gates all read the model's input."""

    class_name = "MLMMoE"
    gates = "gates"
    children = ("experts", "gates")
    methods = (("forward", _forward_raw),)

    def read(self, site: Any) -> list[LevelSource]:
        found: list[LevelSource] = []
        tasks, last = len(site.gates[-1]), len(site.experts) - 1
        for i, (experts, gates) in enumerate(zip(site.experts, site.gates, strict=True)):
            topology = Topology.ml_mmoe(tasks, len(experts), first=i == 0, last=i == last)
            ends = [[gate[0].mlp_net, gate[1], gate[2]] for gate in gates]
            found.append(
                LevelSource(topology, stacks(experts), ends, gate_input="raw" if i else "previous")
            )  # fmt: skip
        return found

    def trial(self, site: Any, draw: Callable[[int], Tensor]) -> tuple[Any, ...]:
        return (draw(site.experts[0][0].mlp_net[0].in_features),)

    def write(self, levels: list[PlainLevel]) -> nn.Module:
        gates = [[self._gate(gate) for gate in level.gates] for level in levels]
        return tree({"experts": self.experts(levels), "gates": gates})

    def _gate(self, gate: PlainStack) -> nn.Module:
        """It may have hidden layers."""
        (end,) = self.linear_gates([PlainStack(gate.path, gate.layers[-1:], gate.temperature, gate.top_k)])
        return nn.Sequential(self.mlp(gate.layers[:-1]), end, nn.Softmax(dim=-1))


def _of_model(model: nn.Module) -> Library:
    return LIBRARIES.get(type(core(model)).__name__, LIBRARIES["PLE"])


def _of_trunk(ple: nn.Module) -> Library:
    """The class that computes what a trunk does, by its first and last level; PLE where there is none."""
    levels = [level for level in getattr(ple, "levels", ()) if isinstance(level, ExtractionNetwork)]
    if not levels:
        return LIBRARIES["PLE"]
    first, last = levels[0].topology, levels[-1].topology
    if first == Topology.cross_stitch(first.num_mixtures):
        return LIBRARIES["CrossStitch"]
    if first.num_slots == 1 and not first.has_offsets:
        return LIBRARIES["MLMMoE"]
    if all(len(experts) == first.num_experts for experts in first.mixture_experts):
        return LIBRARIES["AdaTTSp" if last.num_slots == last.num_mixtures else "AdaTTWSharedExps"]
    return LIBRARIES["PLE"]


LIBRARIES: dict[str, Library] = {
    library.class_name: library
    for library in (
        PLEConverter(),
        AdaTTSpConverter(),
        AdaTTWSharedExpsConverter(),
        MLMMoEConverter(),
        CrossStitchConverter(),
    )
}
for library in LIBRARIES.values():
    register(library)

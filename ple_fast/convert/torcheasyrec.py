"""TorchEasyRec (tzrec): the extraction networks of its PLE, whose shared experts have a make of their own; its MMoE."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..modules import PLE, MMoE
from .converter import LevelSource, register
from .library import Library, PlainLevel, in_order, mixtures, ple_wiring, tree
from .mmoe import Classes, MMoELibrary
from .plain_layers import PlainLayer, PlainStack


def from_torcheasyrec(
    source: nn.Module | Mapping[str, Tensor], *, like: PLE | MMoE | None = None, prefix: str = ""
) -> PLE:
    """The fused trunk of a TorchEasyRec PLE or MMoE, with its weights and statistics.

    Args:
        source: a model with ``_extraction_nets`` (``tzrec.models.ple.PLE``), a ``tzrec.modules.mmoe.MMoE`` or a model
            that has one as ``mmoe``, or its state dict, which also needs ``like``.
        like: a trunk of the configuration of the state dict; it stays as it is.
        prefix: what stands before ``_extraction_nets`` or ``expert_mlps`` in the names of the state dict (``mmoe.`` in
            a model that has it so).

    Returns:
        ``(B, D)`` to ``(B, T, H)``: of an MMoE a trunk of one level, wired as ``ple_fast.MMoE``.

    Raises:
        TypeError, ValueError: it is something else, or of another configuration.
    """
    return LIBRARY.to_ours(source, like, prefix)


def to_torcheasyrec(ple: PLE | MMoE, target: nn.Module | None = None) -> nn.Module:
    """A trunk as TorchEasyRec has it.

    Args:
        ple: a trunk of ours: an MMoE, or else a PLE.
        target: a TorchEasyRec model of the same configuration, whose trunk gets the weights; default a tree of ordinary
            modules whose ``state_dict()`` is the trunk's part of TorchEasyRec's.

    Raises:
        TypeError: ``target`` is something else.
        ValueError: TorchEasyRec cannot represent the trunk, or ``target`` is of another configuration.
    """
    return LIBRARY.to_theirs(ple, target)


def _forward(
    self: Any, extraction_network_fea: Sequence[Tensor], shared_expert_fea: Tensor
) -> tuple[list[Tensor], Tensor | None]:
    (level,) = self.ple_fast.levels
    rows = mixtures(level, [*extraction_network_fea, shared_expert_fea])
    tasks = level.topology.num_slots - 1
    return rows[:tasks], rows[tasks] if len(rows) > tasks else None


class _TorchEasyRec(Library):
    """What the classes have in common: their MLPs."""

    library = "TorchEasyRec"

    def layers(self, mlp: Any) -> list[nn.Module]:
        """The layers of an ``MLP``."""
        if getattr(mlp, "return_hidden_layer_feature", False):
            raise ValueError("return_hidden_layer_feature: its MLPs return all their layers; only the last is fused")
        return [perceptron.perceptron for perceptron in mlp.mlp]

    def mlp(self, layers: Sequence[PlainLayer]) -> nn.Module:
        """An ``MLP``."""
        first = layers[0].spec
        for layer in layers:
            spec = layer.spec
            alike = (spec.norm, spec.activation, spec.bias) == (first.norm, first.activation, first.bias)
            if not alike or layer.norm_after or (spec.norm == "batch" and spec.bias):
                self.cannot(
                    "all layers of its experts, and all hidden ones of its gates, have the same activation, the same "
                    "norm before it, and a bias or not, which stands under a batch norm never"
                )
        return tree({"mlp": [tree({"perceptron": nn.Sequential(*in_order([layer]))}) for layer in layers]})


class ExtractionNetConverter(_TorchEasyRec):
    """``tzrec.modules.extraction_net.ExtractionNet``: one level."""

    class_name = "ExtractionNet"
    sites_in = "_extraction_nets"
    children = ("_shared_layers", "_shared_gate", "_task_layers", "_task_gates")
    methods = (("forward", _forward),)

    def recognises(self, module: nn.Module) -> bool:
        return all(hasattr(module, name) for name in ("_shared_layers", "_task_layers", "_task_gates"))

    def read(self, site: Any) -> list[LevelSource]:
        gates = [*site._task_gates]
        shared_gate = getattr(site, "_shared_gate", None)
        own, shared = [len(experts) for experts in site._task_layers], len(site._shared_layers)
        topology = ple_wiring(own, shared, shared_gate=shared_gate is not None)
        if shared_gate is not None:
            gates.append(shared_gate)
        experts = [self.layers(mlp) for mlps in [*site._task_layers, site._shared_layers] for mlp in mlps]
        return [LevelSource(topology, experts, gates)]

    def trial(self, site: Any, draw: Callable[[int], Tensor]) -> tuple[Any, ...]:
        width = site._task_gates[0].in_features
        return [draw(width) for _ in site._task_gates], draw(width)

    def write(self, levels: list[PlainLevel]) -> nn.Module:
        nets = []
        for level in levels:
            if len(set(level.counts)) > 1:
                self.cannot(f"every task has as many experts, got {level.counts}")
            own, shared = level.split([self.mlp(expert) for expert in level.experts])
            *ends, last = self.linear_gates(level.gates)
            nets.append(
                {"_shared_layers": shared, "_task_layers": own, "_task_gates": [*ends, last]}
                if level.is_last
                else {"_shared_layers": shared, "_shared_gate": last, "_task_layers": own, "_task_gates": ends}
            )
        return tree({"_extraction_nets": nets})


def _mmoe_forward(self: Any, input: Tensor) -> list[Tensor]:
    (level,) = self.ple_fast.levels
    return mixtures(level, input)


class MMoEConverter(_TorchEasyRec, MMoELibrary):
    """``tzrec.modules.mmoe.MMoE``, the mixtures of the models MMoE, DBMTL and DC2VR."""

    class_name = "MMoE"
    site_in = "mmoe"
    children = ("expert_mlps", "gate_mlps", "gate_finals")
    methods = (("forward", _mmoe_forward),)

    def recognises(self, module: nn.Module) -> bool:
        return all(hasattr(module, name) for name in ("expert_mlps", "gate_finals"))

    def read(self, site: Any) -> list[LevelSource]:
        ends = list(site.gate_finals)
        bodies = [self.layers(mlp) for mlp in getattr(site, "gate_mlps", ())] or [[]] * len(ends)
        gates = [[*body, end] for body, end in zip(bodies, ends, strict=True)]
        return self.level([self.layers(mlp) for mlp in site.expert_mlps], gates)

    def lists(self, experts: Sequence[Sequence[PlainLayer]], gates: Sequence[PlainStack]) -> dict[str, Any]:
        ends = self.gate_ends(gates)
        bodies = [self.mlp(gate.layers[:-1]) for gate in gates if len(gate.layers) > 1]
        made = {"expert_mlps": [self.mlp(expert) for expert in experts]}
        return {**made, **({"gate_mlps": bodies} if bodies else {}), "gate_finals": ends}


LIBRARY = Classes(ExtractionNetConverter(), MMoEConverter())
for library in LIBRARY.every:
    register(library)

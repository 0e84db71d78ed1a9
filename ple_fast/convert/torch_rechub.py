"""torch-rechub: the CGC layers of its PLE, and its MMOE, with batch norm in experts and gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import PLE, MMoE
from .converter import LevelSource, random_ids, register
from .library import Library, PlainLevel, mixtures, ple_wiring, tree
from .mmoe import Classes, MMoELibrary
from .plain_layers import PlainLayer, PlainStack

ACTIVATIONS = ("relu", "sigmoid", "prelu", "leaky_relu", "row_dice")


def from_torch_rechub(
    source: nn.Module | Mapping[str, Tensor], *, like: PLE | MMoE | None = None, prefix: str = ""
) -> PLE:
    """The fused trunk of a torch-rechub PLE or MMOE, with its weights and statistics.

    Args:
        source: ``PLE`` or ``MMOE`` of ``torch_rechub.models.multi_task``, or its state dict, which also needs ``like``.
        like: a trunk of the configuration of the state dict; it stays as it is.
        prefix: what stands before ``cgc_layers`` or ``experts`` in the names of the state dict.

    Returns:
        ``(B, D)`` to ``(B, T, H)``: of an MMOE a trunk of one level, wired as ``ple_fast.MMoE``.

    Raises:
        TypeError, ValueError: it is something else, or of another configuration.
    """
    return LIBRARY.to_ours(source, like, prefix)


def to_torch_rechub(ple: PLE | MMoE, target: nn.Module | None = None) -> nn.Module:
    """A trunk as torch-rechub has it.

    Args:
        ple: a trunk of ours: an MMoE, or else a PLE.
        target: a torch-rechub model of the same configuration, whose trunk gets the weights; default a tree of ordinary
            modules whose ``state_dict()`` is the trunk's part of torch-rechub's.

    Raises:
        TypeError: ``target`` is something else.
        ValueError: torch-rechub cannot represent the trunk, or ``target`` is of another configuration.
    """
    return LIBRARY.to_theirs(ple, target)


def _forward(self: Any, x_list: Sequence[Tensor]) -> list[Tensor]:
    (level,) = self.ple_fast.levels
    return mixtures(level, list(x_list))


class _TorchRechub(Library):
    """What the classes have in common: their MLPs and gates."""

    library = "torch-rechub"

    def mlp(self, layers: Sequence[PlainLayer]) -> nn.Module:
        """An expert."""
        modules: list[nn.Module] = []
        for layer in layers:
            if not isinstance(layer.norm, nn.BatchNorm1d) or layer.norm_after or layer.linear.bias is None:
                self.cannot("its experts and gates have a bias and a batch norm before every activation")
            name = layer.spec.activation.name
            if name not in ACTIVATIONS:
                self.cannot(f"the activation {name} is none of {', '.join(ACTIVATIONS)}")
            assert layer.activation is not None
            modules += [layer.linear, layer.norm, layer.activation, layer.dropout or nn.Dropout(0)]
        return tree({"mlp": nn.Sequential(*modules)})

    def gate(self, gate: PlainStack) -> nn.Module:
        """A gate."""
        last = gate.layers[-1] if gate.layers else None
        if last is None or len(gate.layers) > 1 or last.norm is None or not gate.ends_plainly:
            self.cannot("its gates are one linear layer with a batch norm on the logits")
        return tree({"mlp": nn.Sequential(last.linear, last.norm, nn.Softmax(dim=1), nn.Dropout(0))})


class CGCConverter(_TorchRechub):
    """``torch_rechub.models.multi_task.ple.CGC``: one level."""

    class_name = "CGC"
    sites_in = "cgc_layers"
    children = ("experts_specific", "experts_shared", "gates_specific", "gate_shared")
    methods = (("forward", _forward),)

    def recognises(self, module: nn.Module) -> bool:
        return all(hasattr(module, name) for name in ("experts_specific", "experts_shared", "gates_specific"))

    def read(self, site: Any) -> list[LevelSource]:
        gates = [gate.mlp for gate in site.gates_specific]
        has_shared = hasattr(site, "gate_shared")
        tasks, shared = len(gates), len(site.experts_shared)
        if has_shared:
            gates.append(site.gate_shared.mlp)
        own = [len(site.experts_specific) // tasks] * tasks
        topology = ple_wiring(own, shared, shared_gate=has_shared)
        experts = [expert.mlp for expert in [*site.experts_specific, *site.experts_shared]]
        return [LevelSource(topology, experts, gates)]

    def trial(self, site: Any, draw: Callable[[int], Tensor]) -> tuple[Any, ...]:
        first = next(module for module in site.gates_specific.modules() if isinstance(module, nn.Linear))
        return ([draw(first.in_features) for _ in range(len(site.gates_specific) + 1)],)

    def write(self, levels: list[PlainLevel]) -> nn.Module:
        makes = {
            tuple((x.spec.units, x.spec.activation, x.spec.dropout) for x in expert)
            for level in levels
            for expert in level.experts
        }
        if len(makes) > 1:
            self.cannot("all its experts have the same widths, activation and dropout, at every level")
        layers = []
        for level in levels:
            specific = sum(level.counts)
            ends, experts = [self.gate(gate) for gate in level.gates], [self.mlp(expert) for expert in level.experts]
            content: dict[str, Any] = {"experts_specific": experts[:specific], "experts_shared": experts[specific:]}
            content["gates_specific"] = ends[: len(level.counts)]
            if not level.is_last:
                content["gate_shared"] = ends[-1]
            layers.append(content)
        return tree({"cgc_layers": layers})


def _mmoe_forward(self: Any, x: Mapping[str, Tensor]) -> Tensor:
    (level,) = self.ple_fast.levels
    rows = mixtures(level, self.embedding(x, self.features, squeeze_dim=True))
    ends = zip(rows, self.towers, self.predict_layers, strict=True)
    return torch.cat([predict(tower(row)) for row, tower, predict in ends], dim=1)


class MMOEConverter(_TorchRechub, MMoELibrary):
    """``torch_rechub.models.multi_task.MMOE``: a whole model."""

    class_name = "MMOE"
    children = ("experts", "gates")
    methods = (("forward", _mmoe_forward),)

    def recognises(self, module: nn.Module) -> bool:
        rest = () if type(module) is nn.Module else ("features", "embedding", "towers", "predict_layers")  # of a tree
        return all(hasattr(module, name) for name in ("experts", "gates", *rest))

    def read(self, site: Any) -> list[LevelSource]:
        return self.level([expert.mlp for expert in site.experts], [gate.mlp for gate in site.gates])

    def lists(self, experts: Sequence[Sequence[PlainLayer]], gates: Sequence[PlainStack]) -> dict[str, Any]:
        return {"experts": [self.mlp(expert) for expert in experts], "gates": [self.gate(gate) for gate in gates]}

    def trial(self, site: Any, draw: Callable[[int], Tensor]) -> tuple[Any, ...]:
        inputs = {}
        for feature in site.features:
            if hasattr(feature, "pooling"):
                inputs[feature.name] = random_ids(draw, 3, feature.vocab_size)
            elif hasattr(feature, "vocab_size"):
                inputs[feature.name] = random_ids(draw, 1, feature.vocab_size).squeeze(1)
            else:
                inputs[feature.name] = draw(feature.embed_dim)
        return (inputs,)

    def probes(self, site: Any) -> Sequence[nn.Module]:
        return list(site.towers)


LIBRARY = Classes(CGCConverter(), MMOEConverter())
for library in LIBRARY.every:
    register(library)

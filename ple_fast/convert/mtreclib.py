"""MTReclib (Multitask-Recommendation-Library): what lies inside its PLE, MMoE and OMoE, as of its commit 8c6529c."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import PLE, MMoE
from .converter import LevelSource, register
from .library import Library, PlainLevel, in_order, mixtures, ple_wiring, tree, zeroed
from .mmoe import Classes, MMoELibrary
from .plain_layers import PlainLayer, PlainStack, kind


def from_mtreclib(source: nn.Module | Mapping[str, Tensor], *, like: PLE | MMoE | None = None, prefix: str = "") -> PLE:
    """The fused trunk of an MTReclib PLE, MMoE or OMoE, with its weights and statistics, but for what it never reads.

    Args:
        source: ``models.ple.PLEModel``, ``models.mmoe.MMoEModel`` or ``models.omoe.OMoEModel``, or its state dict,
            which also needs ``like``. The shared gate of PLE's last level is never read, and left out.
        like: a trunk of the configuration of the state dict; it stays as it is.
        prefix: what stands before ``task_experts`` or ``expert`` in the names of the state dict.

    Returns:
        ``(B, D)`` to ``(B, T, H)``: of an MMoE a trunk of one level, wired as ``ple_fast.MMoE``; of an OMoE such a
        trunk ``(B, 1, H)``, whose only mixture is that of all tasks.

    Raises:
        TypeError, ValueError: it is something else, or of another configuration.
    """
    return LIBRARY.to_ours(source, like, prefix)


def to_mtreclib(ple: PLE | MMoE, target: nn.Module | None = None) -> nn.Module:
    """A trunk as MTReclib has it.

    Args:
        ple: a trunk of ours: an MMoE, or else a PLE.
        target: an MTReclib model of the same configuration, whose trunk gets the weights; the shared gate of the last
            level of a PLE stays. Default a tree of ordinary modules whose ``state_dict()`` is the trunk's part of
            MTReclib's, with zeros in that gate; that of a trunk of one mixture is an ``MMoEModel`` of one task.

    Raises:
        TypeError: ``target`` is something else.
        ValueError: MTReclib cannot represent the trunk, or ``target`` is of another configuration.
    """
    return LIBRARY.to_theirs(ple, target)


def _read(self: Any, categorical_x: Tensor, numerical_x: Tensor) -> Tensor:
    fields = [self.embedding(categorical_x), self.numerical_layer(numerical_x).unsqueeze(1)]
    return torch.cat(fields, 1).view(-1, self.embed_output_dim)


def _ends(self: Any, rows: Sequence[Tensor]) -> list[Tensor]:
    return [torch.sigmoid(tower(y).squeeze(1)) for tower, y in zip(self.tower, rows, strict=True)]


def _forward(self: Any, categorical_x: Tensor, numerical_x: Tensor) -> list[Tensor]:
    x = _read(self, categorical_x, numerical_x)
    *others, last = self.ple_fast.levels
    for level in others:
        x = level(x)
    return _ends(self, mixtures(last, x))


def _one_gate_forward(self: Any, categorical_x: Tensor, numerical_x: Tensor) -> list[Tensor]:
    (level,) = self.ple_fast.levels
    return _ends(self, mixtures(level, _read(self, categorical_x, numerical_x)) * len(self.tower))


class _MTReclib(Library):
    """What the models have in common: one table of embeddings, a numerical layer, MLPs and towers."""

    library = "MTReclib"
    methods = (("forward", _forward),)

    def probes(self, site: Any) -> Sequence[nn.Module]:
        return list(site.tower)

    def trial(self, site: Any, draw: Callable[[int], Tensor]) -> tuple[Any, ...]:
        numerical = draw(site.numerical_layer.in_features)
        table = site.embedding.embedding
        starts = [*map(int, site.embedding.offsets), table.num_embeddings]
        device = numerical.device
        sizes = torch.tensor([stop - start for start, stop in pairwise(starts)], device=device, dtype=torch.int64)
        return torch.arange(len(numerical), device=device).unsqueeze(1) % sizes, numerical

    def mlp(self, layers: Sequence[PlainLayer]) -> nn.Module:
        """An expert."""
        for layer in layers:
            spec = layer.spec
            if not spec.bias or spec.norm != "batch" or layer.norm_after:
                self.cannot("every layer of its experts is linear with a bias, a batch norm and a ReLU")
            if spec.activation.name != "relu":
                self.cannot(f"the activation of its experts is relu, got {spec.activation.name}")
        return tree({"mlp": nn.Sequential(*in_order(layers, always_dropout=True))})


class PLEModelConverter(_MTReclib):
    """``models.ple.PLEModel``: a whole model."""

    class_name = "PLEModel"
    children = ("task_experts", "task_gates", "share_experts", "share_gates")

    def recognises(self, module: nn.Module) -> bool:
        return all(hasattr(module, name) for name in self.children)

    def read(self, site: Any) -> list[LevelSource]:
        plain = [name for name in self.children if not isinstance(getattr(site, name), nn.ModuleList)]
        if plain:
            raise ValueError(
                f"{plain[0]}: expected a ModuleList, got {kind(getattr(site, plain[0]))}: before its commit 8c6529c "
                "MTReclib kept such lists to itself, so that nothing in them was trained or saved"
            )
        levels = len(site.task_experts)
        found = []
        for i in range(levels):
            is_last = i == levels - 1
            own, shared = [len(experts) for experts in site.task_experts[i]], len(site.share_experts[i])
            experts = [one.mlp for group in [*site.task_experts[i], site.share_experts[i]] for one in group]
            found.append(
                LevelSource(
                    ple_wiring(own, shared, shared_gate=not is_last),
                    experts,
                    [*site.task_gates[i], *(() if is_last else (site.share_gates[i],))],
                    unread=[site.share_gates[i]] if is_last else [],
                )
            )
        return found

    def write(self, levels: list[PlainLevel]) -> nn.Module:
        lists: dict[str, list[Any]] = {name: [] for name in self.children}
        for level in levels:
            if len(set(level.counts)) > 1:
                self.cannot(f"every task has as many experts, got {level.counts}")
            if any(len(expert) > 1 for expert in level.experts):
                self.cannot("the experts of its PLE are one layer")
            own, shared = level.split([self.mlp(expert) for expert in level.experts])
            ends = self.linear_gates(level.gates)
            if level.is_last:  # it has a shared gate there, too, which nothing reads
                like: dict[str, Any] = {"device": ends[0].weight.device, "dtype": ends[0].weight.dtype}
                ends.append(zeroed(nn.Linear(ends[0].in_features, len(level.experts), **like)))
            *gates, last = map(_gate, ends)
            for name, made in zip(self.children, (own, gates, shared, last), strict=True):
                lists[name].append(made)
        return tree(lists)


class MMoEModelConverter(_MTReclib, MMoELibrary):
    """``models.mmoe.MMoEModel``: a whole model."""

    class_name = "MMoEModel"
    children = ("expert", "gate")

    def recognises(self, module: nn.Module) -> bool:
        return hasattr(module, "expert") and isinstance(getattr(module, "gate", None), nn.ModuleList)

    def read(self, site: Any) -> list[LevelSource]:
        return self.level([expert.mlp for expert in site.expert], list(site.gate))

    def lists(self, experts: Sequence[Sequence[PlainLayer]], gates: Sequence[PlainStack]) -> dict[str, Any]:
        ends = self.linear_gates(gates)
        return {"expert": [self.mlp(expert) for expert in experts], "gate": [_gate(end) for end in ends]}


class OMoEModelConverter(MMoEModelConverter):
    """``models.omoe.OMoEModel``: a whole model, whose towers all read the mixture of the one gate."""

    class_name = "OMoEModel"
    methods = (("forward", _one_gate_forward),)

    def recognises(self, module: nn.Module) -> bool:
        return hasattr(module, "expert") and isinstance(getattr(module, "gate", None), nn.Sequential)

    def read(self, site: Any) -> list[LevelSource]:
        return self.level([expert.mlp for expert in site.expert], [site.gate])

    def wired(self, ple: Any) -> bool:
        return super().wired(ple) and len(ple.levels[0].topology.mixture_slot) == 1

    def lists(self, experts: Sequence[Sequence[PlainLayer]], gates: Sequence[PlainStack]) -> dict[str, Any]:
        made = super().lists(experts, gates)
        return {"expert": made["expert"], "gate": made["gate"][0]}


def _gate(end: nn.Linear) -> nn.Module:
    return nn.Sequential(end, nn.Softmax(dim=1))


LIBRARY = Classes(PLEModelConverter(), MMoEModelConverter(), OMoEModelConverter())
for library in LIBRARY.every:
    register(library)

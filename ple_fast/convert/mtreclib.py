"""MTReclib (Multitask-Recommendation-Library): the levels inside its PLE, a whole model; as of its commit 8c6529c."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import PLE
from .converter import LevelSource, register
from .library import Library, PlainLevel, in_order, mixtures, ple_wiring, tree, zeroed
from .plain_layers import PlainLayer, kind


def from_mtreclib(source: nn.Module | Mapping[str, Tensor], *, like: PLE | None = None, prefix: str = "") -> PLE:
    """The fused trunk of an MTReclib PLE, with its weights and statistics, but for what it never reads.

    Args:
        source: ``models.ple.PLEModel``, or its state dict, which also needs ``like``. The shared gate of the last level
            is never read, and left out.
        like: a trunk of the configuration of the state dict; it stays as it is.
        prefix: what stands before ``task_experts`` in the names of the state dict.

    Raises:
        TypeError, ValueError: it is something else, or of another configuration.
    """
    return LIBRARY.to_ours(source, like, prefix)


def to_mtreclib(ple: PLE, target: nn.Module | None = None) -> nn.Module:
    """A trunk as MTReclib has it.

    Args:
        ple: a trunk of ours.
        target: an MTReclib PLE of the same configuration, whose trunk gets the weights; the shared gate of its last
            level stays. Default a tree of ordinary modules whose ``state_dict()`` is the trunk's part of MTReclib's,
            with zeros in that gate.

    Raises:
        ValueError: MTReclib cannot represent the trunk, or ``target`` is of another configuration.
    """
    return LIBRARY.to_theirs(ple, target)


def _forward(self: Any, categorical_x: Tensor, numerical_x: Tensor) -> list[Tensor]:
    fields = [self.embedding(categorical_x), self.numerical_layer(numerical_x).unsqueeze(1)]
    x = torch.cat(fields, 1).view(-1, self.embed_output_dim)
    *others, last = self.ple_fast.levels
    for level in others:
        x = level(x)
    return [torch.sigmoid(tower(y).squeeze(1)) for tower, y in zip(self.tower, mixtures(last, x), strict=True)]


class PLEModelConverter(Library):
    """``models.ple.PLEModel``: a whole model."""

    library = "MTReclib"
    class_name = "PLEModel"
    children = ("task_experts", "task_gates", "share_experts", "share_gates")
    methods = (("forward", _forward),)

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

    def probes(self, site: Any) -> Sequence[nn.Module]:
        return list(site.tower)

    def trial(self, site: Any, draw: Callable[[int], Tensor]) -> tuple[Any, ...]:
        numerical = draw(site.numerical_layer.in_features)
        table = site.embedding.embedding
        starts = [*map(int, site.embedding.offsets), table.num_embeddings]
        device = numerical.device
        sizes = torch.tensor([stop - start for start, stop in pairwise(starts)], device=device, dtype=torch.int64)
        return torch.arange(len(numerical), device=device).unsqueeze(1) % sizes, numerical

    def write(self, levels: list[PlainLevel]) -> nn.Module:
        lists: dict[str, list[Any]] = {name: [] for name in self.children}
        for level in levels:
            if len(set(level.counts)) > 1:
                self.cannot(f"every task has as many experts, got {level.counts}")
            own, shared = level.split([self._mlp(expert) for expert in level.experts])
            ends = self.linear_gates(level.gates)
            if level.is_last:  # it has a shared gate there, too, which nothing reads
                like: dict[str, Any] = {"device": ends[0].weight.device, "dtype": ends[0].weight.dtype}
                ends.append(zeroed(nn.Linear(ends[0].in_features, len(level.experts), **like)))
            *gates, last = [nn.Sequential(end, nn.Softmax(dim=1)) for end in ends]
            for name, made in zip(self.children, (own, gates, shared, last), strict=True):
                lists[name].append(made)
        return tree(lists)

    def _mlp(self, layers: Sequence[PlainLayer]) -> nn.Module:
        layer, spec = layers[0], layers[0].spec
        if len(layers) > 1 or not spec.bias or spec.norm != "batch" or layer.norm_after:
            self.cannot("its experts are one linear layer with a bias, a batch norm and a ReLU")
        if spec.activation.name != "relu":
            self.cannot(f"the activation of its experts is relu, got {spec.activation.name}")
        return tree({"mlp": nn.Sequential(*in_order(layers, always_dropout=True))})


LIBRARY = PLEModelConverter()
register(LIBRARY)

"""What the classes of AdaTT's library have in common: lists of experts per level, which are linear layers and ReLU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.plain import WeightOffset
from .library import Library, PlainLevel, in_order, tree
from .plain_layers import PlainLayer


class AdaTTLibrary(Library):
    """A class with ``experts`` and gates, per level."""

    library = "AdaTT"
    gates = "gate_weights"
    attributes: tuple[str, ...] = ()
    """What ``read`` needs to know beside the modules."""

    def recognises(self, module: nn.Module) -> bool:
        return all(hasattr(module, name) for name in ("experts", self.gates, *self.attributes))

    def slots(self, site: Any) -> int:
        """Rows of its input, per sample."""
        return int(site.num_tasks)

    def trial(self, site: Any, draw: Callable[[int], Tensor]) -> tuple[Any, ...]:
        width = site.experts[0][0].mlp_net[0].in_features
        return (torch.stack([draw(width) for _ in range(self.slots(site))], 1),)

    def sites(self, model: nn.Module) -> Sequence[nn.Module]:
        return [core(model)]

    def lists(self, levels: list[PlainLevel]) -> dict[str, list[Any]]:
        """Experts and single-layer gates."""
        experts = self.experts(levels)
        gates = [[nn.Sequential(end, nn.Softmax(-1)) for end in self.linear_gates(level.gates)] for level in levels]
        return {"experts": experts, "gate_weights": gates}

    def experts(self, levels: list[PlainLevel]) -> list[list[nn.Module]]:
        """Of every level."""
        return [[self.mlp(expert) for expert in level.experts] for level in levels]

    def mlp(self, layers: Sequence[PlainLayer]) -> nn.Module:
        """An expert, or the hidden layers of a gate."""
        for layer in layers:
            spec = layer.spec
            if spec.norm is not None or spec.activation.name != "relu" or spec.dropout:
                self.cannot("its layers are linear and a ReLU, without norm and dropout")
        return tree({"mlp_net": nn.Sequential(*in_order(layers))})

    def written_counts(self, levels: list[PlainLevel]) -> list[int]:
        """Experts per slot, the same at every level."""
        counts = [
            tuple(level.level.topology.expert_slot.count(s) for s in range(level.level.topology.num_slots or 0))
            for level in levels
        ]
        if len(set(counts)) > 1:
            self.cannot(f"all its levels have the same numbers of experts, got {counts}")
        return list(counts[0])


def stacks(experts: Sequence[Any]) -> list[nn.Module]:
    """The layers of experts."""
    return [expert.mlp_net for expert in experts]


def offset(columns: Sequence[bool], scalars: Tensor, trained: bool) -> WeightOffset:
    """A copy of learned scalars."""
    copied = WeightOffset(columns, device=scalars.device, dtype=scalars.dtype)
    copied.weight = nn.Parameter(scalars.detach().clone(), requires_grad=trained)
    return copied


def made(content: dict[str, Any], **attributes: Any) -> nn.Module:
    """A tree with attributes, which ``read`` looks at."""
    root = tree(content)
    vars(root).update(attributes)
    return root


def core(model: nn.Module) -> nn.Module:
    """What a ``CentralTaskArch`` has its trunk in."""
    found = getattr(model, "mtl_arch", model)
    return found if isinstance(found, nn.Module) else model

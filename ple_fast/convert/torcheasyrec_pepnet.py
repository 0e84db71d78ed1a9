"""TorchEasyRec's PEPNet: the gate of its embeddings, and its towers with a gate behind each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..functional import scaled
from ..topology import Topology
from .converter import Converter, LevelSource, register
from .library import separate


def _gate(gate: Any) -> list[nn.Module]:
    """The layers of a ``GateNU``."""
    layers = list(gate.dense_layers)
    kinds = [type(layer) for layer in layers]
    if kinds != [nn.Linear, nn.ReLU, nn.Linear, nn.Sigmoid]:
        names = ", ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"gate: expected the layers of a GateNU, Linear, ReLU, Linear, Sigmoid, got {names}")
    return layers


def _alone(tasks: int, slots: Sequence[int]) -> Topology:
    """An expert for each task, whose output the task gets; ``slots``: what each reads."""
    own = tuple((t,) for t in range(tasks))
    kinds: tuple[Literal["static"], ...] = tuple("static" for _ in own)
    return Topology(tuple(slots), tuple(slots), own, mixture_kind=kinds)


def _ep_forward(self: Any, main_emb: Tensor, domain_emb: Tensor) -> Tensor:
    (level,) = self.ple_fast.levels
    sigmoid = level(torch.cat([domain_emb, main_emb.detach()], dim=-1))
    return scaled(main_emb, sigmoid, factor=self.ple_fast.settings).squeeze(1)


def _ep_width(self: Any) -> int:
    (level,) = self.ple_fast.levels
    width: int = level.out_features
    return width


class EPNetConverter(Converter):
    """``tzrec.modules.personalized_net.EPNet``: twice a sigmoid of domain and features, times the features."""

    library, class_name = "TorchEasyRec", "EPNet"
    children = ("gate_nu",)
    methods = (("forward", _ep_forward), ("output_dim", _ep_width))

    def recognises(self, module: nn.Module) -> bool:
        return hasattr(getattr(module, "gate_nu", None), "dense_layers")

    def read(self, site: Any) -> list[LevelSource]:
        return [LevelSource(Topology.single_task(1), [_gate(site.gate_nu)], [None])]

    def settings(self, site: Any) -> float:
        return float(site.gate_nu._gamma)

    def trial(self, site: Any, draw: Callable[[int], Tensor]) -> tuple[Any, ...]:
        width = site.gate_nu.dense_layers[2].out_features
        return draw(width), draw(site.gate_nu.dense_layers[0].in_features - width)


def _pp_forward(self: Any, main_emb: Tensor, uia_emb: Tensor) -> list[Tensor]:
    levels = list(self.ple_fast.levels)
    prior, x = torch.cat([uia_emb, main_emb.detach()], dim=-1), main_emb
    for place in range(0, len(levels), 2):
        x = scaled(levels[place](x), levels[place + 1](prior), factor=self.ple_fast.settings)
    return separate(levels[-2], x)


class PPNetConverter(Converter):
    """``tzrec.modules.personalized_net.PPNet``: each layer of all tasks is a level, and so are its gates.

    Dropout behind the scaling is dropout before it: both are factors.
    """

    library, class_name = "TorchEasyRec", "PPNet"
    children = ("linears", "activations", "dropout_ratios", "gate_nus")
    methods = (("forward", _pp_forward),)

    def recognises(self, module: nn.Module) -> bool:
        return all(hasattr(module, name) for name in (*self.children, "num_task", "len_hidden"))

    def read(self, site: Any) -> list[LevelSource]:
        tasks, layers = site.num_task, site.len_hidden
        if not layers or len({float(gate._gamma) for gate in site.gate_nus}) != 1:
            raise ValueError("gate_nus: expected hidden layers, and one gamma for all gates")
        found = []
        for layer in range(layers):
            places = [task * layers + layer for task in range(tasks)]
            towers = [[site.linears[i], site.activations[i], site.dropout_ratios[i]] for i in places]
            gates = [_gate(site.gate_nus[i]) for i in places]
            found.append(LevelSource(_alone(tasks, range(tasks)), towers, [None] * tasks))
            found.append(LevelSource(Topology.single_task(tasks), gates, [None] * tasks))
        return found

    def settings(self, site: Any) -> float:
        return float(site.gate_nus[0]._gamma)

    def trial(self, site: Any, draw: Callable[[int], Tensor]) -> tuple[Any, ...]:
        width = site.linears[0].in_features
        return draw(width), draw(site.gate_nus[0].dense_layers[0].in_features - width)


for converter in (EPNetConverter(), PPNetConverter()):
    register(converter)

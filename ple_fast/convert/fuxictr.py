"""FuxiCTR: the CGC layers of its PLE, whose shared gate weighs shared experts only, and the layer of its MMoE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..modules import PLE, MMoE
from .converter import LevelSource, register
from .library import Library, PlainLevel, in_order, make_up, mixtures, ple_wiring, separate, tree, zeroed
from .mmoe import Classes, MMoELibrary
from .plain_layers import PlainLayer, PlainStack


def from_fuxictr(source: nn.Module | Mapping[str, Tensor], *, like: PLE | MMoE | None = None, prefix: str = "") -> PLE:
    """The fused trunk of a FuxiCTR PLE or MMoE, with its weights and statistics, but for what it never reads.

    Args:
        source: ``PLE`` or ``MMoE`` of FuxiCTR's ``model_zoo/multitask``, an ``MMoE_Layer``, or its state dict, which
            also needs ``like``. The last of PLE's ``cgc_layers`` (a ``CGC_Layer`` given alone, too) has a shared
            mixture that no tower reads: it is left out.
        like: a trunk of the configuration of the state dict; it stays as it is.
        prefix: what stands before ``cgc_layers`` or ``experts`` in the names of the state dict (``mmoe_layer.`` in an
            ``MMoE``).

    Returns:
        ``(B, D)`` to ``(B, T, H)``: of an MMoE a trunk of one level, wired as ``ple_fast.MMoE``.

    Raises:
        TypeError, ValueError: it is something else, or of another configuration.
    """
    return LIBRARY.to_ours(source, like, prefix)


def to_fuxictr(ple: PLE | MMoE, target: nn.Module | None = None) -> nn.Module:
    """A trunk as FuxiCTR has it.

    Args:
        ple: a trunk of ours: an MMoE, or else a PLE.
        target: a FuxiCTR model of the same configuration, whose trunk gets the weights; the shared gate of the last
            level of a PLE stays. Default a tree of ordinary modules whose ``state_dict()`` is the trunk's part of
            FuxiCTR's, with zeros in that gate.

    Raises:
        TypeError: ``target`` is something else.
        ValueError: FuxiCTR cannot represent the trunk, or ``target`` is of another configuration.
    """
    return LIBRARY.to_theirs(ple, target)


def _forward(self: Any, x: Sequence[Tensor], require_gate: bool = False) -> Any:
    (level,) = self.ple_fast.levels
    if not require_gate:
        return mixtures(level, list(x))
    y, weights = level(list(x), return_gates=True)
    return separate(level, y), [weight.mean(0).to(y.dtype) for weight in weights]


class _FuxiCTR(Library):
    """What the classes have in common: how their blocks are made."""

    library = "FuxiCTR"

    def check_alike(self, experts: Sequence[Sequence[PlainLayer]], gates: Sequence[PlainStack]) -> None:
        """All levels are made alike in this library.

        Raises:
            ValueError: they are not, or are made in a way that it does not have.
        """
        self.gate_ends(gates)
        made, hidden = {make_up(expert) for expert in experts}, {make_up(gate.layers[:-1]) for gate in gates}
        if max(len(hidden), len(made)) > 1:
            self.cannot("all its experts are made alike, and so are all its gates, at every level")
        specs = [*made.pop(), *hidden.pop()]
        if len({spec.norm for spec in specs}) > 1 or specs[0].norm not in (None, "batch"):
            self.cannot("all layers of its experts and gates have a batch norm, or none has a norm")
        if any((spec.norm and spec.norm_position == "after") or not spec.bias for spec in specs):
            self.cannot("its layers have a bias, and their batch norm before the activation")


class CGCLayerConverter(_FuxiCTR):
    """``CGC_Layer`` of ``model_zoo/multitask/PLE``: one level. It does not know whether it is the last one."""

    class_name = "CGC_Layer"
    sites_in = "cgc_layers"
    children = ("shared_experts", "specific_experts", "gate")
    methods = (("forward", _forward),)

    def recognises(self, module: nn.Module) -> bool:
        return all(hasattr(module, name) for name in self.children)

    def read(self, site: Any) -> list[LevelSource]:
        own, shared = [len(experts) for experts in site.specific_experts], len(site.shared_experts)
        if not shared:
            raise ValueError("expected shared experts, got num_shared_experts=0: FuxiCTR's own forward fails then")
        topology = ple_wiring(own, shared, shared_gate=True, shared_gate_scope="shared")
        experts = [block.mlp for blocks in [*site.specific_experts, site.shared_experts] for block in blocks]
        return [LevelSource(topology, experts, [block.mlp for block in site.gate])]

    def trial(self, site: Any, draw: Callable[[int], Tensor]) -> tuple[Any, ...]:
        width = next(module for module in site.gate.modules() if isinstance(module, nn.Linear)).in_features
        return [draw(width) for _ in site.gate], True

    def sources(self, model: nn.Module) -> list[LevelSource]:
        """The levels; the last one without its shared mixture, which no tower reads."""
        *others, last = super().sources(model)
        *gates, unread = last.gates
        topology = replace(
            last.topology,
            mixture_slot=last.topology.mixture_slot[:-1],
            mixture_experts=last.topology.mixture_experts[:-1],
            mixture_kind=None,
            mixture_offset=None,
        )
        return [*others, LevelSource(topology, last.experts, gates, unread=[unread])]

    def write(self, levels: list[PlainLevel]) -> nn.Module:
        self.check_alike([x for level in levels for x in level.experts], [x for level in levels for x in level.gates])
        layers = []
        for level in levels:
            shared_count = len(level.experts) - sum(level.counts)
            if len(set(level.counts)) > 1 or not shared_count:
                self.cannot(
                    f"every task has as many experts, and some are shared; got {level.counts} and {shared_count}"
                )
            own, shared = level.split([_block(in_order(expert)) for expert in level.experts])
            ends = [_block(in_order(gate.layers)) for gate in level.gates]
            if level.is_last:  # it has a shared gate there, too, which nothing reads
                *body, end = in_order(level.gates[0].layers)
                assert isinstance(end, nn.Linear)
                like: dict[str, Any] = {"device": end.weight.device, "dtype": end.weight.dtype}
                ends.append(zeroed(_block([*body, nn.Linear(end.in_features, shared_count, **like)])))
            layers.append({"shared_experts": shared, "specific_experts": own, "gate": ends})
        return tree({"cgc_layers": layers})


def _mmoe_forward(self: Any, x: Tensor) -> list[Tensor]:
    (level,) = self.ple_fast.levels
    return mixtures(level, x)


class MMoELayerConverter(_FuxiCTR, MMoELibrary):
    """``MMoE_Layer`` of ``model_zoo/multitask/MMoE``."""

    class_name = "MMoE_Layer"
    site_in = "mmoe_layer"
    children = ("experts", "gate")
    methods = (("forward", _mmoe_forward),)

    def recognises(self, module: nn.Module) -> bool:
        return all(hasattr(module, name) for name in self.children)

    def read(self, site: Any) -> list[LevelSource]:
        return self.level([block.mlp for block in site.experts], [block.mlp for block in site.gate])

    def lists(self, experts: Sequence[Sequence[PlainLayer]], gates: Sequence[PlainStack]) -> dict[str, Any]:
        self.check_alike(experts, gates)
        stacks = {"experts": experts, "gate": [gate.layers for gate in gates]}
        return {name: [_block(in_order(layers)) for layers in stack] for name, stack in stacks.items()}


def _block(modules: Iterable[nn.Module]) -> nn.Module:
    return tree({"mlp": nn.Sequential(*modules)})


LIBRARY = Classes(CGCLayerConverter(), MMoELayerConverter())
for library in LIBRARY.every:
    register(library)

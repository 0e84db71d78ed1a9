"""Between our trunks and the modules and checkpoints of a library: what ``from_X`` and ``to_X`` have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ..modules import PLE, ExtractionNetwork
from .converter import Converter, LevelSource
from .plain_layers import PlainLayer, PlainStack, kind, parse


class PlainLevel(NamedTuple):
    """A level as ordinary layers: copies of its weights and buffers."""

    level: ExtractionNetwork
    experts: list[list[PlainLayer]]
    gates: list[PlainStack]
    """Of a static mixture: without layers."""

    @classmethod
    def of(cls, level: ExtractionNetwork) -> PlainLevel:
        """The layers of a level."""
        experts, gates = level.unpack()
        return cls(
            level,
            [parse(f"experts[{e}]", stack).layers for e, stack in enumerate(experts)],
            [
                PlainStack(f"gates[{o}]") if stack is None else parse(f"gates[{o}]", stack, gate=True)
                for o, stack in enumerate(gates)
            ],
        )


class Library:
    """The way between ``PLE`` and one library.

    Args:
        converter: reads the library's sites.
        sites: the sites of a model of the library, or of a tree with its names, first level first.
        write: a tree of modules with the library's names, out of levels; a level that the library cannot represent is
            a ``ValueError`` that says why. Tensors that the library never reads are 0.
    """

    def __init__(
        self,
        converter: Converter,
        sites: Callable[[nn.Module], Sequence[nn.Module]],
        write: Callable[[list[PlainLevel]], nn.Module],
    ) -> None:
        self.converter, self.sites, self.write = converter, sites, write

    def sources(self, module: nn.Module) -> list[LevelSource]:
        """The levels of a model or tree."""
        sites = self.sites(module)
        for site in sites:
            if not self.converter.recognises(site):
                raise TypeError(
                    f"expected a model of {self.converter.library} with levels like {self.converter.class_name}, got "
                    f"{kind(module)}"
                )
        return [source for site in sites for source in self.converter.read(site)]

    def to_ours(self, module: nn.Module) -> PLE:
        """``from_X`` of a module."""
        if not isinstance(module, nn.Module):
            raise TypeError(f"expected a model of {self.converter.library}, got {kind(module)}")
        return PLE.from_levels([source.pack().level for source in self.sources(module)])

    @torch.inference_mode(False)
    def from_model_or_checkpoint(self, source: nn.Module | Mapping[str, Tensor], like: PLE | None, prefix: str) -> PLE:
        """``from_X``."""
        if isinstance(source, nn.Module):
            return self.to_ours(source)
        if like is None:
            raise ValueError(
                "like: a state dict says nothing of activations and rates; pass a PLE of that configuration"
            )
        return self.checkpoint_to_ours(source, like, prefix)

    @torch.inference_mode(False)
    def to_tree_or_target(self, ple: PLE, target: nn.Module | None) -> nn.Module:
        """``to_X``."""
        if target is None:
            return self.tree(ple)
        self.fill(ple, target)
        return target

    def tree(self, ple: PLE) -> nn.Module:
        """Ordinary modules with the library's names and the trunk's weights.

        Raises:
            TypeError: it is no ``PLE``.
            ValueError: the library cannot represent it.
        """
        levels = getattr(ple, "levels", None)
        if not isinstance(levels, nn.ModuleList) or not all(isinstance(x, ExtractionNetwork) for x in levels):
            raise TypeError(f"ple: expected a trunk of ple_fast, PLE say, got {kind(ple)}")
        tree = self.write([PlainLevel.of(level) for level in levels])  # type: ignore[arg-type]  # checked above
        for i, (source, level) in enumerate(zip(self.sources(tree), levels, strict=True)):
            if source.topology != level.topology:
                self.cannot(f"level {i}: its wiring is {level.topology}, and that library's is {source.topology}")
        return tree

    def cannot(self, why: str) -> NoReturn:
        """Refuse a trunk that the library cannot represent."""
        raise ValueError(f"{self.converter.library} cannot represent this trunk: {why}")

    def linear_gates(self, gates: Sequence[PlainStack]) -> list[nn.Linear]:
        """Of a library whose gates are one linear layer and a softmax.

        Raises:
            ValueError: they are more, or less.
        """
        for gate in gates:
            last = gate.layers[-1] if gate.layers else None
            plain = last is not None and len(gate.layers) == 1 and last.norm is None and last.linear.bias is not None
            if not plain or gate.temperature != 1.0:
                self.cannot("its gates are one linear layer with a bias, and a softmax")
        return [gate.layers[0].linear for gate in gates]

    def checkpoint_to_ours(self, state_dict: Mapping[str, Tensor], like: PLE, prefix: str) -> PLE:
        """``from_X`` of a checkpoint, for a trunk made like ``like``, which stays as it is."""
        tree = self.tree(like)
        own = tree.state_dict()
        roots = {name.partition(".")[0] for name in own}
        given = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        given = {name: value for name, value in given.items() if name.partition(".")[0] in roots}
        wrong = [
            f"{prefix}{name}: {'missing' if name not in given else tuple(given[name].shape)}, expected {tuple(t.shape)}"
            for name, t in own.items()
            if name not in given or given[name].shape != t.shape
        ]
        wrong += [f"{prefix}{name}: unexpected" for name in given if name not in own]
        if wrong:
            raise ValueError(
                f"state_dict: is of another configuration than `like` as {self.converter.library} has it, or its "
                f"prefix is not {prefix!r}:{_listed(wrong)}"
            )
        tree.load_state_dict(given)
        return self.to_ours(tree)

    def fill(self, ple: PLE, target: nn.Module) -> None:
        """``to_X`` into an existing model: weights and buffers of its trunk; what the library never reads stays.

        Raises:
            ValueError: the model is of another configuration.
        """
        tree = self.tree(ple)
        own, theirs = tree.state_dict(), target.state_dict()
        unread = {id(tensor) for source in self.sources(target) for tensor in source.unread_tensors()}
        kept = {name for name, t in [*target.named_parameters(), *target.named_buffers()] if id(t) in unread}
        roots = {name.partition(".")[0] for name in own}
        wrong = [
            f"{name}: {'missing' if name not in theirs else tuple(theirs[name].shape)}, expected {tuple(value.shape)}"
            for name, value in own.items()
            if name not in kept and (name not in theirs or theirs[name].shape != value.shape)
        ]
        wrong += [
            f"{name}: unexpected"
            for name in theirs
            if name.partition(".")[0] in roots and name not in own and name not in kept
        ]
        if not wrong:
            wrong = [
                f"level {i}: the model computes {theirs_of}, the trunk {ours_of}"
                for i, (theirs_of, ours_of) in enumerate(zip(self._makeup(target), self._makeup(tree), strict=True))
                if theirs_of != ours_of
            ]
        if wrong:
            raise ValueError(f"target: is of another configuration than the trunk:{_listed(wrong)}")
        with torch.no_grad():
            for name, value in own.items():
                if name not in kept:
                    theirs[name].copy_(value)

    def _makeup(self, module: nn.Module) -> list[Any]:
        levels = [source.pack().level for source in self.sources(module)]
        return [(level.topology, level.expert_specs, level.gate_spec) for level in levels]


def tree(content: Any) -> nn.Module:
    """Modules out of nested dicts (children by name), lists (``ModuleList``) and modules."""
    if isinstance(content, nn.Module):
        return content
    if isinstance(content, list):
        return nn.ModuleList(tree(child) for child in content)
    made = nn.Module()
    for name, child in content.items():
        made.add_module(name, tree(child))
    return made


def in_order(layers: Sequence[PlainLayer], *, always_dropout: bool = False) -> Iterator[nn.Module]:
    """The modules of layers in the order in which they run; with ``always_dropout`` one of rate 0 for none."""
    for layer in layers:
        before, after = (None, layer.norm) if layer.norm_after else (layer.norm, None)
        dropout = layer.dropout or (nn.Dropout(0.0) if always_dropout else None)
        for module in (layer.linear, before, layer.activation, after, dropout):
            if module is not None:
                yield module


def zeroed(module: nn.Module) -> nn.Module:
    """A copy with zeros, in the place of what the library never reads."""
    made = copy.deepcopy(module)
    with torch.no_grad():
        for tensor in [*made.parameters(), *made.buffers()]:
            tensor.zero_()
    return made


def _listed(lines: list[str], most: int = 8) -> str:
    shown = [*lines[:most], *([f"and {len(lines) - most} more"] if len(lines) > most else [])]
    return "".join(f"\n  {line}" for line in shown)

"""What the libraries have in common: wiring, outputs as lists, and what ``from_X`` and ``to_X`` do."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from ..modules import PLE, ExtractionNetwork
from ..specs import LayerSpec
from ..topology import Topology
from .converter import Converter, LevelSource
from .plain_layers import PlainLayer, PlainStack, kind, parse

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def ple_wiring(
    own: Sequence[int], shared: int, *, shared_gate: bool, shared_gate_scope: Literal["all", "shared"] = "all"
) -> Topology:
    """A level with a slot per task and one for what is shared, also where no expert is shared.

    Unlike ``Topology.ple`` it may have a shared mixture without shared experts, which then weighs all tasks' experts.

    Args:
        own: experts per task.
        shared: shared experts, numbered last.
        shared_gate: whether the level has a shared mixture.
        shared_gate_scope: what that one weighs.
    """
    topology = Topology.ple(len(own), own, shared, last=not shared_gate, shared_gate_scope=shared_gate_scope)
    if shared:
        return topology
    weighed = list(topology.mixture_experts)
    if shared_gate:
        weighed.append(tuple(range(topology.num_experts)) if shared_gate_scope == "all" else ())
    return Topology(topology.expert_slot, tuple(range(len(weighed))), tuple(weighed), num_slots=len(own) + 1)


def mixtures(level: Any, x: Any) -> list[Tensor]:
    """The mixtures ``(B, H)`` of a level one by one.

    Each may be changed in place in training, as a library's own can, whose mixtures are tensors of their own.
    """
    return separate(level, level(x))


def separate(level: Any, y: Tensor) -> list[Tensor]:
    """``mixtures`` out of what the level has returned, ``(B, O, H)``."""
    # unbind makes views of one tensor, which autograd lets nobody write to. By index: torch.fx does not iterate.
    rows = y.flatten(1).unsafe_split(level.out_features, 1)
    return [rows[o] for o in range(level.topology.num_mixtures)]


class PlainLevel(NamedTuple):
    """A level as ordinary layers: copies of its weights and buffers."""

    level: ExtractionNetwork
    experts: list[list[PlainLayer]]
    gates: list[PlainStack]
    """Of a static mixture: without layers."""
    is_last: bool

    @classmethod
    def of(cls, level: ExtractionNetwork, is_last: bool) -> PlainLevel:
        """The layers of a level."""
        experts, gates = level.unpack()
        return cls(
            level,
            [parse(f"experts[{e}]", stack).layers for e, stack in enumerate(experts)],
            [
                PlainStack(f"gates[{o}]") if stack is None else parse(f"gates[{o}]", stack, gate=True)
                for o, stack in enumerate(gates)
            ],
            is_last,
        )

    @property
    def counts(self) -> list[int]:
        """Experts per task: every level but the last one has a mixture more than tasks."""
        tasks = self.level.topology.num_mixtures - (not self.is_last)
        return [self.level.topology.expert_slot.count(t) for t in range(tasks)]

    def split(self, made: list[T]) -> tuple[list[list[T]], list[T]]:
        """What was made of the experts, per task, and for all, where every task has as many."""
        counts = self.counts
        own = counts[0]
        return [made[t * own : (t + 1) * own] for t in range(len(counts))], made[len(counts) * own :]


class Library(Converter):
    """A converter that also writes a ``PLE`` as its library has it."""

    sites_in = ""
    """The attribute of a model that lists its sites, first level first; a module without it is the one site."""

    def sites(self, model: nn.Module) -> Sequence[nn.Module]:
        """The sites of a model of the library, or of what ``write`` gives."""
        found: Sequence[nn.Module] = getattr(model, self.sites_in, [model])
        return found

    @abstractmethod
    def write(self, levels: list[PlainLevel]) -> nn.Module:
        """A tree of modules with the library's names. Tensors that the library never reads are 0.

        Raises:
            ValueError: the library cannot represent a level; see ``cannot``.
        """

    def cannot(self, why: str) -> NoReturn:
        """Refuse a trunk that the library cannot represent."""
        raise ValueError(f"{self.library} cannot represent this trunk: {why}")

    def sources(self, model: nn.Module) -> list[LevelSource]:
        """The levels of a model or tree."""
        sites = self.sites(model)
        if not all(self.recognises(site) for site in sites):
            raise TypeError(f"expected a model of {self.library} with levels like {self.class_name}, got {kind(model)}")
        return [source for site in sites for source in self.level_sources(site)]

    def level_sources(self, site: nn.Module) -> list[LevelSource]:
        """``read``, for ``from_X`` and ``to_X``."""
        return self.read(site)

    @torch.inference_mode(False)
    def to_ours(self, source: nn.Module | Mapping[str, Tensor], like: nn.Module | None, prefix: str) -> PLE:
        """``from_X``, of a model or a checkpoint; ``like`` stays as it is."""
        if not isinstance(source, nn.Module):
            if like is None:
                raise ValueError(
                    "like: a state dict says nothing of activations and rates; pass a PLE of that configuration"
                )
            source = self._loaded(source, like, prefix)
        return PLE.from_levels([level.pack().level for level in self.sources(source)])

    @torch.inference_mode(False)
    def to_theirs(self, ple: nn.Module, target: nn.Module | None) -> nn.Module:
        """``to_X``."""
        if target is None:
            return self.tree(ple)
        self._fill(ple, target)
        return target

    def tree(self, ple: nn.Module) -> nn.Module:
        """Ordinary modules with the library's names and the trunk's weights.

        Raises:
            TypeError: it is no ``PLE``.
            ValueError: the library cannot represent it.
        """
        levels: Any = getattr(ple, "levels", None)
        if not isinstance(levels, nn.ModuleList) or not all(isinstance(x, ExtractionNetwork) for x in levels):
            raise TypeError(f"ple: expected a trunk of ple_fast, PLE say, got {kind(ple)}")
        plain = [PlainLevel.of(level, level is levels[-1]) for level in levels]  # type: ignore[arg-type]  # checked above
        tree = self.write(plain)
        for i, (source, own) in enumerate(zip(self.sources(tree), plain, strict=True)):
            level = own.level
            if source.topology != level.topology:
                self.cannot(f"level {i}: its wiring is {level.topology}, and that library's is {source.topology}")
            ours, theirs = (_read_by_gates(level, how, i) for how in (level.gate_spec.input, source.gate_input))
            if ours != theirs:
                self.cannot(f"level {i}: its gates read {ours}, and that library's read {theirs}")
        return tree

    def linear_gates(self, gates: Sequence[PlainStack]) -> list[nn.Linear]:
        """Of a library whose gates are one linear layer and a softmax.

        Raises:
            ValueError: they are more, or less.
        """
        for gate in gates:
            last = gate.layers[-1] if gate.layers else None
            plain = last is not None and len(gate.layers) == 1 and last.norm is None and last.linear.bias is not None
            if not plain or not gate.ends_plainly:
                self.cannot("its gates are one linear layer with a bias, and a softmax")
        return [gate.layers[0].linear for gate in gates]

    def gate_ends(self, gates: Sequence[PlainStack]) -> list[nn.Linear]:
        """The last layers of gates that may have hidden ones.

        Raises:
            ValueError: one is more than linear with a bias, or there is none.
        """
        for gate in gates:
            last = gate.layers[-1] if gate.layers else None
            if last is None or last.norm is not None or not last.spec.bias or not gate.ends_plainly:
                self.cannot("its gates end in a linear layer with a bias, without norm and temperature")
        return [gate.layers[-1].linear for gate in gates]

    def _loaded(self, state_dict: Mapping[str, Tensor], like: nn.Module, prefix: str) -> nn.Module:
        """A checkpoint as a tree, for a trunk made like ``like``."""
        tree = self.tree(like)
        own = tree.state_dict()
        given = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        wrong = _misfits(own, given, prefix=prefix)
        if wrong:
            raise ValueError(
                f"state_dict: is of another configuration than `like` as {self.library} has it, or its "
                f"prefix is not {prefix!r}:{_listed(wrong)}"
            )
        tree.load_state_dict({name: given[name] for name in own})
        return tree

    def _fill(self, ple: nn.Module, target: nn.Module) -> None:
        """``to_X`` into an existing model: weights and buffers of its trunk; what the library never reads stays.

        Raises:
            ValueError: the model is of another configuration.
        """
        tree = self.tree(ple)
        own, theirs = tree.state_dict(), target.state_dict()
        unread = {id(tensor) for source in self.sources(target) for tensor in source.unread_tensors()}
        kept = {name for name, t in [*target.named_parameters(), *target.named_buffers()] if id(t) in unread}
        wrong = _misfits(own, theirs, kept)
        self._refuse_unlike(wrong or self._differences(target, tree))
        with torch.no_grad():
            for name, value in own.items():
                if name not in kept:
                    theirs[name].copy_(value)

    def _differences(self, target: nn.Module, tree: nn.Module) -> list[str]:
        """What a target and a tree compute differently."""
        return [
            f"level {i}: the model computes {theirs_of}, the trunk {ours_of}"
            for i, (theirs_of, ours_of) in enumerate(zip(self._makeup(target), self._makeup(tree), strict=True))
            if theirs_of != ours_of
        ]

    def _refuse_unlike(self, wrong: list[str]) -> None:
        if wrong:
            raise ValueError(f"target: is of another configuration than the trunk:{_listed(wrong)}")

    def _makeup(self, module: nn.Module) -> list[Any]:
        levels = [source.pack().level for source in self.sources(module)]
        return [(level.topology, level.expert_specs, level.gate_spec) for level in levels]


def _read_by_gates(level: ExtractionNetwork, how: str | None, number: int) -> str:
    """What the gates of a level read, in words; at the first one the input is the slots."""
    topology = level.topology
    slots = {topology.mixture_slot[o] for o in topology.gated_mixtures}
    if how == "raw" and number and slots:
        return "the input of the trunk"
    if how == "with_shared" and slots - {(topology.num_slots or 0) - 1}:
        return "each slot plus the last one"
    return "their slots"


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


def make_up(layers: Sequence[PlainLayer]) -> tuple[LayerSpec, ...]:
    """What layers are, without their weights."""
    return tuple(layer.spec for layer in layers)


def zeroed(module: M) -> M:
    """A copy with zeros, in the place of what the library never reads."""
    made = copy.deepcopy(module)
    with torch.no_grad():
        for tensor in [*made.parameters(), *made.buffers()]:
            tensor.zero_()
    return made


def _misfits(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], kept: Collection[str] = (), *, prefix: str = ""
) -> list[str]:
    """What is missing, of another shape or unexpected among given tensors, but for those that are kept as they are.

    Tensors of other parts of a model than ``own`` has are none of its business.
    """
    wrong = [
        f"{prefix}{name}: {'missing' if name not in given else tuple(given[name].shape)}, expected {tuple(t.shape)}"
        for name, t in own.items()
        if name not in kept and (name not in given or given[name].shape != t.shape)
    ]
    roots = {name.partition(".")[0] for name in own}
    others = [name for name in given if name.partition(".")[0] in roots and name not in own and name not in kept]
    return wrong + [f"{prefix}{name}: unexpected" for name in others]


def _listed(lines: list[str], most: int = 8) -> str:
    shown = [*lines[:most], *([f"and {len(lines) - most} more"] if len(lines) > most else [])]
    return "".join(f"\n  {line}" for line in shown)

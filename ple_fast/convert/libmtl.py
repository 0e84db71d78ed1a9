"""LibMTL: its MMoE and CGC with encoders of linear layers, inside the subclasses that its Trainer makes of them."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import CGC, PLE, MMoE
from ..modules.unpack import Move
from ..scalars import is_sequence, shown
from ..topology import Topology
from . import libmtl_shared
from .converter import LevelSource, register
from .encoders import check_encoder, layers_of
from .library import Library, PlainLevel, in_order, make_up, mixtures, tree
from .mmoe import Classes, MMoELibrary
from .plain_layers import PlainLayer, PlainStack


def from_libmtl(
    source: nn.Module | Mapping[str, Tensor],
    *,
    like: PLE | CGC | MMoE | None = None,
    prefix: str = "",
    tasks: Sequence[str] | None = None,
) -> PLE:
    """The fused trunk of a LibMTL ``MMoE`` or ``CGC``, with its weights and statistics.

    Args:
        source: a model whose encoders are an ``nn.Sequential`` that ``pack`` takes, or a module with one such child
            whose forward is its child's, which copies of it show on random input; or the state dict of one whose
            encoders are Sequentials, which also needs ``like``.
        like: a trunk of the configuration of the state dict; it stays as it is.
        prefix: what stands before ``experts_shared`` in the names of the state dict.
        tasks: the names of a state dict's tasks, in order; default ``"0"``, ``"1"``, ...

    Returns:
        ``(B, D)`` to ``(B, T, H)``, the tasks in the order of ``task_name``: of one level, wired as ``ple_fast.MMoE``
        or ``ple_fast.CGC``.

    Raises:
        TypeError, ValueError: it is something else, or of another configuration.
    """
    classes = _classes(tasks)
    if isinstance(source, nn.Module) and tasks is not None:
        raise ValueError("tasks: a model has names of its own; leave it out")
    if tasks is None and isinstance(source, Mapping):
        start = f"{prefix}gate_specific."
        found = {name.removeprefix(start).partition(".")[0]: None for name in source if name.startswith(start)}
        if found.keys() != set(map(str, range(len(found)))):
            raise ValueError(f"tasks: expected the names of the tasks in the model's order, of {', '.join(found)}")
    return classes.to_ours(source, like, prefix)


def to_libmtl(
    ple: PLE | CGC | MMoE, target: nn.Module | None = None, *, tasks: Sequence[str] | None = None
) -> nn.Module:
    """A trunk as LibMTL has it.

    Args:
        ple: a trunk of ours: an MMoE, or else a CGC.
        target: a LibMTL ``MMoE`` or ``CGC`` of the same configuration, whose encoders get the weights layer by layer,
            whatever their names; default a tree of ordinary modules, whose encoders are Sequentials and whose
            ``state_dict()`` is the trunk's part of a model with such.
        tasks: the names of the tasks in the tree; default ``"0"``, ``"1"``, ... A target has its own.

    Raises:
        TypeError: ``target`` or ``tasks`` is something else.
        ValueError: LibMTL cannot represent the trunk, or ``target`` is of another configuration.
    """
    if target is not None and tasks is not None:
        raise ValueError("tasks: a target has names of its own; leave it out")
    return _classes(tasks).to_theirs(ple, target)


def _forward(self: Any, inputs: Any, task_name: str | None = None) -> dict[str, Any]:
    if isinstance(inputs, Tensor) and inputs.dim() != 2:  # torch.fx traces with something else
        raise ValueError(
            f"inputs: expected (B, D), as img_size={list(self.img_size)} says, got {tuple(inputs.shape)}; flatten "
            "them, or ple_fast.restore(model)"
        )
    (level,) = self.ple_fast.levels
    if task_name is not None and len(set(level.topology.mixture_experts)) > 1 and _moves_statistics(level):
        raise ValueError(
            "task_name: in train mode a fused level moves the statistics of all tasks' batch norms, and LibMTL those "
            "of one; call the model without it, or ple_fast.restore(model)"
        )
    # Gates are found by name, and task_name may have changed meanwhile.
    rows = dict(zip(self.ple_fast.settings, mixtures(level, inputs), strict=True))
    out = {}
    for task in self.task_name:
        if task_name is None or task == task_name:
            out[task] = self.decoders[task](self._prepare_rep(rows[task], task, same_rep=False))
    return out


def _moves_statistics(level: nn.Module) -> bool:
    return any(module.training for module in level.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))


class _LibMTL(Library):
    """What the classes have in common."""

    library = "LibMTL"
    subclasses = True
    methods = (
        ("forward", _forward),
        ("get_share_params", libmtl_shared.get_share_params),
        ("zero_grad_share_params", libmtl_shared.zero_grad_share_params),
    )

    def __init__(self, tasks: Sequence[str] | None = None) -> None:
        self.tasks = tasks

    def encoders(self, site: Any) -> Iterator[tuple[str, nn.Module]]:
        """Every expert by its name, the shared ones first."""
        yield from ((f"experts_shared.{i}", encoder) for i, encoder in enumerate(site.experts_shared))

    def read(self, site: Any) -> list[LevelSource]:
        if site.multi_input:
            raise ValueError(
                "multi_input=True: every call is of one task, and fused levels would compute the mixtures of all tasks"
            )
        return [self.level_of(site)]

    def level_of(self, site: Any) -> LevelSource:
        """The level of a model or tree, in the library's order of experts and of the columns of gates."""
        size = getattr(site, "img_size", (1,))
        if is_sequence(size) and len(size) != 1:
            raise ValueError(
                f"img_size: expected one number, the width of the input, got {shown(size)}: ple_fast runs experts on "
                "rows of numbers"
            )
        if list(site.task_name) != list(site.gate_specific):
            raise ValueError(
                f"task_name: expected the tasks of the gates, {list(site.gate_specific)}, got {list(site.task_name)}"
            )
        experts = [layers_of(path, encoder) for path, encoder in self.encoders(site)]
        topology, splits = self.wiring(site)
        return LevelSource(topology, experts, list(site.gate_specific.values()), splits=splits)

    @abstractmethod
    def wiring(self, site: Any) -> tuple[Topology, Collection[int]]:
        """The topology of a site's level, and where experts begin that are not shared."""

    def level_sources(self, site: nn.Module) -> list[LevelSource]:
        for path, encoder in self.encoders(site):
            check_encoder(path, encoder)
        return [self.level_of(site)]

    def settings(self, site: Any) -> tuple[str, ...]:
        return tuple(site.gate_specific)

    def check_copy(self, site: nn.Module) -> None:
        for path, encoder in self.encoders(site):
            check_encoder(path, encoder)

    def trial(self, site: Any, draw: Callable[[int], Tensor]) -> tuple[Any, ...]:
        return (draw(next(m for m in site.gate_specific.modules() if isinstance(m, nn.Linear)).in_features),)

    def probes(self, site: Any) -> Sequence[nn.Module]:
        return list(dict.fromkeys(site.decoders[task] for task in site.task_name))

    def renewed(self, site: Any, moves: Sequence[Move[nn.Parameter]]) -> dict[str, Any]:
        return libmtl_shared.renewed(site, moves)

    def named(self, made: Sequence[nn.Module]) -> nn.ModuleDict:
        """What was made per task, by the tasks' names."""
        names = list(map(str, range(len(made)))) if self.tasks is None else self.tasks
        if len(names) != len(made):
            raise ValueError(f"tasks: expected {len(made)} names, one per task of the trunk, got {shown(names)}")
        try:
            return nn.ModuleDict(dict(zip(names, made, strict=True)))
        except KeyError as error:
            raise ValueError(f"tasks: expected names that an nn.ModuleDict takes: {error.args[0]}") from error

    def _fill(self, ple: nn.Module, target: nn.Module) -> None:
        """By the order of layers: the names in the target's encoders are the user's."""
        made = self.tree(ple)
        wrong = self._differences(target, made)
        pairs = [] if wrong else [*zip(_tensors(self.level_of(target)), _tensors(self.level_of(made)), strict=True)]
        shapes = [
            f"{name}: {tuple(t.shape)}, expected {tuple(v.shape)}" for (name, t), (_, v) in pairs if t.shape != v.shape
        ]
        self._refuse_unlike(wrong or shapes)
        with torch.no_grad():
            for (_, tensor), (_, value) in pairs:
                tensor.copy_(value)


class MMoEConverter(_LibMTL, MMoELibrary):
    """``LibMTL.architecture.MMoE``."""

    class_name = "MMoE"
    children = ("experts_shared", "gate_specific")

    def recognises(self, module: nn.Module) -> bool:
        return _has_gates(module) and not hasattr(module, "experts_specific")

    def wiring(self, site: Any) -> tuple[Topology, Collection[int]]:
        return Topology.mmoe(len(site.gate_specific), len(site.experts_shared)), ()

    def write(self, levels: list[PlainLevel]) -> nn.Module:
        return _with_tasks(super().write(levels))

    def lists(self, experts: Sequence[Sequence[PlainLayer]], gates: Sequence[PlainStack]) -> dict[str, Any]:
        ends = [_gate(end) for end in self.linear_gates(gates)]
        return {"experts_shared": [nn.Sequential(*in_order(e)) for e in experts], "gate_specific": self.named(ends)}


class CGCConverter(_LibMTL):
    """``LibMTL.architecture.CGC``: in the columns of a gate the shared experts come first."""

    class_name = "CGC"
    children = ("experts_shared", "gate_specific", "experts_specific")

    def recognises(self, module: nn.Module) -> bool:
        return _has_gates(module) and hasattr(module, "experts_specific")

    def encoders(self, site: Any) -> Iterator[tuple[str, nn.Module]]:
        yield from super().encoders(site)
        for task in site.gate_specific:
            yield from ((f"experts_specific.{task}.{i}", e) for i, e in enumerate(site.experts_specific[task]))

    def counts(self, site: Any) -> tuple[list[int], int]:
        """Experts per task, and shared ones.

        Raises:
            ValueError: there are none of a kind.
        """
        own, shared = [len(site.experts_specific[task]) for task in site.gate_specific], len(site.experts_shared)
        if not shared or 0 in own:
            raise ValueError(
                f"num_experts: expected shared experts and some of each task, got {[shared, *own]}: LibMTL's own "
                "forward fails then"
            )
        return own, shared

    def wiring(self, site: Any) -> tuple[Topology, Collection[int]]:
        own, shared = self.counts(site)
        starts = [shared + sum(own[:t]) for t in range(len(own))]
        weighed = [(*range(shared), *range(start, start + n)) for start, n in zip(starts, own, strict=True)]
        return Topology((0,) * (shared + sum(own)), (0,) * len(own), tuple(weighed)), (shared,)

    def level_sources(self, site: nn.Module) -> list[LevelSource]:
        """As a level of our PLE: own experts before the shared ones, among the experts and in each gate."""
        (source,) = super().level_sources(site)
        own, shared = self.counts(site)
        gates = [_turned(f"gate_specific[{t}]", gate, -shared) for t, gate in enumerate(source.gates)]
        experts = [*source.experts[shared:], *source.experts[:shared]]
        return [LevelSource(Topology.ple(len(own), own, shared, last=True), experts, gates)]

    def write(self, levels: list[PlainLevel]) -> nn.Module:
        if len(levels) != 1:
            self.cannot(f"it has one level, got {len(levels)}")
        (level,) = levels
        own, topology = level.counts, level.level.topology
        shared = topology.num_experts - sum(own)
        if not shared or 0 in own or topology != Topology.ple(len(own), own, shared, last=True):
            self.cannot(f"it is a CGC with shared experts and some of each task, or an MMoE; its wiring is {topology}")
        if len({make_up(expert) for expert in level.experts}) > 1:
            self.cannot("all its experts are made alike")
        encoders = [nn.Sequential(*in_order(expert)) for expert in level.experts]
        starts = [sum(own[:t]) for t in range(len(own))]
        specific = [nn.ModuleList(encoders[start : start + n]) for start, n in zip(starts, own, strict=True)]
        ends = [_turned("gate", _gate(end), shared) for end in self.linear_gates(level.gates)]
        content = {"experts_shared": encoders[sum(own) :], "gate_specific": self.named(ends)}
        return _with_tasks(tree({**content, "experts_specific": self.named(specific)}))


def _has_gates(module: nn.Module) -> bool:
    gates = getattr(module, "gate_specific", None)
    return isinstance(gates, nn.ModuleDict) and all(hasattr(module, name) for name in ("experts_shared", "task_name"))


def _gate(end: nn.Linear) -> nn.Sequential:
    return nn.Sequential(end, nn.Softmax(dim=-1))


def _turned(path: str, gate: nn.Module, by: int) -> nn.Sequential:
    """A copy of a gate whose columns have moved on."""
    if not isinstance(gate, nn.Sequential) or [type(m) for m in gate] != [nn.Linear, nn.Softmax]:
        raise ValueError(f"{path}: expected an nn.Sequential of Linear and Softmax, as LibMTL makes it, got {gate}")
    turned = copy.deepcopy(gate)
    with torch.no_grad():
        for parameter in turned.parameters():
            parameter.copy_(parameter.roll(by, 0))
    return turned


def _with_tasks(made: nn.Module) -> nn.Module:
    """A tree with the attribute that names its tasks."""
    vars(made).update(task_name=list(made.gate_specific))  # type: ignore[arg-type]  # a ModuleDict
    return made


def _tensors(source: LevelSource) -> Iterator[tuple[str, Tensor]]:
    """Of every layer in the order of a level, with its path there."""
    for placed in source.pack().layers:
        for role, module in placed.plain.modules.items():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                yield f"{placed.plain.paths[role]}.{name}", tensor


def _classes(tasks: Any) -> Classes:
    if tasks is None:
        return LIBRARY
    if not is_sequence(tasks) or not all(isinstance(name, str) for name in tasks):
        raise TypeError(f"tasks: expected a sequence of names, got {shown(tasks)}")
    if len(set(tasks)) != len(tasks):
        raise ValueError(f"tasks: expected each name once, got {shown(tasks)}")
    return Classes(CGCConverter(list(tasks)), MMoEConverter(list(tasks)))


LIBRARY = Classes(CGCConverter(), MMoEConverter())
for library in LIBRARY.every:
    register(library)

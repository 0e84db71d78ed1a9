"""Who else in this process holds parts of a model: optimizers, wrappers, other modules, attributes."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..modules.unpack import Move
from ..references import attributes, remembered

TRACED = (torch.fx.GraphModule, torch.jit.ScriptModule)
WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
OWN = ("_parameters", "_buffers", "_modules")
ATOMS = frozenset((str, bytes, int, float, bool, complex, type(None)))
ENDS = (type, ModuleType, CodeType, BuiltinFunctionType, Optimizer, Tensor)
"""Where a search ends: optimizers are looked at on their own."""
DEPTH = 20


class Bystanders(NamedTuple):
    """Objects of this process that record parts of models."""

    optimizers: list[Optimizer]
    wrappers: list[nn.Module]
    modules: list[nn.Module]
    """All of them, but for graphs that a tracer has made."""


def bystanders(model: nn.Module, given: Sequence[Optimizer]) -> Bystanders:
    """It takes a look at every object there is. What only waits for the garbage collector is none."""
    found = _scan()
    parts = {id(part) for part in [*model.modules(), *model.parameters()]}
    known = {id(optimizer) for optimizer in given}
    inside = {id(module) for module in model.modules()}
    suspects = [o for o in found.optimizers if id(o) not in known and any(id(p) in parts for p in held(o))]
    others = [
        own
        for own in found.modules
        if id(own) not in inside
        and any(
            id(part) in parts for part in (*own._modules.values(), *own._parameters.values(), *own._buffers.values())
        )
    ]
    if not suspects and not others and not wrapper_of(model, found.wrappers):
        return found
    del found, suspects, others
    gc.collect()
    return _scan()


def enclosing(model: nn.Module, modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules of everything that a model is a part of, without its own.

    Args:
        modules: all of the process.
    """
    parents: dict[int, list[nn.Module]] = {}
    for module in modules:
        for child in module._modules.values():
            parents.setdefault(id(child), []).append(module)
    found = {id(module): module for module in model.modules()}
    own, waiting = set(found), [model]
    while waiting:
        for parent in parents.get(id(waiting.pop()), ()):
            if id(parent) not in found:
                waiting.append(parent)
                found.update((id(module), module) for module in parent.modules())
    return [module for key, module in found.items() if key not in own]


def _scan() -> Bystanders:
    found = Bystanders([], [], [])
    graphs: list[nn.Module] = []
    kinds: dict[type, tuple[list[Any], ...]] = {}
    for candidate in gc.get_objects():
        kind = type(candidate)
        lists = kinds.get(kind)
        if lists is None:
            is_module = issubclass(kind, nn.Module) and not issubclass(kind, TRACED)
            lists = kinds[kind] = tuple(
                own
                for own, is_one in (
                    (found.optimizers, issubclass(kind, Optimizer)),
                    (found.wrappers, is_module and any(cls.__name__ in WRAPPERS for cls in kind.__mro__)),
                    (found.modules, is_module),
                    (graphs, issubclass(kind, torch.fx.GraphModule)),
                )
                if is_one
            )
        for own in lists:
            if own is found.optimizers or "_modules" in vars(candidate):  # and not one that is just being made
                own.append(candidate)
    # A graph is what a model was when it was traced; containers in it are ordinary modules.
    containers = {id(part) for graph in graphs for part in graph.modules() if type(part) is nn.Module}
    return found._replace(modules=[module for module in found.modules if id(module) not in containers])


def held(optimizer: Optimizer) -> Iterator[Tensor]:
    """The parameters of an optimizer."""
    for group in getattr(optimizer, "param_groups", ()):
        yield from group["params"]


def wrapper_of(model: nn.Module, wrappers: Iterable[nn.Module]) -> str | None:
    """The kind of a wrapper for distributed training in a model, around it, or around what it is a part of."""
    inside = {id(module) for module in model.modules()}
    for wrapper in wrappers:
        if any(id(part) in inside for part in wrapper.modules()):
            return next(cls.__name__ for cls in type(wrapper).__mro__ if cls.__name__ in WRAPPERS)
    return None


def check_unwrapped(model: nn.Module, around: Bystanders) -> None:
    """Neither the model nor what it is a part of is wrapped for distributed training yet."""
    wrapper = wrapper_of(model, around.wrappers)
    if wrapper is not None:
        raise ValueError(
            f"model: it or a part of it is wrapped in {wrapper}, which has recorded its parameters; accelerate or "
            "restore the model first, and wrap it then"
        )


def check_holders(
    model: nn.Module,
    moves: Sequence[Move[nn.Parameter]],
    around: Bystanders,
    given: Sequence[Optimizer],
    renewed: Collection[tuple[int, str]],
) -> None:
    """Nobody keeps parameters that are about to be replaced, but who is renewed with them.

    Args:
        given: the optimizers that will be renewed.
        renewed: the attributes that will be, by the id of their module and name.
    """
    wanted, passed = {id(move.old) for move in moves}, {id(optimizer) for optimizer in given}
    found = [own for own in around.optimizers if id(own) not in passed and any(id(p) in wanted for p in held(own))]
    if found:
        names = ", ".join(sorted({type(optimizer).__name__ for optimizer in found}))
        own = [
            ".".join(filter(None, ("model", path, name)))
            for path, module in model.named_modules()
            for name, value in vars(module).items()
            if any(value is optimizer for optimizer in found)
        ]
        raise ValueError(
            f"optimizers: {len(found)} optimizer ({names}) holds parameters that would be replaced, and would train "
            f"them in vain; pass it (optimizers=[{', '.join(own) or '...'}]), or build it afterwards and delete the "
            "old one"
        )
    rest = enclosing(model, around.modules)
    known = {id(module) for module in (*model.modules(), *rest)}
    places = [(f"{path}.".lstrip("."), "", module) for path, module in model.named_modules()]
    places += [("", f" of a {type(module).__name__} outside of the model", module) for module in rest]
    for before, after, module in places:
        for name, _ in references(module, wanted, known):
            if (id(module), name) not in renewed:
                where = f"{before}{name}{after}"
                raise ValueError(
                    f"model: the attribute {where} holds parameters that would be replaced, so what is computed with "
                    "it would go on with the old ones; empty it, and fill it again afterwards"
                )


def references(module: nn.Module, wanted: Collection[int], known: Collection[int]) -> Iterator[tuple[str, int]]:
    """Names of the module's attributes, beside its parameters and children, that lead to one of the objects ``wanted``.

    Args:
        wanted: by id.
        known: modules, by id, that are looked into on their own.
    """
    for name, value in vars(module).items():
        if name not in OWN:
            yield from ((name, found) for found in _reached(value, wanted, known, set(), DEPTH))


def _reached(value: Any, wanted: Collection[int], known: Collection[int], seen: set[int], depth: int) -> Iterator[int]:
    """Through containers, what a function remembers, weak references, and attributes of plain objects."""
    if id(value) in wanted:
        yield id(value)
        return
    if issubclass(type(value), ENDS) or id(value) in known or id(value) in seen or depth == 0:
        return
    seen.add(id(value))
    for part in _parts(value):
        if type(part) not in ATOMS:
            yield from _reached(part, wanted, known, seen, depth - 1)


def _parts(value: Any) -> Iterable[Any]:
    kind = type(value)
    if issubclass(kind, dict):
        return list(value.values())
    if issubclass(kind, (list, tuple, set, frozenset)):
        return list(value)
    if kind is MethodType:
        return (value.__self__, value.__func__)
    if issubclass(kind, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if kind is FunctionType:
        return remembered(value)
    if issubclass(kind, weakref.ref):
        return (value(),)
    return attributes(value)

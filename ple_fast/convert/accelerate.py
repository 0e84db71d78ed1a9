"""Fused levels in the place of what a model's library runs in loops, in place, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from . import ties as tied
from .bystanders import Bystanders, bystanders, enclosing, holders, references, wrapper_of
from .moves import (
    Move,
    by_new,
    check_attributes,
    check_optimizers,
    move_attributes,
    move_gradients,
    names_in,
    ordered_groups,
    remap,
    rename,
    settle,
)
from .registry import Converter, converter_named, find
from .swap import (
    Accelerated,
    build,
    dematerialise,
    materialise,
    moves_in,
    replaced_by,
    swap_in,
    swap_out,
)
from .ties import ties
from .trial import try_out
from .trunk import CHILD, FusedTrunk, StateStyle

NOTHING = "nothing in this model is of a class that ple_fast knows (docs/migration has the list)"


@dataclass(frozen=True)
class Replaced:
    """A module whose trunk runs fused now."""

    path: str
    """Its name in the model; empty for the model itself."""
    library: str
    """Library and class."""
    parameters: dict[str, tuple[str, ...]]
    """Per new parameter the names of the old ones that it holds: for rules by name or by number of dimensions."""
    unread: tuple[str, ...] = ()
    """Tensors that the library keeps and never reads: still in the state dict, and no parameters any more. What a
    penalty trains all the same is in ``parameters``."""


@dataclass(frozen=True)
class Left:
    """A module of a known class that was left as it is."""

    path: str
    library: str
    why: str


@dataclass(frozen=True)
class Report:
    """What ``accelerate`` did."""

    replaced: tuple[Replaced, ...] = ()
    left: tuple[Left, ...] = ()
    parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Of all replaced modules together, by their names in the model."""
    already: tuple[str, ...] = ()
    """Names of modules that an earlier call has replaced."""

    def __str__(self) -> str:
        lines = []
        for site in self.replaced:
            lines.append(f"replaced {site.path or 'the model'} ({site.library})")
            if site.unread:
                lines.append(f"  kept, and no longer trained, because nothing reads them: {', '.join(site.unread)}")
        lines += [f"left {site.path or 'the model'} ({site.library}): {site.why}" for site in self.left]
        lines += [f"{path or 'the model'} runs fused already" for path in self.already]
        return "\n".join(lines) or NOTHING


class _Site(NamedTuple):
    path: str
    module: Any
    converter: Converter
    moves: list[Move]


class _Plan(NamedTuple):
    site: _Site
    trunk: FusedTrunk


@torch.inference_mode(False)
def accelerate(
    model: nn.Module,
    *,
    optimizers: Optimizer | Sequence[Optimizer] = (),
    strict: bool = False,
    state_dict: StateStyle = "original",
) -> Report:
    """Run every known trunk in a model fused, in place: same results, same checkpoints; ``restore`` is the way back.

    A trunk is replaced after a trial run on random input has given the same results as the original. Embeddings,
    towers, hooks around the trunk and the class of the model (by ``isinstance``) stay. Call it before the model is
    wrapped for distributed training.

    Args:
        model: any model; known are the classes of ``docs/migration`` and what ``ple_fast.convert.register`` was given.
        optimizers: those that hold the model's parameters. They get the new parameters in the place of the old ones,
            in the same groups and with their state.
        strict: a module of a known class that cannot be replaced is an error, and so is a model without any.
        state_dict: ``"original"``: the library's own names, entry by entry; ``"fused"``: ours. Both can be loaded.

    Returns:
        What was replaced, and what was left and why.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an optimizer or a list holds parameters that would be replaced, and cannot be renewed; the model is
            wrapped already; with ``strict``, something is left, or nothing is known. Nothing has been changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if state_dict not in ("original", "fused"):
        raise ValueError(f'state_dict: expected "original" or "fused", got {state_dict!r}')
    given = _optimizers(optimizers)
    around = bystanders(model, given)
    _check_unwrapped(model, around)
    plans, left = _plans(model, state_dict, around)
    if strict and left:
        raise ValueError("accelerate(strict=True): nothing was replaced, because this would be left:\n" + "\n".join(
            f"  {site.path or 'the model'} ({site.library}): {site.why}" for site in left))  # fmt: skip
    already = tuple(path for path, module in model.named_modules() if isinstance(module, Accelerated))
    if strict and not plans and not already:
        raise ValueError(f"accelerate(strict=True): {NOTHING}")
    sites = [plan.site for plan in plans]
    moves = [move for site in sites for move in site.moves]
    renewed = _renewed(sites)
    _check_holders(sites, renewed, model, moves, around, given)
    check_optimizers(given, moves)
    move_gradients(moves)
    move_attributes(moves)
    names = _names(model)
    before = list(model.parameters())
    ordered, named = ordered_groups(given, before), [names_in(optimizer) for optimizer in given]
    for (site, trunk), attributes in zip(plans, renewed, strict=True):
        note = site.converter.noted(site.module)
        swap_in(site.module, trunk, site.converter)
        vars(site.module).update(attributes)
        assert trunk.record is not None
        trunk.record.notes = (note, site.converter.noted(site.module))
    remap(given, moves)
    settle(given, moves, before, dict(model.named_parameters()), ordered)
    rename(given, moves, names, _names(model), named)
    return replace(_report(plans, names, model, left), already=already)


@torch.inference_mode(False)
def restore(model: nn.Module, *, optimizers: Optimizer | Sequence[Optimizer] = ()) -> tuple[str, ...]:
    """Put the library's own modules back wherever ``accelerate`` replaced them, with the weights as they are now.

    Args:
        model: what ``accelerate`` was given, or a copy of it.
        optimizers: as in ``accelerate``.

    Returns:
        The names of the restored modules in the model.

    Raises:
        TypeError, ValueError: as ``accelerate``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    given = _optimizers(optimizers)
    around = bystanders(model, given)
    _check_unwrapped(model, around)
    accelerated: list[tuple[str, Any]] = [
        (path, module) for path, module in model.named_modules() if isinstance(module, Accelerated)
    ]
    shared = ties(model, [tied.Site(path, m, {CHILD: m.trunk()}) for path, m in accelerated], around.modules)
    if shared:
        raise ValueError(f"restore: nothing was restored, because {shared[min(shared)]}")
    sites = [
        _Site(path, module, converter_named(module._converter), materialise(module)) for path, module in accelerated
    ]
    moves = [move for site in sites for move in site.moves]
    try:
        renewed = _renewed(sites)
        _check_holders(sites, renewed, model, moves, around, given)
        check_optimizers(given, moves)
        check_attributes(moves)
        move_gradients(moves)
    except ValueError:
        for site in sites:
            dematerialise(site.module)
        raise
    move_attributes(moves)
    names = _names(model)
    before = list(model.parameters())
    ordered, named = ordered_groups(given, before), [names_in(optimizer) for optimizer in given]
    for site, attributes in zip(sites, renewed, strict=True):
        old_note, note = site.module.trunk().record.notes
        as_left = None not in (old_note, note) and site.converter.noted(site.module) == note
        swap_out(site.module)
        vars(site.module).update(site.converter.recalled(site.module, old_note) if as_left else attributes)
    remap(given, moves)
    settle(given, moves, before, dict(model.named_parameters()), ordered)
    rename(given, moves, names, _names(model), named)
    return tuple(site.path for site in sites)


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _optimizers(optimizers: Any) -> list[Optimizer]:
    if isinstance(optimizers, Optimizer):
        return [optimizers]
    if not isinstance(optimizers, (list, tuple)) or not all(isinstance(o, Optimizer) for o in optimizers):
        raise TypeError(f"optimizers: expected torch.optim.Optimizer objects, got {optimizers!r}")
    return list(optimizers)


def _check_unwrapped(model: nn.Module, around: Bystanders) -> None:
    """Neither the model nor what it is a part of is wrapped for distributed training yet."""
    wrapper = wrapper_of(model, around.wrappers)
    if wrapper is not None:
        raise ValueError(
            f"model: it or a part of it is wrapped in {wrapper}, which has recorded its parameters; accelerate or "
            "restore the model first, and wrap it then"
        )


def _plans(model: nn.Module, style: StateStyle, around: Bystanders) -> tuple[list[_Plan], list[Left]]:
    """What can be replaced, each trunk built and tried, and what cannot."""
    plans, left = [], []
    known = list(_known(model))
    swapped = {path: (site, own) for path, site, own in known if not isinstance(own, str)}
    places = [tied.Site(path, site, replaced_by(own, site)) for path, (site, own) in swapped.items()]
    shared = {places[i].path: why for i, why in ties(model, places, around.modules).items()}
    for path, site, own in known:
        if isinstance(own, str):
            left.append(Left(path, type(site).__name__, own))
            continue
        try:
            if path in shared:
                raise ValueError(shared[path])
            trunk = build(site, own, style)
            moves = moves_in(site, trunk)
            check_attributes(moves)
            try_out(site, trunk, own)
        except Exception as error:
            why = str(error)
            if not isinstance(error, (TypeError, ValueError)):
                why = f"it cannot be read, because it is of another version or was changed: {error!r}"
            left.append(Left(path, own.name, why))
            continue
        plans.append(_Plan(_Site(path, site, own, moves), trunk))
    return plans, left


def _known(model: nn.Module) -> Iterator[tuple[str, nn.Module, Converter | str]]:
    """Modules of known classes, outermost only, each once."""
    within: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in within or isinstance(module, Accelerated):
            continue
        known = find(module)
        if known is not None:
            within |= {id(inner) for inner in module.modules()}
            yield path, module, known


def _renewed(sites: Sequence[_Site]) -> list[dict[str, Any]]:
    return [site.converter.renewed(site.module, site.moves) for site in sites]


def _check_holders(
    sites: Sequence[_Site],
    attributes: Sequence[dict[str, Any]],
    model: nn.Module,
    moves: Sequence[Move],
    around: Bystanders,
    given: Sequence[Optimizer],
) -> None:
    """Nobody keeps parameters that are about to be replaced, but who is renewed with them."""
    olds = [move.old for move in moves]
    found = holders(around.optimizers, olds, given)
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
    renewed = {(id(site.module), name) for site, own in zip(sites, attributes, strict=True) for name in own}
    rest = enclosing(model, around.modules)
    wanted, known = {id(old) for old in olds}, {id(module) for module in (*model.modules(), *rest)}
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


def _report(plans: Sequence[_Plan], names: dict[int, str], model: nn.Module, left: Sequence[Left]) -> Report:
    """``names``: of the old parameters in the model."""
    held = {
        id(group[0].new): [names[id(move.old)] for move in group] for plan in plans for group in by_new(plan.site.moves)
    }
    parameters = {name: tuple(dict.fromkeys(held[id(p)])) for name, p in model.named_parameters() if id(p) in held}
    replaced = []
    for site, trunk in plans:
        own = f"{site.path}.{CHILD}." if site.path else f"{CHILD}."
        assert trunk.record is not None
        mine = {name: old for name, old in parameters.items() if name.startswith(own)}
        buffers = {name for name, _ in trunk.named_buffers()}
        unread = tuple(name for name, held in trunk.record.unread.items() if held in buffers)
        replaced.append(Replaced(site.path, site.converter.name, mine, unread))
    return Report(tuple(replaced), tuple(left), parameters)

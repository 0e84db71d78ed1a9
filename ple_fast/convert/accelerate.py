"""Fused levels in the place of what a model's library runs in loops, in place, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from ..modules.unpack import Move
from ..scalars import shown
from . import ties as tied
from .bystanders import Bystanders, bystanders, check_holders, check_unwrapped
from .converter import Converter, converter_named, find
from .fused_trunk import CHILD, FusedTrunk, StateStyle, build, replaced_by
from .optimizers import (
    by_new,
    check_attributes,
    check_optimizers,
    following,
    move_attributes,
    move_gradients,
    names_of,
)
from .report import NOTHING, Left, Replaced, Report
from .swap import Accelerated, dematerialise, materialise, moves_in, swap_in, swap_out
from .ties import ties
from .trial import try_out


class _Site(NamedTuple):
    path: str
    module: Any
    converter: Converter
    trunk: FusedTrunk
    moves: list[Move[nn.Parameter]]


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
        raise ValueError(f'state_dict: expected "original" or "fused", got {shown(state_dict)}')
    given = _optimizers(optimizers)
    around = bystanders(model, given)
    check_unwrapped(model, around)
    sites, left = _sites(model, state_dict, around)
    if strict and left:
        raise ValueError("accelerate(strict=True): nothing was replaced, because this would be left:\n" + "\n".join(
            f"  {site.path or 'the model'} ({site.library}): {site.why}" for site in left))  # fmt: skip
    already = tuple(path for path, module in model.named_modules() if isinstance(module, Accelerated))
    if strict and not sites and not already:
        raise ValueError(f"accelerate(strict=True): {NOTHING}")
    moves, renewed = _prepare(sites, model, around, given)
    names = names_of(model)
    with following(given, model, moves):
        for site, attributes in zip(sites, renewed, strict=True):
            note = site.converter.noted(site.module)
            swap_in(site.module, site.trunk, site.converter)
            vars(site.module).update(attributes)
            site.trunk.notes = (note, site.converter.noted(site.module))
    return replace(_report(sites, names, model, left), already=already)


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
    check_unwrapped(model, around)
    accelerated: list[tuple[str, Any]] = [
        (path, module) for path, module in model.named_modules() if isinstance(module, Accelerated)
    ]
    shared = ties(model, [tied.Site(path, m, {CHILD: m.trunk()}) for path, m in accelerated], around.modules)
    if shared:
        raise ValueError(f"restore: nothing was restored, because {shared[min(shared)]}")
    sites = [
        _Site(path, module, converter_named(module._converter), module.trunk(), materialise(module))
        for path, module in accelerated
    ]
    try:
        moves, renewed = _prepare(sites, model, around, given)
    except ValueError:
        for site in sites:
            dematerialise(site.module)
        raise
    with following(given, model, moves):
        for site, attributes in zip(sites, renewed, strict=True):
            old_note, note = site.trunk.notes
            as_left = None not in (old_note, note) and site.converter.noted(site.module) == note
            swap_out(site.module)
            vars(site.module).update(site.converter.recalled(site.module, old_note) if as_left else attributes)
    return tuple(site.path for site in sites)


def _optimizers(optimizers: Any) -> list[Optimizer]:
    if isinstance(optimizers, Optimizer):
        return [optimizers]
    if not isinstance(optimizers, (list, tuple)) or not all(isinstance(o, Optimizer) for o in optimizers):
        raise TypeError(f"optimizers: expected torch.optim.Optimizer objects, got {shown(optimizers)}")
    return list(optimizers)


def _sites(model: nn.Module, style: StateStyle, around: Bystanders) -> tuple[list[_Site], list[Left]]:
    """What can be replaced, each trunk built and tried, and what cannot."""
    sites, left = [], []
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
        sites.append(_Site(path, site, own, trunk, moves))
    return sites, left


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


def _prepare(
    sites: Sequence[_Site], model: nn.Module, around: Bystanders, given: Sequence[Optimizer]
) -> tuple[list[Move[nn.Parameter]], list[dict[str, Any]]]:
    """Check that the parameters can be replaced, and give the new ones gradients and attributes.

    Returns:
        All moves, and per site the attributes that hold new parameters.
    """
    moves = [move for site in sites for move in site.moves]
    renewed = [site.converter.renewed(site.module, site.moves) for site in sites]
    renewed_names = {(id(site.module), name) for site, own in zip(sites, renewed, strict=True) for name in own}
    check_holders(model, moves, around, given, renewed_names)
    check_optimizers(given, moves)
    check_attributes(moves)
    move_gradients(moves)
    move_attributes(moves)
    return moves, renewed


def _report(sites: Sequence[_Site], names: dict[int, str], model: nn.Module, left: Sequence[Left]) -> Report:
    """``names``: of the old parameters in the model."""
    held = {id(group[0].new): [names[id(move.old)] for move in group] for site in sites for group in by_new(site.moves)}
    parameters = {name: tuple(dict.fromkeys(held[id(p)])) for name, p in model.named_parameters() if id(p) in held}
    replaced = []
    for site in sites:
        own = f"{site.path}.{CHILD}." if site.path else f"{CHILD}."
        mine = {name: old for name, old in parameters.items() if name.startswith(own)}
        unread = {f"unread.{name}" for name, _ in site.trunk.unread.named_buffers()}
        kept = tuple(move.old for move in site.trunk.moves if move.new in unread)
        replaced.append(Replaced(site.path, site.converter.name, mine, kept))
    return Report(tuple(replaced), tuple(left), parameters)

"""What goes with a parameter when others take its place: its entry and state in optimizers, gradient, attributes."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..modules.unpack import Move

Moves = Sequence[Move[nn.Parameter]]
ELEMENTWISE = (
    "SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adamax", "NAdam", "RAdam", "Rprop", "ASGD", "Adadelta", "FusedAdam",
)  # fmt: skip
"""Optimizers that treat every element on its own, so that stacking changes nothing."""


def by_new(moves: Moves) -> list[list[Move[nn.Parameter]]]:
    """The moves to one new parameter together."""
    groups: dict[int, list[Move[nn.Parameter]]] = {}
    for move in moves:
        groups.setdefault(id(move.new), []).append(move)
    return list(groups.values())


def successors(moves: Moves) -> dict[int, list[nn.Parameter]]:
    """The new parameters of every old one, by the id of that, each once."""
    found: dict[int, dict[int, nn.Parameter]] = {}
    for move in moves:
        found.setdefault(id(move.old), {})[id(move.new)] = move.new
    return {old: list(news.values()) for old, news in found.items()}


def check_optimizers(optimizers: Sequence[Optimizer], moves: Moves) -> None:
    """Whether every optimizer can take the new parameters; nothing is changed.

    Raises:
        TypeError: something is no optimizer.
        ValueError: an optimizer is not element-wise, or treats parameters that become one in different ways.
    """
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizers: expected torch.optim.Optimizer, got {type(optimizer).__name__}")
        homes = {id(p): i for i, own in enumerate(optimizer.param_groups) for p in own["params"]}
        for group in _held(homes, moves):
            if type(optimizer).__name__ not in ELEMENTWISE:
                raise ValueError(
                    f"optimizers: {type(optimizer).__name__} is not known to treat every element on its own, so it "
                    "would train stacked parameters in another way; build a new one after the swap, or use one of "
                    f"{', '.join(ELEMENTWISE)}"
                )
            _check_one(optimizer, homes, group)


def names_of(model: nn.Module) -> dict[int, str]:
    """Names of a model's parameters, by id."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


@contextmanager
def following(optimizers: Sequence[Optimizer], model: nn.Module, moves: Moves) -> Iterator[None]:
    """Around a swap in a model: the optimizers, checked before, then hold the new parameters in the place of the old.

    They have the state of the old ones, the model's order in groups that were in it, and names where they had any.
    """
    before = list(model.parameters())
    ordered = _ordered_groups(optimizers, before)
    names, known = names_of(model), [_names_in(optimizer) for optimizer in optimizers]
    yield
    _remap(optimizers, moves)
    _settle(optimizers, moves, before, dict(model.named_parameters()), ordered)
    after = names_of(model)
    for optimizer, own in zip(optimizers, known, strict=True):
        _rename(optimizer, moves, names, after, own)


def _remap(optimizers: Sequence[Optimizer], moves: Moves) -> None:
    """Put the new parameters in the place of the old ones, with the optimizers' state. Checked before."""
    news = successors(moves)
    for optimizer in optimizers:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        states = [(group[0].new, _state(optimizer, group)) for group in _held(held, moves)]
        for param_group in optimizer.param_groups:
            renewed: dict[int, Any] = {}
            for parameter in param_group["params"]:
                for new in news.get(id(parameter), [parameter]):
                    renewed[id(new)] = new
            param_group["params"] = list(renewed.values())
        for move in moves:
            optimizer.state.pop(move.old, None)
        for new, state in states:
            if state:
                optimizer.state[new] = state


def _ordered_groups(optimizers: Sequence[Optimizer], parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """The groups that hold a model's parameters in its order; those of others may stand among them."""
    index = {id(p): i for i, p in enumerate(parameters)}
    found = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            places = [index[id(p)] for p in group["params"] if id(p) in index]
            if places == sorted(places):
                found.append(group)
    return found


def _settle(
    optimizers: Sequence[Optimizer],
    moves: Moves,
    before: Sequence[nn.Parameter],
    after: Mapping[str, nn.Parameter],
    ordered: Sequence[dict[str, Any]],
) -> None:
    """After ``_remap``: what an optimizer built now would hold, so that its state dict fits into one and back.

    What is no parameter of the model any more goes. What became one joins those of its kind, where they are in one
    group, or else the rest where that is. The groups of ``ordered`` are in the model's order again, between what they
    hold of others: the model may be a part of a larger one.
    """
    index = {id(p): i for i, p in enumerate(after.values())}
    old = {id(p) for p in before}
    news = {id(move.new) for move in moves}
    kinds = {id(p): (name.rpartition(".")[2], p.dim()) for name, p in after.items()}
    homes: dict[int, dict[str, Any]] = {}
    of_kind: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) in old and id(p) not in index:
                    optimizer.state.pop(p, None)
                if id(p) in news:
                    homes[id(group)] = of_kind.setdefault(kinds[id(p)], {})[id(group)] = group
            group["params"] = [p for p in group["params"] if id(p) in index or id(p) not in old]
    for p in after.values():
        if id(p) in old or id(p) in news:
            continue
        found = list(of_kind.get(kinds[id(p)], homes).values())
        if len(found) == 1:
            held = found[0]["params"]
            stop = 1 + max(i for i, other in enumerate(held) if id(other) in index)
            held.insert(stop, p)
    for group in ordered:
        own = iter(sorted((p for p in group["params"] if id(p) in index), key=lambda p: index[id(p)]))
        group["params"] = [next(own) if id(p) in index else p for p in group["params"]]


def _rename(
    optimizer: Optimizer, moves: Moves, before: Mapping[int, str], after: Mapping[int, str], known: Mapping[int, str]
) -> None:
    """After ``_settle``: ``param_names`` of an optimizer that was built of named parameters.

    Args:
        before, after: names in the model, by id.
        known: ``_names_in`` of the optimizer before anything was changed.
    """
    olds = {id(move.new): id(move.old) for move in moves}
    # The names may begin with what stands before the model's own: those of a model that this one is a part of.
    own = ((name, before[key]) for key, name in known.items() if key in before)
    prefix = next((name.removesuffix(inner) for name, inner in own if name.endswith(inner)), "")
    for group in optimizer.param_groups:
        if "param_names" in group:
            group["param_names"] = [
                known[id(p)] if id(p) in known and id(p) not in olds else prefix + after[id(p)] for p in group["params"]
            ]


def _names_in(optimizer: Optimizer) -> dict[int, str]:
    """Names of the parameters of an optimizer that was built of named ones, by id."""
    rows = [zip(g["params"], g["param_names"], strict=True) for g in optimizer.param_groups if "param_names" in g]
    return {id(p): name for row in rows for p, name in row}


def _held(held: Container[int], moves: Moves) -> list[list[Move[nn.Parameter]]]:
    """``by_new`` of the moves of parameters that an optimizer holds.

    A parameter of which only some parts are held counts as a whole: ``_check_one`` refuses it.
    """
    return [group for group in by_new(moves) if any(id(move.old) in held for move in group)]


def _check_one(optimizer: Optimizer, homes: Mapping[int, int], group: Moves) -> None:
    """``homes``: per held parameter, by id, the number of its group."""
    places = {homes.get(id(move.old)) for move in group}
    if len(places) > 1:
        where = ", ".join("none" if i is None else str(i) for i in sorted(places, key=lambda i: -1 if i is None else i))
        raise ValueError(
            f"optimizers: {type(optimizer).__name__} has parameters in different groups ({where}) that become one "
            f"stacked parameter of shape {tuple(group[0].new.shape)}; give them one group, or build the optimizer "
            "after the swap"
        )
    states = [optimizer.state.get(move.old, {}) for move in group]
    for key in {key for state in states for key in state}:
        values = [state.get(key) for state in states]
        if any(value is None for value in values) and not all(value is None for value in values):
            raise ValueError(
                f"optimizers: {type(optimizer).__name__} has {key!r} of some parameters and not of others that become "
                "one; take a step in which all of them get a gradient, or build the optimizer after the swap"
            )
        if not _is_elementwise(values[0], group[0].old) and not all(_equal(value, values[0]) for value in values):
            raise ValueError(
                f"optimizers: {type(optimizer).__name__} has different {key!r} of parameters that become one; build "
                "the optimizer after the swap"
            )


def _state(optimizer: Optimizer, group: Moves) -> dict[str, Any]:
    """The state of the new parameter."""
    first: Mapping[str, Any] = optimizer.state.get(group[0].old, {})
    made: dict[str, Any] = {}
    for key, value in first.items():
        if not _is_elementwise(value, group[0].old):
            made[key] = value.clone() if isinstance(value, Tensor) else value
            continue
        # In memory as its parameter lies there: fused optimizers go through both from the first byte to the last.
        whole = torch.zeros_like(group[0].new, dtype=value.dtype, device=value.device, requires_grad=False)
        for move in group:
            whole[move.new_place] = optimizer.state[move.old][key][move.old_place]
        made[key] = whole
    return made


def _is_elementwise(value: Any, parameter: nn.Parameter) -> bool:
    """Whether an entry of the state has a number per element; a single number per parameter is a 0-d tensor."""
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0


def _equal(a: Any, b: Any) -> bool:
    if a is b or (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is b or torch.equal(a, b)
    try:
        return bool(a == b)
    except (TypeError, ValueError):  # arrays, say
        return False


def attributes_of(parameter: Tensor) -> dict[str, Any]:
    """What somebody has put on a parameter (``p.no_decay = True``), without what the compiler has."""
    return {name: value for name, value in vars(parameter).items() if not name.startswith("_dynamo")}


def check_attributes(moves: Moves) -> None:
    """Parameters that become one have equal attributes of a user's.

    Raises:
        ValueError: they have not.
    """
    for group in by_new(moves):
        first = attributes_of(group[0].old)
        for move in group[1:]:
            own = attributes_of(move.old)
            differing = [
                name
                for name in {**first, **own}
                if name not in first or name not in own or not _equal(first[name], own[name])
            ]
            if differing:
                raise ValueError(
                    f"parameters that become one of shape {tuple(group[0].new.shape)} have different attributes "
                    f"{', '.join(sorted(differing))}; give them equal ones, or set these afterwards"
                )


def move_attributes(moves: Moves) -> None:
    """Carry attributes over. Checked before."""
    for move in moves:
        vars(move.new).update(attributes_of(move.old))


def move_gradients(moves: Moves) -> None:
    """Carry gradients over.

    Raises:
        ValueError: some of the parameters that become one have a gradient and others have none.
    """
    for group in by_new(moves):
        grads = [move.old.grad for move in group]
        if all(grad is None for grad in grads):
            continue
        if any(grad is None for grad in grads):
            raise ValueError(
                "some parameters that become one have a gradient and others have none; call zero_grad() first"
            )
        whole = torch.zeros_like(group[0].new)
        for move, grad in zip(group, grads, strict=True):
            assert grad is not None
            whole[move.new_place] = grad[move.old_place]
        group[0].new.grad = whole

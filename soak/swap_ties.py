"""What a model shares between its modules, or with others, before it is accelerated, drawn at random."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from soak.swap_places import Subject, alike, inside, make_up, outside, places, sites_of, tensors_at


def a_module_twice(s: Subject, dice: random.Random) -> None:
    """An expert, a gate, a norm or a layer stands at two places."""
    if pair := alike(dice, inside(s.model) + outside(s.model)[:3], lambda place: make_up(place.module)):
        pair[0].put(pair[1].module)


def a_tensor_twice(s: Subject, dice: random.Random) -> None:
    """A parameter or a statistic is also that of another module."""
    rows = tensors_at([*inside(s.model), *outside(s.model)[:3]])
    if pair := alike(dice, rows, lambda one: (one.tensor.shape, type(one.tensor), one.tensor.dtype)):
        pair[0].home[pair[0].name] = pair[1].tensor


def one_memory(s: Subject, dice: random.Random) -> None:
    """Two parameters lie in the same memory, or overlap, or lie side by side, which is no tie."""
    rows = [one for one in tensors_at(inside(s.model)) if isinstance(one.tensor, nn.Parameter)]
    pair = alike(dice, rows, lambda one: one.tensor.shape)
    if pair is None or pair[0].tensor is pair[1].tensor:
        return
    shape, size = pair[0].tensor.shape, pair[0].tensor.numel()
    step = dice.choice((0, size // 2, size, size))
    flat = torch.cat([pair[0].tensor.detach().flatten(), pair[1].tensor.detach().flatten()])
    for number, one in enumerate(pair):
        one.home[one.name] = nn.Parameter(flat[number * step : number * step + size].view(shape))


def a_site_twice(s: Subject, dice: random.Random) -> None:
    """One level runs two times."""
    sites = {id(site) for _, site, _ in sites_of(s.model)}
    every = [place for name in s.model._modules for place in places(s.model, name, name)]
    rows = [place for place in every if id(place.module) in sites]
    if rows and (pair := alike(dice, rows, lambda place: make_up(place.module))):
        pair[0].put(pair[1].module)


class Decoder(nn.Module):
    """Somebody's module with a weight of another one."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight


def a_decoder(s: Subject, dice: random.Random) -> None:
    """A weight is tied to a module in the model, or outside of it."""
    weight = next(dice.choice(inside(s.model)).module.parameters(), None)
    if weight is None:
        return
    decoder = Decoder(weight)
    if dice.random() < 0.6:
        s.model.decoder = decoder
        s.penalties.append(lambda model: model.decoder.weight.square().mean())  # type: ignore[union-attr,operator]
    else:
        s.others.append(decoder)


def _penalty(module: Any) -> Tensor:
    return torch.stack([p.square().mean() for p in module.parameters()]).sum()


def _held(kind: str, module: nn.Module) -> Any:
    made: dict[str, Callable[[], Any]] = {
        "child": lambda: module,
        "list": lambda: [module],
        "dict": lambda: {"of": module},
        "object": lambda: SimpleNamespace(of=(module,)),
        "closure": lambda: lambda: _penalty(module),
        "partial": lambda: functools.partial(lambda one: one, module),
        "method": lambda: module.forward,
        "weights": lambda: list(module.parameters()),
    }
    return made[kind]()


def a_holder(s: Subject, dice: random.Random) -> None:
    """Something in the model leads to a module that it also has elsewhere."""
    place = dice.choice(inside(s.model))
    kind = dice.choice(("child", "child", "list", "dict", "object", "closure", "partial", "method", "weights"))
    owner: Any = s.model if dice.random() < 0.6 else dice.choice(outside(s.model)).module
    owner.aux = _held(kind, place.module)
    # The module in use: a penalty on its weights, by the way that leads to it.
    ways: dict[str, Callable[[nn.Module], Tensor]] = {
        "child": lambda model: _penalty(owner.aux),
        "list": lambda model: _penalty(owner.aux[0]),
        "dict": lambda model: _penalty(owner.aux["of"]),
        "closure": lambda model: owner.aux(),
    }
    if kind in ways:
        s.penalties.append(ways[kind])


def another_model(s: Subject, dice: random.Random) -> None:
    """Another model has one of the modules, too."""
    s.others.append(nn.ModuleList([dice.choice(inside(s.model)).module]))


TIES: dict[Callable[[Subject, random.Random], None], float] = {
    a_module_twice: 2,
    a_tensor_twice: 2,
    one_memory: 2,
    a_site_twice: 1,
    a_decoder: 1,
    a_holder: 2,
    another_model: 0.5,
}
"""How often each is drawn."""

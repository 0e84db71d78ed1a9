"""What stands where in a model that is about to be accelerated: modules and tensors inside and outside of its sites."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from ple_fast.convert import Converter
from ple_fast.convert.converter import find


@dataclass
class Subject:
    """A model to be changed."""

    model: nn.Module
    log: list[tuple[str, Tensor]] = field(default_factory=list)
    """What hooks have seen."""
    penalties: list[Callable[[nn.Module], Tensor]] = field(default_factory=list)
    """Terms of the loss."""
    others: list[Any] = field(default_factory=list)
    """Modules outside of the model, which live as long."""


class Place(NamedTuple):
    """A module where it stands."""

    path: str
    owner: nn.Module
    name: str
    module: nn.Module

    def put(self, module: nn.Module | None) -> None:
        """Put another one here."""
        self.owner._modules[self.name] = module


class Owned(NamedTuple):
    """A parameter or buffer where it stands."""

    path: str
    home: dict[str, Any]
    name: str
    tensor: Tensor


def sites_of(model: nn.Module) -> list[tuple[str, nn.Module, Converter]]:
    """What ``accelerate`` would look at."""
    found = [(path, module, find(module)) for path, module in model.named_modules()]
    return [(path, module, own) for path, module, own in found if isinstance(own, Converter)]


def inside(model: nn.Module) -> list[Place]:
    """The modules with tensors that a swap would replace."""
    made = []
    for path, site, converter in sites_of(model):
        for child in converter.children:
            if site._modules.get(child) is not None:
                made += places(site, child, f"{path}.{child}".lstrip("."))
    return [place for place in made if tensors_of(place.module)]


def outside(model: nn.Module) -> list[Place]:
    """The other modules with tensors, but for the sites and what holds them."""
    inner = {id(place.module) for place in inside(model)}
    every = [place for name in model._modules for place in places(model, name, name)]
    return [
        place for place in every if tensors_of(place.module) and not any(id(m) in inner for m in place.module.modules())
    ]


def places(owner: nn.Module, name: str, path: str) -> list[Place]:
    module = owner._modules[name]
    if module is None:
        return []
    rows = [Place(path, owner, name, module)]
    for child in module._modules:
        rows += places(module, child, f"{path}.{child}")
    return rows


def tensors_of(module: nn.Module, prefix: str = "") -> list[Owned]:
    """All parameters and buffers."""
    return [
        Owned(".".join(filter(None, (prefix, path, name))), home, name, tensor)
        for path, inner in module.named_modules()
        for home in (inner._parameters, inner._buffers)
        for name, tensor in home.items()
        if tensor is not None
    ]


def tensors_at(rows: list[Place]) -> list[Owned]:
    """All parameters and buffers of modules, each once where it stands."""
    found = {(id(o.home), o.name): o for place in rows for o in tensors_of(place.module, place.path)}
    return list(found.values())


def make_up(module: nn.Module) -> Any:
    """What a module must have to stand in the place of another one."""
    return type(module), [(one.path, one.tensor.shape) for one in tensors_of(module)]


def alike(dice: random.Random, rows: list[Any], key: Callable[[Any], Any]) -> tuple[Any, Any] | None:
    """Two different ones with the same key, at random: often those whose paths part early, in two levels, say."""
    first = dice.choice(rows)
    others = [other for other in rows if other is not first and key(other) == key(first)]
    if others and dice.random() < 0.6:
        far = min(_common(first.path, other.path) for other in others)
        others = [other for other in others if _common(first.path, other.path) == far]
    return (first, dice.choice(others)) if others else None


def _common(a: str, b: str) -> int:
    """How many parts of two paths agree from the beginning on."""
    pairs = list(zip(a.split("."), b.split("."), strict=False))
    return next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))

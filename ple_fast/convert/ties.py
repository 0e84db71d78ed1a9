"""What a site shares with the rest of the world: tensors and modules that a swap would tear apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .bystanders import enclosing, references

REMEDY = "the swap would part the two; give the site its own copy (copy.deepcopy)"


class Site(NamedTuple):
    """A module, and the children of it that a swap replaces."""

    path: str
    module: nn.Module
    children: Mapping[str, nn.Module]


class _Owned(NamedTuple):
    owner: nn.Module
    name: str
    tensor: Tensor
    sites: tuple[int, ...]
    """Those that it goes away with."""


def ties(model: nn.Module, sites: Sequence[Site], others: Sequence[nn.Module]) -> dict[int, str]:
    """Why a site cannot be swapped, by its number: each sentence names what is shared, and who else has it.

    Args:
        model: that has the sites.
        sites: what is about to be swapped.
        others: all modules of the process, those of the model among them.
    """
    return _Ties(model, sites, others).found if sites else {}


class _Ties:
    def __init__(self, model: nn.Module, sites: Sequence[Site], others: Sequence[nn.Module]) -> None:
        self.sites = sites
        self.found: dict[int, str] = {}
        self.names = {id(module): name for name, module in model.named_modules()}
        self.inner = [{id(m) for child in site.children.values() for m in child.modules()} for site in sites]
        self.own = [{id(m): name for name, m in site.module.named_modules(prefix=site.path)} for site in sites]
        self.homes: dict[int, tuple[int, ...]] = {}
        for i, inner in enumerate(self.inner):
            for key in inner:
                self.homes[key] = (*self.homes.get(key, ()), i)
        inside = list(model.modules())
        known = {id(module) for module in inside}
        outside = [module for module in others if id(module) not in known]
        self._modules([*inside, *outside])
        self._tensors([*inside, *outside])
        wanted = {id(module) for module in inside if id(module) in self.homes and _has_tensors(module)}
        rest = enclosing(model, outside)
        known |= {id(module) for module in rest}
        for holder in (*inside, *rest):
            for name, key in references(holder, wanted, known):
                for i in self.homes[key]:
                    if id(holder) not in self.inner[i]:
                        self._tie(i, self.own[i][key], f"in the attribute {self._name(holder, name)}")

    def _tie(self, i: int, what: str, where: str) -> None:
        self.found.setdefault(i, f"{what} is also {where}: {REMEDY}")

    def _name(self, owner: nn.Module, name: str) -> str:
        if id(owner) in self.names:
            return ".".join(filter(None, (self.names[id(owner)], name)))
        return f"{name} of a {type(owner).__name__} outside of the model"

    def _modules(self, owners: Sequence[nn.Module]) -> None:
        """Modules with tensors that somebody else has as a child, or the site itself at two places."""
        seen: dict[tuple[int, int], str] = {}
        for owner in owners:
            for name, child in owner._modules.items():
                for i in self.homes.get(id(child), ()):
                    if child is None or not _has_tensors(child):
                        continue
                    here = self._name(owner, name)
                    its_own = owner is self.sites[i].module and name in self.sites[i].children
                    if not its_own and id(owner) not in self.inner[i]:
                        self._tie(i, self.own[i][id(child)], here)
                    elif (i, id(child)) in seen:
                        self._tie(i, seen[i, id(child)], here)
                    else:
                        seen[i, id(child)] = here

    def _tensors(self, owners: Sequence[nn.Module]) -> None:
        """Tensors that are one object, or lie in the same memory, and do not go away together."""
        owned = [
            _Owned(owner, name, tensor, self.homes.get(id(owner), ()))
            for owner in owners
            for name, tensor in (*owner._parameters.items(), *owner._buffers.items())
            if tensor is not None
        ]
        for group in (*_same(owned), *_overlapping(owned)):
            for one in group:
                other = next(other for other in group if other is not one)
                for i in one.sites:
                    self._tie(i, self._name(one.owner, one.name), self._name(other.owner, other.name))


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _same(owned: Sequence[_Owned]) -> Iterator[list[_Owned]]:
    groups: dict[int, list[_Owned]] = {}
    for one in owned:
        groups.setdefault(id(one.tensor), []).append(one)
    yield from (group for group in groups.values() if len(group) > 1)


def _overlapping(owned: Sequence[_Owned]) -> Iterator[list[_Owned]]:
    """Groups of tensors whose memory meets; those of one file or one flat buffer lie side by side."""
    spans: list[tuple[str, int, int, int]] = []
    for number, one in enumerate(owned):
        t = one.tensor
        if type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided and not t.is_meta and t.numel():
            length = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            spans.append((str(t.device), t.data_ptr(), t.data_ptr() + length * t.element_size(), number))
    group: list[_Owned] = []
    place, stop = "", 0
    for device, start, end, number in sorted(spans):
        if device != place or start >= stop:
            if len(group) > 1:
                yield group
            group, place, stop = [], device, 0
        group.append(owned[number])
        stop = max(stop, end)
    if len(group) > 1:
        yield group

"""What the MMoE of a library is, one level over one input, and which of a library's classes a model or a trunk is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..modules import PLE, ExtractionNetwork
from ..topology import Topology
from .converter import LevelSource
from .library import Library, PlainLevel, make_up, tree
from .plain_layers import PlainLayer, PlainStack, kind


class MMoELibrary(Library):
    """A library's MMoE: the first of its ``children`` lists the experts, and another one has the gates."""

    site_in = ""
    """The attribute of a model that is the site; a module without it is the site."""

    def sites(self, model: nn.Module) -> Sequence[nn.Module]:
        found = getattr(model, self.site_in, model)
        return [found if isinstance(found, nn.Module) else model]

    def level(self, experts: Sequence[Any], gates: Sequence[Any]) -> list[LevelSource]:
        """What ``read`` gives: stacks per expert and per task."""
        return [LevelSource(Topology.mmoe(len(gates), len(experts)), experts, gates)]

    def trial(self, site: Any, draw: Callable[[int], Tensor]) -> tuple[Any, ...]:
        experts = getattr(site, self.children[0])
        return (draw(next(module for module in experts.modules() if isinstance(module, nn.Linear)).in_features),)

    def wired(self, ple: Any) -> bool:
        """Whether a trunk is an MMoE."""
        levels = [level for level in getattr(ple, "levels", ()) if isinstance(level, ExtractionNetwork)]
        if len(levels) != 1:
            return False
        topology = levels[0].topology
        return topology == Topology.mmoe(topology.num_mixtures, topology.num_experts)

    def write(self, levels: list[PlainLevel]) -> nn.Module:
        (level,) = levels
        if len({make_up(expert) for expert in level.experts}) > 1:
            self.cannot("all experts of its MMoE are made alike")
        return tree(self.lists(level.experts, level.gates))

    @abstractmethod
    def lists(self, experts: Sequence[Sequence[PlainLayer]], gates: Sequence[PlainStack]) -> dict[str, Any]:
        """The children by name, of experts that are made alike, and so are the gates.

        Raises:
            ValueError: the library cannot represent them.
        """

    def to_theirs(self, ple: nn.Module, target: nn.Module | None) -> nn.Module:
        if target is None:
            return super().to_theirs(ple, None)
        super().to_theirs(ple, *self.sites(target))
        return target


class Classes:
    """The classes of a library that ``from_X`` and ``to_X`` know: that of its PLE, then those of its MMoE."""

    def __init__(self, ple: Library, *others: MMoELibrary) -> None:
        self.ple, self.others = ple, others
        self.every: tuple[Library, ...] = (ple, *others)

    def to_ours(self, source: nn.Module | Mapping[str, Tensor], like: nn.Module | None, prefix: str) -> PLE:
        """``from_X``."""
        if isinstance(source, nn.Module):
            return self._of_model(source).to_ours(source, like, prefix)

        def names_in_it(library: Library) -> int:
            assert like is not None
            return sum(f"{prefix}{name}" in source for name in library.tree(like).state_dict())

        return self._of_trunk(like, names_in_it).to_ours(source, like, prefix)

    def to_theirs(self, ple: nn.Module, target: nn.Module | None) -> nn.Module:
        """``to_X``."""
        library = self._of_trunk(ple, lambda library: target is not None and _knows(library, target))
        return library.to_theirs(ple, target)

    def _of_model(self, model: nn.Module) -> Library:
        for library in self.every:
            if _knows(library, model):
                return library
        names = " or ".join(library.class_name for library in self.every)
        raise TypeError(f"expected a model of {self.ple.library} with levels like {names}, got {kind(model)}")

    def _of_trunk(self, ple: nn.Module | None, fit: Callable[[Library], int]) -> Library:
        """By its wiring; of several that have it the one that fits best, or else the first."""
        wired = [library for library in self.others if library.wired(ple)]
        if len(wired) < 2:
            return wired[0] if wired else self.ple
        return max(wired, key=fit)


def _knows(library: Library, model: nn.Module) -> bool:
    return all(map(library.recognises, library.sites(model)))

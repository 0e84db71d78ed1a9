"""What is known of classes of other libraries: how their levels are read, and what the fused model does instead."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from ..modules.unpack import Index, Move
from ..scalars import shown
from ..topology import Topology
from .pack import Packed, packed


@dataclass
class LevelSource:
    """One level of a library's network, as ``pack`` takes it."""

    topology: Topology
    experts: Sequence[Any]
    """One stack per expert: modules, in any nesting of lists."""
    gates: Sequence[Any]
    """One stack per mixture, None for a static one."""
    gate_input: Literal["previous", "with_shared", "raw"] | None = None
    unread: Sequence[nn.Module | Tensor] = ()
    """Tensors, and modules with tensors, that the library keeps beside the level and never reads."""
    offsets: Mapping[int, tuple[str, Index]] = field(default_factory=dict)
    """Per mixture whose gate ends in a ``WeightOffset`` made by the reader: the name of the library's tensor, and where
    in it the scalars lie. One that is missing here stands for constants of the library, and should be frozen."""
    constant: float | None = None
    """What those constants are, all of them: a model on the meta device does not show it."""
    splits: Collection[int] = ()
    """Experts that must not share parameters with the one before, because the library reads the gradients of one."""

    def unread_tensors(self) -> Iterator[Tensor]:
        """All tensors of ``unread``."""
        for item in self.unread:
            yield from [item] if isinstance(item, Tensor) else [*item.parameters(), *item.buffers()]

    def pack(self) -> Packed:
        """The fused level.

        Raises:
            TypeError, ValueError: as ``pack``.
        """
        return packed(self.experts, self.gates, self.topology, gate_input=self.gate_input, splits=self.splits)


class Converter(ABC):
    """Knows one class of a library: how to read its trunk, and what its methods become once the trunk is fused.

    A class is known by its name and its children, so the library need not be installed. The module that has the trunk
    is the *site*: a level, a stack of levels, or a whole model.
    """

    library: str
    """Of the class, as its users call it."""
    class_name: str
    children: tuple[str, ...]
    """Names of the site's children that the fused trunk replaces; one that a configuration leaves out is skipped."""
    methods: tuple[tuple[str, Callable[..., Any]], ...]
    """What stands in place of the site's methods: functions of the site, which has its fused levels in
    ``self.ple_fast.levels``."""
    trial_method = "forward"
    """The method that the trial run compares."""
    subclasses = False
    """Whether a subclass is taken that has inherited all of ``methods``: users of the library are given subclasses."""

    @property
    def name(self) -> str:
        """Library and class."""
        return f"{self.library} {self.class_name}"

    @abstractmethod
    def recognises(self, module: nn.Module) -> bool:
        """Whether a module of this class name is this library's: by its attributes."""

    @abstractmethod
    def read(self, site: nn.Module) -> list[LevelSource]:
        """The levels of the site, first to last.

        Raises:
            ValueError: what it computes cannot be represented; the message says why.
        """

    @abstractmethod
    def trial(self, site: nn.Module, draw: Callable[[int], Tensor]) -> tuple[Any, ...]:
        """Arguments of ``trial_method`` on random data: ``draw(width)`` is ``(rows, width)`` as the site wants it."""

    def trials(self, site: nn.Module, draw: Callable[[int], Tensor]) -> Iterable[tuple[Any, ...]]:
        """``trial``, once per call that the comparison needs: per level, say."""
        return [self.trial(site, draw)]

    def probes(self, site: nn.Module) -> Sequence[nn.Module]:
        """Modules that stay and read what the fused trunk gives: the trial run compares what reaches them, too."""
        return ()

    def settings(self, site: nn.Module) -> Any:
        """What the methods read of the replaced children besides tensors: they find it in ``self.ple_fast.settings``.

        Plain values, which copies and pickles take along.
        """
        return None

    def check_copy(self, site: nn.Module) -> None:
        """Refuse what the comparison in eval mode cannot see; ``site`` is a private copy, and may be run.

        Raises:
            ValueError: it computes something else; the message says what.
        """
        return

    def trained_unread(self, site: nn.Module) -> Sequence[nn.Parameter]:
        """Parameters of ``LevelSource.unread`` that get a gradient all the same, from a penalty, say."""
        return ()

    def renewed(self, site: nn.Module, moves: Sequence[Move[nn.Parameter]]) -> dict[str, Any]:
        """Values of the site's attributes that hold parameters, with new ones in the place of old ones.

        It is called before a swap in either direction, and leaves the site as it is.

        Raises:
            ValueError: they cannot be renewed; the message says why and what to do.
        """
        return {}

    def noted(self, site: nn.Module) -> Any:
        """The attributes of ``renewed`` by the names of the parameters, so that it survives a copy; None: no note."""
        return None

    def recalled(self, site: nn.Module, note: Any) -> dict[str, Any]:
        """Values of the attributes out of ``noted``, which was called when the site was in its present form."""
        return {}


def random_ids(draw: Callable[[int], Tensor], width: int, vocabulary: int) -> Tensor:
    """Ids ``(rows, width)`` for a trial run, as ``draw`` has its device; small enough to be exact in every dtype."""
    return (draw(width).float().abs() * 1000).long() % min(vocabulary, 256)


_CONVERTERS: list[Converter] = []
_REFUSED: list[tuple[str, Callable[[nn.Module], bool], str]] = []


def register(converter: Converter) -> None:
    """Make ``accelerate`` know a class; the last one that is registered for a class comes first.

    Raises:
        TypeError: it is no ``Converter``.
    """
    if not isinstance(converter, Converter):
        raise TypeError(f"converter: expected a ple_fast.convert.Converter, got {shown(converter)}")
    _CONVERTERS.insert(0, converter)


def refuse_class(class_name: str, is_it: Callable[[nn.Module], bool], why: str) -> None:
    """Make ``accelerate`` say why a known class is left as it is."""
    _REFUSED.append((class_name, is_it, why))


def find(module: nn.Module) -> Converter | str | None:
    """The converter of a module, or why there is none although its class is known, or None."""
    names = [cls.__name__ for cls in type(module).__mro__]
    for converter in _CONVERTERS:
        if converter.class_name not in names:
            continue
        try:
            is_known = converter.recognises(module)
        except Exception as error:
            return f"{converter.name}: recognises failed with {error!r}"
        if is_known:
            if type(module).__name__ == converter.class_name or _inherits(type(module), converter):
                return converter
            return (
                f"is a subclass of {converter.class_name}, whose methods may compute something else; register a "
                "converter for it (ple_fast.convert.register)"
            )
    for class_name, is_it, why in _REFUSED:
        if class_name not in names:
            continue
        try:
            if is_it(module):
                return why
        except Exception as error:
            return f"whether it is a known {class_name} cannot be told, because looking at it failed with {error!r}"
    return None


def _inherits(cls: type[nn.Module], converter: Converter) -> bool:
    """Whether a subclass runs the methods of the known class, and the library hands such subclasses out."""
    known = next(base for base in cls.__mro__ if base.__name__ == converter.class_name)
    same = (getattr(cls, name, None) is getattr(known, name, None) for name, _ in converter.methods)
    return converter.subclasses and all(same)


def converter_named(name: str) -> Converter:
    """The registered converter of that name."""
    return next(converter for converter in _CONVERTERS if converter.name == name)

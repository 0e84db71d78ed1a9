"""Which part of which fused tensor is which tensor of the modules that a level was built of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from ..modules import ExtractionNetwork
from ..modules.layers import ExpertBlock, Gate, StackedDice, StackedLayer
from ..modules.unpack import Part, gate_parts, layer_parts, offset_part
from ..topology import Topology
from .pack import Packed, packed
from .stacks import PlainLayer

Index = int | slice | EllipsisType


@dataclass
class LevelSource:
    """One level of a library's network, as ``pack`` takes it."""

    topology: Topology
    experts: Sequence[Any]
    """One stack per expert: modules, in any nesting of lists."""
    gates: Sequence[Any]
    """One stack per mixture, None for a static one."""
    gate_input: Literal["previous", "raw"] | None = None
    unread: Sequence[nn.Module | Tensor] = ()
    """Tensors, and modules with tensors, that the library keeps beside the level and never reads."""
    offsets: Mapping[int, tuple[str, Index]] = field(default_factory=dict)
    """Per mixture whose gate ends in a ``WeightOffset`` made by the reader: the name of the library's tensor, and where
    in it the scalars lie. One that is missing here stands for constants of the library, and should be frozen."""
    constant: float | None = None
    """What those constants are, all of them: a model on the meta device does not show it."""

    def unread_tensors(self) -> Iterator[Tensor]:
        """All tensors of ``unread``."""
        for item in self.unread:
            yield from [item] if isinstance(item, Tensor) else [*item.parameters(), *item.buffers()]

    def pack(self) -> Packed:
        """The fused level.

        Raises:
            TypeError, ValueError: as ``pack``.
        """
        return packed(self.experts, self.gates, self.topology, gate_input=self.gate_input)


class Piece(NamedTuple):
    """A tensor of a library's module, or a part of it, and where it lies in a fused one."""

    original: str
    """Its name, from the site on: the module whose trunk was fused."""
    inside: Index
    """The part of the original; mostly the whole, ``...``."""
    fused: str
    """The name of the fused tensor, from the trunk on."""
    place: Index
    """The part of the fused tensor."""


class Constant(NamedTuple):
    """Learned scalars of ours that are constants of the library."""

    fused: str
    """The name of the fused tensor, from the trunk on."""
    place: Index
    """The part of the fused tensor."""
    value: float


class Twin(NamedTuple):
    """Two modules whose train or eval mode is one."""

    original: str
    fused: str


class _Names:
    """Names of modules and tensors by identity."""

    def __init__(self, site: nn.Module, level: ExtractionNetwork, prefix: str) -> None:
        self.modules = {id(module): name for name, module in site.named_modules()}
        self.tensors = {
            id(tensor): prefix + name for name, tensor in [*level.named_parameters(), *level.named_buffers()]
        }
        self.fused = {id(module): (prefix + name).removesuffix(".") for name, module in level.named_modules()}

    def piece(self, part: Part, module: nn.Module) -> Piece:
        owner = self.modules[id(module)]
        return Piece(f"{owner}.{part.name}", ..., self.tensors[id(part.stacked)], part.place)


def pieces_of(
    site: nn.Module, source: LevelSource, found: Packed, prefix: str
) -> tuple[list[Piece], list[Twin], list[Constant]]:
    """Every tensor of a level's modules, named from ``site`` on, with its place; the modules that share a mode; and
    what is in none of the tensors.

    ``prefix``: of the level's names in the fused trunk.
    """
    level, names = found.level, _Names(site, found.level, prefix)
    pieces: list[Piece] = []
    twins: list[Twin] = []
    constants: list[Constant] = []
    for layer, row, plain in _layers(found):
        pieces += [names.piece(part, plain.modules[part.role]) for part in layer_parts(layer, row)]
        twins += _twins(names, layer, plain)
    topology, gate = level.topology, level.gate
    assert isinstance(gate, Gate)
    for o in topology.gated_mixtures:
        last, first = found.gates[o].layers[-1], topology.logit_offset[o]
        rows = slice(first, first + len(topology.mixture_experts[o]))
        pieces += [names.piece(part, last.modules[part.role]) for part in gate_parts(gate, rows)]
        for role, module in last.modules.items():
            fused: nn.Module = gate if role == "linear" or gate.norm is None else gate.norm
            twins.append(Twin(names.modules[id(module)], names.fused[id(fused)]))
    for o, stack in enumerate(found.gates):
        offset = offset_part(level, o)
        if offset is None or stack.offset is None:
            continue
        if o in source.offsets:
            name, inside = source.offsets[o]
            pieces.append(Piece(name, inside, names.tensors[id(offset.stacked)], offset.place))
        elif id(stack.offset) in names.modules:
            pieces.append(names.piece(offset, stack.offset))
        elif source.constant is not None:
            constants.append(Constant(names.tensors[id(offset.stacked)], offset.place, source.constant))
    return pieces, twins, constants


def _layers(found: Packed) -> Iterator[tuple[StackedLayer, int, PlainLayer]]:
    """Every stacked layer with a row of it, and the ordinary layer that the row came from."""
    level = found.level
    for block in level.blocks:
        assert isinstance(block, ExpertBlock)
        start, stop = block.experts
        for e in range(start, stop):
            for layer, plain in zip(block.layers, found.experts[e].layers, strict=True):
                assert isinstance(layer, StackedLayer)
                yield layer, e - start, plain
    for row, o in enumerate(level.topology.gated_mixtures):
        for layer, plain in zip(level.gate.layers, found.gates[o].layers[:-1], strict=True):
            assert isinstance(layer, StackedLayer)
            yield layer, row, plain


def _twins(names: _Names, layer: StackedLayer, plain: PlainLayer) -> Iterable[Twin]:
    """The modules of an ordinary layer, each with the stacked one that has its mode."""
    stacked: dict[str, nn.Module | None] = {"norm": layer.norm, "activation": layer.activation}
    if isinstance(layer.activation, StackedDice):
        stacked["dice_norm"] = layer.activation.norm
    modules = {**plain.modules, "dropout": plain.dropout}
    for role, module in modules.items():
        if module is not None:
            fused = stacked.get(role) or layer
            yield Twin(names.modules[id(module)], names.fused[id(fused)])

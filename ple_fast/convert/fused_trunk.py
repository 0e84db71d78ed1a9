"""The fused trunk of a site, which knows where in it each tensor of the library lies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..modules import ExtractionNetwork
from ..modules.unpack import Index, Move, offset_move, tensor_named
from .converter import Converter, LevelSource
from .pack import Packed
from .plain_layers import check_bare

StateStyle = Literal["original", "fused"]
CHILD = "ple_fast"
"""Name of the fused trunk in its site."""


class Constant(NamedTuple):
    """Learned scalars of ours that are constants of the library: a checkpoint of its names says nothing of them."""

    fused: str
    """The name of the fused tensor, from the trunk on."""
    place: Index
    """The part of the fused tensor."""
    value: float


class FusedTrunk(nn.Module):
    """What stands in a site in place of the replaced children: ``levels``, tensors that nothing reads, and what the
    way back and the library's names need.

    Args:
        levels: in order.
        entries: the names in the site's state dict, in order.
        style: of its state dict.
    """

    def __init__(self, levels: list[ExtractionNetwork], entries: Sequence[str], style: StateStyle) -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.unread = nn.Module()
        self.entries, self.style = tuple(entries), style
        self.moves: list[Move[str]] = []
        """Per tensor of the library, named from the site on, its place in a fused one, named from the trunk on."""
        self.modes: dict[str, list[str]] = {}
        """Per fused module the names of the library's that have its mode."""
        self.constants: list[Constant] = []
        self.skeleton: dict[str, nn.Module] = {}
        """The replaced children, on the meta device."""
        self.order: tuple[str, ...] = ()
        """All children of the site."""
        self.settings: Any = None
        """``Converter.settings`` of the site."""
        self.notes: tuple[Any, Any] = (None, None)
        """``Converter.noted`` before and after the swap."""

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer by name."""
        found = tensor_named(self, name)
        assert isinstance(found, Tensor)
        return found

    def original(self, name: str) -> Any:
        """A replaced module, parameter or buffer by its name in the site."""
        first, _, rest = name.partition(".")
        owner, _, last = rest.rpartition(".")
        inner = self.skeleton[first].get_submodule(owner)
        return getattr(inner, last) if last else inner

    def by_original(self) -> dict[str, list[Move[str]]]:
        """The moves of every tensor of the library, by its name."""
        parts: dict[str, list[Move[str]]] = {}
        for move in self.moves:
            parts.setdefault(move.old, []).append(move)
        return parts

    def assembled(self, moves: Sequence[Move[str]]) -> Tensor:
        """A tensor of the library, of which these are all moves, out of the fused ones."""
        fused = self.tensor(moves[0].new)
        value = torch.empty(self.original(moves[0].old).shape, dtype=fused.dtype, device=fused.device)
        for move in moves:
            value[move.old_place].copy_(self.tensor(move.new).detach()[move.new_place])
        return value


def build(site: nn.Module, converter: Converter, style: StateStyle) -> FusedTrunk:
    """The fused trunk of a site, which is left as it is.

    Raises:
        TypeError, ValueError: something in it cannot be packed or represented.
    """
    for name, _ in converter.methods:
        if name in vars(site):
            raise ValueError(
                f"its {name} was replaced on the instance, so the fused levels would not run; restore it first"
            )
    sources = converter.read(site)
    replaced = replaced_by(converter, site)
    for name, child in replaced.items():
        for inner, module in child.named_modules():
            check_bare(f"{name}.{inner}".removesuffix("."), module)
    made = [source.pack() for source in sources]
    trunk = FusedTrunk([found.level for found in made], tuple(entries_of(site)), style)
    trunk.training, trunk.settings = site.training, converter.settings(site)
    for i, (source, found) in enumerate(zip(sources, made, strict=True)):
        _name_level(trunk, f"levels.{i}", site, source, found)
    tensors = {name: tensor for name, tensor in tensors_of(site) if name.partition(".")[0] in replaced}
    _hold_unread(trunk, tensors, [t for source in sources for t in source.unread_tensors()], converter, site)
    known = {move.old for move in trunk.moves}
    lost, foreign = sorted(tensors.keys() - known), sorted(known - tensors.keys())
    if lost or foreign:
        raise ValueError(
            f"{converter.name}: expected the tensors that this version of ple_fast knows; unknown {lost}, missing "
            f"{foreign}: the module is of another version or was changed"
        )
    return trunk


def _name_level(trunk: FusedTrunk, path: str, site: nn.Module, source: LevelSource, found: Packed) -> None:
    """Note in the trunk every tensor of a level's modules, by name, and the modules that share a mode."""
    theirs = {id(module): name for name, module in site.named_modules()}
    ours = {id(module): f"{path}.{name}".removesuffix(".") for name, module in found.level.named_modules()}
    for placed in found.layers:
        modules, home = placed.plain.modules, ours[id(placed.stacked)]
        for move in placed.moves:
            role, _, name = move.old.partition(".")
            old, new = f"{theirs[id(modules[role])]}.{name}", f"{home}.{move.new}"
            trunk.moves.append(Move(old, move.old_place, new, move.new_place))
        for role, module in {**modules, "dropout": placed.plain.dropout}.items():
            if module is not None:
                trunk.modes.setdefault(ours[id(placed.holder(role))], []).append(theirs[id(module)])
    for o, offset in found.offsets.items():
        scalars = offset_move(found.level, o)
        assert scalars is not None
        new = f"{path}.gate.{scalars.new}"
        if o in source.offsets:
            trunk.moves.append(Move(*source.offsets[o], new, scalars.new_place))
        elif id(offset) in theirs:
            trunk.moves.append(Move(f"{theirs[id(offset)]}.weight", ..., new, scalars.new_place))
        elif source.constant is not None:
            trunk.constants.append(Constant(new, scalars.new_place, source.constant))


def _hold_unread(
    trunk: FusedTrunk, tensors: Mapping[str, Tensor], unread: Sequence[Tensor], converter: Converter, site: nn.Module
) -> None:
    """Keep what nothing reads: a buffer, unless something still trains it; a parameter without gradient breaks DDP."""
    wanted = {id(tensor) for tensor in unread}
    trained = {id(p) for p in converter.trained_unread(site)}
    for i, (name, tensor) in enumerate((name, t) for name, t in tensors.items() if id(t) in wanted):
        value = tensor.detach().clone()
        if id(tensor) in trained:
            trunk.unread.register_parameter(str(i), nn.Parameter(value, requires_grad=tensor.requires_grad))
        else:
            trunk.unread.register_buffer(str(i), value)
        trunk.moves.append(Move(name, ..., f"unread.{i}", ...))


def replaced_by(converter: Converter, site: nn.Module) -> dict[str, nn.Module]:
    """The children of a site that a swap replaces."""
    children = {name: site._modules.get(name) for name in converter.children}
    return {name: child for name, child in children.items() if child is not None}


def part_of(tensor: Tensor, index: Index) -> Tensor:
    """A part, or the whole itself."""
    return tensor if index is ... else tensor[index]


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, under every name."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def entries_of(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names in a state dict, in order, without calling the hooks of one."""
    unsaved = module._non_persistent_buffers_set
    yield from (prefix + name for name, value in module._parameters.items() if value is not None)
    yield from (prefix + name for name, value in module._buffers.items() if value is not None and name not in unsaved)
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        yield f"{prefix}_extra_state"
    for name, child in module._modules.items():
        if child is not None:
            yield from entries_of(child, f"{prefix}{name}.")

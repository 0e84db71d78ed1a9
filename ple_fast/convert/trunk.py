"""The fused trunk of a site, with the record of which tensor of the library lies where in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..modules import ExtractionNetwork
from .pieces import Constant, Index, Piece, Twin

StateStyle = Literal["original", "fused"]
CHILD = "ple_fast"
"""Name of the fused trunk in its site."""


@dataclass
class Record:
    """What the way back, and the names of the original, need to know."""

    converter: str
    pieces: tuple[Piece, ...]
    unread: dict[str, str]
    """Names of tensors that the library never reads, with theirs in the fused trunk."""
    twins: tuple[Twin, ...]
    skeleton: dict[str, nn.Module]
    """The replaced children, on the meta device."""
    children: tuple[str, ...]
    """All children of the site, in order."""
    names: tuple[str, ...]
    """The entries of the site's state dict, in order."""
    style: StateStyle
    notes: tuple[Any, Any] = (None, None)
    """``Converter.noted`` before and after the swap."""
    constants: tuple[Constant, ...] = ()
    """What no tensor of the library has: a checkpoint of its names says nothing of it."""


class FusedTrunk(nn.Module):
    """What stands in a site in place of the replaced children: ``levels``, and tensors that nothing reads."""

    def __init__(self, levels: list[ExtractionNetwork]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.unread = nn.Module()
        self.record: Record | None = None

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer by name."""
        found = tensor_named(self, name)
        assert isinstance(found, Tensor)
        return found


def part_of(tensor: Tensor, index: Index) -> Tensor:
    """A part, or the whole."""
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


def by_original(record: Record) -> dict[str, list[Piece]]:
    """The pieces of every tensor of the library, by its name."""
    parts: dict[str, list[Piece]] = {}
    for piece in all_pieces(record):
        parts.setdefault(piece.original, []).append(piece)
    return parts


def assembled(record: Record, trunk: FusedTrunk, name: str, parts: list[Piece]) -> Tensor:
    """A tensor of the library, out of the fused ones."""
    fused = trunk.tensor(parts[0].fused)
    value = torch.empty(skeleton_tensor(record, name).shape, dtype=fused.dtype, device=fused.device)
    for piece in parts:
        part_of(value, piece.inside).copy_(part_of(trunk.tensor(piece.fused).detach(), piece.place))
    return value


def record_of(trunk: FusedTrunk) -> Record:
    """Of a trunk that ``build`` has made."""
    assert trunk.record is not None
    return trunk.record


def all_pieces(record: Record) -> list[Piece]:
    """With those that nothing reads."""
    return [*record.pieces, *(Piece(name, ..., held, ...) for name, held in record.unread.items())]


def tensor_named(module: nn.Module, name: str) -> Any:
    """A parameter or buffer."""
    owner, _, last = name.rpartition(".")
    return getattr(module.get_submodule(owner), last)


def skeleton_module(record: Record, name: str) -> nn.Module:
    """A replaced module, by its name in the site."""
    first, _, rest = name.partition(".")
    return record.skeleton[first].get_submodule(rest)


def skeleton_tensor(record: Record, name: str) -> Any:
    """A parameter or buffer of a replaced module."""
    owner, _, last = name.rpartition(".")
    return getattr(skeleton_module(record, owner), last)

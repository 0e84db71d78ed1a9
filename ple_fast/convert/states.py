"""The state dict of a site: from fused tensors to the library's names, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .pieces import Piece
from .trunk import (
    CHILD,
    FusedTrunk,
    Record,
    all_pieces,
    assembled,
    by_original,
    part_of,
    record_of,
    skeleton_tensor,
    tensors_of,
)


def to_original(trunk: FusedTrunk, state: dict[str, Any], prefix: str) -> None:
    """Rename and cut the entries of a site in ``state``, which end up in the library's order."""
    record, own = record_of(trunk), f"{prefix}{CHILD}."
    section = {name: state.pop(name) for name in [*state] if name.startswith(prefix)}
    parts = by_original(record)
    whole = Counter(piece.fused for piece in all_pieces(record) if piece.place is ...)
    for name in record.names:
        if name in parts:
            first = parts[name][0]
            value = (
                part_of(section[own + first.fused], first.place)
                if first.inside is ...
                else assembled(record, trunk, name, parts[name])
            )
            # A counter that several layers share: each entry has memory of its own, or safetensors would refuse them.
            state[prefix + name] = value.clone() if whole[first.fused] > 1 else value
        elif prefix + name in section:
            state[prefix + name] = section.pop(prefix + name)
    state.update({name: value for name, value in section.items() if not name.startswith(own)})
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        for name in [name for name in metadata if name == own[:-1] or name.startswith(own)]:
            del metadata[name]
        for child, module in record.skeleton.items():
            for name, inner in module.named_modules():
                metadata[f"{prefix}{child}{'.' if name else ''}{name}"] = {"version": inner._version}


@torch.inference_mode(False)
@torch.no_grad()
def to_fused(
    trunk: FusedTrunk,
    state: dict[str, Any],
    prefix: str,
    assign: bool,
    missing: list[str],
    errors: list[str],
) -> None:
    """Put fused entries in the place of the library's, as far as ``state`` has them; the rest keeps its value."""
    record = record_of(trunk)
    groups: dict[str, list[Piece]] = {}
    for piece in all_pieces(record):
        groups.setdefault(piece.fused, []).append(piece)
    given = {name: state.pop(name) for name in [prefix + p.original for p in all_pieces(record)] if name in state}
    values = {name: tensor.detach() for name, tensor in tensors_of(trunk)}
    for name, pieces in groups.items():
        fitting = _fitting(record, pieces, given, prefix, errors)
        if not fitting:
            continue
        lost = [prefix + piece.original for piece in pieces if prefix + piece.original not in given]
        if assign and lost and values[name].is_meta:
            errors.append(f"{', '.join(lost)}: missing; the rest of the stacked tensor cannot leave the meta device")
            continue
        fused = _begun(values[name], fitting[0][1] if assign else values[name])
        for piece, value in fitting:
            part_of(fused, piece.place).copy_(part_of(value, piece.inside))
        values[name] = fused
    saved = set(record.names)
    absent = sorted(piece.original for piece in all_pieces(record) if prefix + piece.original not in given)
    missing += [prefix + name for name in absent if name in saved]
    like = next((value for value in given.values() if value.is_floating_point()), None)
    for name, place, number in record.constants if like is not None else ():
        fused = values[name]
        values[name] = fused = _begun(fused, like if assign and fused.is_meta else fused)
        part_of(fused, place).fill_(number)
    state.update({f"{prefix}{CHILD}.{name}": value for name, value in values.items()})


def _fitting(
    record: Record, pieces: Sequence[Piece], given: Mapping[str, Tensor], prefix: str, errors: list[str]
) -> list[tuple[Piece, Tensor]]:
    """What a checkpoint has of a fused tensor; what does not fit is an error."""
    found: list[tuple[Piece, Tensor]] = []
    for piece in pieces:
        name = prefix + piece.original
        if name not in given:
            continue
        value, expected = given[name], skeleton_tensor(record, piece.original).shape
        if value.shape != expected:
            errors.append(f"size mismatch for {name}: expected {tuple(expected)}, got {tuple(value.shape)}")
            continue
        found.append((piece, value))
        first = found[0][1]
        if piece.place is ... and piece.inside is ... and not value.is_meta and not value.equal(first):
            errors.append(
                f"{name}: expected {first}, as in the experts that share its stacked layer, got {value}; "
                "restore(model), load, and accelerate again"
            )
    return found


def _begun(fused: Tensor, like: Tensor | None) -> Tensor:
    """A tensor to load into: the values so far, of the dtype and on the device of ``like``."""
    assert like is not None
    made = torch.zeros_like(fused, dtype=like.dtype, device=like.device)
    return made if fused.is_meta else made.copy_(fused)

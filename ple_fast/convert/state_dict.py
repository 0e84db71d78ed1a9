"""The state dict of a site: from fused tensors to the library's names, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..modules.unpack import Move
from .fused_trunk import CHILD, FusedTrunk, part_of, tensors_of


def to_original(trunk: FusedTrunk, state: dict[str, Any], prefix: str) -> None:
    """Rename and cut the entries of a site in ``state``, which end up in the library's order."""
    own, moves = f"{prefix}{CHILD}.", trunk.by_original()
    section = {name: state.pop(name) for name in [*state] if name.startswith(prefix)}
    whole = Counter(move.new for move in trunk.moves if move.new_place is ...)
    for name in trunk.entries:
        if name in moves:
            first = moves[name][0]
            is_whole = first.old_place is ...
            value = part_of(section[own + first.new], first.new_place) if is_whole else trunk.assembled(moves[name])
            # A counter that several layers share: each entry has memory of its own, or safetensors would refuse them.
            state[prefix + name] = value.clone() if whole[first.new] > 1 else value
        elif prefix + name in section:
            state[prefix + name] = section.pop(prefix + name)
    state.update({name: value for name, value in section.items() if not name.startswith(own)})
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        for name in [name for name in metadata if name == own[:-1] or name.startswith(own)]:
            del metadata[name]
        for child, module in trunk.skeleton.items():
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
    groups: dict[str, list[Move[str]]] = {}
    for move in trunk.moves:
        groups.setdefault(move.new, []).append(move)
    given = {name: state.pop(name) for name in [prefix + move.old for move in trunk.moves] if name in state}
    values = {name: tensor.detach() for name, tensor in tensors_of(trunk)}
    for name, moves in groups.items():
        fitting = _fitting(trunk, moves, given, prefix, errors)
        if not fitting:
            continue
        lost = [prefix + move.old for move in moves if prefix + move.old not in given]
        if assign and lost and values[name].is_meta:
            errors.append(f"{', '.join(lost)}: missing; the rest of the stacked tensor cannot leave the meta device")
            continue
        fused = _begun(values[name], fitting[0][1] if assign else values[name])
        for move, value in fitting:
            fused[move.new_place].copy_(value[move.old_place])
        values[name] = fused
    absent = sorted({move.old for move in trunk.moves if prefix + move.old not in given})
    missing += [prefix + name for name in absent if name in trunk.entries]
    like = next((value for value in given.values() if value.is_floating_point()), None)
    for name, place, number in trunk.constants if like is not None else ():
        fused = values[name]
        values[name] = fused = _begun(fused, like if assign and fused.is_meta else fused)
        fused[place].fill_(number)
    state.update({f"{prefix}{CHILD}.{name}": value for name, value in values.items()})


def _fitting(
    trunk: FusedTrunk, moves: Sequence[Move[str]], given: Mapping[str, Tensor], prefix: str, errors: list[str]
) -> list[tuple[Move[str], Tensor]]:
    """What a checkpoint has of a fused tensor; what does not fit is an error."""
    found: list[tuple[Move[str], Tensor]] = []
    for move in moves:
        name = prefix + move.old
        if name not in given:
            continue
        value, expected = given[name], trunk.original(move.old).shape
        if value.shape != expected:
            errors.append(f"size mismatch for {name}: expected {tuple(expected)}, got {tuple(value.shape)}")
            continue
        found.append((move, value))
        first = found[0][1]
        if move.new_place is ... and move.old_place is ... and not value.is_meta and not value.equal(first):
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

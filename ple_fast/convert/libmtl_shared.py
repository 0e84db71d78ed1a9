"""What LibMTL's weightings read of a model: the shared parameters, their gradients, and vectors that lie like these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.unpack import Move
from .swap import Accelerated

SHARED = "experts_shared"
"""The child whose parameters are shared; those of gates are not."""


def get_share_params(self: Any) -> Iterator[nn.Parameter]:
    """The shared parameters of an accelerated model."""
    trunk = self.trunk()
    names = dict.fromkeys(move.new for move in trunk.moves if move.old.startswith(f"{SHARED}."))
    return (found for found in map(trunk.tensor, names) if isinstance(found, nn.Parameter))


def zero_grad_share_params(self: Any) -> None:
    """Set their gradients to zero, not to None."""
    for parameter in get_share_params(self):
        if parameter.grad is not None:  # in place, as it may be a part of a bucket
            if parameter.grad.grad_fn is None:
                parameter.grad.requires_grad_(False)
            else:
                parameter.grad.detach_()
            parameter.grad.zero_()


def renewed(site: Any, moves: Sequence[Move[nn.Parameter]]) -> dict[str, Any]:
    """Attributes of weightings that say how the vector of all shared gradients lies, and what lies in the same way.

    Raises:
        ValueError: GradVac has begun to compare gradients parameter by parameter.
    """
    kept = vars(site)
    if "grad_index" not in kept:
        return {}
    if kept.get("k_idx") == kept["grad_index"]:
        raise ValueError(
            "k_idx: GradVac has begun to compare gradients parameter by parameter (GradVac_group_type=2), and the "
            "parameters become others; accelerate before the first step, or take GradVac_group_type=0"
        )
    old = list(site.get_share_params())
    held = {id(parameter) for parameter in old}
    if isinstance(site, Accelerated):
        new = list(site.trunk().skeleton[SHARED].parameters())
    else:
        new = list({id(move.new): move.new for move in moves if id(move.old) in held}.values())
    order = _order(old, new, moves)
    found: dict[str, Any] = {"grad_index": [parameter.numel() for parameter in new]}
    for name, value in kept.items():
        if isinstance(value, Tensor) and value.dim() and value.shape[-1] == len(order):
            found[name] = value[..., order.to(value.device)]
    return found


def _order(old: Sequence[Tensor], new: Sequence[Tensor], moves: Sequence[Move[nn.Parameter]]) -> Tensor:
    """Per element of the new vector the place in the old one."""
    where: dict[str, Any] = {"device": "cpu", "dtype": torch.int64}
    places, start = {}, 0
    for parameter in old:
        places[id(parameter)] = torch.arange(start, start + parameter.numel(), **where).view(parameter.shape)
        start += parameter.numel()
    made = {id(parameter): torch.zeros(parameter.shape, **where) for parameter in new}
    for move in moves:
        if id(move.old) in places and id(move.new) in made:
            made[id(move.new)][move.new_place] = places[id(move.old)][move.old_place]
    return torch.cat([made[id(parameter)].flatten() for parameter in new])

"""Losses that keep the gates of a level from leaving experts idle, from what a trunk returns with
``return_gates="shares"``.

With p the softmax of a gate over all n experts that it weighs, and f how often it chooses each of them (k a row), both
averaged over the batch, a balanced gate has ``(n / k) sum_e f_e p_e = 1`` (Fedus et al., JMLR 2022, eq. 4-6, where k is
1). Gradients flow through p. A gate that takes all of its experts has no f: p stands in its place, and the sum of
squares is least where all shares are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..functional import GateShares
from ..scalars import shown

Balance = Literal["gate", "level"]
BALANCES = ("gate", "level")


def balance_loss(levels: Sequence[GateShares], over: Balance) -> Tensor:
    """1 where the gates are balanced, and more elsewhere; the mean over levels, 0-dimensional.

    Args:
        levels: per level, as a trunk returns them; those without gates are left out.
        over: ``"gate"``: each gate by itself, the mean over all gates of a level. ``"level"``: f and p are those of all
            gates of the level together, and n its experts (SMES, arXiv 2602.09386), so that a gate may prefer what
            others leave.

    Raises:
        TypeError: other than shares by level.
        ValueError: no level has a gate.
    """
    given: Any = levels
    if isinstance(given, GateShares) or not isinstance(given, Sequence):
        raise TypeError(f"gates: expected one GateShares per level, got {shown(levels)}: [gates] is one level's")
    terms = []
    for place, level in enumerate(levels):
        if not isinstance(level, GateShares):
            raise TypeError(
                f"gates[{place}]: expected GateShares, got {type(level).__name__}; call the trunk with "
                'return_gates="shares"'
            )
        if level.experts:
            terms.append(_per_gate(level) if over == "gate" else _over_gates(level))
    if not terms:
        raise ValueError("gates: expected a level with gates to balance, got none")
    return torch.stack(terms).mean()


def _means(level: GateShares) -> tuple[Tensor, Tensor]:
    """f over the k of its gate, so that it sums to 1, and p, both ``(gates, E)``; 0 for no rows."""
    rows = max(level.shares.shape[0], 1)
    p = level.shares.sum(0) / rows
    if level.chosen is None:
        return p, p
    f = level.chosen.sum(0).to(p.dtype)
    return f / f.sum(1, keepdim=True).clamp(min=1.0), p


def _per_gate(level: GateShares) -> Tensor:
    f, p = _means(level)
    sizes = torch.tensor([len(own) for own in level.experts], dtype=p.dtype, device=p.device)
    return (sizes * (f * p).sum(1)).mean()


def _over_gates(level: GateShares) -> Tensor:
    f, p = (values.mean(0) for values in _means(level))
    return f.shape[0] * (f * p).sum()

"""The wiring that the libraries' levels have in common, and their outputs as lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from ..topology import Topology


def ple_wiring(
    own: Sequence[int], shared: int, *, shared_gate: bool, shared_gate_scope: Literal["all", "shared"] = "all"
) -> Topology:
    """A level with a slot per task and one for what is shared, also where no expert is shared.

    Unlike ``Topology.ple`` it may have a shared mixture without shared experts, which then weighs all tasks' experts.

    Args:
        own: experts per task.
        shared: shared experts, numbered last.
        shared_gate: whether the level has a shared mixture.
        shared_gate_scope: what that one weighs.
    """
    tasks, total = len(own), sum(own)
    common = tuple(range(total, total + shared))
    starts = [sum(own[:t]) for t in range(tasks)]
    mixtures = [(*range(start, start + count), *common) for start, count in zip(starts, own, strict=True)]
    if shared_gate:
        mixtures.append(tuple(range(total + shared)) if shared_gate_scope == "all" else common)
    slots = [t for t, count in enumerate(own) for _ in range(count)]
    return Topology(
        (*slots, *(tasks for _ in common)), tuple(range(len(mixtures))), tuple(mixtures), num_slots=tasks + 1
    )


def mixtures(level: Any, x: Any) -> list[Tensor]:
    """The mixtures ``(B, H)`` of a level one by one; by index, because torch.fx does not iterate."""
    rows = level(x).unbind(1)
    return [rows[o] for o in range(level.topology.num_mixtures)]

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
    topology = Topology.ple(len(own), own, shared, last=not shared_gate, shared_gate_scope=shared_gate_scope)
    if shared:
        return topology
    weighed = list(topology.mixture_experts)
    if shared_gate:
        weighed.append(tuple(range(topology.num_experts)) if shared_gate_scope == "all" else ())
    return Topology(topology.expert_slot, tuple(range(len(weighed))), tuple(weighed), num_slots=len(own) + 1)


def mixtures(level: Any, x: Any) -> list[Tensor]:
    """The mixtures ``(B, H)`` of a level one by one.

    Each may be changed in place in training, as a library's own can, whose mixtures are tensors of their own.
    """
    return separate(level, level(x))


def separate(level: Any, y: Tensor) -> list[Tensor]:
    """``mixtures`` out of what the level has returned, ``(B, O, H)``."""
    # unbind makes views of one tensor, which autograd lets nobody write to. By index: torch.fx does not iterate.
    rows = y.flatten(1).unsafe_split(level.out_features, 1)
    return [rows[o] for o in range(level.topology.num_mixtures)]

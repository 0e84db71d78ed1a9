"""AdaTT and cross-stitch networks: levels with learned scalars among the weights of their mixtures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..scalars import check_count, check_number
from ..specs import GateSpec
from ..topology import Topology, check_task_counts
from .layers import OffsetStart
from .stack import Stack, Units, build_levels, gate_spec, mlp_spec, per_level, shared_per_level


def _native_start(topology: Topology) -> OffsetStart:
    """AdaTT's scalars: uniform within ``1 / sqrt(n)`` for n native experts, constants 1 where every unit has one."""
    assert topology.mixture_offset is not None
    counts = [topology.expert_slot.count(slot) for slot in range(topology.num_slots or 0)]
    if set(counts) == {1}:
        ones = (1.0,) * topology.num_mixtures
        return OffsetStart(ones, ones, learned=False)
    bounds = tuple(sum(row) ** -0.5 for row in topology.mixture_offset for _ in range(sum(row)))
    return OffsetStart(tuple(-bound for bound in bounds), bounds)


class AdaTT(Stack):
    """Adaptive Task-to-Task Fusion (Li et al., KDD 2023): ``(B, D)`` to ``(B, T, H)``.

    A *unit* is a task, or what is shared; its experts are its *native* ones. The output of a unit weighs all experts of
    the level: ``y_u = sum_e softmax(gate_u(x_u))_e h_e + sum_{e native to u} v_ue h_e``, the second sum being the
    residual. Without shared experts this is AdaTT-sp, with them AdaTT-general. Its last level has no shared output.

    Args:
        in_features: input width ``D``.
        num_tasks: ``T``.
        num_levels: at least 1.
        task_experts: native experts per task: an int, one per task, or one such list per level.
        shared_experts: of the shared unit: an int, or one per level; 0 means there is none, at every level.
        expert_units: widths of an expert's layers, or one such tuple per level.
        gate_units, gate_bias, activation, norm, dropout, recompute, device, dtype: as in ``PLE``.

    The scalars ``v`` are ``levels.{l}.gate.offset``, unit after unit. They start uniform within ``1 / sqrt(n)`` for n
    native experts. At a level whose units all have one native expert they are constants 1, in a buffer: the residual
    is the native expert itself, as in the authors' code.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        *,
        num_levels: int = 2,
        task_experts: int | Sequence[int] | Sequence[Sequence[int]] = 2,
        shared_experts: int | Sequence[int] = 0,
        expert_units: Units = (256, 128),
        gate_units: Sequence[int] = (),
        gate_bias: bool = True,
        activation: Any = "relu",
        norm: Any = None,
        dropout: Any = 0.0,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_tasks, num_levels = check_count("num_tasks", num_tasks), check_count("num_levels", num_levels)
        counts = per_level("task_experts", task_experts, num_levels, depth=2)
        shared = shared_per_level(shared_experts, num_levels)
        topologies = [
            Topology.adatt(
                num_tasks,
                check_task_counts("task_experts", counts[i], num_tasks),
                shared[i],
                last=i == num_levels - 1,
            )
            for i in range(num_levels)
        ]
        levels = build_levels(
            in_features,
            topologies,
            [
                mlp_spec(units, activation, norm, dropout)
                for units in per_level("expert_units", expert_units, num_levels, depth=2)
            ],
            [gate_spec(gate_units, activation, gate_bias)] * num_levels,
            [_native_start(topology) for topology in topologies],
            recompute=recompute, device=device, dtype=dtype,
        )  # fmt: skip
        self._set_levels(levels, num_tasks)


class CrossStitch(Stack):
    """Cross-stitch network (Misra et al., CVPR 2016, eq. 1): ``(B, D)`` to ``(B, T, H)``.

    One expert per task and level. Behind each level task ``k`` goes on with ``sum_t a_kt h_t``: one learned matrix
    ``a (T, T)`` per level, no gate. For a stitch behind every layer give one width per level:
    ``expert_units=[(256,), (128,)]``.

    Args:
        in_features: input width ``D``.
        num_tasks: ``T``.
        num_levels: at least 1.
        expert_units: widths of an expert's layers, or one such tuple per level.
        own_weight: ``a_kk`` at the start, in [0, 1]; the other tasks share the rest evenly (with one task: 1).
        activation, norm, dropout, recompute, device, dtype: as in ``PLE``.

    ``levels.{l}.gate.offset``, of size ``T * T``, is ``a - 1``, row by row: weight decay draws its weights to 1, so
    leave it out of that.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        *,
        num_levels: int = 2,
        expert_units: Units = (256, 128),
        own_weight: float = 0.9,
        activation: Any = "relu",
        norm: Any = None,
        dropout: Any = 0.0,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_tasks, num_levels = check_count("num_tasks", num_tasks), check_count("num_levels", num_levels)
        topology = Topology.cross_stitch(num_tasks)
        own_weight = check_number("own_weight", own_weight)
        if not 0.0 <= own_weight <= 1.0:
            raise ValueError(f"own_weight: expected a weight in [0, 1], got {own_weight}")
        own, other = (own_weight, (1.0 - own_weight) / (num_tasks - 1)) if num_tasks > 1 else (1.0, 0.0)
        start = tuple((own if k == t else other) - 1.0 for k in range(num_tasks) for t in range(num_tasks))
        levels = build_levels(
            in_features,
            [topology] * num_levels,
            [
                mlp_spec(units, activation, norm, dropout)
                for units in per_level("expert_units", expert_units, num_levels, depth=2)
            ],
            [GateSpec()] * num_levels,
            [OffsetStart(start, start)] * num_levels,
            recompute=recompute, device=device, dtype=dtype,
        )  # fmt: skip
        self._set_levels(levels, num_tasks)

"""Trunks without gates: hard, customized and asymmetric sharing, and single task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from ..scalars import check_count
from ..specs import GateSpec
from ..topology import Topology
from .stack import Stack, build_levels, mlp_spec


class _Ungated(Stack):
    """One level of static mixtures, ``_parts`` per task."""

    _wiring: ClassVar[staticmethod[[int], Topology]]
    _parts: ClassVar[int] = 1

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        *,
        expert_units: int | Sequence[int] = (256, 128),
        activation: Any = "relu",
        norm: Any = None,
        dropout: Any = 0.0,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_tasks = check_count("num_tasks", num_tasks)
        topology, spec = self._wiring(num_tasks), mlp_spec(expert_units, activation, norm, dropout)
        levels = build_levels(
            in_features, [topology], [spec], [GateSpec()], recompute=recompute, device=device, dtype=dtype
        )
        self._set_levels(levels, num_tasks, parts=self._parts)


class HardSharing(_Ungated):
    """Hard parameter sharing, also called shared bottom: ``(B, D)`` to ``(B, T, H)``.

    One expert, whose output every task gets.

    Args:
        in_features: input width ``D``.
        num_tasks: ``T``.
        expert_units: widths of the expert's layers.
        activation, norm, dropout, recompute, device, dtype: as in ``PLE``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    _wiring = staticmethod(Topology.hard_sharing)


class SingleTask(_Ungated):
    """Single-task models side by side, the baseline of the MTL gain: ``(B, D)`` to ``(B, T, H)``.

    One expert per task; the tasks share the input alone. Arguments and errors are those of ``HardSharing``.
    """

    _wiring = staticmethod(Topology.single_task)


class CustomizedSharing(_Ungated):
    """Customized sharing, a baseline of the PLE paper (Tang et al., RecSys 2020): ``(B, D)`` to ``(B, T, 2 H)``.

    One expert per task and a shared one. A task gets the concatenation: its own expert's H features, then the shared
    ones. Arguments and errors are those of ``HardSharing``; ``out_features`` is twice the last of ``expert_units``.
    """

    _wiring = staticmethod(Topology.customized_sharing)
    _parts = 2


class AsymmetricSharing(Stack):
    """Asymmetric sharing, a baseline of the PLE paper (Tang et al., RecSys 2020): ``(B, D)`` to ``(B, T, H)``.

    One expert per task. Task ``k`` gets the sum of the experts of the tasks in ``sources[k]``, itself among them:
    ``sources=[(0,), (0, 1)]`` lets task 1 read what task 0 has learned, and not the other way round.

    Args:
        in_features, num_tasks, expert_units, activation, norm, dropout, recompute, device, dtype: see ``HardSharing``.
        sources: per task the tasks whose experts it adds up.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        *,
        sources: Sequence[Sequence[int]],
        expert_units: int | Sequence[int] = (256, 128),
        activation: Any = "relu",
        norm: Any = None,
        dropout: Any = 0.0,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_tasks = check_count("num_tasks", num_tasks)
        topology = Topology.asymmetric_sharing(num_tasks, sources)
        spec = mlp_spec(expert_units, activation, norm, dropout)
        levels = build_levels(
            in_features, [topology], [spec], [GateSpec()], recompute=recompute, device=device, dtype=dtype
        )
        self._set_levels(levels, num_tasks)

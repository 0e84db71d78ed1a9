"""MMoE, and ML-MMoE: MMoE in levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..scalars import check_count
from ..topology import Topology
from .network import ExtractionNetwork
from .stack import Stack, Units, build_levels, gate_spec, mlp_spec, per_level


class MMoE(Stack):
    """Multi-gate Mixture-of-Experts (Ma et al., KDD 2018, eq. 6-7): ``(B, D)`` to ``(B, T, H)``.

    Args:
        in_features: input width ``D``.
        num_tasks: ``T``: one gate each, over all experts.
        experts: number of experts, every one shared.
        expert_units, gate_units, gate_bias, activation, norm, dropout, recompute, device, dtype: as in ``PLE``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        *,
        experts: int = 8,
        expert_units: int | Sequence[int] = (256, 128),
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
        num_tasks, spec = check_count("num_tasks", num_tasks), mlp_spec(expert_units, activation, norm, dropout)
        level = ExtractionNetwork(
            in_features, Topology.mmoe(num_tasks, experts), experts=spec,
            gate=gate_spec(gate_units, activation, gate_bias), recompute=recompute, device=device, dtype=dtype,
        )  # fmt: skip
        self._set_levels([level], num_tasks)


class MLMMoE(Stack):
    """ML-MMoE: MMoE in levels, a baseline of the PLE paper (Tang et al., RecSys 2020): ``(B, D)`` to ``(B, T, H)``.

    Every level has the same number of experts. Level ``l`` mixes them once per expert of level ``l + 1``, which reads
    that mixture; the last level mixes them once per task. All gates of all levels read the same selector: ``x``.

    Args:
        in_features: input width ``D``.
        num_tasks: ``T``.
        num_levels: at least 1; 1 is MMoE.
        experts: number of experts of each level.
        expert_units: widths of an expert's layers, or one such tuple per level.
        gate_units, gate_bias, activation, norm, dropout, recompute, device, dtype: as in ``PLE``.

    The input has one slot: ``(B, D)``, ``(B, 1, D)`` or a list of one tensor.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        *,
        num_levels: int = 2,
        experts: int = 8,
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
        num_tasks, experts = check_count("num_tasks", num_tasks), check_count("experts", experts)
        num_levels = check_count("num_levels", num_levels)
        last = num_levels - 1
        units = per_level("expert_units", expert_units, num_levels, depth=2)
        levels = build_levels(
            in_features,
            [Topology.ml_mmoe(num_tasks, experts, first=i == 0, last=i == last) for i in range(num_levels)],
            [mlp_spec(widths, activation, norm, dropout) for widths in units],
            # At the first level the slot is the raw input already.
            [
                gate_spec(gate_units, activation, gate_bias, input="raw" if i else "previous")
                for i in range(num_levels)
            ],
            recompute=recompute, device=device, dtype=dtype,
        )  # fmt: skip
        self._set_levels(levels, num_tasks)

"""PLE and CGC, its last level alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..scalars import check_count, check_flag
from ..specs import MLPSpec
from ..topology import Topology, check_task_counts
from .network import ExtractionNetwork
from .stack import Stack, Units, build_levels, gate_spec, mlp_spec, per_level, shared_per_level


def _experts(
    topology: Topology, shared: int, units: Any, shared_units: Any, activation: Any, norm: Any, dropout: Any
) -> tuple[MLPSpec, ...]:
    """One spec per expert: the tasks' own, then ``shared`` shared ones."""
    own, common = (mlp_spec(widths, activation, norm, dropout) for widths in (units, shared_units))
    return (own,) * (topology.num_experts - shared) + (common,) * shared


class PLE(Stack):
    """Progressive Layered Extraction (Tang et al., RecSys 2020, section 4.2): a trunk, ``(B, D)`` to ``(B, T, H)``.

    Args:
        in_features: input width ``D``.
        num_tasks: ``T``.
        num_levels: extraction networks, at least 1; 1 is CGC.
        task_experts: experts per task: an int, one per task, or one such list per level.
        shared_experts: an int, or one per level; 0 means none, at every level.
        expert_units: widths of an expert's layers, or one such tuple per level.
        shared_expert_units: the same for shared experts; default ``expert_units``. Last widths must agree.
        gate_units: widths of the gates' hidden layers; ``()`` is the paper's single linear layer.
        gate_bias: bias of the gates' last layer.
        activation: of experts (one, or one per layer) and of the gates' hidden layers: relu, leaky_relu, prelu, gelu,
            gelu_tanh, silu, tanh, sigmoid, dice, row_dice, identity, or a ``torch.nn`` class or instance.
        norm: of the experts' layers, before the activation: None, ``"batch"`` or ``"layer"``.
        dropout: after the experts' layers.
        shared_gate_scope: the shared mixture weighs ``"all"`` experts (the paper) or the ``"shared"`` ones.
        last_shared: keep a shared mixture at the last level: the output is ``(B, T + 1, H)``, shared last.
        recompute: save inputs only, and run the forward again in backward: less memory, more time.
        device, dtype: of the parameters.

    Norms, biases and activations that differ from layer to layer, and gates that read the raw input, are for
    ``ExtractionNetwork`` and ``from_levels``.

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
        shared_experts: int | Sequence[int] = 2,
        expert_units: Units = (256, 128),
        shared_expert_units: Units | None = None,
        gate_units: Sequence[int] = (),
        gate_bias: bool = True,
        activation: Any = "relu",
        norm: Any = None,
        dropout: Any = 0.0,
        shared_gate_scope: Literal["all", "shared"] = "all",
        last_shared: bool = False,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features, num_tasks = check_count("in_features", in_features), check_count("num_tasks", num_tasks)
        num_levels, last_shared = check_count("num_levels", num_levels), check_flag("last_shared", last_shared)
        counts = per_level("task_experts", task_experts, num_levels, depth=2)
        shared = shared_per_level(shared_experts, num_levels)
        units = per_level("expert_units", expert_units, num_levels, depth=2)
        shared_units = (
            units
            if shared_expert_units is None
            else per_level("shared_expert_units", shared_expert_units, num_levels, depth=2)
        )
        if last_shared and not all(shared):
            raise ValueError(f"last_shared: needs shared experts at every level, got shared_experts={shared_experts}")
        topologies, experts = [], []
        for i in range(num_levels):
            topology = Topology.ple(
                num_tasks,
                check_task_counts("task_experts", counts[i], num_tasks),
                shared[i],
                last=i == num_levels - 1 and not last_shared,
                shared_gate_scope=shared_gate_scope,
            )
            topologies.append(topology)
            experts.append(_experts(topology, shared[i], units[i], shared_units[i], activation, norm, dropout))
        gates = [gate_spec(gate_units, activation, gate_bias)] * num_levels
        levels = build_levels(in_features, topologies, experts, gates, recompute=recompute, device=device, dtype=dtype)
        self._set_levels(levels, num_tasks, last_shared)

    @classmethod
    def from_levels(
        cls, levels: Sequence[ExtractionNetwork], *, num_tasks: int | None = None, last_shared: bool = False
    ) -> PLE:
        """A trunk of existing levels, which it holds and does not copy.

        Args:
            levels: the mixtures of each are the slots of the next.
            num_tasks: ``T``; default the mixtures of the last level (less the shared one with ``last_shared``).
            last_shared: the last level's last mixture is shared, and stays in the output.

        Raises:
            TypeError: an entry is no ``ExtractionNetwork``.
            ValueError: no levels, or levels that do not fit together.
        """
        levels = list(levels)
        if not levels:
            raise ValueError("levels: expected at least one level, got none")
        for i, level in enumerate(levels):
            if not isinstance(level, ExtractionNetwork):
                raise TypeError(f"levels[{i}]: expected an ExtractionNetwork, got {type(level).__name__}")
        last_shared = check_flag("last_shared", last_shared)
        raw = levels[0].in_features
        for i in range(1, len(levels)):
            below, level = levels[i - 1], levels[i]
            if below.out_features != level.in_features:
                raise ValueError(
                    f"levels[{i}]: expected in_features={below.out_features}, the output width of the level below, "
                    f"got {level.in_features}"
                )
            if below.topology.num_mixtures != level.topology.num_slots:
                raise ValueError(
                    f"levels[{i}]: expected {below.topology.num_mixtures} slots, the mixtures of the level below, "
                    f"got {level.topology.num_slots}"
                )
            if level.gate_spec.input == "raw" and level.gate_features != raw:
                raise ValueError(f"levels[{i}]: its gates read the raw input of width {raw}, got {level.gate_features}")
        mixtures = levels[-1].topology.num_mixtures
        tasks = mixtures - last_shared if num_tasks is None else check_count("num_tasks", num_tasks)
        if not 0 < tasks <= mixtures - last_shared:
            raise ValueError(
                f"num_tasks: expected 1 to {mixtures - last_shared}, the mixtures of the last level, got {tasks}"
            )
        ple = cls.__new__(cls)
        nn.Module.__init__(ple)
        ple._set_levels(levels, tasks, last_shared)
        return ple


class CGC(Stack):
    """Customized Gate Control (paper section 4.1): PLE's last level alone, ``(B, D)`` to ``(B, T, H)``.

    Arguments are those of ``PLE``, for one level. With ``last_shared`` it is a level that is not the last: the output
    is ``(B, T + 1, H)``, and ``shared_gate_scope`` says what its shared mixture weighs.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        *,
        task_experts: int | Sequence[int] = 2,
        shared_experts: int = 2,
        expert_units: int | Sequence[int] = (256, 128),
        shared_expert_units: int | Sequence[int] | None = None,
        gate_units: Sequence[int] = (),
        gate_bias: bool = True,
        activation: Any = "relu",
        norm: Any = None,
        dropout: Any = 0.0,
        shared_gate_scope: Literal["all", "shared"] = "all",
        last_shared: bool = False,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_tasks, last_shared = check_count("num_tasks", num_tasks), check_flag("last_shared", last_shared)
        shared_experts = check_count("shared_experts", shared_experts, least=0)
        topology = Topology.ple(
            num_tasks, task_experts, shared_experts, last=not last_shared, shared_gate_scope=shared_gate_scope
        )
        if last_shared and not shared_experts:
            raise ValueError("last_shared: needs shared experts, got shared_experts=0")
        if shared_gate_scope != "all" and not last_shared:
            raise ValueError(
                f"shared_gate_scope: only a shared mixture has one, got {shared_gate_scope!r}; pass last_shared=True"
            )
        shared_units = expert_units if shared_expert_units is None else shared_expert_units
        experts = _experts(topology, shared_experts, expert_units, shared_units, activation, norm, dropout)
        level = ExtractionNetwork(
            in_features, topology, experts=experts, gate=gate_spec(gate_units, activation, gate_bias),
            recompute=recompute, device=device, dtype=dtype,
        )  # fmt: skip
        self._set_levels([level], num_tasks, last_shared)

"""Trunks with gates: PLE and CGC, MMoE and ML-MMoE, AdaTT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from ..scalars import check_count, check_flag
from ..specs import MLPSpec
from ..topology import Topology, check_task_counts
from .layers import OffsetStart
from .network import ExtractionNetwork
from .options import (
    LevelOptions,
    Units,
    expert_spec,
    experts_per_level,
    gate_spec,
    per_level,
    shared_per_level,
    takes_options,
)
from .stack import Stack, build_levels, check_levels

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _experts(topology: Topology, shared: int, units: Any, shared_units: Any, options: LevelOptions) -> list[MLPSpec]:
    """One spec per expert: the tasks' own, then ``shared`` shared ones."""
    own, common = expert_spec(units, options), expert_spec(shared_units, options)
    return [own] * (topology.num_experts - shared) + [common] * shared


@takes_options(LevelOptions)
class PLE(Stack):
    """Progressive Layered Extraction (Tang et al., RecSys 2020, section 4.2): a trunk, ``(B, D)`` to ``(B, T, H)``.

    Args:
        in_features: input width ``D``.
        num_tasks: ``T``.
        num_levels: extraction networks, at least 1; 1 is CGC.
        task_experts: experts per task: an int, one per task, or one such list per level.
        shared_experts: an int, or one per level; 0 means none, at every level.
        shared_expert_units: ``expert_units`` of the shared experts; default the same. Last widths must agree.
        shared_gate_scope: the shared mixture weighs ``"all"`` experts (the paper) or the ``"shared"`` ones.
        last_shared: keep a shared mixture at the last level: the output is ``(B, T + 1, H)``, shared last.
        options: the keywords of ``LevelOptions``.

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
        shared_expert_units: Units | None = None,
        shared_gate_scope: Literal["all", "shared"] = "all",
        last_shared: bool = False,
        **options: Unpack[LevelOptions],
    ) -> None:
        super().__init__()
        in_features, num_tasks = check_count("in_features", in_features), check_count("num_tasks", num_tasks)
        num_levels, last_shared = check_count("num_levels", num_levels), check_flag("last_shared", last_shared)
        counts = per_level("task_experts", task_experts, num_levels, depth=2)
        shared = shared_per_level(shared_experts, num_levels)
        units = shared_units = per_level("expert_units", options["expert_units"], num_levels, depth=2)
        if shared_expert_units is not None:
            shared_units = per_level("shared_expert_units", shared_expert_units, num_levels, depth=2)
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
            experts.append(_experts(topology, shared[i], units[i], shared_units[i], options))
        levels = build_levels(in_features, topologies, experts, [gate_spec(options)] * num_levels, options)
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
        check_levels(levels)
        last_shared = check_flag("last_shared", last_shared)
        mixtures = levels[-1].topology.num_outputs
        tasks = mixtures - last_shared if num_tasks is None else check_count("num_tasks", num_tasks)
        if not 0 < tasks <= mixtures - last_shared:
            raise ValueError(
                f"num_tasks: expected 1 to {mixtures - last_shared}, the mixtures of the last level, got {tasks}"
            )
        ple = cls.__new__(cls)
        nn.Module.__init__(ple)
        ple._set_levels(levels, tasks, last_shared)
        return ple


@takes_options(LevelOptions)
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
        shared_expert_units: int | Sequence[int] | None = None,
        shared_gate_scope: Literal["all", "shared"] = "all",
        last_shared: bool = False,
        **options: Unpack[LevelOptions],
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
        units = options["expert_units"]
        shared_units = units if shared_expert_units is None else shared_expert_units
        experts = _experts(topology, shared_experts, units, shared_units, options)
        levels = build_levels(in_features, [topology], [experts], [gate_spec(options)], options)
        self._set_levels(levels, num_tasks, last_shared)


@takes_options(LevelOptions)
class MMoE(Stack):
    """Multi-gate Mixture-of-Experts (Ma et al., KDD 2018, eq. 6-7): ``(B, D)`` to ``(B, T, H)``.

    Args:
        in_features: input width ``D``.
        num_tasks: ``T``: one gate each, over all experts.
        experts: number of experts, every one shared.
        options: the keywords of ``LevelOptions``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(self, in_features: int, num_tasks: int, *, experts: int = 8, **options: Unpack[LevelOptions]) -> None:
        super().__init__()
        num_tasks, expert = check_count("num_tasks", num_tasks), expert_spec(options["expert_units"], options)
        topology = Topology.mmoe(num_tasks, experts)
        levels = build_levels(in_features, [topology], [expert], [gate_spec(options)], options)
        self._set_levels(levels, num_tasks)


@takes_options(LevelOptions)
class MLMMoE(Stack):
    """ML-MMoE: MMoE in levels, a baseline of the PLE paper (Tang et al., RecSys 2020): ``(B, D)`` to ``(B, T, H)``.

    Every level has the same number of experts. Level ``l`` mixes them once per expert of level ``l + 1``, which reads
    that mixture; the last level mixes them once per task. All gates of all levels read the same selector: ``x``.

    Args:
        in_features: input width ``D``.
        num_tasks: ``T``.
        num_levels: at least 1; 1 is MMoE.
        experts: number of experts of each level.
        options: the keywords of ``LevelOptions``.

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
        **options: Unpack[LevelOptions],
    ) -> None:
        super().__init__()
        num_tasks, experts = check_count("num_tasks", num_tasks), check_count("experts", experts)
        num_levels = check_count("num_levels", num_levels)
        last = num_levels - 1
        levels = build_levels(
            in_features,
            [Topology.ml_mmoe(num_tasks, experts, first=i == 0, last=i == last) for i in range(num_levels)],
            experts_per_level(options, num_levels),
            # At the first level the slot is the raw input already.
            [gate_spec(options, input="raw" if i else "previous") for i in range(num_levels)],
            options,
        )
        self._set_levels(levels, num_tasks)


def _native_start(topology: Topology) -> OffsetStart:
    """AdaTT's scalars: uniform within ``1 / sqrt(n)`` for n native experts, constants 1 where every unit has one."""
    assert topology.mixture_offset is not None
    counts = [topology.expert_slot.count(slot) for slot in range(topology.num_slots or 0)]
    if set(counts) == {1}:
        ones = (1.0,) * topology.num_mixtures
        return OffsetStart(ones, ones, learned=False)
    bounds = tuple(sum(row) ** -0.5 for row in topology.mixture_offset for _ in range(sum(row)))
    return OffsetStart(tuple(-bound for bound in bounds), bounds)


@takes_options(LevelOptions)
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
        options: the keywords of ``LevelOptions``.

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
        **options: Unpack[LevelOptions],
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
            experts_per_level(options, num_levels),
            [gate_spec(options)] * num_levels,
            options,
            [_native_start(topology) for topology in topologies],
        )
        self._set_levels(levels, num_tasks)

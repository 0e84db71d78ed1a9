"""Trunks without gates: hard, customized and asymmetric sharing, single task, cross-stitch networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..scalars import check_count, check_number
from ..specs import GateSpec
from ..topology import Topology
from .layers import OffsetStart
from .network import ExtractionNetwork
from .options import UngatedOptions, expert_spec, experts_per_level, takes_options
from .stack import Stack, build_levels

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _static_level(in_features: int, topology: Topology, options: UngatedOptions) -> list[ExtractionNetwork]:
    """One level of static mixtures."""
    expert = expert_spec(options["expert_units"], options)
    return build_levels(in_features, [topology], [expert], [GateSpec()], options)


@takes_options(UngatedOptions)
class HardSharing(Stack):
    """Hard parameter sharing, also called shared bottom: ``(B, D)`` to ``(B, T, H)``.

    One expert, whose output every task gets.

    Args:
        in_features: input width ``D``.
        num_tasks: ``T``.
        options: the keywords of ``UngatedOptions``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(self, in_features: int, num_tasks: int, **options: Unpack[UngatedOptions]) -> None:
        super().__init__()
        num_tasks = check_count("num_tasks", num_tasks)
        self._set_levels(_static_level(in_features, Topology.hard_sharing(num_tasks), options), num_tasks)


@takes_options(UngatedOptions)
class SingleTask(Stack):
    """Single-task models side by side, the baseline of the MTL gain: ``(B, D)`` to ``(B, T, H)``.

    One expert per task; the tasks share the input alone. Arguments and errors are those of ``HardSharing``.
    """

    def __init__(self, in_features: int, num_tasks: int, **options: Unpack[UngatedOptions]) -> None:
        super().__init__()
        num_tasks = check_count("num_tasks", num_tasks)
        self._set_levels(_static_level(in_features, Topology.single_task(num_tasks), options), num_tasks)


@takes_options(UngatedOptions)
class CustomizedSharing(Stack):
    """Customized sharing, a baseline of the PLE paper (Tang et al., RecSys 2020): ``(B, D)`` to ``(B, T, 2 H)``.

    One expert per task and a shared one. A task gets the concatenation: its own expert's H features, then the shared
    ones. Arguments and errors are those of ``HardSharing``; ``out_features`` is twice the last of ``expert_units``.
    """

    def __init__(self, in_features: int, num_tasks: int, **options: Unpack[UngatedOptions]) -> None:
        super().__init__()
        num_tasks = check_count("num_tasks", num_tasks)
        levels = _static_level(in_features, Topology.customized_sharing(num_tasks), options)
        self._set_levels(levels, num_tasks, parts=2)


@takes_options(UngatedOptions)
class AsymmetricSharing(Stack):
    """Asymmetric sharing, a baseline of the PLE paper (Tang et al., RecSys 2020): ``(B, D)`` to ``(B, T, H)``.

    One expert per task. Task ``k`` gets the sum of the experts of the tasks in ``sources[k]``, itself among them:
    ``sources=[(0,), (0, 1)]`` lets task 1 read what task 0 has learned, and not the other way round.

    Args:
        in_features: input width ``D``.
        num_tasks: ``T``.
        sources: per task the tasks whose experts it adds up.
        options: the keywords of ``UngatedOptions``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        *,
        sources: Sequence[Sequence[int]],
        **options: Unpack[UngatedOptions],
    ) -> None:
        super().__init__()
        num_tasks = check_count("num_tasks", num_tasks)
        topology = Topology.asymmetric_sharing(num_tasks, sources)
        self._set_levels(_static_level(in_features, topology, options), num_tasks)


@takes_options(UngatedOptions)
class CrossStitch(Stack):
    """Cross-stitch network (Misra et al., CVPR 2016, eq. 1): ``(B, D)`` to ``(B, T, H)``.

    One expert per task and level. Behind each level task ``k`` goes on with ``sum_t a_kt h_t``: one learned matrix
    ``a (T, T)`` per level, no gate. For a stitch behind every layer give one width per level:
    ``expert_units=[(256,), (128,)]``.

    Args:
        in_features: input width ``D``.
        num_tasks: ``T``.
        num_levels: at least 1.
        own_weight: ``a_kk`` at the start, in [0, 1]; the other tasks share the rest evenly (with one task: 1).
        options: the keywords of ``UngatedOptions``.

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
        own_weight: float = 0.9,
        **options: Unpack[UngatedOptions],
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
            experts_per_level(options, num_levels),
            [GateSpec()] * num_levels,
            options,
            [OffsetStart(start, start)] * num_levels,
        )
        self._set_levels(levels, num_tasks)

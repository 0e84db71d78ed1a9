"""STEM-Net: a trunk for inputs with embeddings of each task's own beside shared ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..scalars import check_count
from ..topology import Topology, check_task_counts
from .options import LevelOptions, experts_per_level, gate_spec, per_level, takes_options
from .stack import Stack, build_levels

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes_options(LevelOptions)
class STEM(Stack):
    """STEM-Net (Su et al., AAAI 2024): a trunk, ``(B, T + 1, D)`` to ``(B, T, H)``.

    A task weighs the experts of all tasks and the shared ones, and its gradient stops before the experts of other
    tasks: it reads what they know, and they learn from their own task alone. A slot is a task's own embedding of the
    features, or, the last one, the shared embedding: ``MultiTaskModel(..., trunk="stem", task_embeddings=True)`` has
    them. The gate of a task reads its own slot plus the shared one, as in the authors' code. Between levels there is
    also a shared mixture; its gradient stops nowhere.

    Args:
        in_features: input width ``D``, of each slot.
        num_tasks: ``T``.
        num_levels: at least 1; the paper has 1.
        task_experts: experts per task: an int, one per task, or one such list per level.
        shared_experts: at least 1: an int, or one per level.
        options: the keywords of ``LevelOptions``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        *,
        num_levels: int = 1,
        task_experts: int | Sequence[int] | Sequence[Sequence[int]] = 2,
        shared_experts: int | Sequence[int] = 2,
        **options: Unpack[LevelOptions],
    ) -> None:
        super().__init__()
        num_tasks, num_levels = check_count("num_tasks", num_tasks), check_count("num_levels", num_levels)
        counts = per_level("task_experts", task_experts, num_levels, depth=2)
        shared = per_level("shared_experts", shared_experts, num_levels, depth=1)
        topologies = [
            Topology.stem(
                num_tasks,
                check_task_counts("task_experts", counts[i], num_tasks),
                shared[i],
                last=i == num_levels - 1,
            )
            for i in range(num_levels)
        ]
        gates = [gate_spec(options, input="with_shared")] * num_levels
        levels = build_levels(in_features, topologies, experts_per_level(options, num_levels), gates, options)
        self._set_levels(levels, num_tasks)

"""The wiring of HoME (Wang et al., KDD 2025, arXiv 2408.05430): groups of tasks, and gates beside gates.

Names of the paper: the meta level abstracts one representation per group of tasks and one that all share; the task
level predicts from them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .scalars import as_tuple, check_count, check_counts, is_sequence, shown


def check_groups(groups: Any) -> tuple[tuple[int, ...], ...]:
    """Tasks by group.

    Raises:
        TypeError: no sequence of sequences of ints.
        ValueError: an empty group, or tasks that are not ``0`` to ``T - 1``, each in one group.
    """
    if not is_sequence(groups) or not all(map(is_sequence, as_tuple(groups))):
        raise TypeError(
            f"groups: expected a sequence of groups, each a sequence of tasks, such as [[0, 1], [2]]; got "
            f"{shown(groups)} ({type(groups).__name__})"
        )
    found = tuple(
        check_counts(f"groups[{number}]", as_tuple(group), least=0) for number, group in enumerate(as_tuple(groups))
    )
    if not found or not all(found):
        raise ValueError(f"groups: expected at least one group, and a task in each, got {shown(groups)}")
    tasks = [task for group in found for task in group]
    if sorted(tasks) != list(range(len(tasks))):
        raise ValueError(f"groups: expected the tasks 0 to {len(tasks) - 1}, each in one group, got {found}")
    return found


class ExpertSet(NamedTuple):
    """Experts with one owner: a task, a group, or all."""

    slot: int
    """That they read: a group's, or the shared one, which is the last."""
    experts: tuple[int, ...]
    task: int | None
    """Whose own they are."""


def home_sets(groups: Any, group_experts: Any, shared_experts: Any, task_experts: Any) -> tuple[ExpertSet, ...]:
    """The experts of a level in order; ``task_experts`` None: of the meta level."""
    groups = check_groups(groups)
    of_group = _per("group_experts", group_experts, len(groups), "group")
    counts: list[tuple[int, int | None, int]] = []
    for slot, tasks in enumerate(groups):
        if task_experts is not None:
            of_task = _per("task_experts", task_experts, sum(map(len, groups)), "task")
            counts += [(slot, task, of_task[task]) for task in tasks]
        counts.append((slot, None, of_group[slot]))
    counts.append((len(groups), None, check_count("shared_experts", shared_experts)))
    found, start = [], 0
    for slot, task, count in counts:
        found.append(ExpertSet(slot, tuple(range(start, start + count)), task))
        start += count
    return tuple(found)


def home_wiring(
    groups: Any, group_experts: Any, shared_experts: Any, task_experts: Any, *, self_gates: bool
) -> dict[str, Any]:
    """Keywords of the topology; ``task_experts`` None: of the meta level."""
    sets = home_sets(groups, group_experts, shared_experts, task_experts)
    shared = sets[-1].experts
    of_group = {own.slot: own.experts for own in sets if own.task is None}
    outputs: list[tuple[int, tuple[int, ...], tuple[int, ...]]]  # slot of the gate, its experts, those of the self gate
    if task_experts is None:
        every = tuple(e for own in sets for e in own.experts)
        outputs = [(own.slot, own.experts + shared, own.experts) for own in sets[:-1]]
        outputs.append((sets[-1].slot, every, shared))
    else:
        tasks = sorted((own.task, own) for own in sets if own.task is not None)
        outputs = [(own.slot, own.experts + of_group[own.slot] + shared, own.experts) for _, own in tasks]
    mixtures = []
    for output, (slot, weighed, native) in enumerate(outputs):
        mixtures.append((slot, weighed, "softmax", output))
        if self_gates:
            mixtures.append((slot, native, "softmax" if len(native) > 1 else "sigmoid", output))
    slots, experts, kinds, places = zip(*mixtures, strict=True)
    return {
        "expert_slot": tuple(own.slot for own in sets for _ in own.experts),
        "mixture_slot": slots,
        "mixture_experts": experts,
        "mixture_kind": kinds,
        "num_slots": sets[-1].slot + 1,
        "mixture_output": places,
    }


def _per(name: str, value: Any, count: int, what: str) -> tuple[int, ...]:
    """One count per group or task, from an int or a sequence."""
    row = check_counts(name, as_tuple(value), least=1) if is_sequence(value) else (check_count(name, value),) * count
    if len(row) != count:
        raise ValueError(f"{name}: expected one count per {what} ({count}), got {len(row)}: {row}")
    return row

"""The wiring of an extraction network: which slot each expert reads, and which experts each mixture weighs.

No tensors here. Everything a backend needs is derived once, in ``__post_init__``, as plain tuples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .home_wiring import home_wiring
from .outputs import check_outputs, experts_of_outputs
from .scalars import as_tuple, check_count, check_counts, check_flag, is_sequence, own_scalar, shown

MixtureKind = Literal["softmax", "sigmoid", "static"]


def _tuple(name: str, values: Any, what: str) -> tuple[Any, ...]:
    if not is_sequence(values):
        raise TypeError(f"{name}: expected a sequence of {what}, got {shown(values)} ({type(values).__name__})")
    return as_tuple(values)


def _int_tuple(name: str, values: Any) -> tuple[int, ...]:
    return check_counts(name, _tuple(name, values, "ints"), least=0)


@dataclass(frozen=True)
class Topology:
    """The wiring of one extraction network (Tang et al., RecSys 2020, section 4), hashable.

    Args:
        expert_slot: slot that expert ``e`` reads; non-decreasing, so expert ``e`` is row ``e`` of every stacked tensor.
        mixture_slot: slot that the gate of mixture ``o`` reads.
        mixture_experts: for each mixture the ordered, duplicate-free, non-empty experts that it weighs.
        mixture_kind: per mixture ``"softmax"`` (a gate), ``"sigmoid"`` (a gate whose weights are each the sigmoid of
            their own logit) or ``"static"`` (constant weights 1, no gate); default softmax.
        mixture_offset: per mixture one bool per entry of ``mixture_experts``: True adds a learned scalar to that weight
            after the softmax (AdaTT's native-expert residual); default none.
        num_slots: number of input slots ``S``; default the highest slot used, plus one.
        mixture_stop: per mixture one bool per entry of ``mixture_experts``: True stops the gradient of that mixture
            before that expert (Su et al., AAAI 2024), as if its output were detached; that of the weight flows on to
            the gate. None, the default: nothing is stopped.
        mixture_output: per mixture the output that it is added to, from 0 on, non-decreasing, none left out. None, the
            default: each mixture is an output of its own.

    Raises:
        TypeError: an argument is not a sequence, or an entry is not an int (``mixture_offset``, ``mixture_stop``: not
            a bool).
        ValueError: an empty expert set, a mixture without experts, an expert that no mixture reads or that no gradient
            could reach, experts not sorted by slot (the message holds the permutation that sorts them), or an index out
            of range.
    """

    expert_slot: tuple[int, ...]
    mixture_slot: tuple[int, ...]
    mixture_experts: tuple[tuple[int, ...], ...]
    mixture_kind: tuple[MixtureKind, ...] | None = None
    mixture_offset: tuple[tuple[bool, ...], ...] | None = None
    num_slots: int | None = None
    mixture_stop: tuple[tuple[bool, ...], ...] | None = None
    mixture_output: tuple[int, ...] | None = None

    # Derived (plain tuples, never part of equality).
    num_experts: int = field(init=False, repr=False, compare=False)
    num_mixtures: int = field(init=False, repr=False, compare=False)
    num_outputs: int = field(init=False, repr=False, compare=False)
    """``O``: rows of the output; the mixtures, less those that are added into the output of another one."""
    output_experts: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)
    """For each output the experts that its mixtures weigh, each once, in the order of the mixtures."""
    num_weights: int = field(init=False, repr=False, compare=False)
    """``sum_o |A(o)|``: weights over all mixtures, static ones included."""
    num_logits: int = field(init=False, repr=False, compare=False)
    """``G``: gate logits, the weights of gated mixtures only."""
    weight_offset: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """First column of mixture ``o`` in the weights ``P`` of shape ``(B, num_weights)``."""
    logit_offset: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """First row of mixture ``o`` in ``gate.weight``; -1 for a static mixture."""
    gated_mixtures: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """The mixtures that have a gate, softmax and sigmoid, in order."""
    slot_experts: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False)
    """Per slot the half-open range of experts that read it."""

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("expert_slot", _int_tuple("expert_slot", self.expert_slot))
        put("mixture_slot", _int_tuple("mixture_slot", self.mixture_slot))
        rows = _tuple("mixture_experts", self.mixture_experts, "tuples, one per mixture")
        put("mixture_experts", tuple(_int_tuple(f"mixture_experts[{o}]", row) for o, row in enumerate(rows)))
        n_experts, n_mixtures = len(self.expert_slot), len(self.mixture_slot)
        if n_experts == 0:
            raise ValueError("expert_slot: expected at least one expert, got an empty set")
        if n_mixtures == 0:
            raise ValueError("mixture_slot: expected at least one mixture, got none")
        if list(self.expert_slot) != sorted(self.expert_slot):
            order = tuple(sorted(range(n_experts), key=self.expert_slot.__getitem__))
            raise ValueError(
                f"expert_slot: must be non-decreasing, got {self.expert_slot}; "
                f"renumber the experts in the order {order}"
            )
        if len(self.mixture_experts) != n_mixtures:
            raise ValueError(
                f"mixture_experts: expected one tuple per mixture ({n_mixtures}), got {len(self.mixture_experts)}"
            )
        for o, experts in enumerate(self.mixture_experts):
            if not experts:
                raise ValueError(f"mixture_experts[{o}]: a mixture needs at least one expert, got none")
            if len(set(experts)) != len(experts):
                raise ValueError(f"mixture_experts[{o}]: expected each expert once, got {experts}")
            if max(experts) >= n_experts:
                raise ValueError(f"mixture_experts[{o}]: expected experts below {n_experts}, got {experts}")
        unread = sorted(set(range(n_experts)) - {e for experts in self.mixture_experts for e in experts})
        if unread:
            raise ValueError(
                f"mixture_experts: experts {unread} are read by no mixture; remove them or add them to one"
            )
        self._check_kinds(n_mixtures)
        self._check_stops()
        put("mixture_output", check_outputs(self.mixture_output, n_mixtures))
        if self.mixture_stop is not None and self.mixture_output is not None:
            raise ValueError(
                "mixture_output: expected None with mixture_stop: weights of one output are summed before they weigh "
                "an expert, whose gradient then cannot stop for one mixture and go on for another"
            )
        used = max(*self.expert_slot, *self.mixture_slot) + 1
        if self.num_slots is None:
            put("num_slots", used)
        else:
            slots = check_count("num_slots", self.num_slots)
            if slots < used:
                raise ValueError(f"num_slots: the wiring uses slots up to {used - 1}, so at least {used}; got {slots}")
            put("num_slots", slots)
        self._derive(put)

    def _check_kinds(self, n_mixtures: int) -> None:
        kinds: tuple[str, ...] = ("softmax",) * n_mixtures
        if self.mixture_kind is not None:
            kinds = tuple(map(own_scalar, _tuple("mixture_kind", self.mixture_kind, 'kinds, such as "softmax"')))
        if len(kinds) != n_mixtures:
            raise ValueError(f"mixture_kind: expected one per mixture ({n_mixtures}), got {len(kinds)}")
        for kind in kinds:
            if kind not in ("softmax", "sigmoid", "static"):
                raise ValueError(f'mixture_kind: expected "softmax", "sigmoid" or "static", got {kind!r}')
        object.__setattr__(self, "mixture_kind", kinds)
        offsets = self.mixture_offset
        if offsets is None:
            offsets = tuple((False,) * len(experts) for experts in self.mixture_experts)
        else:
            offsets = self._marks("mixture_offset", offsets, " (the scalars are learned)")
        object.__setattr__(self, "mixture_offset", offsets)

    def _marks(self, name: str, marks: Any, why: str = "") -> tuple[tuple[bool, ...], ...]:
        """One bool per entry of ``mixture_experts``."""
        rows = _tuple(name, marks, "tuples, one per mixture")
        named = [_tuple(f"{name}[{o}]", row, "bools") for o, row in enumerate(rows)]
        found = tuple(tuple(map(own_scalar, row)) for row in named)
        for o, row in enumerate(found):
            if not all(isinstance(v, bool) for v in row):
                raise TypeError(f"{name}[{o}]: expected bools{why}, got {row}")
        if tuple(map(len, found)) != tuple(map(len, self.mixture_experts)):
            raise ValueError(
                f"{name}: expected one bool per entry of mixture_experts, lengths "
                f"{tuple(map(len, self.mixture_experts))}, got {tuple(map(len, found))}"
            )
        return found

    def _check_stops(self) -> None:
        if self.mixture_stop is None:
            return
        stops = self._marks("mixture_stop", self.mixture_stop)
        pairs = [
            pair for row, own in zip(self.mixture_experts, stops, strict=True) for pair in zip(row, own, strict=True)
        ]
        closed = sorted({e for e, _ in pairs} - {e for e, is_stopped in pairs if not is_stopped})
        if closed:
            raise ValueError(
                f"mixture_stop: the gradients of all mixtures stop before experts {closed}, which would never learn; "
                "leave one entry of each False, or freeze their parameters (requires_grad_(False))"
            )
        # One form for nothing stopped, which plans, files and comparisons then agree on.
        object.__setattr__(self, "mixture_stop", stops if any(map(any, stops)) else None)

    def _derive(self, put: Any) -> None:
        assert self.mixture_kind is not None and self.num_slots is not None
        sizes = [len(experts) for experts in self.mixture_experts]
        put("num_experts", len(self.expert_slot))
        put("num_mixtures", len(self.mixture_slot))
        put("num_weights", sum(sizes))
        put("weight_offset", tuple(sum(sizes[:o]) for o in range(len(sizes))))
        logit_offset, logits = [], 0
        for size, kind in zip(sizes, self.mixture_kind, strict=True):
            logit_offset.append(logits if kind != "static" else -1)
            logits += size if kind != "static" else 0
        put("num_logits", logits)
        put("logit_offset", tuple(logit_offset))
        put("gated_mixtures", tuple(o for o, kind in enumerate(self.mixture_kind) if kind != "static"))
        outputs = tuple(range(len(sizes))) if self.mixture_output is None else self.mixture_output
        put("num_outputs", outputs[-1] + 1)
        put("output_experts", experts_of_outputs(outputs, self.mixture_experts))
        ranges, start = [], 0
        for slot in range(self.num_slots):
            stop = start + self.expert_slot.count(slot)
            ranges.append((start, stop))
            start = stop
        put("slot_experts", tuple(ranges))

    @property
    def has_offsets(self) -> bool:
        """Whether any weight has a learned scalar added to it."""
        assert self.mixture_offset is not None
        return any(any(row) for row in self.mixture_offset)

    @classmethod
    def ple(
        cls,
        num_tasks: int,
        task_experts: int | Sequence[int],
        shared_experts: int,
        *,
        last: bool,
        shared_gate_scope: Literal["all", "shared"] = "all",
    ) -> Topology:
        """One PLE level (paper section 4.2; ``last=True``: CGC, section 4.1).

        Experts are numbered task 0's, task 1's, ..., shared. A task's mixture weighs its own experts, then the shared
        ones; the shared mixture (absent when ``last``) weighs all experts, or the shared ones with
        ``shared_gate_scope="shared"``. With no shared experts there are T slots and T mixtures.
        """
        if shared_gate_scope not in ("all", "shared"):
            raise ValueError(f'shared_gate_scope: expected "all" or "shared", got {shared_gate_scope!r}')
        slots, own, shared = _groups(num_tasks, task_experts, shared_experts)
        for task, experts in enumerate(own):
            if not experts and not shared:
                raise ValueError(f"task {task}: has no expert of its own and there are no shared ones; give it one")
        mixtures = [experts + shared for experts in own]
        if shared and not last:
            mixtures.append(tuple(range(len(slots))) if shared_gate_scope == "all" else shared)
        return cls(slots, tuple(range(len(mixtures))), tuple(mixtures), num_slots=num_tasks + bool(shared))

    @classmethod
    def mmoe(cls, num_tasks: int, experts: int) -> Topology:
        """MMoE (Ma et al., KDD 2018): one slot, every expert shared, one mixture per task over all experts."""
        num_tasks, experts = check_count("num_tasks", num_tasks), check_count("experts", experts)
        return cls((0,) * experts, (0,) * num_tasks, (tuple(range(experts)),) * num_tasks)

    @classmethod
    def ml_mmoe(cls, num_tasks: int, experts: int, *, first: bool, last: bool) -> Topology:
        """One level of ML-MMoE, the multi-level MMoE that Tang et al. (RecSys 2020) compare PLE with.

        Every mixture weighs all experts. The first level has one slot; above it expert ``e`` reads slot ``e``, which is
        mixture ``e`` of the level below. There is one mixture per expert, and one per task when ``last``. All gates
        share one selector, the raw input: above the first level they need ``GateSpec(input="raw")``.
        """
        num_tasks, experts = check_count("num_tasks", num_tasks), check_count("experts", experts)
        slots = tuple(range(experts))
        count = num_tasks if last else experts
        return cls(
            (0,) * experts if first else slots, (0,) * count, (slots,) * count, num_slots=1 if first else experts
        )

    @classmethod
    def adatt(
        cls, num_tasks: int, task_experts: int | Sequence[int], shared_experts: int = 0, *, last: bool
    ) -> Topology:
        """One level of AdaTT (Li et al., KDD 2023): AdaTT-sp without shared experts, AdaTT-general with them.

        Experts and slots are those of ``Topology.ple``. Every mixture weighs all experts, in their order: one mixture
        per task, and the shared unit's, absent when ``last``. The learned scalars of the residual (``mixture_offset``)
        stand at the unit's native experts: a task's own ones, the shared ones for the shared unit.
        """
        slots, own, shared = _groups(num_tasks, task_experts, shared_experts)
        every = tuple(range(len(slots)))
        native = own if last or not shared else [*own, shared]
        return cls(
            slots,
            tuple(range(len(native))),
            (every,) * len(native),
            mixture_offset=tuple(tuple(e in experts for e in every) for experts in native),
            num_slots=num_tasks + bool(shared),
        )

    @classmethod
    def stem(cls, num_tasks: int, task_experts: int | Sequence[int], shared_experts: int, *, last: bool) -> Topology:
        """One level of STEM-Net (Su et al., AAAI 2024), as its authors' code has it.

        Experts and slots are those of ``Topology.ple``, with at least one shared expert. Every mixture weighs all
        experts, in their order: one mixture per task, whose gradient stops before the experts of other tasks, and the
        shared one, absent when ``last``, whose gradient reaches all. Gates read a task's slot plus the shared one:
        ``GateSpec(input="with_shared")``.
        """
        slots, own, shared = _groups(num_tasks, task_experts, check_count("shared_experts", shared_experts))
        stops = [tuple(e not in experts and e not in shared for e in range(len(slots))) for experts in own]
        stops += [] if last else [(False,) * len(slots)]
        return cls(
            slots,
            tuple(range(len(stops))),
            (tuple(range(len(slots))),) * len(stops),
            num_slots=num_tasks + 1,
            mixture_stop=tuple(stops),
        )

    @classmethod
    def home(
        cls,
        groups: Sequence[Sequence[int]],
        group_experts: int | Sequence[int],
        shared_experts: int,
        *,
        task_experts: int | Sequence[int] | None = None,
        self_gates: bool = True,
    ) -> Topology:
        """One level of HoME (Wang et al., KDD 2025); ``groups`` holds the tasks of each group of related ones.

        Slots are those of group 0, group 1, ..., then the shared one. The meta level, without ``task_experts``: experts
        are in the order of the slots. The output of a group weighs its own experts, then the shared ones; the last
        output, shared, weighs all.

        The task level: experts are those of group 0's tasks, in the order of ``groups``, group 0's own, those of group
        1's tasks, ..., then the shared ones. The output of a task weighs its own experts, its group's, the shared ones.
        Experts of a task read the slot of their group.

        Each output has one mixture, and with ``self_gates`` a second one that is added to it, over its own experts
        alone: a sigmoid where there is one, a softmax over several.
        """
        self_gates = check_flag("self_gates", self_gates)
        return cls(**home_wiring(groups, group_experts, shared_experts, task_experts, self_gates=self_gates))

    @classmethod
    def cross_stitch(cls, num_tasks: int) -> Topology:
        """One level of a cross-stitch network (Misra et al., CVPR 2016, eq. 1): one expert and one slot per task.

        Every mixture weighs all experts, in the order of the tasks, with learned scalars and no gate: a static weight 1
        plus an offset. With offsets of 0 that is the sum; ``CrossStitch`` has the paper's start.
        """
        num_tasks = check_count("num_tasks", num_tasks)
        tasks = tuple(range(num_tasks))
        learned = ((True,) * num_tasks,) * num_tasks
        return cls(tasks, tasks, (tasks,) * num_tasks, mixture_kind=_static(num_tasks), mixture_offset=learned)

    @classmethod
    def hard_sharing(cls, num_tasks: int) -> Topology:
        """One expert that every task reads with weight 1 (shared bottom)."""
        num_tasks = check_count("num_tasks", num_tasks)
        return cls((0,), (0,) * num_tasks, ((0,),) * num_tasks, mixture_kind=_static(num_tasks))

    @classmethod
    def single_task(cls, num_tasks: int) -> Topology:
        """One expert per task, nothing shared but the input."""
        num_tasks = check_count("num_tasks", num_tasks)
        return cls.asymmetric_sharing(num_tasks, [(t,) for t in range(num_tasks)])

    @classmethod
    def customized_sharing(cls, num_tasks: int) -> Topology:
        """One expert per task, then a shared one, all on one slot (a baseline of Tang et al., RecSys 2020).

        Two mixtures per task, its own expert and then the shared one, each with weight 1: side by side they are the
        concatenation that the task's tower reads.
        """
        num_tasks = check_count("num_tasks", num_tasks)
        mixtures = tuple((expert,) for task in range(num_tasks) for expert in (task, num_tasks))
        return cls((0,) * (num_tasks + 1), (0,) * len(mixtures), mixtures, mixture_kind=_static(len(mixtures)))

    @classmethod
    def asymmetric_sharing(cls, num_tasks: int, sources: Sequence[Sequence[int]]) -> Topology:
        """One expert per task on one slot; task ``k`` adds up the experts of the tasks in ``sources[k]``.

        A baseline of Tang et al., RecSys 2020, with sum pooling. The columns of mixture ``k`` are in the order of
        ``sources[k]``, which holds task ``k`` itself, and each task at most once.
        """
        num_tasks = check_count("num_tasks", num_tasks)
        rows = [_int_tuple(f"sources[{k}]", row) for k, row in enumerate(_tuple("sources", sources, "tuples of tasks"))]
        if len(rows) != num_tasks:
            raise ValueError(f"sources: expected one tuple of tasks per task ({num_tasks}), got {len(rows)}: {rows}")
        for task, row in enumerate(rows):
            if task not in row or max(row) >= num_tasks or len(set(row)) != len(row):
                raise ValueError(
                    f"sources[{task}]: expected tasks below {num_tasks}, each once, task {task} itself among them; "
                    f"got {row}"
                )
        slots = (0,) * num_tasks
        return cls(slots, slots, tuple(rows), mixture_kind=_static(num_tasks))


def _static(count: int) -> tuple[MixtureKind, ...]:
    kind: MixtureKind = "static"
    return (kind,) * count


def check_task_counts(name: str, counts: int | Sequence[int], num_tasks: int) -> tuple[int, ...]:
    """One count per task from an int or a sequence."""
    num_tasks = check_count("num_tasks", num_tasks)
    row = _int_tuple(name, counts) if is_sequence(counts) else (check_count(name, counts, least=0),) * num_tasks
    if len(row) != num_tasks:
        raise ValueError(f"{name}: expected one count per task ({num_tasks}), got {len(row)}: {row}")
    return row


def _groups(
    num_tasks: int, task_experts: int | Sequence[int], shared_experts: int
) -> tuple[tuple[int, ...], list[tuple[int, ...]], tuple[int, ...]]:
    """Slots of task 0's experts, task 1's, ..., the shared ones; the experts of each task; the shared experts."""
    counts = check_task_counts("task_experts", task_experts, num_tasks)
    shared_experts = check_count("shared_experts", shared_experts, least=0)
    slots = tuple(t for t, count in enumerate((*counts, shared_experts)) for _ in range(count))
    *own, shared = (tuple(e for e, slot in enumerate(slots) if slot == t) for t in range(num_tasks + 1))
    return slots, own, shared

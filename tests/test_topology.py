"""The wiring: what each family looks like, what is derived from it, and every wiring that is refused."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest

from ple_fast import Topology


def test_ple_level_as_in_the_paper() -> None:
    topology = Topology.ple(3, [2, 0, 1], 2, last=False)
    assert topology.expert_slot == (0, 0, 2, 3, 3)
    assert topology.mixture_slot == (0, 1, 2, 3)
    assert topology.mixture_experts == ((0, 1, 3, 4), (3, 4), (2, 3, 4), (0, 1, 2, 3, 4))
    assert topology.num_slots == 4


def test_the_last_level_has_no_shared_mixture_and_keeps_the_shared_slot() -> None:
    topology = Topology.ple(2, 2, 1, last=True)
    assert topology.mixture_experts == ((0, 1, 4), (2, 3, 4))
    assert (topology.num_slots, topology.num_mixtures) == (3, 2)


def test_the_shared_mixture_may_read_shared_experts_only() -> None:
    topology = Topology.ple(2, 1, 2, last=False, shared_gate_scope="shared")
    assert topology.mixture_experts[-1] == (2, 3)


@pytest.mark.parametrize("last", [False, True])
def test_without_shared_experts_there_are_as_many_slots_and_mixtures_as_tasks(last: bool) -> None:
    topology = Topology.ple(3, [1, 2, 1], 0, last=last)
    assert (topology.num_slots, topology.num_mixtures) == (3, 3)
    assert topology.mixture_experts == ((0,), (1, 2), (3,))


def test_mmoe_hard_sharing_and_single_task() -> None:
    assert Topology.mmoe(2, 3) == Topology((0, 0, 0), (0, 0), ((0, 1, 2), (0, 1, 2)))
    assert Topology.hard_sharing(3).mixture_experts == ((0,), (0,), (0,))
    assert Topology.single_task(3).mixture_experts == ((0,), (1,), (2,))
    for topology in (Topology.hard_sharing(3), Topology.single_task(3)):
        assert topology.mixture_kind == ("static",) * 3
        assert topology.num_logits == 0
        assert topology.gated_mixtures == ()


def test_ml_mmoe_is_mmoe_in_levels() -> None:
    every = (0, 1, 2)
    assert Topology.ml_mmoe(2, 3, first=True, last=True) == Topology.mmoe(2, 3)
    assert Topology.ml_mmoe(2, 3, first=True, last=False) == Topology((0, 0, 0), (0, 0, 0), (every,) * 3)
    assert Topology.ml_mmoe(2, 3, first=False, last=False) == Topology(every, (0, 0, 0), (every,) * 3)
    assert Topology.ml_mmoe(4, 3, first=False, last=True) == Topology(every, (0,) * 4, (every,) * 4)
    assert Topology.ml_mmoe(2, 1, first=False, last=True).num_slots == 1


def test_adatt_marks_the_native_experts_of_every_unit() -> None:
    sp = Topology.adatt(2, [2, 1], last=False)
    assert sp == Topology.adatt(2, [2, 1], last=True)
    assert (sp.expert_slot, sp.mixture_slot, sp.num_slots) == ((0, 0, 1), (0, 1), 2)
    assert sp.mixture_experts == ((0, 1, 2),) * 2
    assert sp.mixture_offset == ((True, True, False), (False, False, True))
    general = Topology.adatt(2, 1, 2, last=False)
    assert (general.expert_slot, general.mixture_slot, general.num_slots) == ((0, 1, 2, 2), (0, 1, 2), 3)
    assert general.mixture_experts == ((0, 1, 2, 3),) * 3
    assert general.mixture_offset == (
        (True, False, False, False),
        (False, True, False, False),
        (False, False, True, True),
    )
    last = Topology.adatt(2, 1, 2, last=True)
    assert (last.num_slots, last.mixture_offset) == (3, general.mixture_offset[:2])
    without_own = Topology.adatt(2, [0, 1], last=True)
    assert without_own.mixture_offset == ((False,), (True,))


def test_stem_stops_before_the_experts_of_other_tasks() -> None:
    inner = Topology.stem(2, [2, 1], 1, last=False)
    assert (inner.expert_slot, inner.mixture_slot, inner.num_slots) == ((0, 0, 1, 2), (0, 1, 2), 3)
    assert inner.mixture_experts == ((0, 1, 2, 3),) * 3
    assert inner.mixture_stop == ((False, False, True, False), (True, True, False, False), (False,) * 4)
    last = Topology.stem(2, [2, 1], 1, last=True)
    assert (last.num_slots, last.mixture_slot, last.mixture_stop) == (3, (0, 1), inner.mixture_stop[:2])
    assert Topology.stem(1, 1, 1, last=True).mixture_stop is None
    with pytest.raises(ValueError, match="shared_experts: expected 1 or more"):
        Topology.stem(2, 1, 0, last=True)


def test_home_groups_tasks_and_adds_self_gates() -> None:
    meta = Topology.home([[0, 2], [1]], [2, 1], 1)
    assert (meta.expert_slot, meta.num_slots, meta.num_outputs) == ((0, 0, 1, 2), 3, 3)
    assert meta.mixture_experts == ((0, 1, 3), (0, 1), (2, 3), (2,), (0, 1, 2, 3), (3,))
    assert meta.mixture_kind == ("softmax", "softmax", "softmax", "sigmoid", "softmax", "sigmoid")
    assert (meta.mixture_slot, meta.mixture_output) == ((0, 0, 1, 1, 2, 2),) * 2
    task = Topology.home([[0, 2], [1]], 1, 2, task_experts=[1, 2, 1])
    # Of task 0, task 2, group 0; of task 1, group 1; shared.
    assert task.expert_slot == (0, 0, 0, 1, 1, 1, 2, 2)
    assert task.mixture_experts == ((0, 2, 6, 7), (0,), (3, 4, 5, 6, 7), (3, 4), (1, 2, 6, 7), (1,))
    assert task.mixture_kind == ("softmax", "sigmoid", "softmax", "softmax", "softmax", "sigmoid")
    assert (task.mixture_slot, task.mixture_output) == ((0, 0, 1, 1, 0, 0), (0, 0, 1, 1, 2, 2))
    assert task.output_experts == task.mixture_experts[::2]
    plain = Topology.home([[0, 2], [1]], 1, 2, task_experts=[1, 2, 1], self_gates=False)
    assert plain.mixture_experts == task.mixture_experts[::2] and plain.mixture_output is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0, 1], 1, 1), TypeError, r"groups: expected a sequence of groups, each a sequence of tasks.*got \[0, 1\]"),
        (([], 1, 1), ValueError, "groups: expected at least one group"),
        (([[0], []], 1, 1), ValueError, "a task in each"),
        (
            ([[0], [0]], 1, 1),
            ValueError,
            r"groups: expected the tasks 0 to 1, each in one group, got \(\(0,\), \(0,\)\)",
        ),
        (([[0], [2]], 1, 1), ValueError, "expected the tasks 0 to 1"),
        (([[0], ["a"]], 1, 1), TypeError, r"groups\[1\]\[0\]: expected an int"),
        (([[0], [1]], [1], 1), ValueError, r"group_experts: expected one count per group \(2\), got 1"),
        (([[0], [1]], 0, 1), ValueError, "group_experts: expected 1 or more"),
        (([[0], [1]], 1, 0), ValueError, "shared_experts: expected 1 or more"),
    ],
)
def test_a_home_level_that_cannot_be_is_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Topology.home(*arguments)


def test_experts_of_tasks_of_home_fit_the_tasks() -> None:
    with pytest.raises(ValueError, match=r"task_experts: expected one count per task \(3\), got 2"):
        Topology.home([[0, 2], [1]], 1, 1, task_experts=[1, 1])
    with pytest.raises(TypeError, match="self_gates"):
        Topology.home([[0], [1]], 1, 1, self_gates=1)  # type: ignore[arg-type]  # that is the test


def test_cross_stitch_learns_every_weight() -> None:
    topology = Topology.cross_stitch(2)
    assert (topology.expert_slot, topology.mixture_slot, topology.num_slots) == ((0, 1), (0, 1), 2)
    assert topology.mixture_experts == ((0, 1), (0, 1))
    assert topology.mixture_kind == ("static", "static")
    assert topology.mixture_offset == ((True, True), (True, True))


def test_customized_and_asymmetric_sharing_have_no_gate() -> None:
    customized = Topology.customized_sharing(2)
    assert customized == Topology((0, 0, 0), (0,) * 4, ((0,), (2,), (1,), (2,)), mixture_kind=("static",) * 4)
    sources = [[0], [2, 1], [0, 1, 2]]
    asymmetric = Topology.asymmetric_sharing(3, sources)
    assert asymmetric == Topology((0,) * 3, (0,) * 3, ((0,), (2, 1), (0, 1, 2)), mixture_kind=("static",) * 3)
    assert Topology.asymmetric_sharing(2, [(0,), (1,)]) == Topology.single_task(2)


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        ([(0,)], ValueError, r"sources: expected one tuple of tasks per task \(2\), got 1"),
        (
            [(0,), (0,)],
            ValueError,
            r"sources\[1\]: expected tasks below 2, each once, task 1 itself among them; got \(0",
        ),
        ([(0, 2), (1,)], ValueError, r"sources\[0\]: expected tasks below 2"),
        ([(0,), (1, 0, 1)], ValueError, r"sources\[1\]: expected tasks below 2, each once"),
        ([(0,), ()], ValueError, r"sources\[1\]: expected tasks below 2"),
        ([0, 1], TypeError, r"sources\[0\]: expected a sequence of ints"),
        ("01", TypeError, "sources: expected a sequence"),
    ],
)
def test_sources_that_cannot_be_are_refused(sources: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Topology.asymmetric_sharing(2, sources)


def test_derived_tables() -> None:
    topology = Topology(
        expert_slot=(0, 2, 2),
        mixture_slot=(0, 3, 2),
        mixture_experts=((2, 0), (1,), (1, 0, 2)),
        mixture_kind=("softmax", "static", "softmax"),
        mixture_offset=((False, False), (True,), (False, True, False)),
    )
    assert (topology.num_experts, topology.num_mixtures, topology.num_slots) == (3, 3, 4)
    assert (topology.num_weights, topology.num_logits) == (6, 5)
    assert topology.weight_offset == (0, 2, 3)
    assert topology.logit_offset == (0, -1, 2)
    assert topology.gated_mixtures == (0, 2)
    assert topology.slot_experts == ((0, 1), (1, 1), (1, 3), (3, 3))
    assert topology.has_offsets


def test_equal_wirings_are_equal_hashable_and_survive_copies() -> None:
    topology = Topology.ple(2, 1, 1, last=False)
    listed: Any = Topology([0, 1, 2], [0, 1, 2], [[0, 2], [1, 2], [0, 1, 2]])  # type: ignore[arg-type]  # lists pass too
    assert listed == topology
    assert hash(listed) == hash(topology)
    assert topology != Topology.ple(2, 1, 1, last=True)
    for other in (copy.deepcopy(topology), pickle.loads(pickle.dumps(topology))):
        assert other == topology
        assert other.slot_experts == topology.slot_experts
    assert dataclasses.replace(topology, num_slots=5).slot_experts[-1] == (3, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        topology.num_slots = 7  # type: ignore[misc]  # frozen: that is the test


OK: dict[str, Any] = {"expert_slot": (0, 1), "mixture_slot": (0, 0), "mixture_experts": ((0, 1), (1,))}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"expert_slot": ()}, ValueError, "at least one expert, got an empty set"),
        ({"mixture_slot": ()}, ValueError, "at least one mixture"),
        ({"mixture_experts": ((0, 1),)}, ValueError, r"one tuple per mixture \(2\), got 1"),
        ({"mixture_experts": ((0, 1), ())}, ValueError, r"mixture_experts\[1\]: a mixture needs at least one expert"),
        ({"mixture_experts": ((0, 1), (1, 1))}, ValueError, r"mixture_experts\[1\]: expected each expert once"),
        ({"mixture_experts": ((0, 1), (2,))}, ValueError, r"mixture_experts\[1\]: expected experts below 2"),
        ({"mixture_experts": ((0,), (0,))}, ValueError, r"experts \[1\] are read by no mixture"),
        ({"mixture_experts": 3}, TypeError, "mixture_experts: expected a sequence"),
        ({"mixture_experts": (0, 1)}, TypeError, r"mixture_experts\[0\]: expected a sequence of ints, got 0 \(int\)"),
        ({"expert_slot": "01"}, TypeError, "expert_slot: expected a sequence of ints, got '01'"),
        ({"expert_slot": (0, 1.0)}, TypeError, r"expert_slot\[1\]: expected an int, got 1.0 \(float\)"),
        ({"expert_slot": (False, 1)}, TypeError, r"expert_slot\[0\]: expected an int, got False"),
        ({"mixture_slot": (0, -1)}, ValueError, r"mixture_slot\[1\]: expected 0 or more, got -1"),
        ({"expert_slot": (1, 0)}, ValueError, r"renumber the experts in the order \(1, 0\)"),
        ({"mixture_kind": ("softmax",)}, ValueError, r"mixture_kind: expected one per mixture \(2\), got 1"),
        ({"mixture_kind": ("softmax", "hard")}, ValueError, "got 'hard'"),
        ({"mixture_kind": "softmax"}, TypeError, "mixture_kind: expected a sequence"),
        ({"mixture_offset": ((True,), (True,))}, ValueError, r"lengths \(2, 1\), got \(1, 1\)"),
        ({"mixture_offset": (True, True)}, TypeError, r"mixture_offset\[0\]: expected a sequence of bools"),
        ({"mixture_offset": ((0.5, False), (True,))}, TypeError, r"mixture_offset\[0\]: expected bools"),
        ({"num_slots": 1}, ValueError, "at least 2; got 1"),
        ({"num_slots": 2.0}, TypeError, "num_slots: expected an int"),
    ],
)
def test_a_wiring_that_cannot_be_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    Topology(**OK)
    with pytest.raises(error, match=message):
        Topology(**{**OK, **change})


def test_the_permutation_that_is_printed_sorts_the_experts() -> None:
    slots = (2, 0, 1, 0)
    with pytest.raises(ValueError, match=r"\(1, 3, 2, 0\)"):
        Topology(slots, (0,), ((0, 1, 2, 3),))
    assert [slots[e] for e in (1, 3, 2, 0)] == sorted(slots)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 2, 1), ValueError, "num_tasks: expected 1 or more, got 0"),
        ((True, 2, 1), TypeError, "num_tasks: expected an int"),
        ((2, [1], 1), ValueError, r"task_experts: expected one count per task \(2\), got 1"),
        ((2, True, 1), TypeError, "task_experts"),
        ((2, -1, 1), ValueError, "task_experts: expected 0 or more, got -1"),
        ((2, 1, -1), ValueError, "shared_experts: expected 0 or more, got -1"),
        ((2, 1, 1.0), TypeError, "shared_experts: expected an int"),
        ((2, [1, 0], 0), ValueError, "task 1: has no expert of its own"),
    ],
)
def test_a_ple_level_that_cannot_be_is_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Topology.ple(*arguments, last=False)


def test_an_unknown_scope_of_the_shared_gate_is_refused() -> None:
    with pytest.raises(ValueError, match='expected "all" or "shared", got'):
        Topology.ple(2, 1, 1, last=False, shared_gate_scope="none")  # type: ignore[arg-type]  # that is the test

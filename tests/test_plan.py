"""Plans of levels: equal ones are one object, so that what is cached by plan does not grow with modules."""

from __future__ import annotations

import copy
import io
import pickle

import torch
from torch import nn

from ple_fast import PLE, GateSpec, MLPSpec, Topology
from ple_fast.plan import LevelPlan
from soak.memory import kept
from tests.helpers import TOPOLOGIES, level


def test_levels_of_equal_make_up_share_a_plan_and_others_do_not() -> None:
    spec, gate = MLPSpec((4,)), GateSpec((3,))
    plans = [level(topology, spec, gate)._plan for topology in TOPOLOGIES.values() for _ in range(2)]
    assert all(a is b for a, b in zip(plans[::2], plans[1::2], strict=True))
    plans += [level(Topology.mmoe(2, 2), spec, GateSpec((3,), temperature=t))._plan for t in (1.0, 2.0)]
    assert len({id(plan) for plan in plans}) == len(TOPOLOGIES) + 2


def test_a_copy_or_a_pickle_of_a_module_has_its_plan() -> None:
    module = PLE(4, 2, expert_units=(3,), norm="batch", activation="prelu")
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)]
    for one, level_ in ((one, level_) for one in copies for level_ in range(2)):
        assert one.levels[level_]._plan is module.levels[level_]._plan
    plan = module.levels[0]._plan
    assert isinstance(plan, LevelPlan) and LevelPlan.from_text(plan.text) is plan


def test_caches_do_not_grow_with_modules_of_equal_make_up() -> None:
    def step(module: nn.Module) -> None:
        for rows in (3, 200):
            module(torch.randn(rows, 4)).sum().backward()
            module(torch.randn(rows, 4), return_gates=True)[0].sum().backward()

    first = PLE(4, 2, expert_units=(3,))
    step(first)
    before = kept()
    for _ in range(3):
        step(PLE(4, 2, expert_units=(3,)))
        step(copy.deepcopy(first))
    assert kept() == before

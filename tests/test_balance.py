"""Losses that balance gates: the formula in Python's numbers, what the gates' shares are, and fit with it."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ple_fast import PLE, AdaTT, GateSpec, MLPSpec, MMoE, SingleTask, use_backend
from ple_fast.functional import GateShares
from ple_fast.losses import JointLoss, TaskLoss, balance_loss
from ple_fast.model import Categorical, MultiTaskModel, Numeric
from ple_fast.model.trunks import TRUNKS
from ple_fast_encoder import Column
from tests.helpers import TOPOLOGIES, level
from tests.model_helpers import SMALL
from tests.ranks import run_ranks

TASKS = [TaskLoss("a", "regression"), TaskLoss("b", "regression")]


def by_formula(levels: list[GateShares], over: str) -> float:
    """Row by row and expert by expert."""
    terms = []
    for shares, chosen, experts in levels:
        rows, gates, width = shares.shape
        p = [[sum(shares[b, o, e].item() for b in range(rows)) / rows for e in range(width)] for o in range(gates)]
        f = p
        if chosen is not None:
            counts = [[sum(bool(chosen[b, o, e]) for b in range(rows)) for e in range(width)] for o in range(gates)]
            f = [[n / sum(row) for n in row] for row in counts]
        if over == "gate":
            per_gate = [len(experts[o]) * sum(f[o][e] * p[o][e] for e in range(width)) for o in range(gates)]
            terms.append(sum(per_gate) / gates)
        else:
            means = [[sum(row[e] for row in values) / gates for e in range(width)] for values in (f, p)]
            terms.append(width * sum(a * b for a, b in zip(*means, strict=True)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("over", ["gate", "level"])
@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_trunk_is_as_balanced_as_the_formula_says(backend: Any, top_k: int | None, over: Any) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    torch.manual_seed(0)
    module = PLE(8, 2, task_experts=[2, 1], shared_experts=2, expert_units=(5,), gate_top_k=top_k, dtype=torch.float64)
    x = torch.randn(11, 8, dtype=torch.float64)
    with use_backend(backend):
        y, gates = module(x, return_gates="shares")
        assert torch.equal(y, module(x))
    found = balance_loss(gates, over)
    assert found.item() == pytest.approx(by_formula(gates, over), rel=1e-12)
    found.backward()
    last: Any = module.levels[1]
    assert last.gate.weight.grad.abs().sum() > 0  # also where one is chosen, whose weight is always 1


@pytest.mark.parametrize("over", ["gate", "level"])
def test_gates_that_are_balanced_have_1_and_others_more(over: Any) -> None:
    even = torch.full((4, 2, 4), 0.25)
    experts = ((0, 1, 2, 3),) * 2
    assert balance_loss([GateShares(even, None, experts)], over).item() == 1
    turns = torch.eye(4).bool().unsqueeze(1).expand(4, 2, 4)  # each in its turn
    assert balance_loss([GateShares(even, turns, experts)], over).item() == 1
    one = torch.zeros(4, 2, 4).index_fill(2, torch.tensor([1]), 1.0)
    assert balance_loss([GateShares(one, one.bool(), experts)], over).item() == 4
    apart = torch.stack([torch.tensor([0.5, 0.5, 0, 0]), torch.tensor([0, 0, 0.5, 0.5])]).expand(4, 2, 4)
    expected = 2.0 if over == "gate" else 1.0  # what one leaves the other takes
    assert balance_loss([GateShares(apart, None, experts)], over).item() == expected


@pytest.mark.parametrize(
    "gate", [GateSpec(), GateSpec((5,), "tanh", "batch", 0.5, logits_norm="batch", temperature=0.5)]
)
def test_the_shares_are_the_weights_of_the_same_forward(gate: GateSpec) -> None:
    """With the masks of its dropout, and statistics that move once."""
    topology = TOPOLOGIES["ple"]
    module = level(topology, MLPSpec((4,)), gate)
    x = torch.randn(9, topology.num_slots or 1, 7, dtype=torch.float64)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    torch.manual_seed(1)
    y, listed = module(x, return_gates=True)
    after = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.load_state_dict(state)
    torch.manual_seed(1)
    again, found = module(x, return_gates="shares")
    assert torch.equal(y, again) and found.chosen is None
    for o, (weights, experts) in enumerate(zip(listed, topology.mixture_experts, strict=True)):
        torch.testing.assert_close(found.shares[:, o, list(experts)], weights)
    torch.testing.assert_close(found.shares.sum(2), torch.ones_like(found.shares[:, :, 0]))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("name", ["ple", "cgc", "mmoe", "ml_mmoe", "adatt", "stem", "home"])
def test_every_trunk_with_gates_gives_shares(name: str) -> None:
    torch.manual_seed(0)
    module: Any = TRUNKS[name](8, 3, **SMALL[name])
    x = torch.randn(12, 8)
    _, listed = module(x, return_gates=True)
    y, gates = module(x, return_gates="shares")
    assert y.shape[:2] == (12, 3) and len(gates) == len(listed)
    for own, weights, network in zip(gates, listed, module.levels, strict=True):
        topology = network.topology
        softmax = [o for o, kind in enumerate(topology.mixture_kind) if kind == "softmax"]
        assert own.experts == tuple(topology.mixture_experts[o] for o in softmax)
        for row, o in enumerate(softmax):
            if topology.has_offsets:
                continue  # which are in the weights
            torch.testing.assert_close(own.shares[:, row, list(topology.mixture_experts[o])], weights[o])
    balance_loss(gates, "gate").backward()
    assert balance_loss(module(x, return_gates="shares")[1], "level").item() > 0


@pytest.mark.parametrize("joint", [0, 1])
def test_what_is_chosen_is_what_has_a_weight(joint: int) -> None:
    torch.manual_seed(0)
    module = AdaTT(8, 2, expert_units=(5,), gate_top_k=2, gate_joint_k=joint)  # with scalars that are added afterwards
    x = torch.randn(20, 8)
    for own in module.levels:
        nn.init.zeros_(own.gate.offset)  # type: ignore[arg-type, union-attr]
    _, listed = module(x, return_gates=True)
    _, gates = module(x, return_gates="shares")
    for weights, found in zip(listed, gates, strict=True):
        for o, own_weights in enumerate(weights):
            assert found.chosen is not None
            assert torch.equal(own_weights != 0, found.chosen[:, o])


def test_autocast_compile_and_no_rows() -> None:
    torch.manual_seed(0)
    module = MMoE(8, 2, experts=4, expert_units=(5,), gate_top_k=1)
    x = torch.randn(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        _, (found,) = module(x, return_gates="shares")
        _, (listed,) = module(x, return_gates=True)
    assert found.shares.dtype == torch.float32 and found.chosen is not None
    assert torch.equal(torch.stack(listed, 1) != 0, found.chosen)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    again, expected = (one(x, return_gates="shares")[1][0][:2] for one in (compiled, module))
    for a, b in zip(again, expected, strict=True):
        torch.testing.assert_close(a, b)
    y, gates = module(x[:0], return_gates="shares")
    assert y.shape == (0, 2, 5) and balance_loss(gates, "gate").item() == 0
    balance_loss(gates, "level").backward()


@pytest.mark.parametrize("over", ["gate", "level"])
def test_the_joint_loss_adds_it(over: Any) -> None:
    torch.manual_seed(0)
    module = MMoE(8, 2, expert_units=(5,))
    y, gates = module(torch.randn(16, 8), return_gates="shares")
    predictions = dict(zip("ab", y.sum(2).unbind(1), strict=True))
    labels = {name: torch.zeros(16) for name in "ab"}
    plain = JointLoss(TASKS)(predictions, labels)
    joint = JointLoss(TASKS, balance=over, balance_weight=0.5)
    result = joint(predictions, labels, gates=gates)
    assert plain.balance is None and result.balance is not None
    torch.testing.assert_close(result.total, plain.total + 0.5 * result.balance)
    assert f"balance={over!r}, balance_weight=0.5" in repr(joint)


def test_what_does_not_fit_is_refused() -> None:
    module = MMoE(8, 2, expert_units=(5,))
    x = torch.randn(4, 8)
    y, gates = module(x, return_gates="shares")
    predictions = dict(zip("ab", y.sum(2).unbind(1), strict=True))
    labels = {name: torch.zeros(4) for name in "ab"}
    balanced = JointLoss(TASKS, balance="gate")
    with pytest.raises(ValueError, match="gates: balance='gate' needs what the trunk returns"):
        balanced(predictions, labels)
    with pytest.raises(ValueError, match="gates: expected None without balance"):
        JointLoss(TASKS)(predictions, labels, gates=gates)
    with pytest.raises(TypeError, match="one GateShares per level"):
        balanced(predictions, labels, gates=gates[0])
    with pytest.raises(TypeError, match=r'gates\[0\]: expected GateShares, got list.*return_gates="shares"'):
        balanced(predictions, labels, gates=module(x, return_gates=True)[1])
    with pytest.raises(ValueError, match="expected a level with gates"):
        balance_loss(SingleTask(8, 2, expert_units=(4,))(x, return_gates="shares")[1], "gate")
    with pytest.raises(ValueError, match='return_gates: expected True, False or "shares"'):
        module(x, return_gates="weights")
    with pytest.raises(ValueError, match="balance: expected"):
        JointLoss(TASKS, balance="all")  # type: ignore[arg-type]  # not one of them
    for weight in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="balance_weight"):
            JointLoss(TASKS, balance="gate", balance_weight=weight)


def test_a_loss_that_was_pickled_before_there_was_a_balance_has_none() -> None:
    old = JointLoss(TASKS)
    for name in ("balance", "balance_weight"):
        del old.__dict__[name]
    again = pickle.loads(pickle.dumps(old))
    predictions = {name: torch.zeros(3) for name in "ab"}
    assert again(predictions, predictions).balance is None and "balance" not in repr(again)


def data() -> tuple[dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(0)
    table: dict[str, Any] = {"c": rng.integers(0, 50, 2000), "x": rng.normal(size=2000)}
    return table, {"a": table["x"], "b": np.asarray(table["c"] % 2, dtype=np.float64)}


def model(**more: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    options = {"expert_units": (8,), "experts": 8, "gate_top_k": 2}
    columns: list[Column] = [Categorical("c", size=50), Numeric("x")]
    return MultiTaskModel(columns, TASKS, trunk="mmoe", trunk_options=options, **more)


def test_fit_balances_and_the_file_says_so(tmp_path: Any) -> None:
    table, labels = data()
    uneven = []
    for more in ({}, {"balance": "gate", "balance_weight": 1.0}):
        net = model(**more)
        net.fit(table, labels, epochs=5, batch_size=128, lr=3e-3, progress=False)
        chosen = np.stack([(np.asarray(w) > 0).mean(0) for w in net.gate_weights(table)[0]])
        uneven.append(chosen.std(1).mean())
        net.save(tmp_path)
        again = MultiTaskModel.load(tmp_path)
        assert again.joint_loss.balance == more.get("balance")
        assert again.joint_loss.balance_weight == more.get("balance_weight", 0.01)
        assert (again.predict(table)["a"] == net.predict(table)["a"]).all()
    assert uneven[1] < 0.5 * uneven[0]
    assert "balance" not in model()._config


def test_a_trunk_without_gates_cannot_be_balanced() -> None:
    columns = [Numeric("x")]
    with pytest.raises(ValueError, match="balance: expected a trunk with gates"):
        MultiTaskModel(columns, TASKS, trunk="single_task", trunk_options={"expert_units": (4,)}, balance="gate")
    own = nn.Sequential(nn.Linear(1, 8), nn.Unflatten(1, (2, 4)))
    with pytest.raises(ValueError, match=r"balance: expected a trunk with gates.*Sequential"):
        MultiTaskModel(columns, TASKS, trunk=own, balance="level")
    trunk = MMoE(1, 2, expert_units=(4,))
    net = MultiTaskModel(columns, TASKS, trunk=trunk, balance="level")
    outputs, gates = net({"x": np.zeros(3)}, return_gates="shares")
    assert net.joint_loss(outputs, {name: torch.zeros(3) for name in "ab"}, gates=gates).balance is not None


def _rank() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    net = nn.parallel.DistributedDataParallel(MMoE(4, 2, expert_units=(3,), experts=4, gate_top_k=1))
    x = torch.randn(8, 4)[rank::ranks]
    y, gates = net(x, return_gates="shares")
    loss = JointLoss(TASKS, balance="gate", process_group=dist.group.WORLD)
    predictions: dict[str, Tensor] = dict(zip("ab", y.sum(2).unbind(1), strict=True))
    loss(predictions, {name: torch.zeros(len(x)) for name in "ab"}, gates=gates).total.backward()
    grad = net.module.levels[0].gate.weight.grad
    assert isinstance(grad, Tensor)
    other = [torch.empty_like(grad) for _ in range(ranks)]
    dist.all_gather(other, grad)
    assert grad.abs().sum() > 0 and all(torch.equal(grad, one) for one in other)


def test_ranks_take_the_mean_of_theirs() -> None:
    run_ranks(2, _rank)

"""Optimizers of sparse gradients: what they change against dense ones, clipping, schedules, resuming, refusals."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, SparseAdam
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR, ReduceLROnPlateau

from ple_fast.model import Callback, MultiTaskModel
from ple_fast.model.look_up import look_up
from ple_fast.model.optimizers import Optimizers, clip_grad_norm
from tests.sparse_helpers import COLUMNS, gradients, model, same, table, weights

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # PyTorch's own, of its Adagrad

OPTIMIZERS: dict[str, Any] = {
    "SGD": SGD,
    "SGD with momentum": functools.partial(SGD, momentum=0.9),
    "Adagrad": functools.partial(Adagrad, lr_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_steps_of_these_optimizers_are_those_of_dense_gradients(name: str) -> None:
    """To the bit of SGD. They move no row without a gradient, or (momentum) keep sparse what they keep."""
    dense, sparse = model(False), model()
    optimizer = OPTIMIZERS[name]
    options: dict[str, Any] = {"epochs": 3, "batch_size": 8, "lr": 0.05, "progress": False}
    dense.fit(*table(), optimizer=optimizer, **options)
    sparse.fit(*table(), optimizer=optimizer, embedding_optimizer=optimizer, **options)
    assert same(dense, sparse, 0.0 if name == "SGD" else 1e-5)


def steps(make: Any, sparse: bool, batches: list[list[int]], **options: Any) -> Tensor:
    """A table of ones after steps along the gradients of these rows' sums of squares."""
    weight = torch.ones(5, 2, dtype=torch.float64, requires_grad=True)
    optimizer = make([weight], lr=0.1, **options)
    for batch in batches:
        optimizer.zero_grad()
        look_up(weight, torch.tensor([batch]), sparse=sparse).square().sum().backward()
        optimizer.step()
    return weight.detach()


def test_the_momentum_of_sgd_is_kept_for_every_row_that_had_a_gradient() -> None:
    weight = torch.ones(5, 2, requires_grad=True)
    optimizer = SGD([weight], lr=0.1, momentum=0.9)
    for row in range(4):
        optimizer.zero_grad()
        look_up(weight, torch.tensor([[row]]), sparse=True).sum().backward()
        optimizer.step()
    assert optimizer.state[weight]["momentum_buffer"].coalesce().indices().tolist() == [[0, 1, 2, 3]]


def test_sparse_adam_is_adam_where_each_step_has_every_row() -> None:
    every = [[0, 1, 2, 3, 4, 4]] * 4
    assert torch.allclose(steps(SparseAdam, True, every), steps(Adam, False, every), rtol=1e-6)


def test_rows_that_a_batch_does_not_have_stand_still_under_sparse_adam() -> None:
    once = steps(SparseAdam, True, [[0, 1]])
    again = steps(SparseAdam, True, [[0, 1], [1], [1]])
    assert torch.equal(again[0], once[0])
    assert torch.equal(again[2:], torch.ones(3, 2, dtype=torch.float64))
    dense = steps(Adam, False, [[0, 1], [1], [1]])
    assert not torch.allclose(dense[0], once[0]), "Adam goes on moving it"


def test_moments_of_rows_that_a_batch_does_not_have_stand_still() -> None:
    weight = torch.ones(5, 2, requires_grad=True)
    optimizer = SparseAdam([weight])
    moments = []
    for batch in ([0, 1], [1]):
        optimizer.zero_grad()
        look_up(weight, torch.tensor([batch]), sparse=True).sum().backward()
        optimizer.step()
        moments.append([optimizer.state[weight][name].clone() for name in ("exp_avg", "exp_avg_sq")])
    for first, second in zip(*moments, strict=True):
        assert torch.equal(first[0], second[0])
        assert not torch.equal(first[1], second[1])


def test_the_bias_correction_of_sparse_adam_counts_all_steps() -> None:
    """Row 0 is in the first and the third: its moments have seen two gradients, its correction counts three steps."""
    got = steps(SparseAdam, True, [[0], [1], [0]])[0, 0].item()
    first = second = 0.0
    value = 1.0
    for step in (1, 3):
        gradient = 2 * value
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        value -= 0.1 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)) ** 0.5)
    assert got == pytest.approx(value, rel=1e-6)


def test_a_row_that_comes_late_is_moved_as_far_as_by_adam() -> None:
    late = [[1]] * 5 + [[0]]
    sparse, dense = steps(SparseAdam, True, late), steps(Adam, False, late)
    assert sparse[0].tolist() == pytest.approx(dense[0].tolist(), rel=1e-6)
    assert abs(1 - sparse[0, 0].item()) < 0.1 * 0.9, "of another length than in a first step"


def test_the_eps_of_sparse_adam_weighs_more_in_the_first_steps() -> None:
    """Of the same ``eps``: it stands beside the root of the moment before its bias correction."""
    large = {"eps": 1.0}
    sparse, dense = steps(SparseAdam, True, [[0]], **large)[0, 0], steps(Adam, False, [[0]], **large)[0, 0]
    assert dense.item() == pytest.approx(1 - 0.1 * 2 / (2 + 1))
    assert sparse.item() == pytest.approx(1 - 0.1 * 2 / (2 + 1 / 0.001**0.5))


def test_both_keep_two_moments_of_the_size_of_the_table() -> None:
    net = model()
    net.fit(*table(), progress=False)
    assert net._run is not None and isinstance(net._run._kept, Optimizers)
    state = net._run._kept.parts["embedding_optimizer"].state
    assert {tuple(state[weight]["exp_avg"].shape) for weight in weights(net)} == {(31 + 41, 4), (25, 2)}
    assert all(not state[weight]["exp_avg_sq"].is_sparse for weight in weights(net))


def test_weight_decay_of_the_optimizer_does_not_reach_the_tables() -> None:
    before = model()
    net = copy.deepcopy(before)
    decay = functools.partial(AdamW, weight_decay=0.5)
    net.fit(*table(4), optimizer=decay, progress=False, epochs=2)
    codes = net.encode(table(4)[0]).codes
    unread = sorted(set(range(25)) - set(codes[:, 2].tolist()))  # hours
    (narrow,) = (weight for weight in weights(net) if weight.shape[1] == 2)
    assert unread
    assert torch.equal(narrow[unread], weights(before)[0][unread])


def test_the_norm_is_that_of_dense_gradients_and_both_kinds_are_scaled() -> None:
    data, labels = table()
    found = []
    for sparse in (False, True):
        net = model(sparse)
        rows = net.encode(data)
        gradients(net, rows, labels)
        gradients(net, rows, labels)  # added up: not coalesced
        if sparse:  # PyTorch's own takes none, as docs/model.md says: the day it does, ours can go
            with pytest.raises(NotImplementedError):
                nn.utils.clip_grad_norm_(net.parameters(), 0.01)
        norm = clip_grad_norm(list(net.parameters()), 0.01)
        found.append((norm, [p.grad.to_dense() for p in net.parameters() if p.grad is not None]))
    (dense_norm, dense), (norm, own) = found
    assert norm.item() == pytest.approx(dense_norm.item(), rel=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-9) for a, b in zip(own, dense, strict=True))
    total = torch.stack([gradient.norm() for gradient in own]).norm()
    assert total.item() == pytest.approx(0.01, rel=1e-3)


def test_the_norm_of_a_sparse_gradient_of_others_is_that_of_its_rows() -> None:
    table_of = nn.Embedding(5, 2, sparse=True)
    table_of(torch.tensor([3, 1, 3])).sum().backward()  # two entries for row 3
    norm = clip_grad_norm(list(table_of.parameters()), 0.5)
    assert norm.item() == pytest.approx((2 * (2**2 + 1)) ** 0.5)
    assert table_of.weight.grad is not None
    assert table_of.weight.grad.to_dense().norm().item() == pytest.approx(0.5, rel=1e-5)


def test_clipped_training_is_that_of_dense_gradients() -> None:
    dense, sparse = model(False), model()
    options: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 0.5, "progress": False, "clip_norm": 0.1}
    dense.fit(*table(), optimizer=SGD, **options)
    sparse.fit(*table(), optimizer=SGD, embedding_optimizer=SGD, **options)
    assert same(dense, sparse, 1e-5)


SCHEDULES: dict[str, dict[str, Any]] = {
    "none": {},
    "Adagrad": {"embedding_optimizer": Adagrad, "validation": 0.25},
    "epoch": {"schedule": functools.partial(ExponentialLR, gamma=0.5), "embedding_optimizer": SGD, "clip_norm": 1.0},
    "batch": {"schedule": functools.partial(OneCycleLR, max_lr=0.1, total_steps=24), "schedule_every": "batch"},
    "plateau": {"schedule": functools.partial(ReduceLROnPlateau, patience=0), "validation": 0.25},
    "momentum": {"embedding_optimizer": functools.partial(SGD, momentum=0.9)},
}


class Stopped(Exception):
    pass


class StopAt(Callback):
    def __init__(self, epoch: int, batch: int) -> None:
        self.place = epoch, batch

    def after_step(self, model: Any, step: Any) -> None:
        if (step.epoch, step.batch) == self.place:
            raise Stopped


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("place", [(2, 1), (3, 5)])
def test_a_stopped_training_goes_on_to_the_bit(kind: str, place: tuple[int, int], tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 4, "batch_size": 8, "progress": False, **SCHEDULES[kind]}
    saved = {**options, "checkpoint": tmp_path / "run.pt", "checkpoint_every": 4, "resume": True}
    straight = model()
    expected = straight.fit(*table(), **options)
    with pytest.raises(Stopped):
        model().fit(*table(), callbacks=[StopAt(*place)], **saved)
    resumed = model()
    history = resumed.fit(*table(), **saved)
    assert [result.loss for result in history] == [result.loss for result in expected]
    assert [result.lr for result in history] == [result.lr for result in expected]
    assert same(resumed, straight)


def test_a_schedule_changes_the_rates_of_both() -> None:
    rates: list[list[float]] = []

    class Rates(Callback):
        def after_epoch(self, model: Any, result: Any) -> None:
            rates.append([float(group["lr"]) for group in made[0].param_groups])

    made: list[Any] = []

    def schedule(optimizer: Any) -> Any:
        made.append(optimizer)
        return ExponentialLR(optimizer, gamma=0.5)

    own = functools.partial(SGD, weight_decay=0.0)
    for lr in (1.0, torch.tensor(1.0)):
        rates.clear()
        made.clear()
        net = model()
        history = net.fit(
            *table(), epochs=3, lr=lr, optimizer=own, embedding_optimizer=Adagrad, schedule=schedule,  # type: ignore[arg-type]
            callbacks=[Rates()], progress=False,
        )  # fmt: skip
        assert rates == [[0.5, 0.5], [0.25, 0.25], [0.125, 0.125]]
        assert [result.lr for result in history] == [1.0, 0.5, 0.25]


def test_a_schedule_of_momentum_needs_it_in_both() -> None:
    schedule = functools.partial(OneCycleLR, max_lr=0.1, total_steps=100)
    for name in ("optimizer", "embedding_optimizer"):
        options: dict[str, Any] = {name: Adagrad, "progress": False, "schedule_every": "batch"}
        with pytest.raises(ValueError, match="cycle_momentum"):
            model().fit(*table(), schedule=schedule, **options)
        model().fit(*table(), schedule=functools.partial(schedule, cycle_momentum=False), **options)


REFUSED: dict[str, Any] = {
    "AdamW": AdamW,
    "Adam": Adam,
    "fused": functools.partial(SGD, fused=True),
    "foreach": functools.partial(Adam, foreach=True),
    "fused Adagrad": functools.partial(Adagrad, fused=True),
    "weight decay": functools.partial(Adagrad, weight_decay=0.1),
    "decaying SGD": functools.partial(SGD, weight_decay=0.1),
    "RMSprop": torch.optim.RMSprop,
    "NAdam": torch.optim.NAdam,
    "Rprop": torch.optim.Rprop,
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_that_takes_no_sparse_gradients_is_named_and_moves_nothing(name: str) -> None:
    net = model()
    before = copy.deepcopy(net)
    with pytest.raises(TypeError, match=r"embedding_optimizer: expected one that takes sparse .*SparseAdam, Adagrad"):
        net.fit(*table(), embedding_optimizer=REFUSED[name], progress=False)
    assert same(net, before)


def test_other_arguments_are_refused_before_anything_is_trained() -> None:
    net = model()
    for wrong in (3, "adam", SparseAdam([torch.zeros(1, requires_grad=True)])):
        with pytest.raises(TypeError, match="embedding_optimizer: expected a class or function that is called as"):
            net.fit(*table(), embedding_optimizer=wrong, progress=False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"embedding_optimizer: expected the function to return a torch\.optim\.Optim"):
        net.fit(*table(), embedding_optimizer=lambda *_, **__: None, progress=False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^optimizer: expected the function to return"):
        net.fit(*table(), optimizer=lambda *_, **__: None, progress=False)  # type: ignore[arg-type]
    frozen = model()
    frozen.embedding.tables.requires_grad_(False)
    for other in (model(False), frozen, model(columns=[COLUMNS[-1]])):
        with pytest.raises(ValueError, match="embedding_optimizer: expected a model with sparse_embeddings=True"):
            other.fit(*table(), embedding_optimizer=SparseAdam, progress=False)
    with pytest.raises(TypeError, match="sparse_embeddings: expected a bool, got 'yes'"):
        model("yes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sparse: expected a bool, got 2"):
        net.embedding.sparse = 2  # type: ignore[assignment]


@pytest.mark.parametrize("part", ["embedding", "rest"])
def test_parts_that_are_frozen_stay(part: str) -> None:
    net = model()
    chosen = net.embedding.tables if part == "embedding" else nn.ModuleList([net.trunk, net.towers])
    chosen.requires_grad_(False)
    before = copy.deepcopy(net)
    net.fit(*table(), epochs=2, progress=False)
    moved = [not torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True)]
    assert moved == [parameter.requires_grad for parameter in net.parameters()]


def test_later_calls_go_on_unless_the_optimizer_of_the_tables_is_another() -> None:
    once, thrice, changed = model(), model(), model()
    options: dict[str, Any] = {"batch_size": 8, "progress": False}
    once.fit(*table(), epochs=3, **options)
    for _ in range(3):
        thrice.fit(*table(), embedding_optimizer=SparseAdam, **options)  # the default, by name
    assert same(once, thrice)
    changed.fit(*table(), **options)
    run = changed._run
    changed.fit(*table(), embedding_optimizer=Adagrad, **options)
    assert changed._run is not run
    run = changed._run
    changed.embedding.sparse = False
    changed.fit(*table(), **options)
    assert changed._run is not run


def test_a_checkpoint_of_another_optimizer_of_the_tables_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint": tmp_path / "run.pt", "resume": True, "progress": False}
    model().fit(*table(), **options)
    others: tuple[tuple[MultiTaskModel, dict[str, Any]], ...] = (
        (model(), {"embedding_optimizer": Adagrad}),
        (model(False), {}),
    )
    for net, own in others:
        with pytest.raises(ValueError, match=r"expected its own settings, .*'embedding_optimizer': 'SparseAdam'"):
            net.fit(*table(), **{**options, **own, "epochs": 2})


def test_a_checkpoint_of_a_dense_model_has_no_new_setting(tmp_path: Path) -> None:
    model(False).fit(*table(), checkpoint=tmp_path / "run.pt", progress=False)
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    assert "embedding_optimizer" not in state["settings"]
    assert set(state["optimizer"]) == {"state", "param_groups"}

"""Weights of samples and of rare labels in the joint loss, and the scale of a regression's labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ple_fast.losses import JointLoss, TaskLoss
from tests.ranks import run_ranks

NAN = float("nan")
TASKS = (
    TaskLoss("click", weight=0.5),
    TaskLoss("watch", "regression"),
    TaskLoss("rating", "multiclass", num_classes=3),
)


def batch(rows: int = 9) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Predictions, labels with gaps, whole weights from 0 to 3."""
    predictions = {"click": torch.randn(rows), "watch": torch.randn(rows, 1), "rating": torch.randn(rows, 3)}
    labels = {
        "click": torch.randint(0, 2, (rows,)).float(),
        "watch": torch.randn(rows),
        "rating": torch.randint(-1, 3, (rows,)),
    }
    labels["watch"][2] = NAN
    weights = {name: torch.arange(rows).roll(k) % 4 / 1.0 for k, name in enumerate(predictions)}
    return predictions, labels, weights


def test_a_weight_counts_a_row_so_many_times_and_0_takes_it_out() -> None:
    predictions, labels, weights = batch()
    leaves = {name: p.clone().requires_grad_() for name, p in predictions.items()}
    result = JointLoss(TASKS)(leaves, labels, sample_weight=weights)
    result.total.backward()
    for task in TASKS:
        times = weights[task.name].long()
        leaf = predictions[task.name].clone().requires_grad_()
        repeated = leaf.repeat_interleave(times, dim=0)
        own = JointLoss([task])({task.name: repeated}, {task.name: labels[task.name].repeat_interleave(times)})
        torch.testing.assert_close(result.per_task[task.name], own.per_task[task.name])
        torch.testing.assert_close(result.sample_weights[task.name], own.counts[task.name].float())
        own.total.backward()
        torch.testing.assert_close(leaves[task.name].grad, leaf.grad)
        inside = ~labels[task.name].isnan() & (labels[task.name] != (-1 if task.kind == "multiclass" else NAN))
        assert int(result.counts[task.name]) == int((inside & (times > 0)).sum())


def test_equal_weights_change_nothing_and_absent_ones_are_1() -> None:
    predictions, labels, _ = batch()
    plain = JointLoss(TASKS)(predictions, labels)
    halves = {"click": torch.full((9, 1), 0.5), "watch": torch.full((9,), 7.0, dtype=torch.float64)}
    weighted = JointLoss(TASKS)(predictions, labels, sample_weight=halves)
    for name in predictions:
        torch.testing.assert_close(weighted.per_task[name], plain.per_task[name])
    assert plain.sample_weights == plain.counts


def test_a_task_whose_weights_are_all_0_contributes_exactly_0() -> None:
    predictions, labels, _ = batch()
    prediction = torch.full((9,), NAN, requires_grad=True)
    result = JointLoss(TASKS)({**predictions, "click": prediction}, labels, sample_weight={"click": torch.zeros(9)})
    assert result.per_task["click"].item() == 0 and int(result.counts["click"]) == 0
    result.total.backward()
    assert torch.equal(prediction.grad, torch.zeros(9))  # type: ignore[arg-type]  # not None


@pytest.mark.parametrize(
    ("weight", "error", "says"),
    [
        ({"buy": torch.ones(9)}, ValueError, "sample_weight: there is no task 'buy'"),
        (torch.ones(9), TypeError, "sample_weight: expected tensors by task"),
        ({"click": torch.ones(8)}, ValueError, r"sample_weight\['click'\]: expected as many samples.*\(9\), got 8"),
        ({"click": torch.ones(9, 2)}, ValueError, r"sample_weight\['click'\]: expected shape \(B,\)"),
        (
            {"click": torch.ones(9).long()},
            TypeError,
            r"sample_weight\['click'\]: expected floating weights, got torch.int64",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(weight: Any, error: type[Exception], says: str) -> None:
    predictions, labels, _ = batch()
    with pytest.raises(error, match=says):
        JointLoss(TASKS)(predictions, labels, sample_weight=weight)


def weighted_share(rank: int) -> float:
    predictions, labels, weights = batch(12)
    share = slice(0, 3) if rank == 0 else slice(3, 12)

    def own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor[share] for name, tensor in tensors.items()}

    loss = JointLoss(TASKS, process_group=dist.group.WORLD)
    return float(loss(own(predictions), own(labels), sample_weight=own(weights)).total)


def weighted_rank() -> float:
    torch.manual_seed(3)
    return weighted_share(dist.get_rank())


def test_the_mean_over_ranks_of_weighted_losses_is_that_of_all_rows() -> None:
    shares = run_ranks(2, weighted_rank)
    torch.manual_seed(3)
    predictions, labels, weights = batch(12)
    whole = JointLoss(TASKS)(predictions, labels, sample_weight=weights).total
    assert sum(shares) / 2 == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.parametrize("label", [0.0, 0.3, 1.0])
def test_pos_weight_is_pytorchs(label: float) -> None:
    logit = torch.linspace(-40, 40, 9, requires_grad=True)
    labels = torch.full((9,), label)
    ours = JointLoss([TaskLoss("buy", pos_weight=20.0)])({"buy": logit}, {"buy": labels}).total
    theirs = nn.functional.binary_cross_entropy_with_logits(logit, labels, pos_weight=torch.tensor(20.0))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pos_weight": 0}, "a finite pos_weight above 0, got 0.0"),
        ({"kind": "regression", "pos_weight": 2.0}, r"pos_weight=2.0 is for kind='binary'.*sample_weight"),
        ({"kind": "regression", "std": 0.0}, "a finite std above 0"),
        ({"kind": "regression", "mean": NAN}, "expected a finite mean, got nan"),
        ({"mean": 3.0}, "standardise, mean and std are for kind='regression'"),
        ({"standardise": True}, "standardise, mean and std are for kind='regression'"),
        ({"kind": "regression", "standardise": True, "std": 2.0}, "standardise=True, which measures mean and std, or"),
    ],
)
def test_options_of_another_kind_of_task_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TaskLoss("y", **options)


def test_flags_and_numbers_of_a_task_are_typed() -> None:
    with pytest.raises(TypeError, match="standardise: expected a bool, got 'yes'"):
        TaskLoss("y", "regression", standardise="yes")  # type: ignore[arg-type]  # what is tested
    with pytest.raises(TypeError, match="pos_weight: expected a number"):
        TaskLoss("y", pos_weight="20")  # type: ignore[arg-type]  # what is tested
    given: Any = np.float32(2)
    assert type(TaskLoss("y", pos_weight=given).pos_weight) is float


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_the_loss_is_of_standardised_labels_whatever_their_dtype(dtype: torch.dtype) -> None:
    task = TaskLoss("t", "regression", mean=1000.0, std=4.0)
    labels = torch.tensor([1000, 1004, 992]).to(dtype)
    result = JointLoss([task])({"t": torch.tensor([0.0, 0.0, -2.0])}, {"t": labels})
    assert result.total.item() == pytest.approx(1 / 3)


def test_labels_that_nothing_has_measured_have_no_loss() -> None:
    task = TaskLoss("t", "regression", standardise=True)
    with pytest.raises(
        ValueError, match=r"task 't': standardise=True: expected .*TaskLoss\('t', 'regression', mean=, std=\)"
    ):
        JointLoss([task])({"t": torch.zeros(2)}, {"t": torch.zeros(2)})

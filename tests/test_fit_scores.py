"""Labels that are missing, and the scores of validation: what fit says of each, and what it refuses."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from ple_fast.losses import TaskLoss
from ple_fast.model import Callback, Step
from tests.fit_helpers import model, table


def test_a_task_without_any_label_is_named_in_one_warning() -> None:
    data, labels = table()
    gaps = labels | {"watch": np.full(64, np.nan), "rating": np.full(64, -1)}
    with pytest.warns(
        UserWarning, match=r"labels: .*none at all for 'watch', 'rating'; they are not trained"
    ) as caught:
        model().fit(data, gaps, epochs=3, batch_size=16)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        some = labels | {"watch": np.where(np.arange(64) == 5, 1.0, np.nan)}
        model().fit(data, some, batch_size=16, validation=(data, some))


def test_validation_labels_of_no_task_are_not_acted_on() -> None:
    data, labels = table()
    net = model(tasks=[TaskLoss("click")])
    none = {"click": np.full(64, np.nan)}
    with pytest.warns(UserWarning, match="validation labels: .*none at all for 'click'") as caught:
        results = net.fit(data, labels, epochs=4, batch_size=16, patience=1, validation=(data, none))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert [result.score for result in results] == [None] * 4
    assert net._run is not None and net._run._kept is not None  # nothing was put back


def test_a_task_without_validation_labels_leaves_the_score_to_the_others() -> None:
    data, labels = table()
    net = model()
    with pytest.warns(UserWarning, match="'watch'"):
        found = net.fit(data, labels, batch_size=64, validation=(data, labels | {"watch": np.full(64, np.nan)}))
    targets = {name: torch.as_tensor(label) for name, label in labels.items()}
    losses, weights = net.joint_loss(net.eval()(data), targets).per_task, {task.name: task.weight for task in net.tasks}
    expected = sum(weights[name] * losses[name].item() for name in ("click", "rating"))
    assert found[0].score == pytest.approx(-expected, rel=1e-5)


def test_a_score_that_puts_the_model_into_eval_mode_is_told() -> None:
    data, labels = table()
    net = model()

    def careless(predictions: Any, _: Any) -> float:
        net.eval()
        return float(predictions["click"].mean())

    with pytest.warns(UserWarning, match=r"score careless: it called eval\(\) on the model") as caught:
        net.fit(data, labels, epochs=3, batch_size=16, validation=(data, labels), score=careless)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def auc_of_one_class(_predictions: Any, _labels: Any) -> float:
    return float("nan")


def test_a_score_that_is_nan_is_named_once_and_training_goes_on() -> None:
    data, labels = table()
    with pytest.warns(
        UserWarning, match=r"epoch 1: score auc_of_one_class of the validation data .* is undefined .*both classes"
    ) as caught:
        history = model().fit(data, labels, epochs=3, validation=(data, labels), score=auc_of_one_class, patience=1)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert [result.score for result in history] == [None] * 3


def test_a_score_that_is_infinite_is_named_and_the_learning_rate_is_not_blamed() -> None:
    data, labels = table()
    with pytest.raises(FloatingPointError, match="epoch 1: expected a finite validation score, got inf") as caught:
        model().fit(data, labels, validation=(data, labels), score=lambda p, y: float("inf"))
    assert "lr" not in str(caught.value)


def test_a_validation_loss_that_is_not_finite_is_told_from_the_training_loss() -> None:
    data, labels = table()
    huge = labels | {"watch": np.full(64, 3e38)}
    with pytest.raises(FloatingPointError, match="epoch 1: expected a finite validation loss, got inf") as caught:
        model().fit(data, labels, validation=(data, huge))
    assert "lr" not in str(caught.value)


@pytest.mark.parametrize(
    "score", [lambda p, y: {"auc": 0.5}, lambda p, y: "0.5", lambda p, y: np.ones(3), lambda p, y: None]
)
def test_a_score_that_is_no_number_is_refused(score: Any) -> None:
    data, labels = table()
    with pytest.raises(TypeError, match="score <lambda>: expected one number, higher is better, got"):
        model().fit(data, labels, validation=(data, labels), score=score)


@pytest.mark.parametrize("scalar", [np.float32, np.int64, torch.tensor, np.array])
def test_a_score_may_be_any_scalar(scalar: Any) -> None:
    data, labels = table()
    results = model().fit(data, labels, validation=(data, labels), score=lambda p, y: scalar(2))
    assert (results[0].score, type(results[0].score)) == (2.0, float)


def test_a_task_whose_outputs_are_lost_is_no_best_epoch() -> None:
    """Not even where the metrics of the others are the better for it."""

    class Spoils(Callback):
        def after_step(self, model: Any, step: Step) -> None:
            if (step.epoch, step.batch) == (2, step.batches):
                with torch.no_grad():
                    next(model.towers[1].parameters()).fill_(torch.nan)

    data, labels = table()
    tasks = (TaskLoss("click"), TaskLoss("other"))
    net = model(tasks=tasks)
    both = {"click": labels["click"], "other": labels["click"]}
    with pytest.raises(FloatingPointError, match="epoch 2: expected finite outputs of 'other'"):
        net.fit(data, both, epochs=2, validation=0.5, score="auc", callbacks=[Spoils()], progress=False)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in net.state_dict().values()), "of the best epoch"


def test_validation_losses_of_two_epochs_are_comparable() -> None:
    net = model(tasks=(TaskLoss("click", gamma=2.0),))
    data, labels = table()
    history = net.fit(data, labels, epochs=3, lr=1e-12, validation=(data, labels), progress=False)
    scores = [result.score for result in history]
    assert scores == pytest.approx([scores[0]] * 3, rel=0.05)

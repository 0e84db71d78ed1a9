"""What fit keeps and evaluate gives: numbers of each task, in the history, after Ctrl-C and as a data frame."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import numpy as np
import pytest
import torch

from ple_fast.losses import TaskLoss
from ple_fast.model import Encoded, EpochResult, Step, columns_from
from tests import model_helpers
from tests.fit_helpers import model, table

PLAIN: dict[str, Any] = {"options": {"expert_units": ((8,), (6,))}, "dropout": 0.0}


def held() -> tuple[dict[str, Any], dict[str, Any]]:
    data, labels = table(48, seed=1)
    labels["click"][:5] = np.nan
    labels["rating"][:9] = -1
    return data, labels


def test_evaluate_gives_the_numbers_of_the_history() -> None:
    data, labels = table()
    net = model()
    metrics = {"auc", "logloss", "rmse", "accuracy"}
    history = net.fit(data, labels, epochs=4, batch_size=16, validation=held(), metrics=metrics, progress=False)
    found = net.evaluate(*held(), metrics=metrics)
    assert history.best is not None  # whose weights are back
    assert found == history.best.validation
    assert found.loss == pytest.approx(-history.best.score)  # type: ignore[operator]  # not None
    assert [found[name].count for name in ("click", "watch", "rating")] == [43, 48, 39]
    targets = {name: torch.as_tensor(label) for name, label in held()[1].items()}
    result = net.joint_loss(net.eval()(held()[0]), targets)
    for name, loss in result.per_task.items():
        assert found[name].loss == pytest.approx(loss.item(), rel=1e-5)
    total = sum(task.weight * result.per_task[task.name].item() for task in net.tasks)
    assert found.loss == pytest.approx(total, rel=1e-5), "with the weights of epoch 0"


def test_batches_of_any_size_evaluate_alike() -> None:
    net = model()
    whole, parts = (net.evaluate(*held(), metrics={"auc", "rmse"}, batch_size=size) for size in (1000, 7))
    assert parts.flat() == pytest.approx(whole.flat(), rel=1e-5)


def test_evaluate_of_no_label_is_none() -> None:
    data, labels = table()
    found = model().evaluate(data, {name: np.full(64, np.nan) for name in labels}, metrics={"auc", "rmse"})
    assert found.loss is None
    assert [(scores.loss, scores.count) for scores in found.tasks.values()] == [(None, 0)] * 3


def test_the_losses_of_training_are_means_over_each_tasks_labels() -> None:
    """With weights that stand still."""
    data, labels = table()
    labels["watch"][:50] = np.nan
    net = model(**PLAIN)
    expected = net.evaluate(data, labels)
    result = net.fit(data, labels, batch_size=16, lr=1e-30, optimizer=torch.optim.SGD, progress=False)[0]
    for name, scores in result.tasks.items():
        assert scores.loss == pytest.approx(expected[name].loss, rel=1e-5)
        assert scores.count == expected[name].count
    assert result.lr == pytest.approx(1e-30)
    assert (result.rows, result.validation) == (64, None)
    assert result.samples_per_second == pytest.approx(64 / result.seconds)


def test_a_result_of_four_numbers_is_one() -> None:
    """As those were before."""
    result = EpochResult(1, 0.5, None, 0.1)
    assert result == EpochResult(epoch=1, loss=0.5, score=None, seconds=0.1)
    assert hash(result) == hash(EpochResult(1, 0.5, None, 0.1))


def test_the_history_is_a_list_that_becomes_a_frame() -> None:
    data, labels = table()
    one_class = {**labels, "click": np.ones(64)}
    history = model().fit(
        data, labels, epochs=3, batch_size=16, validation=(data, one_class), metrics={"auc", "rmse"}, progress=False
    )
    assert issubclass(type(history), list)
    assert [result.epoch for result in history] == [1, 2, 3]
    frame = history.to_frame()
    assert frame["loss"].tolist() == [result.loss for result in history]
    assert {"score", "seconds", "samples_per_second", "lr", "train/click/loss", "val/loss", "val/watch/rmse"} <= set(
        frame
    )
    assert frame["val/click/auc"].isna().all() and frame["val/click/auc"].dtype == np.float64
    assert frame["val/rating/count"].tolist() == [64] * 3
    for other in (copy.deepcopy(history), pickle.loads(pickle.dumps(history))):
        assert (
            other == history
            and other.watched == history.watched == "joint loss of the validation data (lower is better)"
        )
    by_task = model().evaluate(data, labels, metrics={"rmse"}).to_frame()
    assert by_task["count"].tolist() == [64] * 3
    assert by_task["rmse"].isna().tolist() == [True, False, True]


def test_a_frame_without_pandas_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    history = model().fit(*table(), progress=False)
    with pytest.raises(ImportError, match=r"pip install pandas, or read flat\(\)"):
        history.to_frame()


def test_the_history_survives_ctrl_c_with_all_its_numbers() -> None:
    data, labels = table()

    def interrupt(step: Step) -> None:
        if (step.epoch, step.batch) == (3, 2):
            raise KeyboardInterrupt

    options: dict[str, Any] = {"batch_size": 16, "validation": held(), "metrics": "auc"}
    expected = model().fit(data, labels, epochs=2, progress=False, **options)
    with pytest.raises(KeyboardInterrupt) as caught:
        model().fit(data, labels, epochs=5, progress=interrupt, **options)
    history = caught.value.history  # type: ignore[attr-defined]  # what is tested
    assert [result.validation for result in history] == [result.validation for result in expected]
    assert len(history.to_frame()) == 2


def test_a_share_of_the_rows_is_held_back_by_the_seed() -> None:
    data, labels = model_helpers.table(100)
    data["age"] = 20 + np.arange(100) / 3.0  # tells the rows apart
    columns = columns_from(data, categorical=["country", "hour"], numeric=["age", "amount"])

    def rows(seed: int, epochs: int = 2) -> tuple[set[float], set[float]]:
        net = model_helpers.model(columns=columns)
        trained: set[float] = set()
        scored: set[float] = set()
        ages = net.encode(data).numbers[:, 0].tolist()

        def note(module: Any, inputs: tuple[Encoded, ...]) -> None:
            (scored if torch.is_inference_mode_enabled() else trained).update(inputs[0].numbers[:, 0].tolist())

        net.embedding.register_forward_pre_hook(note)
        history = net.fit(data, labels, epochs=epochs, batch_size=16, validation=0.2, seed=seed, progress=False)
        assert history[0].validation is not None and history[0].validation["click"].count == 20
        assert history[0].rows == 80
        assert trained | scored == set(ages) and not trained & scored
        return trained, scored

    assert rows(0) == rows(0) == rows(0, epochs=1)
    assert rows(0) != rows(1)


def test_labels_of_a_share_reach_the_users_score() -> None:
    data, labels = table()
    seen: list[Any] = []

    def score(predictions: Any, truth: Any) -> float:
        seen.append((predictions, truth))
        return 1.0

    weight = {"click": np.where(np.arange(64) % 2, 1.0, 0.0)}
    history = model().fit(data, labels, validation=0.25, score=score, sample_weight=weight, progress=False)
    predictions, truth = seen[0]
    assert {name: len(label) for name, label in truth.items()} == {"click": 16, "watch": 16, "rating": 16}
    assert [len(p) for p in predictions.values()] == [16] * 3
    assert history[0].validation is not None and history[0].validation["click"].count == int(
        (~np.isnan(truth["click"])).sum()
    )


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5, -0.1, 0.001, 0.999, float("nan")])
def test_a_share_that_leaves_nothing_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="validation: expected a share between 0 and 1 that leaves rows on both sides"):
        model().fit(*table(), validation=share)


WATCHED: dict[Any, tuple[str, Any]] = {
    None: ("joint loss of the validation data (lower is better)", lambda v: -v.loss),
    "loss": ("joint loss of the validation data (lower is better)", lambda v: -v.loss),
    "click/auc": ("auc of 'click' on the validation data (higher is better)", lambda v: v["click"]["auc"]),
    "auc": ("auc of 'click' on the validation data (higher is better)", lambda v: v["click"]["auc"]),
    "watch/rmse": ("rmse of 'watch' on the validation data (lower is better)", lambda v: -v["watch"]["rmse"]),
    "rating/loss": ("loss of 'rating' on the validation data (lower is better)", lambda v: -v["rating"].loss),
    "accuracy": (
        "mean accuracy of 'click', 'rating' on the validation data (higher is better)",
        lambda v: (v["click"]["accuracy"] + v["rating"]["accuracy"]) / 2,
    ),
}


@pytest.mark.parametrize("score", WATCHED)
def test_the_number_that_is_watched_is_named_and_may_be_any(score: Any) -> None:
    words, expected = WATCHED[score]
    history = model().fit(*table(), epochs=2, batch_size=16, validation=held(), score=score, progress=False)
    assert history.watched == words
    assert [result.score for result in history] == [pytest.approx(expected(result.validation)) for result in history]


def test_early_stopping_says_which_number_it_watched_and_when_it_was_best() -> None:
    falling = iter([1.0, 3.0, 2.0, 1.0])

    def quality(predictions: Any, truth: Any) -> float:
        return next(falling)

    history = model().fit(
        *table(), epochs=9, batch_size=16, validation=held(), score=quality, patience=2, progress=False
    )
    assert history.stopped == (
        "stopped after epoch 4 of 9: score quality of the validation data (higher is better) was best in epoch 2, "
        "whose weights are back; patience=2"
    )
    assert history.best is history[1]
    assert model().fit(*table(), epochs=2, validation=held(), patience=2, progress=False).stopped is None


def test_an_undefined_number_that_is_watched_is_told_once_and_nothing_is_put_back() -> None:
    data, labels = table()
    one_class = {**labels, "click": np.zeros(64)}
    net = model()
    with pytest.warns(UserWarning, match=r"epoch 1: auc of 'click' .* is undefined \(an AUC needs both") as caught:
        history = net.fit(
            data, labels, epochs=4, batch_size=16, validation=(data, one_class), score="auc", patience=1, progress=False
        )
    assert len(caught) == 1 and caught[0].filename == __file__
    assert [result.score for result in history] == [None] * 4
    assert history.best is None and net._run is not None and net._run._kept is not None


@pytest.mark.parametrize("name", ["ndcg", "buy/auc", "watch/auc", "click/", "/auc/", ""])
def test_a_name_that_is_no_number_of_the_validation_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"score: expected loss, one of auc, .*'click/loss' and so on"):
        model().fit(*table(), validation=held(), score=name)


def test_one_task_alone_may_be_watched_by_its_loss() -> None:
    net = model(tasks=[TaskLoss("a/b")])
    data, labels = table()
    history = net.fit(data, {"a/b": labels["click"]}, validation=0.5, score="a/b/loss", progress=False)
    assert history.watched == "loss of 'a/b' on the validation data (lower is better)"

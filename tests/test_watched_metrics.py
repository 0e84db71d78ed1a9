"""Metrics of the user's own as the number that training watches, and those that weights of rows do not reach."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torchmetrics
from sklearn.metrics import mean_squared_error

from ple_fast.model import History
from tests.fit_helpers import model, table


def gini(truth: Any, predicted: Any, sample_weight: Any = None) -> float:
    return float(2 * sklearn.metrics.roc_auc_score(truth, predicted, sample_weight=sample_weight) - 1)


def spread(_truth: Any, predicted: Any) -> float:
    return float(np.std(predicted))


def fit(metrics: Any, score: str, **options: Any) -> History:
    data, labels = table(96)
    whole: dict[str, Any] = {"epochs": 3, "batch_size": 16, "lr": 0.01, "validation": 0.5, "progress": False}
    return model().fit(data, labels, metrics=metrics, score=score, **whole | options)


NAMED: list[tuple[Any, str, float, str]] = [
    ({"click": [gini]}, "gini", 1, "gini of 'click' on the validation data (higher is better)"),
    ({"click": [gini]}, "click/gini", 1, "gini of 'click' on the validation data (higher is better)"),
    ({"click": {"-": gini}, "watch": [spread]}, "-spread", -1, "spread of 'watch' on the validation data (lower"),
    ([spread, "auc"], "-watch/spread", -1, "spread of 'watch' on the validation data (lower"),
    ({"watch": [mean_squared_error]}, "-mean_squared_error", -1, "mean_squared_error of 'watch' on"),
    ({"watch": {"mse": torchmetrics.MeanSquaredError()}}, "mse", -1, "mse of 'watch' on the validation data (lower"),
    ({"watch": [torchmetrics.R2Score()]}, "R2Score", 1, "R2Score of 'watch' on the validation data (higher"),
    ({"click": {"quality": "auc"}}, "quality", 1, "quality of 'click' on the validation data (higher is better)"),
    ({"click": {"quality": "logloss"}}, "quality", -1, "quality of 'click' on the validation data (lower is better)"),
]  # fmt: skip


@pytest.mark.parametrize(("metrics", "score", "sign", "words"), NAMED, ids=[named[1] for named in NAMED])
def test_a_metric_of_the_users_is_watched_by_its_name(metrics: Any, score: str, sign: float, words: str) -> None:
    history = fit(metrics, score)
    assert history.watched is not None and history.watched.startswith(words)
    task, name = words.split("'")[1], words.split(" ")[0]
    for result in history:
        assert result.validation is not None
        assert result.score == pytest.approx(sign * float(result.validation[task][name]))  # type: ignore[arg-type]


def test_a_function_of_several_tasks_is_their_mean_and_chooses_the_best_epoch(tmp_path: Path) -> None:
    numbers = iter([1.0, 2.0, 6.0, 3.0, 4.0, 5.0, 0.0, 1.0, 2.0])

    def counted(truth: Any, predicted: Any) -> float:
        return next(numbers)

    history = fit(counted, "counted", patience=1, epochs=5, checkpoint=tmp_path / "run.pt")
    assert history.watched == "mean counted of 'click', 'watch', 'rating' on the validation data (higher is better)"
    assert [result.score for result in history] == [3.0, 4.0, 1.0]
    assert history.stopped is not None and "best in epoch 2" in history.stopped


@pytest.mark.parametrize(
    ("metrics", "score", "says"),
    [
        (
            {"watch": [mean_squared_error]},
            "mean_squared_error",
            "score: expected '-mean_squared_error', where lower is",
        ),
        ({"click": [gini]}, "watch/gini", "a metric of metrics= by its name, or a function, got 'watch/gini'"),
        ({"click": [gini]}, "-auc", "score: expected loss, one of auc"),
        ({"click": {"m": "auc"}, "watch": {"m": "rmse"}}, "m", "one name of one direction, got 'm'"),
    ],
)
def test_a_name_without_a_direction_and_an_unknown_one_are_refused(metrics: Any, score: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fit(metrics, score)


def test_a_metric_that_is_infinite_is_an_error_with_its_number() -> None:
    def endless(truth: Any, predicted: Any) -> float:
        return float("inf")

    with pytest.raises(FloatingPointError, match=r"expected a finite validation score .*got inf"):
        fit({"click": [endless]}, "endless")


UNWEIGHTED: Any = {"click": [spread, torchmetrics.classification.BinaryAUROC(), "auc", gini], "watch": ["rmse"]}


@pytest.mark.parametrize("in_parts", [False, True])
def test_metrics_that_take_no_weights_are_named_once(in_parts: bool) -> None:
    data, labels = table(96)
    weight = np.linspace(0.1, 1, 96)
    rows: tuple[Any, ...] = ([(data, labels, weight)],) if in_parts else (data, labels)
    own: dict[str, Any] = {} if in_parts else {"sample_weight": weight}
    held: Any = [(data, labels, weight)] if in_parts else (data, labels, weight)
    net = model()
    for call in (
        lambda: net.fit(data, labels, epochs=2, validation=held, metrics=UNWEIGHTED, progress=False),
        lambda: net.evaluate(*rows, metrics=UNWEIGHTED, **own),
    ):
        with pytest.warns(UserWarning, match="metrics: expected metrics that take the weights of rows, got ") as caught:
            call()
        (one,) = caught
        assert "got spread of 'click', BinaryAUROC of 'click', computed without them" in str(one.message)
        assert one.filename == __file__


def test_nothing_is_said_where_there_are_no_weights_or_of_another_task() -> None:
    data, labels = table(96)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model().evaluate(data, labels, metrics=UNWEIGHTED)
        model().evaluate(data, labels, metrics=UNWEIGHTED, sample_weight={"watch": np.ones(96)})

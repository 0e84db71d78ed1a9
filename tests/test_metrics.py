"""Metrics by name and as functions, against scikit-learn and torchmetrics, each over the task's own sample space."""

from __future__ import annotations

import functools
import sys
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torchmetrics

from ple_fast.losses import TaskLoss
from ple_fast.model import MultiTaskModel
from tests.fit_helpers import model, table

ALL = {"auc", "average_precision", "logloss", "accuracy", "rmse", "mae"}


def gaps(rows: int = 200) -> tuple[dict[str, Any], dict[str, Any]]:
    """Labels of which each task has others."""
    data, labels = table(rows, seed=1)
    place = np.arange(rows)
    return data, {
        "click": np.where(place % 3 == 0, np.nan, labels["click"]),
        "watch": np.where(place % 4 == 0, np.nan, labels["watch"]),
        "rating": np.where(place % 5 == 0, -1, labels["rating"]),
    }


@pytest.fixture(scope="module")
def net() -> MultiTaskModel:
    made = model()
    made.fit(*table(), batch_size=16, progress=False)
    return made


@pytest.mark.parametrize("is_weighted", [False, True])
def test_the_names_are_the_fields_over_each_tasks_own_sample_space(net: MultiTaskModel, is_weighted: bool) -> None:
    data, labels = gaps()
    weight = np.linspace(0.1, 3, 200).astype(np.float32) if is_weighted else None
    found = net.evaluate(data, labels, metrics=ALL, sample_weight=weight)
    predicted = net.predict(data)
    inside = {"click": ~np.isnan(labels["click"]), "watch": ~np.isnan(labels["watch"]), "rating": labels["rating"] >= 0}
    y = {name: labels[name][rows] for name, rows in inside.items()}
    p = {name: predicted[name][rows] for name, rows in inside.items()}
    w: dict[str, Any] = {name: None if weight is None else weight[rows] for name, rows in inside.items()}
    m = sklearn.metrics
    expected = {
        "click": {
            "auc": m.roc_auc_score(y["click"], p["click"], sample_weight=w["click"]),
            "average_precision": m.average_precision_score(y["click"], p["click"], sample_weight=w["click"]),
            "logloss": m.log_loss(y["click"], p["click"], sample_weight=w["click"]),
            "accuracy": m.accuracy_score(y["click"], p["click"] >= 0.5, sample_weight=w["click"]),
        },
        "watch": {
            "rmse": m.root_mean_squared_error(y["watch"], p["watch"], sample_weight=w["watch"]),
            "mae": m.mean_absolute_error(y["watch"], p["watch"], sample_weight=w["watch"]),
        },
        "rating": {
            "logloss": m.log_loss(y["rating"], p["rating"], sample_weight=w["rating"], labels=[0, 1, 2]),
            "accuracy": m.accuracy_score(y["rating"], p["rating"].argmax(1), sample_weight=w["rating"]),
        },
    }
    for name, metrics in expected.items():
        assert list(found[name].metrics) == list(metrics)
        assert found[name].metrics == pytest.approx(metrics, rel=1e-5)
        assert found[name].count == inside[name].sum()
    assert found["click"].loss == pytest.approx(found["click"]["logloss"], rel=1e-5)
    assert found["watch"].loss == pytest.approx(expected["watch"]["rmse"] ** 2, rel=1e-5)


def test_a_prediction_of_0_or_1_has_a_finite_logloss() -> None:
    from ple_fast.model.metrics import NAMED

    found = NAMED["logloss"].compute(np.array([0.0, 1.0]), np.array([1.0, 1.0], dtype=np.float32), None)
    assert found == pytest.approx(sklearn.metrics.log_loss([0, 1], np.array([1.0, 1.0], dtype=np.float32)), rel=1e-3)


def test_functions_are_called_as_scikit_learns_with_weights_where_they_take_them(net: MultiTaskModel) -> None:
    data, labels = gaps()
    seen: list[Any] = []

    def mine(truth: Any, predicted: Any) -> float:
        seen.append((truth, predicted))
        return 7.0

    metrics = {
        "click": [sklearn.metrics.brier_score_loss, mine],
        "watch": {"r2": sklearn.metrics.r2_score, "off": mine},
    }
    found = net.evaluate(data, labels, metrics=metrics, sample_weight=np.arange(200) / 10)
    assert found["click"]["mine"] == found["watch"]["off"] == 7.0
    assert list(found["rating"].metrics) == []
    inside = ~np.isnan(labels["click"])
    inside[0] = False  # of weight 0
    truth, predicted = seen[0]
    assert np.array_equal(truth, labels["click"][inside])
    assert np.array_equal(predicted, net.predict(data)["click"][inside])
    weight = (np.arange(200) / 10)[inside]
    assert found["click"]["brier_score_loss"] == pytest.approx(
        sklearn.metrics.brier_score_loss(truth, predicted, sample_weight=weight), rel=1e-5
    )
    assert found["click"]["brier_score_loss"] != pytest.approx(
        sklearn.metrics.brier_score_loss(truth, predicted), rel=1e-3
    )


def test_metrics_of_torchmetrics_are_begun_anew_at_each_evaluation(net: MultiTaskModel) -> None:
    data, labels = gaps()
    metric = torchmetrics.classification.BinaryAUROC()
    classes = torchmetrics.classification.MulticlassAccuracy(3, average="micro")
    metrics = {
        "click": ["auc", metric],
        "watch": [torchmetrics.MeanSquaredError(squared=False), "rmse"],
        "rating": ["accuracy", classes],
    }
    for part in (slice(0, 100), slice(100, 200)):
        found = net.evaluate(
            {n: c[part] for n, c in data.items()}, {n: c[part] for n, c in labels.items()}, metrics=metrics
        )
        assert found["click"]["BinaryAUROC"] == pytest.approx(found["click"]["auc"])
        assert found["watch"]["MeanSquaredError"] == pytest.approx(found["watch"]["rmse"], rel=1e-5)
        assert found["rating"]["MulticlassAccuracy"] == pytest.approx(found["rating"]["accuracy"])


def test_a_function_in_a_list_goes_to_all_tasks_and_one_alone_is_a_list(net: MultiTaskModel) -> None:
    data, labels = gaps()

    def rows(truth: Any, predicted: Any) -> int:
        return len(truth)

    found = net.evaluate(data, labels, metrics=rows)
    assert all(scores["rows"] == scores.count for scores in found.tasks.values())
    assert found == net.evaluate(data, labels, metrics=[rows])
    assert net.evaluate(data, labels, metrics=functools.partial(rows))["click"]["rows"] == found["click"].count
    assert list(net.evaluate(data, labels, metrics="auc")["click"].metrics) == ["auc"]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_auc_of_one_class_is_undefined_and_training_goes_on(value: float) -> None:
    data, labels = table()
    held = {**labels, "click": np.full(64, value), "watch": np.full(64, np.nan)}

    def nan(truth: Any, predicted: Any) -> float:
        return float("nan")

    def older(truth: Any, predicted: Any) -> float:
        if len(set(truth)) < 2:
            raise ValueError("Only one class present in y_true.")
        return 1.0

    metrics = {"click": ["auc", "average_precision", "logloss", nan, older], "watch": ["rmse"]}
    with pytest.warns(UserWarning, match="'watch'"):
        history = model().fit(
            data, labels, epochs=2, batch_size=16, validation=(data, held), metrics=metrics, progress=False
        )
    assert len(history) == 2
    for result in history:
        assert result.validation is not None
        click = result.validation["click"]
        assert [click[name] for name in ("auc", "average_precision", "nan", "older")] == [None] * 4
        assert click["logloss"] is not None
        assert (result.validation["watch"].loss, result.validation["watch"]["rmse"]) == (None, None)


def test_what_a_function_raises_is_not_hidden_where_both_classes_are_there(net: MultiTaskModel) -> None:
    def wrong(truth: Any, predicted: Any) -> float:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        net.evaluate(*gaps(), metrics={"click": wrong})


@pytest.mark.parametrize(
    ("metrics", "error", "says"),
    [
        ("ndcg", ValueError, "metrics: expected one of auc, average_precision, .*, or a function, got 'ndcg'"),
        (
            {"buy": "auc"},
            ValueError,
            r"metrics: expected metrics by task, of \['click', 'watch', 'rating'\], got 'buy'",
        ),
        ({"watch": "auc"}, ValueError, r"metrics\['watch'\]: auc is for a task of kind binary, got regression"),
        ({"click": 3}, TypeError, r"metrics\['click'\]: expected names of metrics, or functions.*got 3"),
        ([3], TypeError, "metrics: expected names of metrics, or functions"),
        (["auc", "auc"], ValueError, "metrics: expected every name once"),
        ({"click": {"loss": len}}, ValueError, "and not loss or count"),
        ({"click": lambda y, p: "high"}, TypeError, "metric <lambda> of 'click': expected one number, got 'high'"),
    ],
)
def test_metrics_that_are_none_are_named(net: MultiTaskModel, metrics: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        net.evaluate(*gaps(), metrics=metrics)


def test_a_name_that_is_for_none_of_the_tasks_and_labels_between_the_classes_are_refused() -> None:
    data, labels = table()
    one = model(tasks=[TaskLoss("click")])
    with pytest.raises(ValueError, match="metrics: rmse is for a task of kind regression, and there is none"):
        one.evaluate(data, labels, metrics={"auc", "rmse"})
    soft = {"click": labels["click"] * 0.9}
    with pytest.raises(ValueError, match="metrics: auc of 'click': expected labels of 0 and 1, got some between"):
        one.fit(data, labels, validation=(data, soft), metrics="auc")
    assert one.evaluate(data, soft, metrics="logloss")["click"]["logloss"] is not None
    with pytest.raises(ValueError, match=r"score, patience, metrics: expected validation=0.1 or \(data, labels\)"):
        one.fit(data, labels, metrics="auc")


def test_a_missing_scikit_learn_is_told_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    data, labels = table()
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    net = model()
    steps: list[Any] = []
    with pytest.raises(ImportError, match="pip install scikit-learn, or pass a function"):
        net.fit(data, labels, validation=0.5, metrics={"auc", "rmse"}, progress=steps.append)
    assert not steps
    assert net.evaluate(data, labels, metrics={"rmse", "logloss"})["watch"]["rmse"] is not None

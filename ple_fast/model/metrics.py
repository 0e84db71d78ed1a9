"""Metrics of a task's predictions, by name or as functions, each over the task's own sample space."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from ple_fast_encoder.tables import Array

from ..losses import TaskLoss
from ..scalars import check_number, shown

Metrics = Any
"""Names or functions: one, several, or several by task."""
Weights = Array | None
TINY = float(np.finfo(np.float32).eps)
"""A float32 probability is not told from 0 or 1 nearer than this."""


class Named(NamedTuple):
    """A metric that has a name here."""

    kinds: tuple[str, ...]
    """Of tasks that it is for."""
    compute: Callable[[Array, Array, Weights], float]
    """Of labels, predictions and weights."""
    lower_is_better: bool = False
    of_classes: bool = False
    """Whether it is scikit-learn's, of labels that are 0 or 1, and undefined where one of them is not there."""


def _of_sklearn(name: str) -> Any:
    try:
        import sklearn.metrics
    except ImportError as error:
        raise ImportError(
            f"{name} is scikit-learn's: pip install scikit-learn, or pass a function of (labels, predictions)"
        ) from error
    return getattr(sklearn.metrics, name)


def _auc(labels: Array, predictions: Array, weights: Weights) -> float:
    return float(_of_sklearn("roc_auc_score")(labels, predictions, sample_weight=weights))


def _average_precision(labels: Array, predictions: Array, weights: Weights) -> float:
    return float(_of_sklearn("average_precision_score")(labels, predictions, sample_weight=weights))


def _logloss(labels: Array, predictions: Array, weights: Weights) -> float:
    chances = np.clip(predictions.astype(np.float64), TINY, 1 - TINY)
    if predictions.ndim == 2:
        losses = -np.log(chances[np.arange(len(labels)), labels.astype(np.int64)])
    else:
        losses = -(labels * np.log(chances) + (1 - labels) * np.log1p(-chances))
    return float(np.average(losses, weights=weights))


def _accuracy(labels: Array, predictions: Array, weights: Weights) -> float:
    chosen = predictions.argmax(1) if predictions.ndim == 2 else predictions >= 0.5
    truth = labels if predictions.ndim == 2 else labels >= 0.5
    return float(np.average(chosen == truth, weights=weights))


def _rmse(labels: Array, predictions: Array, weights: Weights) -> float:
    return math.sqrt(np.average(np.square(predictions.astype(np.float64) - labels), weights=weights))


def _mae(labels: Array, predictions: Array, weights: Weights) -> float:
    return float(np.average(np.abs(predictions.astype(np.float64) - labels), weights=weights))


NAMED = {
    "auc": Named(("binary",), _auc, of_classes=True),
    "average_precision": Named(("binary",), _average_precision, of_classes=True),
    "logloss": Named(("binary", "multiclass"), _logloss, lower_is_better=True),
    "accuracy": Named(("binary", "multiclass"), _accuracy),
    "rmse": Named(("regression",), _rmse, lower_is_better=True),
    "mae": Named(("regression",), _mae, lower_is_better=True),
}


LOWER = ("_error", "_loss", "_deviance")
"""Ends of scikit-learn's names of what is better the lower it is."""
EXPECTED = "names of metrics, or functions of (labels, predictions)"


class Metric(NamedTuple):
    """One metric of one task."""

    name: str
    given: str | Callable[..., Any]
    """A key of ``NAMED``, or the user's function."""

    @property
    def lower_is_better(self) -> bool | None:
        """What the metric itself says, in its table here or as torchmetrics' do; None where it says nothing."""
        if isinstance(self.given, str):
            return NAMED[self.given].lower_is_better
        higher = getattr(self.given, "higher_is_better", None)
        return None if higher is None or not _is_torchmetric(self.given) else not higher

    @property
    def takes_weights(self) -> bool:
        """Whether it can be given the weights of rows."""
        return isinstance(self.given, str) or (not _is_torchmetric(self.given) and _takes_weights(self.given))

    def check(self, task: TaskLoss, labels: Array) -> None:
        """What is known before a model has predicted anything, from the labels of the sample space.

        Raises:
            ImportError: scikit-learn is needed and missing.
            ValueError: labels of 0 and 1 are needed, and some are between.
        """
        if isinstance(self.given, str) and NAMED[self.given].of_classes:
            _of_sklearn("roc_auc_score")
            if not _are_classes(labels):
                raise ValueError(
                    f"metrics: {self.name} of {task.name!r}: expected labels of 0 and 1, got some between them"
                )

    def value(self, task: TaskLoss, labels: Array, predictions: Array, weights: Weights) -> float | None:
        """Of labels ``(n,)`` and predictions ``(n,)`` or ``(n, C)`` of the sample space; None where it is undefined.

        Raises:
            TypeError: the function returned no number.
        """
        if not len(labels):
            return None
        is_one_class = task.kind != "regression" and len(np.unique(labels)) < 2
        if isinstance(self.given, str):
            named = NAMED[self.given]
            is_undefined = (named.of_classes and is_one_class) or not np.isfinite(predictions).all()
            return None if is_undefined else named.compute(labels, predictions, weights)
        try:
            found = _called(self.given, task, labels, predictions, weights)
        except ValueError:
            if is_one_class:  # older releases of scikit-learn raise where a metric is undefined
                return None
            raise
        value = check_number(f"metric {self.name} of {task.name!r}", found, "one number")
        return None if math.isnan(value) else value


def _called(function: Callable[..., Any], task: TaskLoss, labels: Array, predictions: Array, weights: Weights) -> Any:
    """As scikit-learn's functions are called, or as torchmetrics' objects are."""
    if _is_torchmetric(function):
        metric: Any = function
        truth = torch.from_numpy(labels)
        metric.reset()
        metric.update(
            torch.from_numpy(predictions), truth.long() if task.kind != "regression" and _are_classes(labels) else truth
        )
        return metric.compute()
    if weights is not None and _takes_weights(function):
        return function(labels, predictions, sample_weight=weights)
    return function(labels, predictions)


def _is_torchmetric(function: Callable[..., Any]) -> bool:
    return all(callable(getattr(function, name, None)) for name in ("reset", "update", "compute"))


def _are_classes(labels: Array) -> bool:
    return bool((labels == np.floor(labels)).all())  # of binary labels, which are from 0 to 1, 0 and 1


def _takes_weights(function: Callable[..., Any]) -> bool:
    try:
        return "sample_weight" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a built-in
        return False


def metrics_by_task(metrics: Metrics, tasks: Sequence[TaskLoss]) -> dict[str, tuple[Metric, ...]]:
    """The metrics of each task.

    A list goes to every task that a name in it is for, and its functions to all tasks.

    Raises:
        TypeError: neither names nor functions.
        ValueError: an unknown name or task, a name that is for no task that it is given for, or a name twice.
    """
    if metrics is None:
        return {task.name: () for task in tasks}
    if not isinstance(metrics, Mapping):
        given = _several("metrics", metrics)
        for name, metric in given.items():
            if isinstance(metric, str) and not any(task.kind in NAMED[metric].kinds for task in tasks):
                raise ValueError(f"metrics: {name} is for a task of kind {_kinds(metric)}, and there is none")
        return {
            task.name: tuple(
                Metric(name, metric)
                for name, metric in given.items()
                if not isinstance(metric, str) or task.kind in NAMED[metric].kinds
            )
            for task in tasks
        }
    names = [task.name for task in tasks]
    if unknown := [name for name in metrics if name not in names]:
        raise ValueError(f"metrics: expected metrics by task, of {names}, got {shown(unknown[0])}")
    found = {}
    for task in tasks:
        given = _several(f"metrics[{task.name!r}]", metrics.get(task.name, ()))
        for name, metric in given.items():
            if isinstance(metric, str) and task.kind not in NAMED[metric].kinds:
                raise ValueError(
                    f"metrics[{task.name!r}]: {name} is for a task of kind {_kinds(metric)}, got {task.kind}"
                )
        found[task.name] = tuple(Metric(name, metric) for name, metric in given.items())
    return found


def _kinds(name: str) -> str:
    return " or ".join(NAMED[name].kinds)


def _several(where: str, metrics: Metrics) -> dict[str, Any]:
    """Names or functions by name, those of a set in a fixed order."""
    if isinstance(metrics, Mapping):
        pairs = list(metrics.items())
    else:
        entries = [metrics] if isinstance(metrics, str) or callable(metrics) else metrics
        if not isinstance(entries, Iterable):
            raise TypeError(f"{where}: expected {EXPECTED}, got {shown(metrics)}")
        pairs = [(_name_of(where, entry), entry) for entry in entries]
        if isinstance(metrics, (set, frozenset)):
            order = list(NAMED)
            pairs.sort(key=lambda pair: (order.index(pair[0]) if pair[0] in order else len(order), pair[0]))
    found: dict[str, Any] = {}
    for name, entry in pairs:
        if isinstance(entry, str) and entry not in NAMED:
            raise ValueError(f"{where}: expected one of {', '.join(NAMED)}, or a function, got {entry!r}")
        if not isinstance(name, str) or not (isinstance(entry, str) or callable(entry)):
            raise TypeError(f"{where}: expected {EXPECTED}, got {shown(entry)}")
        if name in found or name in ("loss", "count"):
            raise ValueError(
                f"{where}: expected every name once, and not loss or count, got {name!r}; by task, functions can be "
                "given names of your own: {task: {name: function}}"
            )
        found[name] = entry
    return found


def _name_of(where: str, metric: Any) -> str:
    if isinstance(metric, str):
        return metric
    inner = metric
    while isinstance(inner, partial):
        inner = inner.func
    return str(getattr(inner, "__name__", type(inner).__name__))

"""Validation: the rows that are held back, what is measured on them, and the number that training watches."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ple_fast_encoder.caller import warn_caller
from ple_fast_encoder.tables import Array, Table

from ..losses import TaskLoss
from ..scalars import check_number, shown
from .arguments import has_no_names, kind_of
from .columns import Encoded
from .eval_view import eval_view, is_training
from .evaluation import evaluation
from .history import Evaluation
from .labels import Labelled, sample_space
from .metrics import LOWER, NAMED, Metric, metrics_by_task
from .network import TaskNetwork
from .parts import is_parts
from .rows import RowParts, Rows, rows_of

Score = Callable[[dict[str, Array], Table], float]
LEAST_ROWS = 8192
"""Of a batch: scoring keeps nothing for a backward."""
HELD_BACK = 0x5D588B656C078965
"""What is added to the seed for the rows that are held back: the order of the others is another draw."""


def with_validation(
    model: TaskNetwork, rows: Rows | RowParts, validation: Any, seed: int
) -> tuple[Rows | RowParts, Rows | RowParts | None]:
    """The rows to train on, and those to validate on.

    Args:
        validation: a tuple of data and labels, and weights maybe; a table with its labels; data that comes in parts, as
            every list is; or a share of ``rows``, which ``seed`` draws.

    Raises:
        TypeError: neither.
        ValueError: a share that is not between 0 and 1, or leaves one of the two without a row, or of rows that come
            in parts.
    """
    if validation is None:
        return rows, None
    if isinstance(validation, tuple) and not isinstance(validation, Encoded) and len(validation) in (2, 3):
        weight = validation[2] if len(validation) == 3 else None
        return rows, rows_of(model, validation[0], validation[1], weight, "validation labels")
    if not isinstance(validation, tuple) and (is_parts(validation) or not has_no_names(validation)):
        return rows, rows_of(model, validation, None, None, "validation labels")
    try:
        share = check_number("validation", validation)
    except TypeError as error:
        raise TypeError(
            "validation: expected (data, labels), (data, labels, sample_weight), data with its labels, or a share of "
            f"the rows such as 0.1, got {kind_of(validation)}"
        ) from error
    if isinstance(rows, RowParts):
        raise ValueError(
            f"validation: expected (data, labels) or parts of their own beside data that comes in parts, got {share}"
        )
    count = len(rows.data)
    held = round(share * count) if 0 < share < 1 else 0
    if not 0 < held < count:
        raise ValueError(
            f"validation: expected a share between 0 and 1 that leaves rows on both sides, got {share} of {count} rows"
        )
    generator = torch.Generator(device="cpu").manual_seed((seed + HELD_BACK) % 2**63)
    order = torch.randperm(count, generator=generator, device="cpu")
    return _some(rows, order[held:]), _some(rows, order[:held])


def _some(rows: Rows, index: Tensor) -> Rows:
    labels = rows.labels.rows(index)
    return Rows(rows.data.rows(index), labels, {name: label.numpy() for name, label in labels.targets.items()})


class Watched(NamedTuple):
    """The number by which the best epoch is chosen."""

    words: str
    """What it is."""
    value: Callable[[Evaluation], float | None]
    """Higher is better; None where it is undefined."""
    tasks: tuple[str, ...]
    """Of which it is."""
    sign: float = -1.0
    """Between it and the number it is made of."""


class Scorer:
    """Called with the number of an epoch: what the validation rows say after it, and the score, higher is better.

    The score is that of the user's function; or of a name, minus it where lower is better; by default minus the joint
    loss. It is None where that is undefined. ``patience``: after how many epochs without a better one training ends.

    Raises:
        TypeError: a metric that is no name and no function.
        ValueError: an unknown name, or a part of the model that cannot be scored in train mode.
        ImportError: a metric's library is missing.
    """

    def __init__(
        self,
        model: TaskNetwork,
        rows: Rows | RowParts,
        score: Score | str | None,
        metrics: Any,
        batch_size: int,
        patience: int | None,
    ) -> None:
        self.model, self.rows, self.patience = model, rows, patience
        self.batch_size = max(batch_size, LEAST_ROWS)
        labels = rows.labels if isinstance(rows, Rows) else rows.all_labels()
        self.targets = labels.targets
        self.metrics = checked_metrics(model, labels, metrics)
        self.function = score if callable(score) else None
        if self.function is not None:
            self.watched = f"score {_name(self.function)} of the validation data (higher is better)"
        else:
            name = "loss" if score is None else str(score)
            self.metrics, (self.watched, self.value, self.watched_tasks, self.sign) = _watched(
                name, model.tasks, self.metrics
            )
            for task in model.tasks:  # of the metric that is only watched
                _check(task, labels, self.metrics[task.name])
        self.has_labels = len(model.joint_loss.unlabelled(self.targets)) < len(model.tasks)
        self.has_warned = not self.has_labels and score is None  # which fit warns of
        eval_view(model)  # says what is wrong before an epoch has run

    def __call__(self, epoch: int) -> tuple[Evaluation, float | None]:
        """Raises FloatingPointError where the score is infinite, TypeError where it is no number."""
        found, predictions, labels = evaluation(
            self.model, self.rows.blocks(self.batch_size), self.metrics, all_predictions=self.function is not None
        )
        if self.function is not None:
            own = self.rows.given if isinstance(self.rows, Rows) else {k: t.numpy() for k, t in labels.targets.items()}
            value = self._given(self.function, predictions, own, epoch)
        else:
            value = self.value(found)
            if value is not None and not np.isfinite(value):
                what = "loss" if value != value or value == -float(found.loss or 0.0) else f"score ({self.watched})"
                raise FloatingPointError(
                    f"epoch {epoch}: expected a finite validation {what}, got {self.sign * value}, while that of the "
                    "training batches was finite; look at validation labels of a large scale, at rows that are far "
                    "from those of training, and at what the last step made of weights and running statistics"
                )
            for name in self.watched_tasks:  # of which a metric would only be undefined
                loss = found[name].loss
                if loss is not None and not np.isfinite(loss):
                    raise FloatingPointError(
                        f"epoch {epoch}: expected finite outputs of {name!r} for the validation data, got a loss of "
                        f"{loss}; a lower lr may mend it, or look at rows that are far from those of training"
                    )
        if value is None and not self.has_warned:
            self.has_warned = True
            warn_caller(
                f"epoch {epoch}: {self.watched} is undefined (an AUC needs both classes among the validation labels, a "
                "mean needs labels): an epoch without a score is neither the best one, nor does patience end training "
                "before one has a score"
            )
        return found, value

    def _given(self, score: Score, predictions: dict[str, Array], labels: Table, epoch: int) -> float | None:
        name, was_training = _name(score), is_training(self.model)
        found = score(predictions, labels)
        if was_training and not is_training(self.model):
            warn_caller(
                f"score {name}: it called eval() on the model, whose training goes on without dropout and with batch "
                "statistics that stand still; read the predictions it is given, or model.predict, which leave modes "
                "as they are"
            )
        value = check_number(f"score {name}", found, "one number, higher is better")
        if np.isinf(value):
            raise FloatingPointError(f"epoch {epoch}: expected a finite validation score, got {value} from {name}")
        return None if np.isnan(value) else value


def checked_metrics(model: TaskNetwork, labels: Labelled, metrics: Any) -> dict[str, tuple[Metric, ...]]:
    """The metrics of each task, for which the labels are as they need them."""
    found = metrics_by_task(metrics, model.tasks)
    for task in model.tasks:
        _check(task, labels, found[task.name])
    warn_of_unweighted(labels, found)
    return found


def warn_of_unweighted(labels: Labelled, metrics: Mapping[str, tuple[Metric, ...]]) -> None:
    """A warning that names the metrics which cannot take the weights of rows."""
    weighed = {task: own for task, own in metrics.items() if task in labels.weights}
    found = [
        f"{metric.name} of {task!r}" for task, own in weighed.items() for metric in own if not metric.takes_weights
    ]
    if found:
        warn_caller(
            f"metrics: expected metrics that take the weights of rows, got {', '.join(found)}, computed without them, "
            "while losses have them; a function of (labels, predictions, sample_weight) is given the weights"
        )


def _check(task: TaskLoss, labels: Labelled, metrics: tuple[Metric, ...]) -> None:
    if metrics:
        label, _, _ = sample_space(task, labels)
        for metric in metrics:
            metric.check(task, label)


def _name(score: Score) -> str:
    return str(getattr(score, "__name__", type(score).__name__))


def _watched(
    name: str, tasks: tuple[TaskLoss, ...], metrics: Mapping[str, tuple[Metric, ...]]
) -> tuple[dict[str, tuple[Metric, ...]], Watched]:
    """What a name stands for, and the metrics with it.

    Raises:
        ValueError: it stands for nothing.
    """
    by_task = dict(metrics)
    if name == "loss":
        return by_task, Watched(
            "joint loss of the validation data (lower is better)",
            lambda e: None if e.loss is None else -e.loss,
            tuple(task.name for task in tasks),
        )
    if (found := _watched_of_user(name, tasks, by_task)) is not None:
        return by_task, found
    own, _, metric = name.rpartition("/")
    kinds = tuple(task.kind for task in tasks) if metric == "loss" else NAMED[metric].kinds if metric in NAMED else ()
    chosen = [task.name for task in tasks if task.kind in kinds and own in ("", task.name)]
    if not chosen:
        raise ValueError(
            f"score: expected loss, one of {', '.join(NAMED)} (the mean over the tasks that it is for), "
            f"{tasks[0].name + '/loss'!r} and so on for one task, a metric of metrics= by its name, or a function, got "
            f"{shown(name)}"
        )
    for task in chosen if metric != "loss" else ():
        if metric not in [known.name for known in by_task[task]]:
            by_task[task] = (*by_task[task], Metric(metric, metric))
    return by_task, _mean(chosen, metric, is_lower_better=metric == "loss" or NAMED[metric].lower_is_better)


def _watched_of_user(
    name: str, tasks: tuple[TaskLoss, ...], metrics: Mapping[str, tuple[Metric, ...]]
) -> Watched | None:
    """A metric of the user's own, or under a name of the user's, one that has none here; None of any other name.

    Raises:
        ValueError: it does not say which direction is better.
    """
    plain = name.removeprefix("-")
    found = [
        (task.name, metric)
        for task in tasks
        for metric in metrics[task.name]
        if metric.name not in NAMED and plain in (metric.name, f"{task.name}/{metric.name}")
    ]
    if not found:
        return None
    directions = {metric.lower_is_better for _, metric in found}
    metric = found[0][1].name
    if len(directions) > 1 or (directions == {None} and name == plain and metric.endswith(LOWER)):
        raise ValueError(
            f"score: expected {'-' + name!r}, where lower is better, or one name of one direction, got {name!r}; of a "
            "function of yours higher is better without the minus"
        )
    return _mean([task for task, _ in found], metric, is_lower_better=name != plain or directions == {True})


def _mean(chosen: Sequence[str], metric: str, *, is_lower_better: bool) -> Watched:
    """The mean over tasks of one number of each."""
    sign = -1.0 if is_lower_better else 1.0

    def value(found: Evaluation) -> float | None:
        numbers = [number for task in chosen if (number := found[task][metric]) is not None]
        return sign * statistics.fmean(numbers) if numbers else None

    mean = "mean " if len(chosen) > 1 else ""
    direction = "lower" if is_lower_better else "higher"
    which = ", ".join(map(repr, chosen))
    words = f"{mean}{metric} of {which} on the validation data ({direction} is better)"
    return Watched(words, value, tuple(chosen), sign)

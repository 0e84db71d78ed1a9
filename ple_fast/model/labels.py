"""Labels and the weights of their rows, as tensors; the scale of a regression's labels."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ple_fast_encoder.caller import warn_caller
from ple_fast_encoder.tables import Array, Table, cells_of, column_of

from ..losses import MISSING_CLASS, JointLoss, TaskLoss
from .arguments import Labels, kind_of, label_tensors
from .moments import Moments, mean_and_std

SampleWeight = Any
"""One column ``(N,)`` for all tasks, a table of columns by task, or None."""
LARGEST = 100.0
"""Root mean square of a regression's labels, above which training is told to go slowly: Adam moves a weight by about
``lr`` in a step, and the loss, a square, drowns those of the other tasks."""


class Labelled(NamedTuple):
    """What rows are compared with."""

    targets: Labels
    """NaN where a label is missing, or its weight is 0."""
    weights: Mapping[str, Tensor]
    """By task, ``(N,)`` float32; tasks whose rows all weigh 1 are absent."""

    def rows(self, index: Tensor | slice) -> Labelled:
        """Of some of the rows."""
        targets = {name: label[index] for name, label in self.targets.items()}
        return Labelled(targets, {name: weight[index] for name, weight in self.weights.items()})

    def of_tasks(self, names: Collection[str]) -> Labelled:
        """Of some of the tasks."""
        targets = {name: label for name, label in self.targets.items() if name in names}
        return Labelled(targets, {name: weight for name, weight in self.weights.items() if name in names})

    def to(self, device: torch.device) -> Labelled:
        """On another device."""
        targets = {name: label.to(device) for name, label in self.targets.items()}
        return Labelled(targets, {name: weight.to(device) for name, weight in self.weights.items()})


def joined(labels: Sequence[Labelled]) -> Labelled:
    """Labels of parts, one after the other."""
    first = labels[0]
    targets = {name: torch.cat([part.targets[name] for part in labels]) for name in first.targets}
    weights = {name: torch.cat([part.weights[name] for part in labels]) for name in first.weights}
    return Labelled(targets, weights)


def labelled(labels: Table, sample_weight: SampleWeight, rows: int, joint_loss: JointLoss, what: str) -> Labelled:
    """Labels and weights of ``rows`` rows, checked.

    Args:
        what: how errors name the labels; weights are named ``sample_weight`` in their place.

    Raises:
        TypeError: labels that are no table, or a column that holds no numbers.
        ValueError: no rows, a column of another length or out of range, or weights of an unknown task.
    """
    targets = dict(label_tensors(labels, rows, joint_loss, what))
    weights = _weights(sample_weight, rows, list(targets), what.replace("labels", "sample_weight"))
    for name, weight in weights.items():
        if bool((weight == 0).any()):
            targets[name] = torch.where(weight == 0, torch.nan, targets[name])
    return Labelled(targets, weights)


def _weights(sample_weight: SampleWeight, rows: int, tasks: Sequence[str], what: str) -> dict[str, Tensor]:
    if sample_weight is None:
        return {}
    names = _column_names(sample_weight)
    if names is None:
        weight = _weight(what, sample_weight, rows)
        return dict.fromkeys(tasks, weight)
    if unknown := [name for name in names if name not in tasks]:
        raise ValueError(f"{what}: expected columns of the tasks {list(tasks)}, got {unknown[0]!r}; leave it out")
    return {name: _weight(f"{what}[{name!r}]", column_of(sample_weight, name, what), rows) for name in names}


def _column_names(data: Any) -> list[Any] | None:
    """The names of a table's columns; None of one column."""
    if isinstance(data, Mapping):
        return list(data)
    if isinstance(data, np.ndarray):
        return list(data.dtype.names) if data.dtype.names else None
    for attribute in ("column_names", "columns"):
        if (names := getattr(data, attribute, None)) is not None and not callable(names):
            return list(names)
    return None


def _weight(where: str, column: Any, rows: int) -> Tensor:
    if isinstance(column, (str, bytes, int, float)):
        raise TypeError(f"{where}: expected one weight per row, ({rows},), got {kind_of(column)}")
    weight = cells_of(where, column).numbers("numbers of 0 or more")
    if weight.shape != (rows,):
        raise ValueError(f"{where}: expected one weight per row, ({rows},), got shape {weight.shape}")
    with np.errstate(over="ignore"):  # what overflows is infinite, and refused as such
        weight = weight.astype(np.float32)
    wrong = ~(np.isfinite(weight) & (weight >= 0))
    if wrong.any():
        some = np.unique(weight[wrong])[:5].tolist()
        raise ValueError(
            f"{where}: expected finite weights of 0 or more, got {int(wrong.sum())} others, such as {some}"
        )
    return torch.from_numpy(weight)


class LabelMoments:
    """Mean and deviation of a task's labels, which may come in parts."""

    def __init__(self, task: TaskLoss) -> None:
        self.task, self.moments = task, Moments()

    def add(self, label: Tensor) -> None:
        """Some labels ``(n,)``, NaN where one is missing."""
        self.moments.add(label[~label.isnan()].to(torch.float64).numpy())

    def measured(self) -> TaskLoss:
        """The task with both.

        Raises:
            ValueError: there was no label to measure, or none of float64's range.
        """
        name = self.task.name
        if not self.moments.count:
            raise ValueError(
                f"labels[{name!r}]: expected labels, whose mean and standard deviation standardise=True measures, got "
                f"none at all; leave the task out, or give TaskLoss({name!r}, 'regression', mean=, std=)"
            )
        mean, std = self.moments.mean_and_std()
        return replace(self.task, standardise=False, mean=mean, std=std)


def measured_tasks(tasks: Sequence[TaskLoss], targets: Labels) -> tuple[TaskLoss, ...]:
    """The tasks, with the mean and deviation of the labels of those that are to be standardised.

    Raises:
        ValueError: there is no label to measure, or none of float64's range.
    """
    return tuple(_measured(task, targets[task.name]) if task.standardise else task for task in tasks)


def _measured(task: TaskLoss, label: Tensor) -> TaskLoss:
    moments = LabelMoments(task)
    moments.add(label)
    return moments.measured()


def warn_of_scale(tasks: Sequence[TaskLoss], targets: Labels) -> None:
    """A warning for each regression whose labels, in the units of its loss, are far from 1."""
    for task in tasks:
        if task.kind != "regression":
            continue
        label = targets[task.name]
        label = (label[~label.isnan()].to(torch.float64) - task.mean) / task.std
        if len(label) and float(label.square().mean().sqrt()) > LARGEST:
            mean, std = mean_and_std(label.numpy())
            units = " in the units of its mean and std" if task.is_scaled else ""
            warn_caller(
                f"labels[{task.name!r}]: expected values of a scale near 1, got a mean of {mean:.3g} and a standard "
                f"deviation of {std:.3g}{units}; training moves towards them slowly, and their loss drowns those of "
                f"other tasks: TaskLoss({task.name!r}, 'regression', standardise=True) standardises them, and "
                "predictions come back in their own scale"
            )


def sample_space(task: TaskLoss, labels: Labelled) -> tuple[Array, Array | None, Array]:
    """A task's labels ``(n,)`` (those of classes int64), their weights ``(n,)`` or None, and which rows ``(N,)`` these
    are, as arrays."""
    label = labels.targets[task.name]
    inside = ~label.isnan()
    if task.kind == "multiclass":
        inside &= label != MISSING_CLASS
    label = label[inside]
    weight = labels.weights.get(task.name)
    return (
        (label.to(torch.int64) if task.kind == "multiclass" else label).numpy(),
        None if weight is None else weight[inside].numpy(),
        inside.numpy(),
    )

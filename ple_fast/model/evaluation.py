"""What a model gives for rows of data, in eval mode, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from ple_fast_encoder.tables import Array, Table

from ..losses import TaskLoss
from ..losses.task_loss import task_sum
from .columns import Encoded
from .eval_view import eval_view
from .history import Evaluation, TaskScores
from .labels import Labelled, joined, sample_space
from .metrics import Metric
from .network import TaskNetwork


def predictions(model: TaskNetwork, data: Table | Encoded, batch_size: int) -> dict[str, Array]:
    """``MultiTaskModel.predict``."""
    for task in model.tasks:
        task.check_measured()
    parts: dict[str, list[Array]] = {name: [] for name in model.task_names}
    for _, outputs in _evaluate(model, data, batch_size, gates=False):
        for task in model.tasks:
            parts[task.name].append(prediction_of(task, outputs[task.name]).cpu().numpy())
    return {name: np.concatenate(part) for name, part in parts.items()}


def prediction_of(task: TaskLoss, output: Tensor) -> Tensor:
    """A task's prediction from its raw output, float32: probabilities, or a value in the label's own scale."""
    output = output.float()
    if task.kind == "regression":
        return output * task.std + task.mean if task.is_scaled else output
    return output.softmax(1) if task.kind == "multiclass" else output.sigmoid()


def gate_weights(model: TaskNetwork, data: Table | Encoded, batch_size: int) -> list[list[Tensor]]:
    """``MultiTaskModel.gate_weights``."""
    batches = [gates for gates, _ in _evaluate(model, data, batch_size, gates=True)]
    levels = zip(*batches, strict=True)
    return [[torch.cat(weights) for weights in zip(*level, strict=True)] for level in levels]


def _evaluate(
    model: TaskNetwork, data: Table | Encoded, batch_size: int, *, gates: bool
) -> list[tuple[list[list[Tensor]], dict[str, Tensor]]]:
    """Per batch the gates (or nothing) and the raw outputs; one empty batch where there are no rows."""
    rows, found, view = model.encode(data), [], eval_view(model)
    with torch.inference_mode():
        for start in range(0, max(len(rows), 1), batch_size):
            features, scales = view._inputs(rows.rows(slice(start, start + batch_size)).to(view.device))
            weights: list[list[Tensor]] = []
            if gates:
                mixtures, per_level = view.trunk(features, return_gates=True)
                if per_level and isinstance(per_level[0], Tensor):  # one level, not a stack
                    per_level = [per_level]
                weights = [[weight.cpu() for weight in level] for level in per_level]
            else:
                mixtures = view.trunk(features)
            found.append((weights, view._outputs(mixtures, scales)))
    return found


def evaluation(
    model: TaskNetwork,
    blocks: Iterable[tuple[Encoded, Labelled]],
    metrics: Mapping[str, tuple[Metric, ...]],
    *,
    all_predictions: bool = False,
) -> tuple[Evaluation, dict[str, Array], Labelled]:
    """Losses and metrics over whole data, each task over its whole sample space, in one pass.

    Returns:
        The numbers, and the predictions and labels of the tasks that have metrics, or of all.
    """
    view, tasks = eval_view(model), model.tasks
    sums = {task.name: [0.0, 0.0, 0.0] for task in tasks}
    parts: dict[str, list[Array]] = {task.name: [] for task in tasks if all_predictions or metrics[task.name]}
    kept: list[Labelled] = []
    with torch.inference_mode():
        for rows, labels in blocks:
            outputs, own = view(rows.to(view.device)), labels.to(view.device)
            for task in tasks:
                name = task.name
                found = task_sum(task, outputs[name], own.targets[name], weight=own.weights.get(name))
                sums[name] = [total + float(value) for total, value in zip(sums[name], found, strict=True)]
                if name in parts:
                    parts[name].append(prediction_of(task, outputs[name]).cpu().numpy())
            kept.append(labels.of_tasks(parts))
    predicted = {name: np.concatenate(part) for name, part in parts.items()}
    together = joined(kept)
    scores = {}
    for task in tasks:
        total, count, weight = sums[task.name]
        values = _values(task, together, predicted[task.name], metrics[task.name]) if metrics[task.name] else {}
        scores[task.name] = TaskScores(total / weight if count else None, int(count), values)
    # With the weights of no epoch: where they change, the losses of two epochs would not be comparable.
    losses = [task.weight * loss for task in tasks if (loss := scores[task.name].loss) is not None]
    return Evaluation(sum(losses) if losses else None, scores), predicted, together


def _values(task: TaskLoss, labels: Labelled, predicted: Array, metrics: tuple[Metric, ...]) -> dict[str, float | None]:
    label, weight, inside = sample_space(task, labels)
    of_space = predicted[inside]
    for metric in metrics:
        metric.check(task, label)  # of labels that came in parts nobody has looked at all
    return {metric.name: metric.value(task, label, of_space, weight) for metric in metrics}

"""The score of a model on validation data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from ..losses import JointLoss
from ..scalars import check_number
from .arguments import Labels, kind_of, label_tensors
from .columns import Encoded
from .eval_view import eval_view, is_training
from .network import TaskNetwork
from .tables import Array, Table

Score = Callable[[dict[str, Array], Table], float]
LEAST_ROWS = 8192
"""Of a batch: scoring keeps nothing for a backward."""


class Scorer:
    """Called with the number of an epoch: the score after it, higher is better.

    Without a function of the user's it is minus the joint loss, and None where no task has a label. ``patience``: after
    how many epochs without a better one training ends.

    Raises:
        TypeError: ``validation`` is not a pair of tables.
        ValueError: labels that do not fit, or a part of the model that cannot be scored in train mode.
    """

    def __init__(
        self,
        model: TaskNetwork,
        predict: Callable[..., dict[str, Array]],
        validation: Any,
        score: Score | None,
        batch_size: int,
        patience: int | None,
    ) -> None:
        if isinstance(validation, Encoded) or not isinstance(validation, (tuple, list)) or len(validation) != 2:
            raise TypeError(
                "validation: expected (data, labels) of rows that are not trained on, got "
                f"{kind_of(validation)}; split the rows yourself"
            )
        self.patience = patience
        self.model, self.predict, self.score, self.batch_size = model, predict, score, max(batch_size, LEAST_ROWS)
        self.rows, self.labels = model.encode(validation[0]), validation[1]
        self.targets = label_tensors(self.labels, len(self.rows), model.joint_loss, "validation labels")
        self.has_labels = len(model.joint_loss.unlabelled(self.targets)) < len(model.tasks)
        eval_view(model)  # says what is wrong before an epoch has run

    def __call__(self, epoch: int) -> float | None:
        """Raises FloatingPointError where the score is not finite, TypeError where it is no number."""
        if self.score is not None:
            return self._given(self.score, epoch)
        return self._minus_loss(epoch) if self.has_labels else None

    def _given(self, score: Score, epoch: int) -> float:
        name = getattr(score, "__name__", type(score).__name__)
        predictions, was_training = self.predict(self.rows, batch_size=self.batch_size), is_training(self.model)
        found = score(predictions, self.labels)
        if was_training and not is_training(self.model):
            warnings.warn(
                f"score {name}: it called eval() on the model, whose training goes on without dropout and with batch "
                "statistics that stand still; read the predictions it is given, or model.predict, which leave modes "
                "as they are",
                stacklevel=5,  # at whoever called fit
            )
        value = check_number(f"score {name}", found, "one number, higher is better")
        if not np.isfinite(value):
            raise FloatingPointError(
                f"epoch {epoch}: expected a finite validation score, got {value} from {name}; a metric is not defined "
                "everywhere: an AUC needs both classes among the validation labels, a mean needs labels"
            )
        return value

    def _minus_loss(self, epoch: int) -> float:
        view = eval_view(self.model)
        loss = mean_loss(view, view.joint_loss, self.rows, self.targets, self.batch_size)
        if not np.isfinite(loss):
            raise FloatingPointError(
                f"epoch {epoch}: expected a finite validation loss, got {loss}, while that of the training batches was "
                "finite; look at validation labels of a large scale, at rows that are far from those of training, and "
                "at what the last step made of weights and running statistics"
            )
        return -loss


def mean_loss(model: nn.Module, joint_loss: JointLoss, rows: Encoded, labels: Labels, batch_size: int) -> float:
    """The joint loss over whole data (each task averaged over its whole sample space), in the model's present mode."""
    device = next(model.parameters()).device
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            part = slice(start, start + batch_size)
            target = {name: label[part].to(device) for name, label in labels.items()}
            result = joint_loss(model(rows.rows(part).to(device)), target)
            for name, count in result.counts.items():
                sums[name] = sums.get(name, 0.0) + float(result.per_task[name]) * int(count)
                counts[name] = counts.get(name, 0) + int(count)
    return sum(weight * sums[name] / max(counts[name], 1) for name, weight in joint_loss.weights().items())

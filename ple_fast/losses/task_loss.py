"""The loss of one task, summed over its sample space."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scalars import check_count, check_flag, check_number, own_scalar, shown

Kind = Literal["binary", "regression", "multiclass"]
MISSING_CLASS = -1
"""The class label that takes a sample out of the sample space of a multi-class task."""


@dataclass(frozen=True)
class TaskLoss:
    """The loss of one task: binary (cross-entropy on logits), regression (squared error) or multiclass (cross-entropy).

    Args:
        name: the key of the task in predictions, labels and masks.
        num_classes: C, at least 2, for a multi-class task; None otherwise.
        weight: the loss weight w_k,0 at epoch 0, above 0.
        gamma: the ratio gamma_k, above 0, by which the weight changes per epoch (eq. 10).
        pos_weight: of a binary task, above 0: the loss of a positive label counts so many times, that of a negative one
            once (a label between 0 and 1: each part). With p of a rare label predicted so, the odds ``p / (1 - p)`` are
            about ``pos_weight`` times the label's own; the order of predictions, and so AUC, is not shifted.
        standardise: of a regression: the first ``MultiTaskModel.fit`` measures ``mean`` and ``std`` of its labels,
            which then stand here in its place.
        mean, std: of a regression's labels y: the loss is that of ``(y - mean) / std``, so raw outputs are in these
            units; ``MultiTaskModel.predict`` gives values in the label's own. ``std`` is above 0.

    Numbers may be NumPy's; they are kept as int and float.

    Raises:
        TypeError: the name is no string, the classes are no int, ``standardise`` is no bool, or another field is no
            number.
        ValueError: an unknown kind, an option of another kind of task, a weight, ratio or deviation that is not above 0
            and finite, a mean that is not finite, or both ``standardise`` and what it would measure.
    """

    name: str
    kind: Kind = "binary"
    num_classes: int | None = None
    weight: float = 1.0
    gamma: float = 1.0
    pos_weight: float = 1.0
    standardise: bool = False
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", own_scalar(self.name))
        if not isinstance(self.name, str):
            raise TypeError(f"name: expected a string, got {shown(self.name)}")
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"task {self.name!r}: expected a kind of {', '.join(get_args(Kind))}, got {shown(self.kind)}"
            )
        if self.kind == "multiclass":
            where = f"task {self.name!r}: num_classes of kind='multiclass'"
            if self.num_classes is None:
                raise ValueError(f"{where}: expected 2 or more, got None")
            object.__setattr__(self, "num_classes", check_count(where, self.num_classes, least=2))
        elif self.num_classes is not None:
            raise ValueError(
                f"task {self.name!r}: num_classes={self.num_classes!r} is for kind='multiclass'; "
                f"leave it out for {self.kind!r}"
            )
        for field in ("weight", "gamma", "pos_weight", "std", "mean"):
            value = check_number(f"task {self.name!r}: {field}", getattr(self, field))
            if not math.isfinite(value) or (value <= 0 and field != "mean"):
                bound = "" if field == "mean" else " above 0"
                raise ValueError(f"task {self.name!r}: expected a finite {field}{bound}, got {value!r}")
            object.__setattr__(self, field, value)
        object.__setattr__(self, "standardise", check_flag(f"task {self.name!r}: standardise", self.standardise))
        if self.pos_weight != 1 and self.kind != "binary":
            raise ValueError(
                f"task {self.name!r}: pos_weight={self.pos_weight!r} is for kind='binary'; leave it out for "
                f"{self.kind!r}, or give rows a sample_weight"
            )
        if (self.standardise or self.is_scaled) and self.kind != "regression":
            raise ValueError(
                f"task {self.name!r}: standardise, mean and std are for kind='regression'; leave them out for "
                f"{self.kind!r}"
            )
        if self.standardise and self.is_scaled:
            raise ValueError(
                f"task {self.name!r}: expected standardise=True, which measures mean and std, or these, got both: "
                f"mean={self.mean!r}, std={self.std!r}"
            )

    @property
    def num_outputs(self) -> int:
        """Width of the tower's output: one logit or value, or C logits."""
        return self.num_classes or 1

    @property
    def is_scaled(self) -> bool:
        """Whether outputs are in other units than labels: ``(y - mean) / std``."""
        return (self.mean, self.std) != (0.0, 1.0)

    def check_measured(self) -> None:
        """ValueError where the units of the outputs are not known, because ``standardise`` has measured nothing yet."""
        if self.standardise:
            raise ValueError(
                f"task {self.name!r}: standardise=True: expected labels' mean and std, which MultiTaskModel.fit "
                f"measures, and no fit has run yet; in a loop of your own, or to load a state, give "
                f"TaskLoss({self.name!r}, 'regression', mean=, std=)"
            )


class TaskSum(NamedTuple):
    """What one task's loss sums up over its sample space in a batch, 0-dimensional."""

    total: Tensor
    """Of the losses, each times its sample's weight."""
    size: Tensor
    """Of the space, int64."""
    weight: Tensor
    """Of the weights; the size where samples have none."""


def task_sum(
    task: TaskLoss, prediction: Tensor, label: Tensor, mask: Tensor | None = None, weight: Tensor | None = None
) -> TaskSum:
    """Sums of one task over its sample space; the arguments are those of ``JointLoss.forward``."""
    task.check_measured()
    where = f"[{task.name!r}]"
    check_tensor("predictions" + where, prediction)
    check_tensor("labels" + where, label)
    if not prediction.is_floating_point():
        raise TypeError(f"predictions{where}: expected floating {task.kind} outputs, got {prediction.dtype}")
    if label.is_complex():
        raise TypeError(f"labels{where}: expected a real dtype, got {label.dtype}")
    if task.kind == "multiclass":
        if prediction.ndim != 2 or prediction.shape[1] != task.num_classes:
            raise ValueError(
                f"predictions{where}: expected logits (B, {task.num_classes}), got shape {tuple(prediction.shape)}"
            )
    else:
        prediction = _column("predictions" + where, prediction)
    label = _column("labels" + where, label)
    valid = ~label.isnan()
    if task.kind == "multiclass":
        if not label.is_floating_point():
            label = label.to(torch.int64)  # in uint8, -1 is 255
        valid = valid & (label != MISSING_CLASS)
    rows = {f"predictions{where}": prediction, f"labels{where}": label}
    if mask is not None:
        check_tensor("masks" + where, mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"masks{where}: expected bool, got {mask.dtype}; say `mask.bool()`")
        rows[f"masks{where}"] = mask = _column("masks" + where, mask)
    if weight is not None:
        check_tensor("sample_weight" + where, weight)
        if not weight.is_floating_point():
            raise TypeError(f"sample_weight{where}: expected floating weights, got {weight.dtype}")
        rows[f"sample_weight{where}"] = weight = _column("sample_weight" + where, weight)
    for name, given in rows.items():
        if given.shape[0] != prediction.shape[0]:
            raise ValueError(
                f"{name}: expected as many samples as predictions ({prediction.shape[0]}), got {given.shape[0]}"
            )
        if given.device != prediction.device:
            raise ValueError(f"{name}: expected the device of the predictions, {prediction.device}, got {given.device}")
    if mask is not None:
        valid = valid & mask
    if weight is not None:
        valid = valid & (weight != 0)
    # Predictions and labels are replaced before the loss: afterwards 0 * NaN would still be NaN in the gradients.
    prediction = wide(prediction)
    if task.kind == "multiclass":
        target = torch.where(valid, label, 0).to(torch.int64)
        loss = F.cross_entropy(torch.where(valid.unsqueeze(1), prediction, 0.0), target, reduction="none")
    else:
        prediction = torch.where(valid, prediction, 0.0)
        if task.is_scaled:  # in float64 where labels are: what is left of a mean of 1e9 is small
            label = (wide(label) - task.mean) / task.std
        target = torch.where(valid, label.to(prediction.dtype), 0.0)
        if task.kind == "regression":
            loss = F.mse_loss(prediction, target, reduction="none")
        else:
            of_positives = None
            if task.pos_weight != 1:
                of_positives = torch.full((), task.pos_weight, dtype=prediction.dtype, device=prediction.device)
            loss = F.binary_cross_entropy_with_logits(prediction, target, reduction="none", pos_weight=of_positives)
    size = valid.sum()
    if weight is None:
        return TaskSum(torch.where(valid, loss, 0.0).sum(), size, size)
    weight = torch.where(valid, weight.to(loss.dtype), 0.0)
    return TaskSum((torch.where(valid, loss, 0.0) * weight).sum(), size, weight.sum())


def wide(x: Tensor) -> Tensor:
    """In float32 at least: bfloat16 has 8 bits for a probability near 1."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def check_tensor(name: str, given: object) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}; torch.as_tensor makes one")


def _column(name: str, x: Tensor) -> Tensor:
    """``(B,)`` from ``(B,)`` or ``(B, 1)``: both together would silently broadcast to ``(B, B)``."""
    if x.ndim == 2 and x.shape[1] == 1:
        return x.squeeze(1)
    if x.ndim != 1:
        raise ValueError(f"{name}: expected shape (B,) or (B, 1), got {tuple(x.shape)}")
    return x

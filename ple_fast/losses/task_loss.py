"""The loss of one task, summed over its sample space."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scalars import check_count, check_number, own_scalar, shown

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

    Numbers may be NumPy's; they are kept as int and float.

    Raises:
        TypeError: the name is no string, the classes are no int, or a weight or ratio is no number.
        ValueError: an unknown kind, classes that do not fit it, or a weight or ratio that is not above 0 and finite.
    """

    name: str
    kind: Kind = "binary"
    num_classes: int | None = None
    weight: float = 1.0
    gamma: float = 1.0

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
        for field in ("weight", "gamma"):
            value = check_number(f"task {self.name!r}: {field}", getattr(self, field))
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"task {self.name!r}: expected a finite {field} above 0, got {value!r}")
            object.__setattr__(self, field, value)

    @property
    def num_outputs(self) -> int:
        """Width of the tower's output: one logit or value, or C logits."""
        return self.num_classes or 1


def task_sum(task: TaskLoss, prediction: Tensor, label: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of a task's losses over its sample space, and the size of the space (int64)."""
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
    for name, given in rows.items():
        if given.shape[0] != prediction.shape[0]:
            raise ValueError(
                f"{name}: expected as many samples as predictions ({prediction.shape[0]}), got {given.shape[0]}"
            )
        if given.device != prediction.device:
            raise ValueError(f"{name}: expected the device of the predictions, {prediction.device}, got {given.device}")
    if mask is not None:
        valid = valid & mask
    # Predictions and labels are replaced before the loss: afterwards 0 * NaN would still be NaN in the gradients.
    prediction = wide(prediction)
    if task.kind == "multiclass":
        target = torch.where(valid, label, 0).to(torch.int64)
        loss = F.cross_entropy(torch.where(valid.unsqueeze(1), prediction, 0.0), target, reduction="none")
    else:
        prediction = torch.where(valid, prediction, 0.0)
        target = torch.where(valid, label.to(prediction.dtype), 0.0)
        per_sample = F.binary_cross_entropy_with_logits if task.kind == "binary" else F.mse_loss
        loss = per_sample(prediction, target, reduction="none")
    return torch.where(valid, loss, 0.0).sum(), valid.sum()


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

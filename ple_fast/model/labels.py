"""What a user hands to the model as a table: told from what is none, and labels as tensors."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..losses import JointLoss
from .columns import Table, column_of
from .training import Labels


def has_no_names(data: Any) -> bool:
    """Whether something is no table: arrays, tensors and series have entries, but no columns by name."""
    if isinstance(data, (Tensor, np.ndarray, list, tuple, set, str, bytes)) or getattr(data, "ndim", 2) == 1:
        return True
    return not hasattr(type(data), "__getitem__")


def kind_of(data: Any) -> str:
    """What came, without its contents."""
    if isinstance(data, (str, int, float)):
        return repr(data)[:60]
    shape = getattr(data, "shape", None)
    return type(data).__name__ + ("" if shape is None else f" of shape {tuple(shape)}")


def label_tensors(labels: Table, rows: int, joint_loss: JointLoss, what: str) -> Labels:
    """Labels as float32 tensors ``(rows,)``, one per task, checked.

    Raises:
        TypeError: no columns by name, or one that holds no numbers.
        ValueError: no rows; a task's labels are missing, of another length or out of range.
    """
    if rows == 0:
        raise ValueError(f"{what}: expected data of at least one row, got none")
    if has_no_names(labels):
        raise TypeError(
            f"{what}: expected one column ({rows},) per task by name, such as {{{joint_loss.tasks[0].name!r}: array}}, "
            f"got {kind_of(labels)}"
        )
    targets = {}
    for task in joint_loss.tasks:
        name = task.name
        label = np.asarray(column_of(labels, name, what))
        if label.shape != (rows,):
            raise ValueError(f"{what}[{name!r}]: expected one label per row, ({rows},), got shape {label.shape}")
        try:
            targets[name] = torch.from_numpy(label.astype(np.float32))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{what}[{name!r}]: expected numbers (0 and 1, values, or classes from 0), got {label.dtype}"
            ) from error
    joint_loss.check_labels(targets)
    return targets


def warn_of_unlabelled(joint_loss: JointLoss, targets: Labels, what: str, effect: str) -> None:
    """One warning, at whoever called ``fit``, that names the tasks which have no label at all."""
    if none := joint_loss.unlabelled(targets):
        warnings.warn(
            f"{what}: expected labels of every task, got none at all for {', '.join(map(repr, none))}; {effect}",
            stacklevel=3,
        )

"""What a user hands to the model: told from what it is not, and labels as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ple_fast_encoder.caller import warn_caller
from ple_fast_encoder.columns import COLUMN_TYPES, Column, owners_of
from ple_fast_encoder.tables import Table, cells_of, check_names, column_of, label_values

from ..losses import JointLoss, TaskLoss
from ..scalars import shown

Labels = Mapping[str, Tensor]
"""By task, ``(N,)`` float32; float64 where a regression is standardised."""


def has_no_names(data: Any) -> bool:
    """Whether something is no table: arrays, tensors and series have entries, but no columns by name."""
    if isinstance(data, np.ndarray):
        return data.dtype.names is None
    if isinstance(data, (Tensor, list, tuple, set, str, bytes)) or getattr(data, "ndim", 2) == 1:
        return True
    return not hasattr(type(data), "__getitem__")


def kind_of(data: Any) -> str:
    """What came, without its contents."""
    if isinstance(data, (str, int, float)):
        return repr(data)[:60]
    shape = getattr(data, "shape", None)
    if shape is not None:
        return f"{type(data).__name__} of shape {tuple(shape)}"
    return f"{type(data).__name__} of {len(data)}" if isinstance(data, (list, tuple)) else type(data).__name__


def label_tensors(labels: Table, rows: int, joint_loss: JointLoss, what: str) -> Labels:
    """Labels as float32 tensors ``(rows,)``, one per task, checked; float64 where a regression is standardised.

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
        where, column = f"{what}[{name!r}]", column_of(labels, name, what)
        if task.standardise or task.is_scaled:  # of 1e9 and more float32 keeps no units
            label = cells_of(where, column).numbers("numbers").astype(np.float64)
        else:
            label = label_values(where, column)
        if label.shape != (rows,):
            raise ValueError(f"{what}[{name!r}]: expected one label per row, ({rows},), got shape {label.shape}")
        targets[name] = torch.from_numpy(label)
    joint_loss.check_labels(targets)
    return targets


def warn_of_unlabelled(joint_loss: JointLoss, targets: Labels, what: str, effect: str) -> None:
    """One warning, at whoever called ``fit``, that names the tasks which have no label at all."""
    warn_of_none(joint_loss.unlabelled(targets), what, effect)


def warn_of_none(tasks: Sequence[str], what: str, effect: str) -> None:
    """The same of these tasks; nothing where there is none."""
    if tasks:
        warn_caller(
            f"{what}: expected labels of every task, got none at all for {', '.join(map(repr, tasks))}; {effect}"
        )


def check_ranks(joint_loss: JointLoss) -> None:
    """Says that ``fit`` trains in one process, where there are several.

    Raises:
        ValueError: the joint loss counts the labels of several ranks, and nothing would average their gradients.
    """
    mend = (
        "write a loop of your own for several, as docs/training_at_scale.md and examples/train_distributed.py have it"
    )
    group = joint_loss.process_group
    if group is not None and dist.get_world_size(group) > 1:
        raise ValueError(
            f"fit: expected a model of one process, got a process_group of {dist.get_world_size(group)} ranks, whose "
            f"labels the loss counts together, while fit averages no gradients; {mend}"
        )
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warn_caller(
            f"fit: expected one process, got a process group of {dist.get_world_size()} ranks: each of them that calls "
            f"fit trains a model of its own, on its own rows; {mend}"
        )


def check_columns(columns: Any) -> tuple[Column, ...]:
    """The columns of a model.

    Raises:
        TypeError: other than columns.
        ValueError: a name twice; a column that shares the embedding of one that is not there.
    """
    if isinstance(columns, (str, *COLUMN_TYPES)) or not isinstance(columns, Iterable):
        raise TypeError(f"columns: expected a sequence of Categorical, Hashed and Numeric, got {kind_of(columns)}")
    found = tuple(columns)
    for column in found:
        if not isinstance(column, COLUMN_TYPES):
            raise TypeError(
                f"columns: expected Categorical, Hashed or Numeric, which columns_from makes, got {shown(column)}"
            )
    check_names([column.name for column in found])
    owners_of(found)
    return found


def mapping(name: str, value: Any) -> Mapping[str, Any]:
    """A mapping; an empty one for None. TypeError for anything else."""
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected a dict, got {shown(value)}")
    return value or {}


def check_given(given: Mapping[str, str], tasks: Sequence[TaskLoss]) -> None:
    """ValueError where ``given`` names other than a binary task and one of those before it."""
    kinds = {task.name: task.kind for task in tasks}
    names = list(kinds)
    for name, condition in given.items():
        if name not in names or condition not in names[: names.index(name)]:
            raise ValueError(
                f"given: expected two of the tasks {names}, the condition first, got {name!r} given {condition!r}"
            )
        if kinds[name] != "binary" or kinds[condition] != "binary":
            raise ValueError(f"given: expected binary tasks, got {name!r} ({kinds[name]}) given {condition!r}")

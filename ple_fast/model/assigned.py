"""What may be assigned to a model that is built: what its modules go on with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from ple_fast_encoder.columns import Column

from ..losses import TaskLoss
from ..scalars import shown
from .arguments import check_columns
from .embedding import FeatureEmbedding

ONLY_ENCODED = ("values", "padding", "keep", "transform", "mean", "std")
"""Fields of a column that say how it is encoded, and nothing of the embedding (of a vocabulary its size does)."""


def same_features(built: tuple[Column, ...], columns: Any) -> tuple[Column, ...]:
    """Columns in the place of those that a model was built with.

    Raises:
        TypeError: other than columns.
        ValueError: columns that do not fit together, or whose embedding is another one.
    """
    found = check_columns(columns)
    names, own = [column.name for column in found], [column.name for column in built]
    if names != own:
        raise ValueError(
            f"columns: expected those that the model was built with, in their order, {own[:60]}, got {names[:60]}; "
            "build another model"
        )
    with torch.device("meta"):
        is_same = FeatureEmbedding(found).layout == FeatureEmbedding(built).layout
    if not is_same:
        differing = [f"{new.name!r} ({', '.join(_fields(old, new))})" for old, new in zip(built, found, strict=True)]
        got = [words for words in differing if not words.endswith("()")]
        raise ValueError(
            "columns: expected columns whose embedding is the one that the model was built with, got another "
            f"{', '.join(got)}; build another model, and leave these fields as they are in this one"
        )
    return found


def _fields(old: Column, new: Column) -> list[str]:
    """The fields that differ, of those that may matter to the embedding."""
    if type(old) is not type(new):
        return [f"{type(new).__name__} for {type(old).__name__}"]
    may = () if getattr(old, "rows", None) == getattr(new, "rows", None) else ("values",)
    names = [field.name for field in fields(old) if field.name not in ONLY_ENCODED or field.name in may]
    return [name for name in names if getattr(old, name) != getattr(new, name)]


def check_same_tasks(built: tuple[TaskLoss, ...], tasks: Any, expected: str) -> None:
    """That tasks may take the place of those that a model was built with, whose weights and scales alone may differ.

    Raises:
        TypeError: other than a sequence of tasks.
        ValueError: others, or in another order.
    """
    if not isinstance(tasks, (list, tuple)) or not all(isinstance(task, TaskLoss) for task in tasks):
        raise TypeError(f"{expected} the tasks that the model was built with, a list of TaskLoss, got {shown(tasks)}")
    own, found = _towers_of(built), _towers_of(tasks)
    if own != found:
        raise ValueError(
            f"{expected} the tasks that the model was built with, in their order, {own}, got {found}; weights, scales "
            "and pos_weight may be others, and for other tasks build another model"
        )


def _towers_of(tasks: Sequence[TaskLoss]) -> list[str]:
    """What the towers of tasks depend on."""
    return [f"{task.name} ({task.kind}, {task.num_outputs})" for task in tasks]

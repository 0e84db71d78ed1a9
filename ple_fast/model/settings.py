"""Whether a checkpoint is one of this training: what its loss curve depends on, and the shapes of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ple_fast_encoder.columns import to_json

from .checkpoint import Checkpoint
from .network import TaskNetwork
from .rows import RowParts, Rows
from .scoring import Scorer
from .updates import Updates

VERSION = 2
"""Of what stands in a checkpoint."""
MEASURED = ("standardise", "mean", "std")
"""Of a task: what ``fit`` may set."""


def settings_of(
    model: TaskNetwork, rows: Rows | RowParts, batch_size: int | None, scorer: Scorer | None, updates: Updates
) -> dict[str, Any]:
    """What the loss curve depends on, beside the number of epochs. A digest of large vocabularies takes a while."""
    return {
        "version": VERSION,
        "rows": _size(rows),
        "validation": 0 if scorer is None else _size(scorer.rows),
        "watched": None if scorer is None else scorer.watched,
        "sample_weight": rows.weighed(),
        "tasks": model.task_names,
        "model": _digest(model),
        **updates.settings(),
        "batch_size": batch_size,
    }


def _size(rows: Rows | RowParts) -> int | str:
    return len(rows.data) if isinstance(rows, Rows) else "parts"


def _digest(model: TaskNetwork) -> str:
    """Tells models apart that have the same shapes: codes of their columns, losses, what is hidden from a task."""
    about = [
        [to_json(column) for column in model.columns],
        [{key: value for key, value in asdict(task).items() if key not in MEASURED} for task in model.tasks],
        sorted(model.given.items()),
        None if model.slot_inputs is None else model.slot_inputs.digest(),
    ]
    return hashlib.sha256(repr(about).encode()).hexdigest()[:16]


def check_state(checkpoint: Checkpoint, state: Mapping[str, Any], model: TaskNetwork, epochs: int) -> None:
    """ValueError where a state is of other settings or another model, or has begun more epochs than there are to be."""
    checkpoint.check(state)
    where, begun = checkpoint.file, state["epoch"] - (0 if state["batch"] else 1)
    if begun > epochs:
        raise ValueError(f"{where}: expected epochs={begun} or more, which it has begun, got {epochs}")
    shapes, saved = ({n: tuple(t.shape) for n, t in s.items()} for s in (model.state_dict(), state["model"]))
    if other := [name for name in {**shapes, **saved} if shapes.get(name) != saved.get(name)]:
        name = other[0]
        raise ValueError(
            f"{where}: expected the weights of this model, got {name} {saved.get(name, 'missing')}, which is "
            f"{shapes.get(name, 'missing')} in the model; build the model as it was, or name another file"
        )

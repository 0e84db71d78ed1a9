"""What a model gives for rows of data, in eval mode, batch by batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .columns import Encoded
from .eval_view import eval_view
from .network import TaskNetwork
from .tables import Array, Table


def predictions(model: TaskNetwork, data: Table | Encoded, batch_size: int) -> dict[str, Array]:
    """``MultiTaskModel.predict``."""
    parts: dict[str, list[Array]] = {name: [] for name in model.task_names}
    for _, outputs in _evaluate(model, data, batch_size, gates=False):
        for task in model.tasks:
            output = outputs[task.name].float()
            if task.kind != "regression":
                output = output.softmax(1) if task.kind == "multiclass" else output.sigmoid()
            parts[task.name].append(output.cpu().numpy())
    return {name: np.concatenate(part) for name, part in parts.items()}


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
            features = view._features(rows.rows(slice(start, start + batch_size)).to(view.device))
            weights: list[list[Tensor]] = []
            if gates:
                mixtures, per_level = view.trunk(features, return_gates=True)
                if per_level and isinstance(per_level[0], Tensor):  # one level, not a stack
                    per_level = [per_level]
                weights = [[weight.cpu() for weight in level] for level in per_level]
            else:
                mixtures = view.trunk(features)
            found.append((weights, view._outputs(mixtures)))
    return found

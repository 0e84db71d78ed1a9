"""What the tests of fit share: a model with all that has a mode, its data, and what it holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ple_fast.losses import TaskLoss
from ple_fast.model import MultiTaskModel, Numeric

TASKS = (TaskLoss("click", gamma=0.9), TaskLoss("watch", "regression"), TaskLoss("rating", "multiclass", num_classes=3))


COLUMNS = [Numeric("age", width=4), Numeric("amount")]


OPTIONS = {"expert_units": ((8,), (6,)), "norm": "batch", "dropout": 0.5}


def model(*, tasks: Any = TASKS, options: dict[str, Any] = OPTIONS, dropout: float = 0.5) -> MultiTaskModel:
    """With all that has a mode."""
    torch.manual_seed(0)
    return MultiTaskModel(COLUMNS, tasks, trunk_options=options, tower_units=(5,), tower_dropout=dropout)


def table(rows: int = 64, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(seed)
    data = {"age": rng.normal(size=rows), "amount": rng.normal(size=rows)}
    labels = {
        "click": (data["age"] > 0).astype(float),
        "watch": data["amount"] / 2,
        "rating": (data["age"] > 0).astype(int) + (data["amount"] > 0),
    }
    return data, labels


def modes(net: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in net.named_modules()}


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def are_equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(value, second[name]) for name, value in first.items())

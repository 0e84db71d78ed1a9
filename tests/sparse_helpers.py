"""What the tests of sparse embeddings share: a model with columns of every kind, dense or sparse, and its data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ple_fast.losses import TaskLoss
from ple_fast.model import Categorical, Encoded, Hashed, MultiTaskModel, Numeric

ROWS = 48
COLUMNS = (
    Categorical("item", size=30, width=4),
    Categorical("history", share="item", pooling="mean", max_length=3),
    Hashed("user", 40, width=4),
    Categorical("hour", size=24, width=2),
    Numeric("age"),
)


def table(rows: int = ROWS, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(seed)
    data: dict[str, Any] = {
        "item": rng.integers(0, 30, rows),
        "history": [list(rng.integers(0, 30, rng.integers(0, 4))) for _ in range(rows)],
        "user": rng.integers(0, 1000, rows),
        "hour": rng.integers(0, 24, rows),
        "age": rng.normal(size=rows),
    }
    return data, {"click": (data["item"] > 14).astype(float), "watch": data["age"] / 2}


def model(sparse: bool = True, *, columns: Any = COLUMNS, **options: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    own = {"trunk_options": {"expert_units": (8, 6)}, "tower_units": (5,), **options}
    tasks = [TaskLoss("click"), TaskLoss("watch", "regression")]
    return MultiTaskModel(columns, tasks, sparse_embeddings=sparse, **own)


def weights(net: MultiTaskModel) -> list[nn.Parameter]:
    return list(net.embedding.tables.parameters())


def same(first: MultiTaskModel, second: MultiTaskModel, rtol: float = 0.0) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.allclose(a, b, rtol=rtol, atol=rtol * 0.1) for a, b in pairs)


def gradients(net: MultiTaskModel, rows: Encoded, labels: dict[str, Any]) -> list[Tensor]:
    targets = {name: torch.as_tensor(label, dtype=torch.float32) for name, label in labels.items()}
    net.joint_loss(net(rows), targets).total.backward()
    found = [parameter.grad for parameter in net.parameters()]
    assert all(gradient is not None for gradient in found)
    return [gradient for gradient in found if gradient is not None]

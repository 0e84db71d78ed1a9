"""What the tests of the model share: tasks, columns, data, and every trunk in small."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ple_fast.losses import TaskLoss
from ple_fast.model import Categorical, MultiTaskModel, Numeric

TASKS = (TaskLoss("click"), TaskLoss("watch", "regression"), TaskLoss("rating", "multiclass", num_classes=3))


COLUMNS = (
    Categorical("country", values=("de", "fr", "it"), width=3),
    Numeric("age", mean=40.0, std=10.0),
    Categorical("hour", size=24, width=2),
    Numeric("amount", transform="log1p", missing="indicator"),
)


SMALL: dict[str, dict[str, Any]] = {
    "ple": {"num_levels": 2, "task_experts": 2, "shared_experts": 1, "expert_units": (8, 6)},
    "cgc": {"task_experts": 1, "shared_experts": 2, "expert_units": (8, 6)},
    "mmoe": {"experts": 3, "expert_units": (8, 6)},
    "ml_mmoe": {"experts": 3, "expert_units": (8, 6)},
    "adatt": {"task_experts": 2, "shared_experts": 1, "expert_units": (8, 6)},
    "stem": {"num_levels": 2, "task_experts": 2, "shared_experts": 1, "expert_units": (8, 6)},
    "home": {"groups": ((0, 2), (1,)), "task_experts": 1, "expert_units": (8, 6), "feature_gate_rank": 2},
    "cross_stitch": {"expert_units": ((8,), (6,))},
    "hard_sharing": {"expert_units": (8, 6)},
    "customized_sharing": {"expert_units": (8, 3)},
    "asymmetric_sharing": {"expert_units": (8, 6)},
    "single_task": {"expert_units": (8, 6), "activation": "tanh"},
}


def table(rows: int = 64, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns, and labels that depend on them."""
    rng = np.random.default_rng(seed)
    country = rng.choice(["de", "fr", "it", "es"], rows)  # "es" is in no vocabulary
    age = rng.uniform(20, 60, rows)
    amount = np.where(rng.random(rows) < 0.2, np.nan, rng.exponential(100, rows))
    data = {"country": country, "age": age, "hour": rng.integers(0, 24, rows), "amount": amount}
    labels = {
        "click": ((country == "de") | (age > 50)).astype(int),
        "watch": age / 40 + np.isnan(amount),
        "rating": np.where(country == "fr", 2, (age > 40).astype(int)),
    }
    return data, labels


def model(
    trunk: Any = "ple", *, tasks: Any = TASKS, columns: Any = COLUMNS, seed: int = 0, **kwargs: Any
) -> MultiTaskModel:
    torch.manual_seed(seed)
    options = SMALL.get(trunk) if isinstance(trunk, str) else None
    if trunk == "home":
        options = SMALL[trunk] | {
            "groups": (tuple(range(0, len(tasks), 2)), tuple(range(1, len(tasks), 2)))[: len(tasks)]
        }
    if trunk == "asymmetric_sharing":
        options = SMALL[trunk] | {"sources": tuple((0, k)[not k :] for k in range(len(tasks)))}
    return MultiTaskModel(columns, tasks, trunk=trunk, **{"trunk_options": options, "tower_units": (5,), **kwargs})


class Bottom(nn.Module):
    """A trunk of the user's: one layer per task."""

    def __init__(self, in_features: int, tasks: int = 3, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(in_features, width) for _ in range(tasks))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.stack([layer(x) for layer in self.layers], dim=1)

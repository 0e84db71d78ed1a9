"""What the tests of saved models share: models that say which one they are, and files of the first version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ple_fast.losses import TaskLoss
from ple_fast.model import Categorical, MultiTaskModel, Numeric
from ple_fast.model.configuration import task_to_json
from ple_fast.model.tensor_file import read
from ple_fast_encoder.columns import to_json

WEIGHTS = "model.safetensors"


VALUES = ("de", "fr", "it", "\udcff")  # the last one as Python reads a file name that is no text


def model(number: int = 0, units: int = 4) -> MultiTaskModel:
    """Every parameter and the configuration say which one it is."""
    columns: list[Any] = [Categorical("country", values=VALUES), Numeric("age", mean=float(number))]
    tasks = [TaskLoss("click"), TaskLoss("watch", "regression")]
    net = MultiTaskModel(columns, tasks, trunk_options={"expert_units": (units,)}, tower_units=(3,))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(float(number))
    return net


def number_of(directory: Path) -> int:
    """Of the model in a directory, which must be one save, whole."""
    net = MultiTaskModel.load(directory)
    column = net.columns[1]
    assert isinstance(column, Numeric)
    found = {column.mean, *(value for p in net.parameters() for value in p.unique().tolist())}
    assert len(found) == 1, f"parts of several saves: {found}"
    return int(found.pop())


def config_of(net: MultiTaskModel) -> dict[str, Any]:
    return {
        "format": "ple_fast.MultiTaskModel",
        "version": 1,
        "dtype": "float32",
        "columns": [to_json(column) for column in net.columns],
        "tasks": [task_to_json(task) for task in net.tasks],
        **net._config,
    }


def save_version_1(net: MultiTaskModel, directory: Path, **changes: Any) -> None:
    """As the first version did."""
    directory.mkdir(exist_ok=True)
    safetensors.torch.save_model(net, str(directory / WEIGHTS), metadata={"format": "ple_fast.MultiTaskModel"})
    config = config_of(net) | {"weights_sha256": read(directory / WEIGHTS).sha256} | changes
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def names(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir())

"""What may be assigned to a model that is built, and what would have been saved and not computed."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ple_fast.losses import JointLoss, TaskLoss
from ple_fast.model import Categorical, Hashed, MultiTaskModel, Numeric

COLUMNS: tuple[Any, ...] = (
    Categorical("item", values=(1, 2, 3), width=3),
    Categorical("seen", share="item", pooling="mean", max_length=2),
    Categorical("hour", size=4, width=3),
    Hashed("user", 8, width=2),
    Numeric("age"),
    Numeric("price", width=2),
)
DATA: dict[str, Any] = {
    "item": [1, 2, 3, 7],
    "seen": [[1, 2, 3], [3], [], [2, 2]],
    "hour": [0, 1, 2, 3],
    "user": ["a", "b", "c", "d"],
    "age": [0.5, 1.0, -1.0, 2.0],
    "price": [1.0, 2.0, 3.0, 4.0],
}


def model(**options: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    tasks = [TaskLoss("click"), TaskLoss("buy"), TaskLoss("watch", "regression")]
    return MultiTaskModel(COLUMNS, tasks, trunk_options={"expert_units": (6,)}, tower_units=(5,), **options)


def changed(place: int, **fields: Any) -> tuple[Any, ...]:
    return (*COLUMNS[:place], replace(COLUMNS[place], **fields), *COLUMNS[place + 1 :])


REFUSED: list[tuple[tuple[Any, ...], str]] = [
    (changed(1, pooling="sum"), r"another 'seen' \(pooling\)"),
    (changed(1, max_length=3), r"another 'seen' \(max_length\)"),
    (changed(1, share=None, size=3, width=3), r"another 'seen' \(size, width, share\)"),
    (changed(0, values=(1, 2)), r"another 'item' \(values\)"),
    (changed(0, width=2), r"another 'item' \(width\)"),
    (changed(2, size=5), r"another 'hour' \(size\)"),
    (changed(3, buckets=9), r"another 'user' \(buckets\)"),
    (changed(4, missing="indicator"), r"another 'age' \(missing\)"),
    (changed(5, width=None), r"another 'price' \(width\)"),
    ((*COLUMNS[:4], Hashed("age", 3), COLUMNS[5]), r"another 'age' \(Hashed for Numeric\)"),
    (changed(4, name="years"), "expected those that the model was built with, in their order"),
    (COLUMNS[::-1], "expected those that the model was built with, in their order"),
    (COLUMNS[:5], "expected those that the model was built with, in their order"),
]


@pytest.mark.parametrize(("columns", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_columns_of_another_embedding_are_refused(columns: Any, words: str) -> None:
    made = model()
    encoder = made.encoder()
    with pytest.raises(ValueError, match=f"^columns: .*{words}"):
        made.columns = columns
    assert made.columns == COLUMNS and made.encoder() is encoder


ALLOWED: list[tuple[Any, ...]] = [
    changed(4, missing="mean"),
    changed(4, mean=3.0, std=2.0),
    changed(5, transform="log1p"),
    changed(1, keep="first", padding=3),
    changed(0, values=(1, 2, 4)),
]


@pytest.mark.parametrize("columns", ALLOWED, ids=range(len(ALLOWED)))
def test_columns_of_the_same_embedding_are_followed_by_the_model_and_by_its_file(columns: Any, tmp_path: Path) -> None:
    made = model()
    data = {**DATA, "age": [0.5, None, -1.0, 2.0]} if columns[4].missing == "mean" else {**DATA, "item": [1, 2, 4, 7]}
    made.columns = list(columns)  # type: ignore[assignment]  # as the constructor takes them
    assert made.columns == columns and made.encoder().columns is made.columns and made.encoder() is made.encoder()
    found = made.predict(data)
    made.save(tmp_path)
    again = MultiTaskModel.load(tmp_path)
    built = MultiTaskModel(columns, made.tasks, trunk_options={"expert_units": (6,)}, tower_units=(5,))
    built.load_state_dict(made.state_dict())
    for other in (again, copy.deepcopy(made), built):
        assert other.columns == columns
        assert all(np.array_equal(value, found[task]) for task, value in other.predict(data).items())


def test_what_is_no_column_is_refused() -> None:
    made = model()
    with pytest.raises(TypeError, match="columns: expected a sequence of Categorical"):
        made.columns = COLUMNS[0]
    with pytest.raises(TypeError, match="columns: expected Categorical, Hashed or Numeric"):
        made.columns = ("item",)  # type: ignore[assignment]


def test_tasks_that_are_assigned_are_those_of_the_loss_of_the_file_and_of_what_is_served(tmp_path: Path) -> None:
    made, rows = model(), {name: torch.ones(4) for name in ("click", "buy", "watch")}
    before = made.joint_loss(made(DATA), rows)
    raw = made.predict(DATA)["watch"]
    made.tasks = [TaskLoss("click", weight=3.0), made.tasks[1], TaskLoss("watch", "regression", mean=5.0, std=2.0)]
    assert made.tasks is made.joint_loss.tasks
    after = made.joint_loss(made(DATA), rows)
    assert torch.equal(after.per_task["click"], before.per_task["click"])
    assert torch.allclose(
        after.total - after.per_task["watch"], before.total - before.per_task["watch"] + 2 * before.per_task["click"]
    )
    made.save(tmp_path)
    codes, numbers = made.encode(DATA)
    served = made.for_inference()(codes, numbers)["watch"].numpy()
    for found in (made.predict(DATA)["watch"], MultiTaskModel.load(tmp_path).predict(DATA)["watch"], served):
        assert np.allclose(found, 2 * raw + 5, atol=1e-5)


def test_a_joint_loss_that_is_assigned_brings_its_tasks(tmp_path: Path) -> None:
    made = model()
    made.joint_loss = JointLoss([replace(task, weight=2.0) for task in made.tasks])
    assert [task.weight for task in made.tasks] == [2.0, 2.0, 2.0]
    made.save(tmp_path)
    assert MultiTaskModel.load(tmp_path).tasks == made.tasks
    made.joint_loss = torch.compile(made.joint_loss, backend="eager")  # type: ignore[assignment]
    made.tasks = [replace(task, weight=4.0) for task in made.tasks]
    assert made.joint_loss.weights() == {"click": 4.0, "buy": 4.0, "watch": 4.0}


OTHER_TASKS: list[list[TaskLoss]] = [
    [TaskLoss("click"), TaskLoss("buy")],
    [TaskLoss("buy"), TaskLoss("click"), TaskLoss("watch", "regression")],
    [TaskLoss("click"), TaskLoss("buy"), TaskLoss("watch")],
    [TaskLoss("click"), TaskLoss("buy"), TaskLoss("watch", "multiclass", num_classes=2)],
]


@pytest.mark.parametrize("tasks", OTHER_TASKS, ids=range(len(OTHER_TASKS)))
def test_tasks_that_the_towers_are_not_of_are_refused(tasks: list[TaskLoss]) -> None:
    made = model()
    before, loss = made.tasks, made.joint_loss
    with pytest.raises(ValueError, match=r"^tasks: expected the tasks that the model was built with, in their order"):
        made.tasks = tasks
    with pytest.raises(ValueError, match=r"^joint_loss: expected a JointLoss of the tasks that the model was built"):
        made.joint_loss = JointLoss(tasks)
    for wrong in (TaskLoss("click"), ["click"]):
        with pytest.raises(TypeError, match="a list of TaskLoss"):
            made.tasks = wrong  # type: ignore[assignment]
    with pytest.raises(TypeError, match="joint_loss: expected a JointLoss"):
        made.joint_loss = torch.nn.Identity()  # type: ignore[assignment]
    assert made.tasks is before and made.joint_loss is loss


def test_what_follows_from_the_build_cannot_be_changed() -> None:
    made = model(given={"buy": "click"}, trunk="cgc", task_columns={"watch": ["item", "hour", "user", "age", "price"]})
    for held in (made.given, made.task_columns):
        with pytest.raises(TypeError, match="does not support item assignment"):
            held["buy"] = "watch"  # type: ignore[index]
    for name in ("given", "task_columns"):
        with pytest.raises(AttributeError):
            setattr(made, name, {})
    twin = pickle.loads(pickle.dumps(copy.deepcopy(made)))
    assert twin.given == {"buy": "click"} and twin.task_columns == made.task_columns
    assert np.array_equal(twin.predict(DATA)["buy"], made.predict(DATA)["buy"])

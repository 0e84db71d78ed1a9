"""What may be assigned to a model that is built, and what would have been saved and not computed."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ple_fast.losses import TaskLoss
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

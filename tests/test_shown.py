"""What errors show of what came: shapes and not numbers, one line, names of arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ple_fast import (
    PLE,
    ExtractionNetwork,
    GateSpec,
    MLPSpec,
    Topology,
)
from ple_fast.losses import TaskLoss
from ple_fast.model import Categorical, MultiTaskModel, Numeric, columns_from
from ple_fast.scalars import check_count
from ple_fast.synthetic import synthetic_tasks


def _fitted(**options: Any) -> Any:
    model = MultiTaskModel([Numeric("x")], [TaskLoss("y")], tower_units=())
    return model.fit({"x": [0.0, 1.0]}, {"y": [0, 1]}, **options)


MANY: dict[str, Callable[[Any], Any]] = {
    "a size": lambda many: PLE(many, 2),
    "a count": lambda many: PLE(8, num_tasks=many),
    "widths": lambda many: PLE(8, 2, expert_units=many),
    "an activation": lambda many: PLE(8, 2, activation=many),
    "a norm": lambda many: PLE(8, 2, norm=many),
    "a rate": lambda many: PLE(8, 2, dropout=many),
    "a flag": lambda many: PLE(8, 2, recompute=many),
    "experts": lambda many: ExtractionNetwork(8, Topology.mmoe(2, 2), experts=many, gate=GateSpec()),
    "a topology": lambda many: ExtractionNetwork(8, many, experts=MLPSpec((4,)), gate=GateSpec()),
    "a task": lambda many: TaskLoss(many),
    "a weight": lambda many: TaskLoss("y", weight=many),
    "tasks": lambda many: MultiTaskModel([Numeric("x")], [many]),
    "columns": lambda many: MultiTaskModel([many], [TaskLoss("y")]),
    "a trunk": lambda many: MultiTaskModel([Numeric("x")], [TaskLoss("y")], trunk=many),
    "a condition": lambda many: MultiTaskModel([Numeric("x")], [TaskLoss("y")], given=many),
    "a mean": lambda many: Numeric("x", mean=many),
    "a vocabulary and a size": lambda many: Categorical("x", values=many, size=3),
    "a rare value": lambda many: columns_from({"x": ["a"]}, categorical=["x"], min_count=many),
    "a learning rate": lambda many: _fitted(lr=many),
    "an optimizer": lambda many: _fitted(optimizer=many),
    "a score": lambda many: _fitted(validation=({"x": [0.0]}, {"y": [1]}), score=lambda *_: many),
}


@pytest.mark.parametrize("kind", [torch.zeros, np.zeros], ids=["tensor", "array"])
@pytest.mark.parametrize("argument", MANY)
def test_errors_show_the_shape_of_an_array_and_not_its_numbers(argument: str, kind: Callable[[Any], Any]) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        MANY[argument](kind((300, 3)))
    message = str(error.value)
    assert "\n" not in message and len(message) < 400, message
    assert "0., 0." not in message and "0.0, 0.0, 0.0, 0.0" not in message, message


def test_errors_show_other_values_on_one_line_and_not_without_end() -> None:
    with pytest.raises(TypeError) as error:
        _fitted(optimizer=torch.optim.Adam([torch.zeros(1)]))
    assert "\n" not in str(error.value) and "got Adam" in str(error.value)
    with pytest.raises(TypeError) as error:
        check_count("size", list(range(10_000)))
    assert len(str(error.value)) < 300
    with pytest.raises(TypeError, match=r"got '7' \(str\)"):
        check_count("size", "7")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"seed": 2**65}, "seed: expected less than 2 ** 64, got 36893488147419103232"),
        ({"lr": torch.ones(2)}, "lr: expected a number, got Tensor of shape (2,)"),
        (
            {"validation": ({"x": [0.0]}, {"y": [1]}, 3)},
            "validation sample_weight: expected one weight per row, (1,), got 3",
        ),
        ({"validation": ({"x": [0.0]}, {"y": [1]}, None, 3)}, "got tuple of 4"),
    ],
)
def test_arguments_of_fit_that_do_not_fit_are_named(options: dict[str, Any], part: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        _fitted(**options)
    assert part in str(error.value)


def test_a_seed_that_no_generator_takes_is_named() -> None:
    with pytest.raises(ValueError, match=r"seed: expected less than 2 \*\* 64, got"):
        synthetic_tasks(4, 4, correlation=0.5, seed=2**64)
    synthetic_tasks(4, 4, correlation=0.5, seed=2**64 - 1)


def test_a_rate_that_is_a_tensor_of_one_number_stays_one() -> None:
    assert len(_fitted(lr=torch.tensor([1e-3]))) == 1


def test_a_name_of_numpy_is_kept_as_a_string() -> None:
    assert type(TaskLoss(np.str_("y")).name) is str

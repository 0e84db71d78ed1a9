"""What is measured of columns: constants, small deviations, missing numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from ple_fast.losses import TaskLoss
from ple_fast.model import MultiTaskModel, Numeric, columns_from

NAN = math.nan


@pytest.mark.parametrize(
    "constant",
    [
        np.full(7, 0.1),
        [0.1 * 3, 0.3, 0.3],
        np.full(1000, 1e9) + np.tile([0, 1e-7], 500),
        [0.0, 0.0],
        [5],
        [-0.3, -0.1 * 3],
    ],
    ids=["equal", "rounded", "large", "zeros", "one row", "negative"],
)
def test_what_is_constant_up_to_rounding_has_a_deviation_of_one(constant: Any) -> None:
    (column,) = columns_from({"x": constant}, numeric=["x"])
    assert isinstance(column, Numeric)
    assert column.std == 1.0
    assert abs(column.encode([column.mean + 0.01])[0, 0] - 0.01) < 1e-6


def test_a_constant_of_any_size_is_one() -> None:
    for value in (1e300, -1e300, 5e-324):
        (column,) = columns_from({"x": [value] * 4}, numeric=["x"])
        assert isinstance(column, Numeric)
        assert column.std == 1.0


def test_small_deviations_beside_a_large_mean_are_kept() -> None:
    seconds = 1.7e9 + np.arange(10.0)
    (column,) = columns_from({"x": seconds}, numeric=["x"])
    assert isinstance(column, Numeric)
    assert column.std == np.std(seconds)


@pytest.mark.parametrize("treatment", ["mean", "indicator"])
def test_a_number_that_is_missing_while_serving_can_be_asked_for_beforehand(treatment: Any) -> None:
    table = {"age": np.array([20.0, 40.0]), "price": np.array([1.0, NAN])}
    age, price = columns_from(table, numeric=["age", "price"], missing=treatment)
    assert isinstance(age, Numeric) and isinstance(price, Numeric)
    assert age.missing == price.missing == treatment
    expected = [[1.0], [0.0]] if treatment == "mean" else [[1.0, 0.0], [0.0, 1.0]]
    assert age.encode([40.0, None]).tolist() == expected
    assert age.features == len(expected[0])


def test_a_trained_model_can_be_told_that_missing_numbers_are_the_mean() -> None:
    data, labels = {"age": np.array([20.0, 40.0, 60.0])}, {"y": [0, 1, 1]}
    model = MultiTaskModel(
        columns_from(data, numeric=["age"]),
        [TaskLoss("y")],
        trunk="hard_sharing",
        trunk_options={"expert_units": 4},
        tower_units=(),
    )
    model.fit(data, labels)
    with pytest.raises(ValueError, match=r'1 of 2 missing .*missing="mean" \(a trained model can have it too\)'):
        model.predict({"age": [None, 40.0]})
    model.columns = tuple(
        dataclasses.replace(column, missing="mean") if isinstance(column, Numeric) else column
        for column in model.columns
    )
    one, other = model.predict({"age": [None, 40.0]})["y"]
    assert one == other

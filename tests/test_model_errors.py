"""What the model refuses, and options of other libraries that it takes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from ple_fast.model import MultiTaskModel, encode
from tests.model_helpers import COLUMNS, SMALL, TASKS, Bottom, model, table

Make = Callable[[], Any]


def _fit(**kwargs: Any) -> Make:
    data, labels = table(8)
    return lambda: model().fit(**{"data": data, "labels": labels, **kwargs})


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: model("transformer", trunk_options={}), ValueError, "one of ple, cgc.*'transformer'"),
        (
            lambda: model(trunk_options={"num_heads": 3}),
            TypeError,
            r"trunk_options: expected options of 'ple', num_levels, .*expert_units.*; got \['num_heads'\]",
        ),
        (lambda: model("asymmetric_sharing", trunk_options={}), TypeError, "expected sources, which 'asymm"),
        (lambda: model(trunk_options=["norm"]), TypeError, r"trunk_options: expected a dict, got \['norm'\]"),
        (lambda: model(7), TypeError, "trunk: expected a name, a module, or a function of in_features, got 7"),
        (lambda: model(given=["click"]), TypeError, "given: expected a dict"),
        (
            lambda: model(columns=COLUMNS[0]),
            TypeError,
            "columns: expected a sequence of Categorical, Hashed and Numeric, got C",
        ),
        (lambda: model(columns=["age"]), TypeError, "columns: expected Categorical, Hashed or Numeric.*got 'age'"),
        (lambda: model(tasks=TASKS[0]), TypeError, "tasks: expected a sequence of TaskLoss"),
        (lambda: model(tower_units=64), TypeError, r"tower_units: expected the widths.*\(64,\), got 64"),
        (lambda: model(tower_units=(8, 0)), ValueError, r"tower_units\[1\]: expected 1 or more, got 0"),
        (lambda: model(tower_units=(8.0,)), TypeError, r"tower_units\[0\]: expected an int"),
        (lambda: model(tower_dropout=math.nan), ValueError, "tower_dropout: expected a rate from 0 to 1, got nan"),
        (lambda: model(tower_dropout="0.5"), TypeError, "tower_dropout: expected a number"),
        (lambda: model(tower_activation=["relu"]), ValueError, r"tower_activation.*got \['relu'\]"),
        (
            lambda: model(trunk_options={"activation": nn.ReLU}),
            ValueError,
            r"options\['activation'\].*by its name",
        ),
        (lambda: model(Bottom, trunk_options={"width": 3}), ValueError, "a trunk of your own"),
        (lambda: model(functools.partial(Bottom, tasks=2)), ValueError, r"\(B, 3, H\).*got shape \(2, 2, 4\)"),
        (lambda: model(lambda width: nn.Linear(width, 3)), ValueError, r"Linear to return.*got shape \(2, 3\)"),
        (lambda: model(lambda width: "module"), TypeError, "return a module"),
        (lambda: model(tower_activation="mish"), ValueError, "tower_activation.*'mish'"),
        (lambda: model(columns=[COLUMNS[0]] * 2), ValueError, r"\['country'\] more than once"),
        (lambda: model(columns=[]), ValueError, "at least one"),
        (lambda: model(tasks=[]), ValueError, "at least one TaskLoss"),
        (lambda: model(given={"click": "buy"}), ValueError, "two of the tasks"),
        (lambda: model(given={"click": "watch"}), ValueError, "the condition first"),
        (lambda: model(given={"rating": "click"}), ValueError, "binary tasks"),
        (_fit(data={"age": [1]}), ValueError, r"expected a column 'country', got \['age'\]"),
        (_fit(labels={"click": [1] * 8}), ValueError, "labels: expected a column 'watch'"),
        (_fit(labels=table(9)[1]), ValueError, r"labels\['click'\].*\(8,\), got shape \(9,\)"),
        (_fit(labels=table(8)[1] | {"click": [2] * 8}), ValueError, r"labels\['click'\].*0 to 1"),
        (_fit(labels=table(8)[1] | {"rating": [3] * 8}), ValueError, r"labels\['rating'\].*classes 0 to 2"),
        (_fit(labels=table(8)[1] | {"click": ["yes"] * 8}), TypeError, r"labels\['click'\].*numbers"),
        (_fit(epochs=0), ValueError, "epochs"),
        (_fit(batch_size=0), ValueError, "batch_size"),
        (_fit(patience=2), ValueError, "validation"),
        (_fit(score=lambda p, y: 0.0), ValueError, "validation"),
        (_fit(validation=(table(4)[0], table(5)[1])), ValueError, "validation labels.*4.*5"),
        (_fit(validation="a tenth"), TypeError, r"validation: expected \(data, labels\), .*or a share.*got 'a tenth'"),
        (_fit(validation=[1, 2, 3, 4]), TypeError, "validation: expected .*got list of 4"),
        (_fit(validation=encode(table(4)[0], COLUMNS)), TypeError, "validation: expected .*got Encoded"),
        (_fit(validation=table(4)[0]), ValueError, "validation labels: expected labels by task beside the data"),
        (_fit(optimizer="adam"), TypeError, r"optimizer: expected a class.*torch\.optim\.Adam, got 'adam'"),
        (
            _fit(optimizer=lambda p, lr: None),
            TypeError,
            "optimizer: expected the function to return an optimizer, got N",
        ),
        (_fit(lr="1e-3"), TypeError, "lr: expected a number, got '1e-3'"),
        (_fit(seed=0.5), TypeError, "seed: expected an int, got 0.5"),
        (_fit(epochs=True), TypeError, "epochs: expected an int, got True"),
        (_fit(validation=table(4), score=0.5), TypeError, "score: expected a function or a name, got 0.5"),
        (_fit(progress="bar"), TypeError, "progress: expected a bool or a function, got 'bar'"),
        (_fit(validation=table(4), score=lambda p, y: math.inf), FloatingPointError, "validation score, got inf"),
        (_fit(labels=table(8)[1] | {"watch": [3e38] * 8}), FloatingPointError, "epoch 1: expected a finite loss"),
        (
            lambda: model().fit({name: column[:0] for name, column in table()[0].items()}, {}),
            ValueError,
            "at least one row",
        ),
        (lambda: model().predict({"age": [1]}), ValueError, "'country'"),
        (
            lambda: model().requires_grad_(False).fit(*table(8)),
            ValueError,
            "parameters that require a gradient, got a model whose parameters are frozen",
        ),
    ],
)
def test_the_model_refuses_in_sentences(make: Make, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    "data",
    [
        torch.zeros(8, 4),
        np.zeros((8, 4)),
        [1, 2],
        (torch.zeros(8, 2), torch.zeros(8, 2)),
        pd.Series([1.0]),
        "age",
        3,
        None,
    ],
    ids=lambda data: type(data).__name__,
)
def test_what_has_no_columns_by_name_is_refused_without_its_contents(data: Any) -> None:
    net = model()
    for call in (net.predict, net.gate_weights, net.encode, net, lambda d: net.fit(d, {})):
        with pytest.raises(TypeError, match=r"^data: expected columns by name.*'country', 'age'.*got .+") as caught:
            call(data)
        assert len(str(caught.value)) < 250
    if data is None:  # then they are columns of the data
        return
    with pytest.raises(
        TypeError, match=r"^labels: expected one column \(64,\) per task by name.*'click': array.*got"
    ) as caught:
        net.fit(table()[0], data)
    assert len(str(caught.value)) < 250


def test_labels_may_be_columns_of_the_data_and_are_missed_there() -> None:
    data, labels = table()
    with pytest.raises(ValueError, match=r"^labels: expected labels by task.*got neither for 'click'"):
        model().fit(data)
    with pytest.raises(TypeError, match="labels: expected labels by task with encoded rows"):
        model().fit(model().encode(data))
    fitted = []
    for arguments in ((data, labels), ({**data, **labels},)):
        net = model()
        net.fit(*arguments, batch_size=16, progress=False)
        fitted.append(net.predict(data)["click"])
    np.testing.assert_array_equal(fitted[0], fitted[1])


def test_labels_of_two_axes_are_refused_by_their_shape() -> None:
    data, labels = table()
    with pytest.raises(TypeError, match=r"got ndarray of shape \(64, 2\)"):
        model().fit(data, np.zeros((64, 2)))  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ValueError, match=r"labels\['click'\]: expected one .* per row.*got shape \(64, 2\)"):
        model().fit(data, labels | {"click": np.zeros((64, 2))})


def test_a_state_of_another_number_of_tasks_is_refused_before_anything_is_loaded() -> None:
    one, three = model("hard_sharing", tasks=TASKS[:1]), model("hard_sharing", seed=1)
    kept = {name: value.clone() for name, value in one.state_dict().items()}
    says = r"expected the state of a model of 1 tasks, \['click'\], got one of 3; build the model with the tasks"
    with pytest.raises(ValueError, match=says):
        one.load_state_dict(three.state_dict())
    assert all(torch.equal(value, kept[name]) for name, value in one.state_dict().items())
    missing, unexpected = one.load_state_dict(three.state_dict(), strict=False)  # who asks for it gets what fits
    assert not missing
    assert unexpected == [name for name in three.state_dict() if name.startswith(("towers.1", "towers.2"))]


@pytest.mark.parametrize("count", [np.int64, np.uint8, torch.tensor], ids=["int64", "uint8", "tensor"])
def test_scalar_options_of_other_libraries_build_and_train_the_same_model(count: Any, tmp_path: Path) -> None:
    data, labels = table()
    expected = model(tower_units=(5, 4), tower_dropout=0.25, trunk_options=SMALL["ple"] | {"norm": "layer"})
    options = {
        "num_levels": count(2),
        "task_experts": count(2),
        "shared_experts": count(1),
        "expert_units": np.array([8, 6]),
        "norm": np.str_("layer"),
        "gate_bias": np.True_,
    }
    net = model(tower_units=np.array([5, 4]), tower_dropout=np.float32(0.25), trunk_options=options)
    assert net.columns == expected.columns
    plain = {"epochs": 2, "batch_size": 16, "patience": 2, "seed": 3, "validation": (data, labels)}
    torch.manual_seed(0)
    first = expected.fit(data, labels, lr=0.5**9, **plain)  # type: ignore[arg-type]
    torch.manual_seed(0)
    counts = {name: count(value) for name, value in plain.items() if isinstance(value, int)}
    second = net.fit(data, labels, lr=np.float32(0.5**9), validation=(data, labels), **counts)  # type: ignore[arg-type]
    assert [(r.loss, r.score) for r in second] == [(r.loss, r.score) for r in first]
    net.save(tmp_path)
    again = MultiTaskModel.load(tmp_path).predict(data, batch_size=count(7))
    assert np.array_equal(again["click"], expected.predict(data, batch_size=7)["click"])

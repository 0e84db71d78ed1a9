"""Regression labels of any scale: standardised on request, predicted in their own, saved, and warned of."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ple_fast.losses import TaskLoss
from ple_fast.model import MultiTaskModel
from tests.fit_helpers import model, table

OPTIONS: dict[str, Any] = {"options": {"expert_units": ((8,), (6,))}, "dropout": 0.0}
SCALE, SHIFT = 3e5, 2e6


def large() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Data, labels of the scale 1e6 with gaps, and the same labels near 1."""
    data, labels = table(256)
    small = np.where(np.arange(256) % 5 == 0, np.nan, labels["watch"])
    small = (small - np.nanmean(small)) / np.nanstd(small)
    near = {"click": labels["click"], "watch": small}
    return data, {"click": labels["click"], "watch": SHIFT + SCALE * small}, near


TASKS = (TaskLoss("click"), TaskLoss("watch", "regression"))
STANDARDISED = (TASKS[0], TaskLoss("watch", "regression", standardise=True))


def test_labels_of_a_large_scale_train_as_those_near_1_and_come_back_in_their_own() -> None:
    data, labels, near = large()
    net, expected = model(tasks=STANDARDISED, **OPTIONS), model(tasks=TASKS, **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = net.fit(data, labels, epochs=10, batch_size=32, lr=1e-2, progress=False)
    theirs = expected.fit(data, near, epochs=10, batch_size=32, lr=1e-2, progress=False)
    assert [r.loss for r in ours] == pytest.approx([r.loss for r in theirs], rel=1e-3)
    assert ours[-1].loss < 0.7 * ours[0].loss
    task = net.tasks[1]
    assert task is net.joint_loss.tasks[1] and not task.standardise
    assert [task.mean, task.std] == pytest.approx([SHIFT, SCALE])
    raw = net.eval()(data)["watch"].detach().numpy()
    assert net.predict(data)["watch"] == pytest.approx(SHIFT + SCALE * raw, rel=1e-6)
    found, near_found = net.evaluate(data, labels, metrics="rmse"), expected.evaluate(data, near, metrics="rmse")
    assert found["watch"]["rmse"] == pytest.approx(SCALE * near_found["watch"]["rmse"], rel=1e-2)  # type: ignore[operator]
    assert found["watch"].loss == pytest.approx((found["watch"]["rmse"] / SCALE) ** 2, rel=1e-4)  # type: ignore[operator]


def test_the_scale_is_that_of_the_first_fit_and_is_saved_and_loaded(tmp_path: Path) -> None:
    data, labels, _ = large()
    net = model(tasks=STANDARDISED, **OPTIONS)
    net.fit(data, labels, batch_size=64, progress=False)
    tasks = net.tasks
    net.fit(data, {**labels, "watch": labels["watch"] * 1.5}, batch_size=64, progress=False)
    assert net.tasks == tasks
    net.save(tmp_path)
    again = MultiTaskModel.load(tmp_path)
    assert again.tasks == tasks  # to the last bit
    assert np.array_equal(again.predict(data)["watch"], net.predict(data)["watch"])


def test_rows_that_are_held_back_or_weigh_0_are_not_measured() -> None:
    data, labels, _ = large()
    weight = np.where(np.arange(256) < 128, 1.0, 0.0)
    net = model(tasks=STANDARDISED, **OPTIONS)
    net.fit(data, labels, batch_size=64, sample_weight={"watch": weight}, progress=False)
    assert net.tasks[1].mean == pytest.approx(np.nanmean(labels["watch"][:128]), rel=1e-12)


def test_what_no_fit_has_measured_says_so() -> None:
    data, labels, _ = large()
    net = model(tasks=STANDARDISED, **OPTIONS)
    says = (
        r"task 'watch': standardise=True: expected labels' mean and std.*TaskLoss\('watch', 'regression', mean=, std=\)"
    )
    for call in (net.predict, lambda d: net.evaluate(d, labels)):
        with pytest.raises(ValueError, match=says):
            call(data)
    targets = {name: torch.as_tensor(label) for name, label in labels.items()}
    with pytest.raises(ValueError, match=says):
        net.joint_loss(net(data), targets)
    with pytest.raises(ValueError, match="standardise=True measures, got none at all"):
        net.fit(data, {**labels, "watch": np.full(256, np.nan)})


def test_a_request_that_was_saved_is_still_one(tmp_path: Path) -> None:
    model(tasks=STANDARDISED, **OPTIONS).save(tmp_path)
    assert MultiTaskModel.load(tmp_path).tasks == STANDARDISED


def test_a_model_without_the_new_options_is_written_as_before(tmp_path: Path) -> None:
    """So that older releases load it."""
    from ple_fast.model import storage

    model(tasks=TASKS).save(tmp_path)
    for task in storage.read(tmp_path).config["tasks"]:
        assert set(task) == {"name", "kind", "num_classes", "weight", "gamma"}
    assert "pos_weight" not in json.dumps(storage.read(tmp_path).config)


def test_what_float32_cannot_tell_apart_is_standardised_in_float64() -> None:
    data, _, near = large()
    stamps = 1.7e9 + 10 * near["watch"]
    net = model(tasks=STANDARDISED, **OPTIONS)
    history = net.fit(
        data, {"click": near["click"], "watch": stamps}, epochs=10, batch_size=32, lr=1e-2, progress=False
    )
    expected = model(tasks=TASKS, **OPTIONS).fit(data, near, epochs=10, batch_size=32, lr=1e-2, progress=False)
    assert history[-1].tasks["watch"].loss == pytest.approx(expected[-1].tasks["watch"].loss, rel=1e-2)


def test_constant_labels_have_deviation_1() -> None:
    data, labels, _ = large()
    net = model(tasks=STANDARDISED, **OPTIONS)
    net.fit(data, {**labels, "watch": np.full(256, 0.1)}, progress=False)
    assert net.tasks[1].std == 1.0


def test_labels_far_from_1_are_warned_of_once_at_the_caller() -> None:
    data, labels, _ = large()
    says = r"labels\['watch'\]: .*a mean of 2e\+06 and a standard deviation of 3e\+05.*standardise=True"
    with pytest.warns(UserWarning, match=says) as caught:
        model(tasks=TASKS, **OPTIONS).fit(data, labels, epochs=2, batch_size=64, progress=False)
    assert len(caught) == 1 and caught[0].filename == __file__
    far = TaskLoss("watch", "regression", mean=1e6)
    with pytest.warns(UserWarning, match="in the units of its mean and std"):
        model(tasks=[TASKS[0], far], **OPTIONS).fit(data, labels, batch_size=64, progress=False)

"""The callback that writes to TensorBoard: the numbers of the history, some steps, and the gates."""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ple_fast import viz
from ple_fast.model import TensorBoard
from tests.model_helpers import COLUMNS, Bottom, model, table


class Writer:
    """What SummaryWriter is asked for."""

    def __init__(self) -> None:
        self.scalars: dict[str, list[tuple[int, float]]] = defaultdict(list)
        self.flushes = 0

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert type(value) is float
        self.scalars[tag].append((step, value))

    def flush(self) -> None:
        self.flushes += 1


def test_every_number_of_an_epoch_is_a_scalar_and_what_is_undefined_is_none() -> None:
    data, labels = table()
    writer = Writer()
    held = {**labels, "click": [0] * 64}
    history = model().fit(
        data,
        labels,
        epochs=2,
        batch_size=16,
        validation=(data, held),
        metrics={"auc", "rmse"},
        clip_norm=1.0,
        callbacks=[TensorBoard(writer, every=3)],
        progress=False,
    )
    for name, value in history[1].flat().items():
        if name != "epoch" and value is not None:
            step, written = writer.scalars[name][1]
            assert step == 2 and written == pytest.approx(float(value))
    assert "val/click/auc" not in writer.scalars
    assert [step for step, _ in writer.scalars["step/loss"]] == [3, 6]
    assert [step for step, _ in writer.scalars["step/gradient_norm"]] == [3, 6]
    assert writer.scalars["step/lr"] == [(3, 1e-3), (6, 1e-3)]
    assert writer.flushes == 2
    assert not [tag for tag in writer.scalars if tag.startswith("gates")]


def test_the_gates_are_those_of_the_picture() -> None:
    data, labels = table()
    writer, net = Writer(), model()
    net.fit(data, labels, epochs=2, batch_size=16, callbacks=[TensorBoard(writer, gates=data)], progress=False)
    gates = {tag: values for tag, values in writer.scalars.items() if tag.startswith("gates/")}
    assert {"gates/level_1/click/click_1", "gates/level_1/click/click_2", "gates/level_1/click/shared_1"} <= set(gates)
    for use in viz.gate_use(net.gate_weights(data), net.topologies, net.task_names):
        prefix = f"gates/{use.level}/{use.gate}/".replace(" ", "_")
        found = [values[1][1] for tag, values in gates.items() if tag.startswith(prefix)]
        assert found == pytest.approx(use.mean)
    assert all([step for step, _ in values] == [1, 2] for values in gates.values())


def test_a_trunk_without_gates_says_so() -> None:
    data, labels = table()
    with pytest.raises(TypeError, match="Bottom"):
        model(Bottom).fit(data, labels, callbacks=[TensorBoard(Writer(), gates=data)], progress=False)
    model(Bottom).fit(data, labels, callbacks=[TensorBoard(Writer())], progress=False)


def test_a_writer_that_is_none_and_a_missing_package_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="writer: expected a folder or a SummaryWriter, got 3"):
        TensorBoard(3)
    with pytest.raises(ValueError, match="every: expected 1 or more"):
        TensorBoard(Writer(), every=0)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard, or pass a writer"):
        TensorBoard(tmp_path)


def test_a_folder_gets_pytorchs_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Module:
        class SummaryWriter(Writer):
            def __init__(self, folder: str) -> None:
                super().__init__()
                made.append((folder, self))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Module)
    model().fit(*table(), callbacks=[TensorBoard(tmp_path)], progress=False)
    folder, writer = made[0]
    assert folder == str(tmp_path)
    assert writer.scalars["loss"]


@pytest.mark.parametrize("trunk", [lambda width: Bottom(width), "ple"])
def test_gates_that_cannot_be_read_are_found_before_a_step(trunk: Any) -> None:
    data, labels = table()
    rows = {name: column for name, column in data.items() if trunk != "ple" or name != "age"}
    net = model(trunk)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    expected: tuple[Any, str] = (TypeError, "topology") if trunk != "ple" else (ValueError, "'age'")
    with pytest.raises(expected[0], match=expected[1]) as caught:
        net.fit(data, labels, callbacks=[TensorBoard(Writer(), gates=rows)], progress=False)
    assert caught.value.history == []
    assert all(map(torch.equal, net.parameters(), before))


def test_a_callback_of_two_models_encodes_its_rows_for_each() -> None:
    data, labels = table()
    other = model(columns=[replace(COLUMNS[0], values=("it", "fr", "de")), *COLUMNS[1:]])
    alone, shared = Writer(), Writer()
    torch.manual_seed(1)
    other.fit(data, labels, callbacks=[TensorBoard(alone, gates=data)], progress=False)
    callback = TensorBoard(shared, gates=data)
    model().fit(data, labels, callbacks=[callback], progress=False)
    shared.scalars.clear()
    again = model(columns=other.columns)
    torch.manual_seed(1)
    again.fit(data, labels, callbacks=[callback], progress=False)
    timed = ("seconds", "samples_per_second")
    found, expected = ({tag: v for tag, v in own.scalars.items() if tag not in timed} for own in (shared, alone))
    assert found == expected and any(tag.startswith("gates") for tag in found)

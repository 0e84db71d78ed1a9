"""Files of models of other versions, of other programs, and of none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ple_fast.model import MultiTaskModel, storage
from tests.storage_helpers import WEIGHTS, model, names, number_of, save_version_1


def test_a_folder_of_version_1_is_loaded_and_replaced(tmp_path: Path) -> None:
    save_version_1(model(7), tmp_path)
    assert number_of(tmp_path) == 7
    model(8).save(tmp_path)
    assert number_of(tmp_path) == 8
    assert names(tmp_path) == [WEIGHTS], "a configuration that nobody reads would mislead"


def test_files_of_two_saves_of_version_1_are_told_apart(tmp_path: Path) -> None:
    save_version_1(model(1), tmp_path)
    before = (tmp_path / "config.json").read_text()
    save_version_1(model(2), tmp_path)
    (tmp_path / "config.json").write_text(before)
    with pytest.raises(ValueError, match="different saves"):
        MultiTaskModel.load(tmp_path)


def test_a_configuration_of_somebody_else_is_left(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"format": "theirs"}')
    model(1).save(tmp_path)
    assert names(tmp_path) == ["config.json", WEIGHTS]
    assert number_of(tmp_path) == 1


def test_the_configuration_can_be_read_by_people(tmp_path: Path) -> None:
    model(3).save(tmp_path)
    text = bytes(safetensors.torch.load_file(tmp_path / WEIGHTS)["config.json"].tolist()).decode("utf-8", "replace")
    assert json.loads(text)["columns"][1]["mean"] == 3.0


def test_a_later_version_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(storage, "VERSION", 3)
        model().save(tmp_path)
    with pytest.raises(ValueError, match="expected version 2, got 3; load it with the release"):
        MultiTaskModel.load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_in_the_place_of_its_directory_is_refused(name: str, tmp_path: Path) -> None:
    save_version_1(model(), tmp_path)
    with pytest.raises(ValueError, match=f"directory: expected the directory that save wrote.*load '{tmp_path}'"):
        MultiTaskModel.load(tmp_path / name)


def test_nothing_to_load_says_which_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        MultiTaskModel.load(tmp_path)
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / WEIGHTS)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        MultiTaskModel.load(tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_loading_never_unpickles(version: int, tmp_path: Path) -> None:
    net = model()
    if version == 1:
        save_version_1(net, tmp_path)
    torch.save(net, tmp_path / WEIGHTS)  # a pickle under the name of the weights
    with pytest.raises(ValueError, match=r"model\.safetensors: expected the format of safetensors"):
        MultiTaskModel.load(tmp_path)

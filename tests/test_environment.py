"""What the results of the GPU benchmark say about the machine and the code."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import environment


def test_the_gpu_and_its_driver_are_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(total_memory=80, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    about = environment.gpu_environment(torch.device("cuda"))
    assert about["machine"] == "nvidia-h100-80gb-hbm3"
    assert about["multiprocessors"] == 132
    assert {"driver", "cuda", "packages", "commit"} <= set(about)
    assert about["tiles"] == "shipped"


def test_the_tiles_in_use_are_written_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("PLE_FAST_TILES", str(tmp_path / "tiles.json"))
    assert environment.tiles_in_use(torch.device("cuda")) == "shipped"
    (tmp_path / "tiles.json").write_text("{}", encoding="utf-8")
    assert environment.tiles_in_use(torch.device("cuda")) == "tiles.json, sha256 44136fa355b3"
    monkeypatch.setenv("PLE_FAST_TILES", "")
    assert environment.tiles_in_use(torch.device("cuda")) == "shipped"


def test_a_tree_without_git_is_told_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.delenv(environment.COMMIT, raising=False)
    assert environment.code_version() == ("unknown", False)
    assert environment.code_version("0123abc") == ("0123abc", False)
    monkeypatch.setenv(environment.COMMIT, "0123abc-dirty")
    assert environment.code_version() == ("0123abc", True)

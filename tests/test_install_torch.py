"""Set-up fetches the build of torch that this machine can use, and says first what it fetches; nothing is installed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import ROOT

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="elsewhere there is one build for all machines")

# Answers as pip does, from what the variable OFFERED has for its own places and for an index that is named.
PIP = """
import os, sys
if "index" in sys.argv:
    own, named = os.environ["OFFERED"].split("|")
    versions = named if "--index-url" in sys.argv else own
    if not versions:
        sys.exit("ERROR: No matching distribution found for torch")
    print(f"torch ({versions.split(', ')[0]})\\nAvailable versions: {versions}\\n  INSTALLED: 2.13.0+cpu")
else:
    print("pip was run:", *sys.argv[1:])
    sys.exit(7)
"""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PYPI = "2.14.0, 2.13.0, 2.11.0"


def executable(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


def install(folder: Path, *arguments: str, offered: str, gpu: str | None = None) -> subprocess.CompletedProcess[str]:
    """``gpu``: what ``nvidia-smi`` prints, which fails where that is empty."""
    (folder / "pip").mkdir()
    (folder / "pip" / "__init__.py").touch()  # without it Python finds the real one
    (folder / "pip" / "__main__.py").write_text(PIP)
    (folder / "bin").mkdir()
    if gpu is not None:
        executable(folder / "bin" / "nvidia-smi", f"#!/bin/sh\necho '{gpu}'\n{'exit 0' if gpu else 'exit 9'}\n")
    found = {"PYTHONPATH": str(folder), "PATH": str(folder / "bin"), "OFFERED": offered}
    return subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "install_torch.py"), *arguments],
        env={**os.environ, **found},
        capture_output=True,
        encoding="utf-8",
    )


needs_no_gpu = pytest.mark.skipif(
    any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/kfd")), reason="there is a GPU here"
)


@needs_no_gpu
@pytest.mark.parametrize("gpu", [None, ""], ids=["no driver", "a driver without a device"])
def test_without_a_gpu_the_build_for_cpus_comes_from_its_index(tmp_path: Path, gpu: str | None) -> None:
    done = install(tmp_path, "2.13.0", "--dry-run", offered=f"{PYPI}|2.13.0+cpu, 2.11.0+cpu", gpu=gpu)
    words, command = done.stdout.splitlines()
    assert words == "torch 2.13.0+cpu, without CUDA: about 200 MB to fetch"
    assert command.endswith(f" install --index-url {CPU_INDEX} torch==2.13.0+cpu")


@needs_no_gpu
def test_without_a_gpu_a_build_for_cpus_that_pip_finds_by_itself_is_taken(tmp_path: Path) -> None:
    done = install(tmp_path, "2.13.0", "--dry-run", offered=f"2.13.0+cpu, {PYPI}|")
    assert done.stdout.endswith(" install torch==2.13.0+cpu\n")


@needs_no_gpu
def test_where_the_index_does_not_answer_pypi_is_taken_and_its_size_said(tmp_path: Path) -> None:
    done = install(tmp_path, "2.11.0", "--dry-run", offered=f"{PYPI}|")
    words, command = done.stdout.splitlines()
    assert "2.11.0+cpu" in words and "3 GB" in words
    assert command.endswith(" install torch==2.11.0")


def test_with_a_gpu_the_ordinary_wheel_is_taken(tmp_path: Path) -> None:
    done = install(tmp_path, "2.13.0", "--dry-run", offered="2.13.0+cpu|2.13.0+cpu", gpu="GPU 0: Some GPU (UUID: 1)")
    words, command = done.stdout.splitlines()
    assert "with CUDA, because there is a GPU: about 3 GB" in words
    assert command.endswith(" install torch==2.13.0")


@pytest.mark.parametrize("version", ["2.13.0+cu130", "2.13.0+cpu"])
@pytest.mark.parametrize("gpu", [None, "GPU 0: Some GPU (UUID: 1)"])
def test_a_build_that_was_asked_for_is_not_replaced(tmp_path: Path, version: str, gpu: str | None) -> None:
    done = install(tmp_path, version, "--dry-run", offered="2.13.0+cu130, 2.13.0+cpu|2.13.0+cpu", gpu=gpu)
    assert done.stdout.endswith(f" install torch=={version}\n")


@needs_no_gpu
def test_pip_is_run_and_its_failure_is_the_result(tmp_path: Path) -> None:
    done = install(tmp_path, "2.13.0", offered="2.13.0+cpu|")
    assert done.stdout.splitlines()[-1].endswith("--no-input install torch==2.13.0+cpu")
    assert done.stdout.splitlines()[-1].startswith("pip was run:")
    assert done.returncode == 7


@pytest.mark.parametrize("version", ["2.13.0", "2.11.0"])
def test_make_hands_the_version_to_both_environments(version: str) -> None:
    chosen = [] if version == "2.13.0" else [f"TORCH_VERSION={version}"]
    done = subprocess.run(
        ["make", "--dry-run", "-W", "pyproject.toml", "example", "test-oldest-triton", *chosen],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    for folder in (".venv", ".venv-oldest-triton"):
        assert f"{folder}/bin/python .ci/install_torch.py {version}\n" in done.stdout
    assert "--quiet" not in done.stdout
    assert done.stdout.count("to fetch") >= 3  # each step says how much

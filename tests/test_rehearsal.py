"""The first run on a GPU, start to end on a CPU: every stage, on a machine that has Python, PyTorch, Triton and pytest.

No git, no make, no network, none of our extras: what the image of a lent GPU machine lacks is missing here too. Kernels
are interpreted and the trunks tiny, so this takes minutes and measures nothing.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.missing import optional
from tests.test_first_gpu_run import ROOT, Machine

pytest.importorskip("triton")

STAYS = {"out", "dist", "build"}
"""Of the tree; and all that begins with a dot."""
THERE = {"pytest", "hypothesis", "triton"}
"""Of the packages that our extras ask for: what the suite and the kernels cannot do without."""
GUARD = """
import os, socket
from importlib.machinery import PathFinder

GONE, NOTES = set(os.environ["REHEARSAL_GONE"].split()), os.environ["REHEARSAL_NOTES"]
find = PathFinder.find_spec


def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in GONE else find(name, path, target)


def refused(what, *rest, **options):
    with open(NOTES, "a") as notes:
        print(what, file=notes)
    raise OSError("there is no network in a rehearsal")


def connect(self, address, real=socket.socket.connect):
    return real(self, address) if self.family == socket.AF_UNIX else refused(address)


PathFinder.find_spec = classmethod(find_spec)
socket.socket.connect = connect
socket.getaddrinfo = refused
"""
SANITIZER = """#!/bin/bash
shift 4
exec "$@"
"""
COUNTERS = """#!/bin/bash
while [ $# -gt 0 ]; do
  case $1 in --log-file) echo '"ID","Kernel Name"' > "$2" ;; */python*) exec "$@" ;; esac
  shift
done
"""


class GpuMachine(Machine):
    """The script with its real programs, in a copy of the tree."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        shutil.rmtree(self.tree)
        self.tree.mkdir()
        for path in ROOT.iterdir():
            if path.name.startswith(".") or path.name in STAYS:
                continue
            if path.is_dir():
                shutil.copytree(path, self.tree / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, self.tree)
        guard, programs = folder / "guard", Path(self.environment["PATH"])
        guard.mkdir()
        (guard / "sitecustomize.py").write_text(GUARD, encoding="utf-8")
        self._program(programs / "python3", f'#!/bin/bash\nexec {sys.executable} "$@"\n')
        self._program(programs / "compute-sanitizer", SANITIZER)
        self._program(programs / "ncu", COUNTERS)
        self.asked = folder / "asked"
        self.environment |= {
            "PYTHONPATH": str(guard), "REHEARSAL_GONE": " ".join(optional() - THERE),
            "REHEARSAL_NOTES": str(self.asked), "OMP_NUM_THREADS": "1", "HOME": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip

    def stage(self, name: str, *arguments: str) -> str:
        """Rehearse it; what it said."""
        code, output = self.run(
            name, "--commit", "abc1234", "--device", "cpu", "--tiny", "--minutes", "20", "--", *arguments, seconds=1500
        )
        assert code == 0, output
        assert f"stage {name} is through" in output
        assert not self.asked.exists(), self.asked.read_text(encoding="utf-8")
        assert {path.name for path in self.out.iterdir()} == {f"{name}.log", f"{name}.tar.gz"}
        return output

    def result(self, stage: str, name: str) -> Any:
        """A JSON file out of what the stage packed; the folder is emptied, as it is before each command there."""
        with tarfile.open(self.out / f"{stage}.tar.gz") as archive:
            (member,) = (found for found in archive.getnames() if found.endswith(f"/{name}"))
            file = archive.extractfile(member)
            assert file is not None
            content = json.loads(file.read())
        shutil.rmtree(self.out)
        return content


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> GpuMachine:
    return GpuMachine(tmp_path_factory.mktemp("gpu"))


def wheel(folder: Path) -> None:
    """A package that travels: one module."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "carried-1-py3-none-any.whl", "w") as archive:
        archive.writestr("carried.py", "")
        archive.writestr("carried-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1\n")
        archive.writestr(
            "carried-1.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("carried-1.dist-info/RECORD", "carried.py,,\n")


@pytest.mark.slow
def test_check(machine: GpuMachine) -> None:
    tests = ("tests/test_shipped_tiles.py", "-m", "not slow", "-k", "combine")
    machine.stage("check", *tests)
    found = machine.result("check", "check.json")
    assert found["environment"]["commit"] == "abc1234" and "torch" in found["environment"]["packages"]
    assert found["ceilings/tiny"]["mm_flops_per_s"] > 0
    for how in ("compiled", "on disk"):
        step = found[f"first_step/tiny/kernels {how}"]
        assert step["first_training_step_s"] > 0 and step["backend"] == "triton"
    assert {found[f"sanitizer/{tool}"]["outcome"] for tool in ("alone", "memcheck", "racecheck")} == {"no error"}


@pytest.mark.slow
def test_test(machine: GpuMachine) -> None:
    """A test of a file that needs a package is skipped with its name, and the others run."""
    machine.stage("test", "tests/test_gradient_balancing.py", "tests/test_kernel_helpers.py")
    found = machine.result("test", "tests.json")
    assert found["passed"] > 0 and found["failed"] == [] and found["deaths"] == [] and found["not_run"] == []
    assert "torchjd is not installed" in found["skipped"]


@pytest.mark.slow
def test_the_whole_suite_is_collected(machine: GpuMachine) -> None:
    """A file that cannot be imported there would end every process of the stage."""
    command = [
        f"{machine.environment['PATH']}/python3", "-m", "pytest", "-p", "no:cacheprovider", "-q", "--collect-only",
        "--only-device", "--skip-missing",
    ]  # fmt: skip
    path = f"{machine.tree}:{machine.tree / 'kernels'}:{machine.tree / 'encoder'}:{machine.environment['PYTHONPATH']}"
    environment = machine.environment | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=machine.tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "torchjd is not installed" in done.stdout


@pytest.mark.slow
def test_tune(machine: GpuMachine) -> None:
    machine.stage("tune")
    found = machine.result("tune", "tiles.json")
    assert [trunk["dtype"] for trunk in found["trunks"]] == ["bfloat16"] * 3 + ["float32"] * 3
    assert {row.partition("/")[2] for row in found["tiles"]} >= {"half", "tf32"}
    assert found["kernels_library_us"] and "weight_grad_parts_us" in found


@pytest.mark.slow
def test_bench(machine: GpuMachine) -> None:
    wheel(machine.tree / ".whl")
    only = ("--rounds", "1", "--dtypes", "bfloat16", "--modes")
    machine.stage("bench", *only, "train,inference", "--only", "loop,rechub")
    found = machine.result("bench", "gpu.json")
    assert [case["mode"] for case in found["results"]] == ["train", "inference"]
    for case in found["results"]:
        assert set(case["contestants"]) == {"fast", "fast/graph", "loop", "loop/graph"}
        assert case["contestants"]["fast"]["backend"] == "triton"
        assert case["failed"] == {"rechub": "torch_rechub is not installed"}
    assert (machine.tree / "out" / "first_gpu_run" / "site" / "carried.py").is_file()
    machine.stage("bench", *only, "inference", "--only", "fast,bmm")  # goes on
    cases = machine.result("bench", "gpu.json")["results"]
    assert ["bmm" in case["contestants"] for case in cases] == [False, True]
    assert all("loop" in case["contestants"] for case in cases)


@pytest.mark.slow
def test_profile(machine: GpuMachine) -> None:
    machine.stage("profile")
    found = machine.result("profile", "profile.json")
    assert [row["mode"] for row in found["results"]] == ["train", "inference"]
    assert all(row["kernels"] for row in found["results"])
    assert found["counters"] == [{"size": "tiny", "outcome": "wrote ncu-tiny.csv"}]


def test_the_machine_of_the_rehearsal_has_no_extra_and_no_network(tmp_path: Path) -> None:
    """The guard itself: an import, a search for a module, and a connection."""
    machine = GpuMachine(tmp_path)
    looked = (
        "import importlib.util, socket\n"
        "print(importlib.util.find_spec('torchjd'), importlib.util.find_spec('pytest') is not None)\n"
        "try: import polars\n"
        "except ModuleNotFoundError as error: print(error.name)\n"
        "try: socket.create_connection(('127.0.0.1', 9))\n"
        "except OSError as error: print(error)\n"
    )
    command = [str(Path(machine.environment["PATH"]) / "python3"), "-c", looked]
    done = subprocess.run(command, env=machine.environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["None True", "polars", "there is no network in a rehearsal"]
    assert machine.asked.read_text(encoding="utf-8").split() == ["127.0.0.1"]
    assert not any(shutil.which(name, path=machine.environment["PATH"]) for name in ("git", "make", "pip", "curl"))

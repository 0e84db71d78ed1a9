"""The suite in several processes: every test once, whatever happens to a process; and tests without their package."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import claims, missing, processes

ROOT = Path(__file__).resolve().parents[1]

SUITE = """
import os
import pathlib
import signal
import pytest

NOTES = pathlib.Path(__file__).with_name("notes")


@pytest.mark.parametrize("number", range(30))
def test_passes(number):
    with NOTES.open("a") as file:
        file.write(f"{number}\\n")


def test_fails():
    assert 1 + 1 == 3


@pytest.fixture
def broken():
    yield
    raise OSError("no space left")


def test_fails_at_its_end(broken):
    pass


@pytest.mark.skip(reason="skipped so that the report has a skip to count")
def test_skipped():
    pass


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_dies(how):
    if how == "exit":
        os._exit(5)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("number", range(30, 40))
def test_passes_too(number):
    test_passes(number)
"""


def run(folder: Path, *options: str, arguments: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
    """Exit code and result of a run."""
    code = processes.main(["--out", str(folder / "out"), *options, "--", *arguments])
    return code, json.loads((folder / "out" / "tests.json").read_text(encoding="utf-8"))


def test_every_test_runs_once_though_processes_die(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = tmp_path / "test_suite.py"
    suite.write_text(SUITE, encoding="utf-8")
    code, found = run(tmp_path, "--processes", "2", arguments=(str(suite),))
    assert code == 1
    assert sorted(map(int, (tmp_path / "notes").read_text(encoding="utf-8").split())) == list(range(40))
    assert found["passed"] == 40
    assert found["skipped"] == {"skipped so that the report has a skip to count": 1}
    assert found["not_run"] == found["stopped"] == []
    failed = {entry["id"].partition("::")[2]: entry["text"] for entry in found["failed"]}
    assert set(failed) == {"test_fails", "test_fails_at_its_end", "test_dies[exit]", "test_dies[kill]"}
    assert "assert (1 + 1) == 3" in failed["test_fails"]
    assert "no space left" in failed["test_fails_at_its_end"]
    assert failed["test_dies[exit]"] == "the process died: exit code 5"
    assert failed["test_dies[kill]"] == "the process died: signal SIGKILL"
    assert len(found["deaths"]) == 2
    printed = capsys.readouterr().out
    assert "assert (1 + 1) == 3" in printed
    assert "40 passed, 4 failed, 1 skipped, 0 to run" in printed


def test_a_run_whose_time_is_over_says_what_it_has_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = tmp_path / "test_suite.py"
    suite.write_text(
        "import time\ndef test_quick():\n    pass\ndef test_long():\n    time.sleep(60)\ndef test_last():\n    pass\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(processes, "GRACE_S", 0.5)
    code, found = run(tmp_path, "--processes", "1", "--minutes", "0.04", arguments=(str(suite),))
    assert code == 3
    assert [name.partition("::")[2] for name in found["stopped"]] == ["test_long"]
    assert [name.partition("::")[2] for name in found["not_run"]] == ["test_long", "test_last"]
    assert found["passed"] == 1


def test_arguments_that_pytest_refuses_are_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run(tmp_path, "--processes", "1", arguments=("--no-such-option",))
    assert code == 1
    assert found["deaths"] == ["process 0: exit code 4"]
    assert "unrecognized arguments: --no-such-option" in capsys.readouterr().out


def test_a_run_that_is_stopped_writes_what_it_knows(tmp_path: Path) -> None:
    suite = tmp_path / "test_suite.py"
    suite.write_text(
        "import time\ndef test_quick():\n    pass\ndef test_long():\n    time.sleep(60)\n", encoding="utf-8"
    )
    command = [sys.executable, "tests/processes.py", "--out", str(tmp_path / "out"), "--processes", "1"]
    started = subprocess.Popen([*command, "--", str(suite)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    events = tmp_path / "out" / "claims" / "events-000.jsonl"
    for _ in range(600):
        if events.is_file() and "test_long" in events.read_text(encoding="utf-8").partition('"end"')[2]:
            break
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    printed, _ = started.communicate(timeout=20)
    assert started.returncode == 128 + signal.SIGTERM
    assert "1 passed, 0 failed, 0 skipped, 1 to run" in printed
    found = json.loads((tmp_path / "out" / "tests.json").read_text(encoding="utf-8"))
    assert found["passed"] == 1
    assert [name.partition("::")[2] for name in found["stopped"]] == ["test_long"]


def test_a_device_that_answers_no_more_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def illegal() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", illegal)
    assert not claims._answers()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert claims._answers()


WITHOUT = """
import pytest
{first}

def test_plain():
    pass


def test_imports():
    import polars


@pytest.fixture
def frame():
    import polars


def test_takes(frame):
    pass


def test_mistyped():
    import polarz
"""


@pytest.mark.parametrize("first", ["", "import polars", "import ple_fazt"])
def test_tests_without_their_package_are_skipped_on_request_alone(first: str, tmp_path: Path) -> None:
    """In a process that cannot import polars, whether it is there or not."""
    (tmp_path / "conftest.py").write_text(
        "import sys\nfrom tests.missing import SkipMissing\nimport tests.missing\n"
        "class Hidden:\n    def find_spec(self, name, *rest):\n"
        "        if name == 'polars':\n            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "find = tests.missing.find_spec\n"
        "tests.missing.find_spec = lambda name: None if name == 'polars' else find(name)\n"
        "def pytest_addoption(parser):\n    parser.addoption('--skip-missing', action='store_true')\n"
        "def pytest_configure(config):\n"
        "    if config.getoption('--skip-missing'):\n        config.pluginmanager.register(SkipMissing())\n",
        encoding="utf-8",
    )
    (tmp_path / "test_suite.py").write_text(WITHOUT.format(first=first), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", str(tmp_path)]

    def ends(*options: str) -> str:
        done = subprocess.run(
            [*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        return done.stdout

    end = ends("--skip-missing")
    if first == "import ple_fazt":
        assert "No module named 'ple_fazt'" in end, "it is none of the packages that a machine may lack"
        assert "1 error" in end
    elif first:
        assert "polars is not installed" in end
        assert "1 skipped" in end
        assert "1 error" in ends()
    else:
        assert "1 failed, 1 passed, 2 skipped" in end
        assert "polars is not installed" in end
        assert "2 failed, 1 passed, 1 error" in ends()


def test_the_packages_that_a_machine_may_lack_are_those_of_the_extras() -> None:
    assert {"torchjd", "polars", "torch_rechub", "deepctr_torch", "sklearn", "torchrec"} <= missing.optional()
    assert not {"torch", "numpy", "ple_fast", "scikit_learn"} & missing.optional()

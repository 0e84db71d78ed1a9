"""What a first run on a GPU checks and profiles, on a CPU: each finding is written when it is there, failures too."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import device_checks, device_profile, rehearsal

pytest.importorskip("triton")
CPU = torch.device("cpu")


def findings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "check.json").read_text(encoding="utf-8"))
    return found


def test_ceilings_are_found_and_added_to_what_is_known(tmp_path: Path) -> None:
    device_checks.Findings(tmp_path).add("before", 1)
    device_checks.main(["ceilings", "--tiny", "--device", "cpu", "--out", str(tmp_path)])
    found = findings(tmp_path)
    assert found["before"] == 1 and found["environment"]["gpu"] is None
    assert all(value > 0 for value in found["ceilings/tiny"].values())
    with pytest.raises(SystemExit):
        device_checks.main(["ceilings", "--device", "cpu"])


def test_first_steps_are_timed_from_the_start_of_the_process() -> None:
    found = device_checks.first_step("tiny", CPU, time.time() - 7)
    assert 7 <= found.pop("import_s") < 8
    assert (found.pop("size"), found.pop("kernels"), found.pop("backend")) == ("tiny", 0, "torch")
    assert len(found) == 5 and all(seconds > 0 for seconds in found.values())


class Programs:
    """In place of ``subprocess.run``: exit codes in turn, None for one that takes too long."""

    def __init__(self, *codes: int | None) -> None:
        self.codes = list(codes)
        self.commands: list[list[str]] = []
        self.environments: list[dict[str, str]] = []

    def run(self, command: list[str], *, env: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        self.environments.append(env)
        code = self.codes.pop(0)
        if code is None:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return subprocess.CompletedProcess(command, code, '{"size": "tiny"}\n', "said\n" * 100)


@pytest.mark.parametrize(
    ("codes", "is_right", "outcomes"),
    [
        ((0, 0, 0), True, ["no error"] * 3),
        ((0, 86, 0), False, ["no error", "errors", "no error"]),
        ((0, None, 86), False, ["no error", "not through after 9 s", "errors"]),
        ((0, 255, None), True, ["no error", "does not run: exit code 255", "not through after 9 s"]),
        ((1,), False, ["does not run: exit code 1"]),
        ((None,), False, ["not through after 9 s"]),
    ],
)
def test_steps_run_alone_and_then_under_every_tool_of_the_sanitizer(
    codes: tuple[int | None, ...], is_right: bool, outcomes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = Programs(*codes)
    monkeypatch.setattr(subprocess, "run", programs.run)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    assert device_checks.check_sanitizer(device_checks.Findings(tmp_path), CPU, 9.0) is is_right
    found = list(findings(tmp_path).values())
    assert [finding["outcome"] for finding in found] == outcomes
    assert all(len(finding.get("output", [])) <= 80 for finding in found)
    assert programs.commands[0][:1] == [sys.executable]
    assert all(command[:3] == ["/bin/compute-sanitizer", "--tool", tool] for command, tool in zip(
        programs.commands[1:], device_checks.TOOLS, strict=False
    ))  # fmt: skip
    assert all(environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1" for environment in programs.environments)


def test_a_machine_without_the_sanitizer_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", Programs(0).run)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert device_checks.check_sanitizer(device_checks.Findings(tmp_path), CPU, 9.0)
    assert findings(tmp_path)["sanitizer"] == "compute-sanitizer is not on the PATH"


def test_a_first_step_runs_in_fresh_processes_with_a_cache_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(shared))
    programs = Programs(0, 0, 1)
    monkeypatch.setattr(subprocess, "run", programs.run)
    assert not device_checks.check_first_step(device_checks.Findings(tmp_path), CPU, ("small", "large"))
    found = findings(tmp_path)
    assert [key.removeprefix("first_step/") for key in found] == [
        "small/kernels compiled", "small/kernels on disk", "large/kernels compiled"
    ]  # fmt: skip
    assert found["first_step/small/kernels on disk"] == {"size": "tiny"}
    assert found["first_step/large/kernels compiled"].startswith("said")
    caches = [environment["TRITON_CACHE_DIR"] for environment in programs.environments]
    assert caches[0] == caches[1] != caches[2] and str(shared) not in caches
    assert shared.is_dir()


def test_kernels_of_a_step_are_listed_the_longest_first() -> None:
    a = torch.randn(64, 64)

    def step() -> torch.Tensor:
        return (a @ a).relu() + a @ a

    rows = device_profile.kernels_of(step, CPU, 2)
    calls = {row["name"]: row["calls"] for row in rows}
    assert calls["aten::mm"] == 2 and calls["aten::relu"] == 1
    times = [row["us"] for row in rows]
    assert times == sorted(times, reverse=True) and times[-1] > 0


def test_a_case_that_fails_is_told_and_the_others_are_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., dict[str, Any]] = device_profile.case

    def case(size: str, mode: Any, device: torch.device) -> dict[str, Any]:
        if mode == "train":
            raise RuntimeError("CUPTI says no")
        return real(size, mode, device)

    monkeypatch.setattr(device_profile, "case", case)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(SystemExit, match=r"^tiny, train: CUPTI says no$"):
        device_profile.main(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))
    (row,) = content["results"]
    assert row["mode"] == "inference" and row["eager_us"] > 0 and row["graph_us"] > 0 and row["kernels"]
    assert content["counters"] == [{"size": "tiny", "outcome": "not run: ncu is not on the PATH"}]


def test_no_case_is_profiled_when_the_time_is_over(tmp_path: Path) -> None:
    device_profile.main(["--tiny", "--device", "cpu", "--out", str(tmp_path), "--minutes", "0"])
    assert not (tmp_path / "profile.json").exists()


def test_counters_are_read_where_the_program_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = Programs(0, 1, None)
    monkeypatch.setattr(subprocess, "run", programs.run)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    path = tmp_path / "ncu.csv"
    assert device_profile.counters("tiny", CPU, path, 9.0) == "wrote ncu.csv"
    assert device_profile.counters("tiny", CPU, path, 9.0).startswith("exit code 1: ")
    assert device_profile.counters("tiny", CPU, path, 9.0) == "not through after 9 s"
    assert str(path) in programs.commands[0] and "--counted-step" in programs.commands[0]


def test_a_sample_of_the_rehearsal_is_a_call() -> None:
    called: list[int] = []
    sample = rehearsal.host_sampler(lambda: called.append(1))
    assert sample() >= 0 and sample() >= 0
    assert len(called) == 2

"""The script of a first run on a GPU, with programs that are stand-ins: what it starts, hands on and packs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "first_gpu_run.sh"
PROGRAMS = ("bash", "dirname", "env", "grep", "gzip", "mkdir", "mv", "nproc", "rm", "tar", "tee", "timeout")
"""All that the script may need of a machine, besides Python: no make, no git, no pip."""
STAND_IN = """#!/bin/bash
echo "$*" >> "$NOTES"
echo "tiles ${PLE_FAST_TILES-}, path $PYTHONPATH" >> "$NOTES.environment"
[ "$*" != --version ] || { echo stand-in; exit; }
while [ $# -gt 0 ]; do
  case $1 in --out|--results) folder=$2 ;; esac
  shift
done
[[ $folder != *.json ]] || folder=${folder%/*}
mkdir -p "$folder"; echo "found" > "$folder/found"
[ -z "${SLEEPS-}" ] || sleep "$SLEEPS"
[ -z "${SAYS-}" ] || echo "$SAYS"
exit "${ENDS-0}"
"""
STAGES = {
    "check": ["device_checks.py ceilings", "device_checks.py first_step", "processes.py", "device_checks.py sanitizer"],
    "test": ["processes.py"],
    "tune": ["-m ple_fast.tune", "--dtype float32 --tf32"],
    "bench": ["run_gpu.py"],
    "profile": ["device_profile.py"],
}


class Machine:
    """A tree without git, in which every program that the script starts is a stand-in."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.out, self.notes = folder / "tree", folder / "out", folder / "notes"
        programs = folder / "bin"
        for made in (self.tree / "benchmarks", programs):
            made.mkdir(parents=True)
        shutil.copy(SCRIPT, self.tree / "benchmarks")
        for name in PROGRAMS:
            (programs / name).symlink_to(str(shutil.which(name)))
        self._program(programs / "python3", STAND_IN)
        self._program(programs / "sleep", f"#!/bin/bash\nexec {shutil.which('sleep')} ${{1/#20/0.2}}\n")
        self.environment = {"PATH": str(programs), "OUT": str(self.out), "NOTES": str(self.notes)}

    @staticmethod
    def _program(path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(shutil.which("bash")), "benchmarks/first_gpu_run.sh", *arguments],
            cwd=self.tree, env=self.environment | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, *arguments: str, seconds: float = 60.0, **environment: str) -> tuple[int, str]:
        """Exit code and output, which shall be there within so many seconds."""
        with self.start(*arguments, **environment) as process:
            output, _ = process.communicate(timeout=seconds)
        return process.returncode, output

    def commands(self) -> list[str]:
        """What the stand-in of Python was asked for."""
        return [line for line in self.notes.read_text(encoding="utf-8").splitlines() if line != "--version"]

    def packed(self, stage: str) -> set[str]:
        with tarfile.open(self.out / f"{stage}.tar.gz") as archive:
            return {name for name in archive.getnames() if not archive.getmember(name).isdir()}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_its_programs_and_packs_two_files(machine: Machine, stage: str) -> None:
    code, output = machine.run(stage, "--commit", "abc", "--minutes", "9")
    assert code == 0, output
    commands = machine.commands()
    assert len(commands) == len(STAGES[stage])
    assert all(part in command for part, command in zip(STAGES[stage], commands, strict=True)), commands
    assert {path.name for path in machine.out.iterdir()} == {f"{stage}.log", f"{stage}.tar.gz"}
    assert any(name.endswith("/found") for name in machine.packed(stage))
    assert (machine.out / f"{stage}.log").read_text(encoding="utf-8") == output
    assert f"stage {stage} of abc, on cuda, tiles as shipped" in output


@pytest.mark.parametrize("how", ["to it alone", "to all of its processes"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stage_that_is_stopped_still_packs(machine: Machine, number: signal.Signals, how: str) -> None:
    process = machine.start("profile", "--commit", "abc", SLEEPS="60")
    wait_for((machine.tree / "out/first_gpu_run/profile/found").is_file)
    if how == "to it alone":
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert {path.name for path in machine.out.iterdir()} == {"profile.log", "profile.tar.gz"}
    assert machine.packed("profile") == {"profile/found"}
    assert "stopped by a signal" in (machine.out / "profile.log").read_text(encoding="utf-8")


def test_a_stage_that_is_killed_has_packed_what_it_had(machine: Machine) -> None:
    process = machine.start("bench", "--commit", "abc", SLEEPS="60")
    wait_for((machine.out / "bench.tar.gz").is_file)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert machine.packed("bench") == {"bench/found"}
    assert "== bench" in (machine.out / "bench.log").read_text(encoding="utf-8")
    assert len(list(machine.out.iterdir())) <= 3
    time.sleep(0.5)  # what still packs ends without its parent


def test_a_log_lives_on_where_nobody_reads_the_output(machine: Machine) -> None:
    process = machine.start("check", "--commit", "abc", SLEEPS="0.2")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=30) == 0
    assert "stage check is through" in (machine.out / "check.log").read_text(encoding="utf-8")


def test_a_stage_ends_and_packs_when_its_time_is_over(machine: Machine) -> None:
    begin = time.monotonic()
    code, output = machine.run("check", "--commit", "abc", "--minutes", "0.2", SLEEPS="60")
    assert code == 3, output
    assert time.monotonic() - begin < 12
    assert len(machine.commands()) == 1, "nothing is started when no time is left"
    assert [line for line in output.splitlines() if line.startswith("NOT THROUGH")] == [
        f"NOT THROUGH: {name}" for name in ("ceilings", "first-step", "shipped-tiles", "sanitizer")
    ]
    assert machine.packed("check")


def test_what_fails_is_named_and_the_rest_runs(machine: Machine) -> None:
    code, output = machine.run("check", "--commit", "abc", ENDS="1")
    assert code == 1
    assert len(machine.commands()) == len(STAGES["check"])
    assert "FAILED: ceilings\nFAILED: first-step\nFAILED: shipped-tiles\nFAILED: sanitizer\n" in output
    code, output = machine.run("test", "--commit", "abc", ENDS="3")
    assert code == 3
    assert "NOT THROUGH: tests" in output
    code, output = machine.run("bench", "--commit", "abc", SAYS="time is over: loop at large is not measured")
    assert code == 3
    assert "NOT THROUGH: what the log names after 'time is over'" in output


def test_stages_hand_on_tiles_packages_and_results(machine: Machine) -> None:
    state = machine.tree / "out" / "first_gpu_run"
    (machine.tree / ".whl").mkdir()
    (machine.tree / ".whl" / "peer-1-py3-none-any.whl").touch()
    (state / "site").mkdir(parents=True)
    for stage in ("tune", "bench", "test"):
        (state / stage).mkdir()
        (state / stage / "before").touch()
    assert machine.run("tune", "--commit", "abc")[0] == 0
    (state / "tune" / "tiles.json").write_text("{}", encoding="utf-8")
    assert machine.run("bench", "--commit", "abc", "--", "--sizes", "small")[0] == 0
    assert machine.run("test", "--commit", "abc")[0] == 0
    install, tune, _, _, bench, _, test = machine.commands()
    assert install.startswith("-m pip install") and "--no-index" in install and install.endswith("any.whl")
    assert "--trunk small --trunk medium --trunk large" in tune and tune.count("tiles.json") == 1
    assert "--continue --skip-missing" in bench and bench.endswith("--sizes small")
    assert "--only-device" in test
    with_tiles = machine.notes.with_name("notes.environment").read_text(encoding="utf-8").splitlines()
    found = [line for line in with_tiles if f"tiles {state / 'tune' / 'tiles.json'}," in line]
    assert len(found) == 2, "Python for the bench, and its version: tests take what ships"
    assert all(line.endswith(f":{state / 'site'}") for line in found if "kernels" in line)
    assert machine.packed("tune") == {"tune/before", "tune/found", "tune/tiles.json"} - {"tune/tiles.json"}
    assert machine.packed("bench") == {"bench/before", "bench/found"}
    assert "test/before" not in machine.packed("test"), "of another commit"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "expected a stage: check, test, tune, bench or profile; got ''"),
        (("all", "--commit", "abc"), "got 'all'"),
        (("check",), "--commit: expected the commit of this tree"),
        (("check", "--commit"), "--commit: expected a value"),
        (("check", "--commit", "abc", "--minutes", "soon"), "--minutes: expected a number, got 'soon'"),
        (("check", "--commit", "abc", "-k", "x"), "expected an option, got '-k'"),
        (("check", "--commit", "abc", "--device", "cpu"), "--device cpu is for --tiny"),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(machine: Machine, arguments: tuple[str, ...], expected: str) -> None:
    code, output = machine.run(*arguments)
    assert code == 2
    assert expected in output and len(output.splitlines()) == 1
    assert not machine.out.exists() and not machine.notes.exists()


def test_the_plan_of_the_half_hour_fits_and_names_every_stage() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    _, _, plan = page.partition("## The first half hour on a lent GPU")
    calls = re.findall(
        r"^\| \d \| `bash benchmarks/first_gpu_run.sh (\w+) --commit COMMIT --minutes ([\d.]+)` \| ([\d.]+) \|",
        plan,
        re.M,
    )
    assert [stage for stage, _, _ in calls] == list(STAGES)
    assert all(minutes == shown and 0 < float(minutes) <= 9.5 for _, minutes, shown in calls)
    start = 2
    (total,) = re.findall(r"with two minutes for the start they are ([\d.]+)\.", plan)
    assert sum(float(minutes) for _, minutes, _ in calls) + start == float(total) < 30


def test_the_wheels_that_travel_are_those_of_the_extra() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"pip download [^`]*", page)
    peers = re.findall(
        r'"([\w-]+==[\d.]+)"',
        re.findall(r"^peers = .*$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[0],
    )
    assert len(peers) == 2 and set(peers) < set(command.split())
    assert "-d .whl" in command and "/.whl/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()

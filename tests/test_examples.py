"""The examples run from the command line, print their tables and write their pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples import census_income

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """An example in a process of its own, with this tree in front of whatever is installed."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments],
        env=os.environ | {"PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )


def assert_picture(file: Path) -> None:
    assert file.read_bytes().startswith(PNG)


def test_census_income_in_small(tmp_path: Path) -> None:
    arguments = "--rows 3000 --seeds 2 --epochs 2 --models single_task,mmoe,ple".split()
    done = run("census_income", *arguments, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for words in ("2,000 train, 500 validation, 500 test", "single task", "MMoE", "PLE", "MTL gain", " ± ", "fused"):
        assert words in done.stdout
    assert "hard sharing" not in done.stdout
    assert "Note:" not in done.stdout  # the floors are those of the full data
    assert_picture(tmp_path / "census_auc.png")
    assert_picture(tmp_path / "census_gates.png")


@pytest.mark.slow
def test_census_income_learns(tmp_path: Path) -> None:
    done = run("census_income", "--rows", "40000", "--seeds", "1", "--models", "ple", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("│ PLE")]
    income, never_married = (float(cell.split()[0]) for cell in row.split("│")[3:5])
    assert income > 0.89
    assert never_married > 0.99


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--models ple,transformer", "got transformer"),
        ("--rows 10", "--rows: expected 1000 or more, got 10"),
        ("--seeds 0", "--seeds: expected 1 or more, got 0"),
    ],
)
def test_census_income_refuses_in_sentences(arguments: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        census_income.main(arguments.split())
    assert says in capsys.readouterr().err


def test_seesaw_in_small(tmp_path: Path) -> None:
    picture = tmp_path / "seesaw.png"
    done = run("seesaw", "--quick", "--image", str(picture))
    assert done.returncode == 0, done.stderr
    for words in ("hard sharing", "MMoE", "CGC", "PLE", "parameters in the trunk"):
        assert words in done.stdout
    assert_picture(picture)

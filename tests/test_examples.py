"""The examples run from the command line, print their tables and write their pictures."""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path

import pytest

from benchmarks import report
from examples import census_income
from tests.programs import ROOT, run_python

PNG = b"\x89PNG\r\n\x1a\n"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python(str(ROOT / "examples" / f"{name}.py"), *arguments)


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
    written = json.loads((tmp_path / "census_income.json").read_text(encoding="utf-8"))
    assert [row["model"] for row in written["results"]] == ["single task", "MMoE", "PLE"]
    assert all(len(row["seconds"]) == len(row["auc"]["income"]) == 2 for row in written["results"])
    for row in written["results"]:
        for aucs in row["auc"].values():
            assert census_income.spread(aucs) in done.stdout
    assert f"{written['samples_per_second']['fused']:,} fused" in done.stdout


def test_the_page_quotes_the_committed_run() -> None:
    """Every figure of the example that docs/examples.md gives, out of the file of the run."""
    page = " ".join((ROOT / "docs" / "examples.md").read_text(encoding="utf-8").split())
    machine = report.readme_source(report.README.read_text(encoding="utf-8"))
    run = report.load(ROOT / "benchmarks" / "results" / machine)["census_income"]
    rows = run["results"]
    assert [row["model"] for row in rows] == [model.label for model in census_income.MODELS.values()]

    def short(number: str) -> str:
        return number.replace("0.", ".")

    means = [{task: statistics.fmean(aucs) for task, aucs in row["auc"].items()} for row in rows]
    for row, mean in zip(rows, means, strict=True):
        cells = [row["model"], f"{row['parameters']:,}"]
        for task, aucs in row["auc"].items():
            gain = "" if row is rows[0] else short(f"{mean[task] - means[0][task]:+.4f}")
            cells += [short(census_income.spread(aucs)), gain]
        assert f"| {' | '.join(cells)} |".replace("|  |", "| |") in page
    assert f"{run['minutes']} minutes in all" in page
    fused, plain = (run["samples_per_second"][name] for name in ("fused", "plain"))
    for words in (f"{fused:,} with the fused PLE", f"{plain:,} with", f"{fused / plain:.2f} x"):
        assert words in page
    both = [" / ".join(short(f"{value:.4f}") for value in mean.values()) for mean in means]
    assert f"| here, 3 seeds | {' | '.join([*both[:3], both[4]])} |" in page
    incomes = [mean["income"] for mean in means]
    own = rows[4]["auc"]["income"]
    spans = [short(f"{max(values) - min(values):.4f}") for values in (own, incomes)]
    assert f"span {spans[0]} of income AUC, the means of all models {spans[1]}" in page


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

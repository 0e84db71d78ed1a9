"""The examples run from the command line, print their tables and write their pictures."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rendering import quoted
from benchmarks.result_files import load
from benchmarks.result_files import read as read_result
from examples import architectures, census_data, census_income, census_pictures, seesaw
from tests.programs import ROOT, run_python

PNG = b"\x89PNG\r\n\x1a\n"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python(str(ROOT / "examples" / f"{name}.py"), *arguments)


def assert_picture(file: Path) -> None:
    assert file.read_bytes().startswith(PNG)


def test_census_income_in_small(tmp_path: Path) -> None:
    arguments = "--rows 3000 --seeds 2 --epochs 2 --models single_task,mmoe,ple,home".split()
    done = run("census_income", *arguments, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for words in ("2,000 train, 500 validation, 500 test", "single task", "MMoE", "PLE", "MTL gain", " ± ", "fused"):
        assert words in done.stdout
    assert done.stdout.startswith("  0:00  loading\n")  # in a log, before anything else
    first, last = (done.stdout.index(f"AUC on the test data, {of}") for of in ("the first of 2 seeds", "mean ±"))
    assert first < last
    assert done.stdout.count("500 test: 1% of the data. ") == 2
    assert "hard sharing" not in done.stdout
    assert "Note:" not in done.stdout  # the floors are those of the full data
    assert_picture(tmp_path / "census_auc.png")
    assert_picture(tmp_path / "census_gates.png")
    written = json.loads((tmp_path / "census_income.json").read_text(encoding="utf-8"))
    assert [row["model"] for row in written["results"]] == ["single task", "MMoE", "PLE", "HoME"]
    assert all(len(row["seconds"]) == len(row["auc"]["income"]) == 2 for row in written["results"])
    for row in written["results"]:
        for aucs in row["auc"].values():
            assert census_income.spread(aucs) in done.stdout
    assert f"{written['samples_per_second']['fused']:,} fused" in done.stdout
    assert written["rows"] == {"train": 2000, "validation": 500, "test": 500}
    levels = {"MMoE", *(f"{name} level {number}" for name in ("PLE", "HoME") for number in (1, 2))}
    assert {gate["level"] for gate in written["gates"]} == levels
    for gate in written["gates"]:
        assert gate["rows"] == 500
        if len(gate["mean"]) > 1:  # a self gate of one expert is a sigmoid
            assert sum(gate["mean"]) == pytest.approx(1, abs=1e-4)


def test_make_example_takes_the_rows_that_the_documents_say() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "example", "example-full", "ARGS=--seeds 5"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    part, full = (
        line.split("census_income.py ")[1] for line in done.stdout.splitlines() if "census_income.py " in line
    )
    given, rows, others = part.split(" ", 2)
    assert (given, others, full) == ("--rows", "--seeds 5", "--seeds 5")  # what is asked for comes last, and counts
    assert census_income.arguments(f"--rows {rows} --rows 2000".split()).rows == 2000
    for name in ("README.md", "docs/examples.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert f"{int(rows):,}" in text and f"{census_data.ALL_ROWS:,} rows" in text
    assert census_income.arguments([]).rows is None


def committed_file() -> Path:
    """The one that the page names: not every machine has measured everything."""
    named = re.search(r"benchmarks/results/[\w.-]+/census_income\.json", (ROOT / "docs/examples.md").read_text("utf-8"))
    assert named is not None
    return ROOT / named[0]


def committed() -> dict[str, Any]:
    """The file of the run that the documents quote."""
    return dict(load(committed_file().parent)["census_income"])


def test_the_pictures_say_of_how_many_rows_and_seeds_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    for name in ("plot_scores", "plot_gate_use"):
        monkeypatch.setattr(census_pictures, name, lambda shown, title, path: titles.append(title))
    census_pictures.draw(committed(), tmp_path)
    auc, gates = titles
    assert auc == "Census-Income: AUC on 49,881 test rows, 3 seeds, 199,523 training rows"
    assert gates == "Census-Income: expert utilisation per gate, test data, first seed, 199,523 training rows"


def test_the_pictures_are_drawn_again_from_the_committed_figures(tmp_path: Path) -> None:
    done = run("census_pictures", str(committed_file()), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for name in (census_pictures.AUC, census_pictures.GATES):
        assert_picture(tmp_path / name)


def test_the_page_quotes_the_committed_run() -> None:
    """Every figure of the example that docs/examples.md gives, out of the file of the run."""
    page = " ".join((ROOT / "docs" / "examples.md").read_text(encoding="utf-8").split())
    run = committed()
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


def test_what_the_texts_say_of_the_gates_is_in_the_committed_figures() -> None:
    run = committed()
    page, readme = (
        " ".join((ROOT / name).read_text(encoding="utf-8").split()) for name in ("docs/examples.md", "README.md")
    )
    most = {}
    for gate in run["gates"]:
        order = sorted(range(len(gate["mean"])), key=lambda e, gate=gate: -gate["mean"][e])  # type: ignore[misc]
        most[gate["level"], gate["gate"]] = [(gate["experts"][e], e + 1) for e in order]
    models = list(dict.fromkeys(level.partition(" level")[0] for level, _ in most))
    assert f"what the gates of {', '.join(models[:-1])} and {models[-1]} look at" in readme
    assert "CGC's and PLE's gates read an expert of their own task most" in page
    for (level, gate), experts in most.items():
        if level != "MMoE" and gate != "shared":
            assert experts[0][0] == gate, level
    income, married = (most["MMoE", task][0][1] for task in ("income", "never married"))
    assert f"its income gate reads expert {income} most, its never married gate expert {married}" in page
    assert "PLE's shared gate reads a shared expert and one of income's" in page
    assert {owner for owner, _ in most["PLE level 1", "shared"][:2]} == {"shared", "income"}


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


def test_architectures_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = seesaw.Settings((0.5,), seeds=2, train_rows=256, test_rows=64, epochs=1)
    monkeypatch.setattr(architectures, "QUICK", architectures.Settings(2, rows=1500, epochs=1, synthetic=few))
    architectures.main(["--quick", "--out", str(tmp_path)])
    content = read_result(tmp_path / "architectures.json", "architectures")
    names = [row["architecture"] for row in content["results"] if row["measure"] == "AUC"]
    assert names == [*architectures.ARCHITECTURES]
    for row in content["results"]:
        assert len(row["values"]) == len(row["gains"]) == 2
        sign = 1 if row["measure"] == "AUC" else -1
        single = next(
            own for own in content["results"] if own["data"] == row["data"] and own["architecture"] == "single task"
        )
        for gains, values, ones in zip(row["gains"], row["values"], single["values"], strict=True):
            assert gains == pytest.approx([sign * (own - one) for own, one in zip(values, ones, strict=True)])
    text = architectures.markdown(content, "some/file.json")
    assert text.count("| single task |") == 2 and "2 seeds" in text


def test_a_gain_is_borne_where_seeds_agree() -> None:
    assert architectures.borne([0.01, 0.011, 0.012]) and architectures.borne([-0.2, -0.21, -0.2])
    assert not architectures.borne([0.01, 0.05, 0.001])  # its spread is larger
    assert not architectures.borne([0.01, -0.0001, 0.01])


def test_the_page_on_architectures_quotes_its_file() -> None:
    text = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    block = quoted(text, architectures.BLOCK)
    named = re.search(r"benchmarks/results/[\w.-]+/architectures\.json", block)
    if named is None:
        assert not block  # nothing was measured
        return
    content = read_result(ROOT / named.group(), "architectures")
    assert block == architectures.markdown(content, named.group()), (
        f"render it again: python examples/architectures.py --write-page {named.group()}"
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_trains_the_trunk(precision: str, tmp_path: Path) -> None:
    arguments = "--rows 4000 --epochs 3 --batch-size 64 --precision".split()
    done = run("train_lightning", *arguments, precision, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = dict(line.split(": ") for line in done.stdout.splitlines() if "AUC" in line)
    assert float(found["test AUC, income"]) > 0.7 and float(found["test AUC, never married"]) > 0.9
    assert (tmp_path / "best.ckpt").is_file()
    header, *rows = (tmp_path / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert "validation AUC" in header and len(rows) >= 2

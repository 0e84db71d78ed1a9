"""The committed results are complete, and the documents quote them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import embeddings, host_time, report, serving, serving_report, whole_model
from benchmarks.analytic import work
from benchmarks.bare_best import BEST_FLOOR
from benchmarks.configs import (
    EMBEDDING_GROWTH,
    EMBEDDING_ROWS,
    GRID,
    HEAD_TO_HEAD,
    HOST_ROUNDS,
    ROUNDS,
    SCALING_BATCHES,
    SCALING_RANKS,
    SIZES,
    THREADS,
    WHOLE_MODEL,
    suite_config,
)
from benchmarks.contestants import CONTESTANTS, FLOORS, NORM_PAIRS, OURS
from benchmarks.contestants import HEAD_TO_HEAD as RIVALS
from benchmarks.environment import ROOT
from benchmarks.rendering import quoted
from benchmarks.result_files import load, read


def test_the_size_of_the_head_to_head_is_the_one_that_was_asked_for() -> None:
    cpu = SIZES["cpu"]
    assert (cpu.in_features, cpu.num_tasks, cpu.task_experts, cpu.shared_experts) == (512, 3, 2, 2)
    assert (cpu.units, cpu.num_levels, cpu.dtype) == ((256, 128), 2, "float32")
    assert set(HEAD_TO_HEAD) == {("train", 4096), ("train", 256), *(("inference", b) for b in (4096, 256, 1))}
    assert work(cpu, "train").product_flops == pytest.approx(45.4e9, rel=0.01)
    assert suite_config("cpu-256") == cpu.at(256)
    with pytest.raises(ValueError, match="expected one of"):
        suite_config("huge")


def test_the_grid_covers_what_it_promises() -> None:
    assert (min(c.batch for c in GRID), max(c.batch for c in GRID)) == (1, 65536)
    for batch in {c.batch for c in GRID}:
        points = [c for c in GRID if c.batch == batch]
        assert {min(c.num_tasks for c in points), max(c.num_tasks for c in points)} == {2, 8}
        assert {min(len(c.units) for c in points), max(len(c.units) for c in points)} == {1, 4}
    assert len({c.name for c in GRID}) == len(GRID)
    assert ROUNDS >= 15


def test_the_readme_quotes_the_committed_results() -> None:
    text = report.README.read_text(encoding="utf-8")
    machine = report.readme_source(text)
    files = load(ROOT / "benchmarks" / "results" / machine)
    assert quoted(text, "cpu") == report.readme_block(machine, files), (
        "render it again: .venv/bin/python benchmarks/report.py --write-readme"
    )


def page_block(kind: str) -> str:
    """What the page of a result file quotes of it."""
    return quoted(report.BLOCKS[kind].page.read_text(encoding="utf-8"), kind)


def quoted_results(kind: str) -> list[Any]:
    """Entries of the file that the page of a kind quotes whole; none, and an empty block, where there is no file."""
    machine = report.readme_source(report.README.read_text(encoding="utf-8"))
    found = load(report.RESULTS / machine).get(kind)
    assert page_block(kind) == ("" if found is None else report.block(kind, machine, found)), (
        "render it again: .venv/bin/python benchmarks/report.py --write-readme"
    )
    return [] if found is None else list(found["results"])


def test_the_page_on_performance_quotes_the_committed_norms() -> None:
    machine = report.readme_source(report.README.read_text(encoding="utf-8"))
    norms = load(ROOT / "benchmarks" / "results" / machine)["norms"]
    assert page_block("norms") == report.block("norms", machine, norms), (
        "render it again: .venv/bin/python benchmarks/report.py --write-readme"
    )
    cases = [(peer, ours, *case) for peer, ours in NORM_PAIRS for case in HEAD_TO_HEAD]
    assert [(e["peer"], e["ours"], e["mode"], e["batch"]) for e in norms["results"]] == cases
    assert all(entry["rounds"] >= 15 for entry in norms["results"])
    assert {entry["contestant"] for entry in norms["saved"]} == {name for pair in NORM_PAIRS for name in pair}


def machine_of(kind: str) -> str:
    """The folder that a page quotes: not every machine has measured everything. The README's where it names none."""
    named = re.search(r"benchmarks/results/([\w.-]+)/", page_block(kind))
    return named[1] if named else report.readme_source(report.README.read_text(encoding="utf-8"))


def test_the_page_on_scale_quotes_the_committed_scaling() -> None:
    """Nothing, as long as nothing was measured."""
    machine = machine_of("scaling")
    found = load(ROOT / "benchmarks" / "results" / machine).get("scaling")
    page = page_block("scaling")
    assert page == ("" if found is None else report.block("scaling", machine, found)), (
        "render it again: .venv/bin/python benchmarks/report.py --write-readme"
    )
    if found is not None:
        cases = [(batch, ranks) for batch in SCALING_BATCHES for ranks in SCALING_RANKS]
        assert [(entry["batch_per_rank"], entry["ranks"]) for entry in found["results"]] == cases
        assert all(entry["rounds"] >= ROUNDS for entry in found["results"])


def test_the_page_on_serving_quotes_the_committed_serving() -> None:
    """Nothing, as long as nothing was measured."""
    page = quoted(serving_report.PAGE.read_text(encoding="utf-8"), serving_report.BLOCK)
    files = sorted(report.RESULTS.glob("*/serving.json"))
    if not files:
        assert page == ""
        return
    (file,) = (each for each in files if f"Figures from benchmarks/results/{each.parent.name}/serving.json." in page)
    found = read(file, "serving")
    assert page == serving_report.serving_block(file.parent.name, found), "python benchmarks/serving.py --write-page"
    cases = [(rows, threads) for rows in serving.REQUEST_ROWS for threads in serving.THREADS]
    assert [(entry["rows"], entry["threads"]) for entry in found["results"]] == cases
    assert all(set(entry["contestants"]) == set(serving.CONTESTANTS) for entry in found["results"])


def test_committed_results_are_complete_and_not_quick() -> None:
    machine = report.readme_source(report.README.read_text(encoding="utf-8"))
    files = load(ROOT / "benchmarks" / "results" / machine)
    head = files["head_to_head"]
    assert [(entry["mode"], entry["batch"]) for entry in head["results"]] == list(HEAD_TO_HEAD)
    for entry in head["results"]:
        expected = {name for name in RIVALS if name in FLOORS or entry["mode"] in CONTESTANTS[name].modes}
        assert set(entry["contestants"]) | {BEST_FLOOR} == expected  # which older files lack
        assert entry["rounds"] >= 15
    assert [entry["point"] for entry in files["grid"]["results"]] == [c.name for c in GRID]
    assert {entry["contestant"] for entry in head["saved"]} >= {*OURS, "loop"}


def test_the_readme_quotes_every_committed_head_to_head_the_worst_first() -> None:
    text = report.README.read_text(encoding="utf-8")
    assert quoted(text, "profiles") == report.profiles_block(report.profiles()), (
        "README.md differs from its results; python benchmarks/report.py --write-readme renders them again"
    )


@pytest.mark.parametrize("folder", sorted(report.RESULTS.glob("cpu-*")), ids=lambda folder: folder.name)
def test_a_folder_is_named_after_what_its_files_were_measured_with(folder: Path) -> None:
    for content in load(folder).values():
        about = content["environment"]
        assert folder.name.startswith(about["machine"]) and about["cpu_capability"].lower() in about["machine"]
        if folder.name == about["machine"]:
            assert content["kind"] != "head_to_head" or about["threads"] == THREADS


def test_the_page_on_swapping_quotes_the_committed_whole_models() -> None:
    machine = machine_of("whole_model")
    found = load(ROOT / "benchmarks" / "results" / machine)["whole_model"]
    results = found["results"]
    page = page_block("whole_model")
    assert page == report.block("whole_model", machine, {"results": results, "environment": found["environment"]}), (
        "render it again: .venv/bin/python benchmarks/report.py --write-readme"
    )
    assert [(entry["library"], entry["mode"], entry["batch"]) for entry in results] == [
        (library, *case) for library in whole_model.LIBRARIES for case in WHOLE_MODEL
    ]
    for entry in results:
        assert set(entry["contestants"]) == set(whole_model.VARIANTS)
        assert entry["rounds"] >= ROUNDS


def test_the_page_on_benchmarks_quotes_the_committed_host_time() -> None:
    machine = machine_of("host_time")
    found = load(ROOT / "benchmarks" / "results" / machine)["host_time"]
    page = page_block("host_time")
    assert page == report.block("host_time", machine, found), (
        "render it again: .venv/bin/python benchmarks/report.py --write-readme"
    )
    assert [entry["mode"] for entry in found["results"]] == [*host_time.MODES]
    for entry in found["results"]:
        assert [*entry["contestants"]] == [*host_time.CASES]
        assert entry["rounds"] >= HOST_ROUNDS
        assert entry["contestants"][host_time.OURS]["ratio_to_loop"] <= host_time.TARGETS[entry["mode"]]


def test_the_page_on_models_quotes_the_committed_embeddings() -> None:
    quoted_results("embeddings")


def test_the_bound_of_sparse_steps_is_the_one_that_was_asked_for() -> None:
    assert EMBEDDING_GROWTH == 1.3
    assert (min(EMBEDDING_ROWS), max(EMBEDDING_ROWS)) == (20_000, 2_000_000)


@pytest.mark.parametrize("file", sorted(report.RESULTS.glob("*/embeddings.json")), ids=lambda file: file.parent.name)
def test_a_step_with_sparse_gradients_does_not_grow_with_the_vocabulary(file: Path) -> None:
    content = read(file, "embeddings")
    results = content["results"]
    assert content["environment"]["threads"] == 1
    assert [(entry["ids"], entry["rows"]) for entry in results] == [
        (ids, rows) for ids in embeddings.IDS for rows in EMBEDDING_ROWS
    ]
    for entry in results:
        assert entry["rounds"] >= ROUNDS
        assert entry["contestants"]["sparse"]["growth"] <= EMBEDDING_GROWTH

"""Reports of the benchmarks say what the results say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.contestants import FLOORS, OURS
from benchmarks.contestants import HEAD_TO_HEAD as RIVALS
from benchmarks.rendering import quoted, with_block
from benchmarks.result_files import load, write


def case(mode: str, batch: int, **ratios: float) -> dict[str, Any]:
    times = {name: {"median_ms": 10 * ratio, "iqr_ms": 1.0, "ratio_to_fast": ratio} for name, ratio in ratios.items()}
    return {"mode": mode, "batch": batch, "rounds": 15, "contestants": times}


CONTENT: dict[str, Any] = {
    "environment": {
        "cpu": "Some CPU",
        "cores": 2,
        "cpu_capability": "AVX2",
        "threads": 2,
        "python": "3.11.2",
        "packages": {"torch": "2.13.0"},
        "commit": "abc",
        "uncommitted_changes": False,
        "date": "2026-01-01",
    },
    "results": [
        case("train", 4096, fast=1.0, loop=1.3, deepctr=1.2, bare_gemm=0.8),
        case("inference", 1, fast=1.0, loop=2.5, loop_frozen=2.25, deepctr=4.0, bare_gemm=0.5),
    ],
    "saved": [
        {"contestant": name, "saved_bytes": size, "forward_operators": 3, "backward_operators": 4}
        for name, size in (("fast", 50 * 2**20), ("loop", 100 * 2**20))
    ],
}


def test_the_table_says_what_the_results_say() -> None:
    lines = report.head_to_head_table(CONTENT).splitlines()
    rows = {cells[1].strip(): [c.strip() for c in cells[2:-1]] for cells in (line.split("|") for line in lines)}
    assert rows["**`fast`**"] == ["10.0", "10.0", "50.0", "7"]
    assert rows["`loop_frozen`"] == ["", "22.5", "", ""]
    assert rows["speed-up of `fast` over the best peer"] == ["1.20 x, `deepctr`", "2.25 x, `loop_frozen`", "", ""]
    assert rows["speed-up of `fast` over `loop`"] == ["1.30 x", "2.50 x", "0.50 of `loop`", ""]
    assert rows["`fast` in units of `bare_gemm`"] == ["1.25 x", "2.00 x", "", ""]
    assert [report.best_peer(entry) for entry in CONTENT["results"]] == ["deepctr", "loop_frozen"]


@pytest.mark.parametrize("name", [name for name in RIVALS if name not in (*OURS, *FLOORS)])
def test_the_best_peer_may_be_any_contestant_that_is_not_ours(name: str) -> None:
    others = {"fast": 1.0, "loop": 2.5, "bare_gemm": 0.5}
    entry = case("inference", 1, **{**others, name: 0.75})
    assert report.best_peer(entry) == name
    assert report.ratio_to_best(entry) == 0.75


def test_a_case_that_is_lost_comes_first_in_the_readme() -> None:
    lost = case("inference", 1, fast=1.0, loop=2.5, bmm=0.78, bare_gemm=0.5)
    content = {**CONTENT, "results": [*CONTENT["results"], lost]}
    assert report.readme_block("cpu-2core-some", {"head_to_head": content}).startswith(
        "The worst case first: in inference of 1 row `fast` is slower than the best peer, 0.78 x (`bmm`: naive "
        "stacking: one batched product per layer; 7.80 ms against 10.0 ms). In the other cases it is "
        "1.20 to 2.25 x as fast.\n\n|"
    )
    assert report.worst_case_sentence({"results": CONTENT["results"][:1]}).startswith(
        "The worst case first: in forward + backward of 4,096 rows `fast` is least ahead of the best peer, 1.20 x "
        "(`deepctr`"
    )


def test_the_grid_sentence_says_what_the_results_say() -> None:
    ratios = {"b1-t2-l1": (2.0, 3.0), "b8-t3-l2": (1.25, 1.5), "b4096-t3-l4": (1.5, 0.97)}
    entries = [
        {
            "point": name,
            "batch": int(name[1:].partition("-")[0]),
            "tasks": int(name[-4]),
            "units": [8] * int(name[-1]),
            "train": {"ratio": train},
            "inference": {"ratio": inference},
        }
        for name, (train, inference) in ratios.items()
    ]
    assert report.grid_sentence({"results": entries}) == (
        "Speed-up of `fast` over `loop` on a grid of 3 points (batch 1 to 4,096, 2 to 3 tasks, 1 to 4 expert layers): "
        "forward + backward 1.50 x in the middle, 1.25 x at worst (`b8-t3-l2`); "
        "inference 1.50 x in the middle, 0.97 x at worst (`b4096-t3-l4`)."
    )


def test_a_block_is_written_between_its_comments_and_found_again() -> None:
    before = "# x\n<!-- benchmark:cpu -->\nold\n<!-- /benchmark:cpu -->\nafter \\1\n"
    block = report.readme_block("cpu-2core-some", {"head_to_head": CONTENT})
    after = with_block(before, "cpu", block)
    assert quoted(after, "cpu") == block
    assert report.readme_source(after) == "cpu-2core-some"
    assert after.startswith("# x\n") and after.endswith("after \\1\n")
    with pytest.raises(ValueError, match="expected the lines"):
        with_block("# no comments\n", "cpu", block)


def test_result_files_are_written_small_and_read_back(tmp_path: Path) -> None:
    rows = [{"size": "cpu", "median_ms": 1.5}, {"size": "small", "median_ms": 0.25}]
    write(tmp_path / "machine" / "suite.json", "suite", {"results": rows})
    files = load(tmp_path / "machine")
    assert list(files["suite"]["results"]) == rows
    assert {"machine", "cpu", "threads", "packages", "commit", "date"} <= set(files["suite"]["environment"])
    (tmp_path / "machine" / "grid.json").write_text(json.dumps({"schema": 1, "kind": "suite"}), encoding="utf-8")
    with pytest.raises(ValueError, match="expected schema 1"):
        load(tmp_path / "machine")
    with pytest.raises(FileNotFoundError, match="expected a folder"):
        load(tmp_path / "absent")


def test_the_table_of_norms_says_what_the_results_say() -> None:
    entry = {
        "peer": "rechub",
        "ours": "fast_rechub",
        "peer_ms": 30.0,
        "ours_ms": 20.0,
        "rounds": 15,
        "load": [0.5, 1.25],
    }
    cases = [
        {**entry, "mode": "train", "batch": 256, "ratio": 1.51},
        {**entry, "mode": "inference", "batch": 1, "ratio": 2},
    ]
    saved = [{"contestant": "rechub", "saved_bytes": 100 << 20}, {"contestant": "fast_rechub", "saved_bytes": 40 << 20}]
    content = {"results": cases, "saved": saved, "environment": CONTENT["environment"]}
    block = report.block("norms", "some", content)
    assert (
        "| `rechub` / `fast_rechub` | 30.0 / 20.0: **1.51 x** | 30.0 / 20.0: **2.00 x** | 100 / 40.0: 0.40 |" in block
    )
    assert "up to 1.25" in block and "benchmarks/results/some/norms.json" in block
    page = "a\n<!-- benchmark:norms -->\nold\n<!-- /benchmark:norms -->\nb\n"
    assert quoted(with_block(page, "norms", block), "norms") == block


def scaled(ranks: int, fast: float, loop: float, efficiency: float) -> dict[str, Any]:
    rows = {
        name: {"median_ms": median, "ratio_to_fast": median / fast, "efficiency": efficiency, "efficiency_apart": 0.9}
        for name, median in (("fast", fast), ("loop", loop))
    }
    about = {"batch_per_rank": 4096, "ranks": ranks, "threads_per_rank": 1, "rounds": 15, "load": [0.5, 1.25]}
    return {**about, "contestants": rows}


def test_the_table_of_scaling_says_what_the_results_say() -> None:
    content = {
        "results": [scaled(1, 100.0, 150.0, 1.0), scaled(2, 125.0, 200.0, 0.8)],
        "environment": CONTENT["environment"],
    }
    block = report.block("scaling", "some", content)
    assert "| 4,096 | 1 | 100 | 150 | 1.50 x |  |  |  |  |" in block
    assert "| 4,096 | 2 | 125 | 200 | 1.60 x | 0.80 | 0.90 | 0.80 | 0.90 |" in block
    assert "up to 1.25" in block and "2 cores, AVX2, 1 thread per rank; " in block
    page = "a\n<!-- benchmark:scaling -->\n<!-- /benchmark:scaling -->\nb\n"
    assert quoted(with_block(page, "scaling", block), "scaling") == block

"""Kernels compiled ahead of time: the committed tables, and a part of them compiled again."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks import aot
from benchmarks.configs import aot_dtypes
from benchmarks.environment import ROOT
from benchmarks.launches import TABLE_OF
from benchmarks.machine_code import shuffles_in_loops
from benchmarks.rendering import quoted
from tests.programs import IMPORT_PATH

VERSIONS = ("3.6.0", "3.9.0")


def rows_of(version: str) -> list[dict[str, Any]]:
    return aot.rows_of(aot.RESULTS / f"triton-{version}.json")


def run(tmp_path: Path, *arguments: str) -> str:
    """Standard output of ``aot.py`` in a process that does not interpret, and does not poison gigabytes."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    environment["PYTHONPATH"] = IMPORT_PATH
    command = [sys.executable, str(ROOT / "benchmarks" / "aot.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("version", VERSIONS)
def test_no_committed_configuration_is_at_fault(version: str) -> None:
    assert not aot.faults(rows_of(version))


@pytest.mark.parametrize("version", VERSIONS)
def test_tiles_of_sm_80_fit_into_the_99_kib_of_its_relatives(version: str) -> None:
    assert max(row["shared"] for row in rows_of(version) if row["architecture"] == "sm_80") <= 99 * 1024


def test_the_committed_tables_are_of_the_present_code(tmp_path: Path) -> None:
    wanted = Counter(run(tmp_path, "--list").splitlines())
    for version in VERSIONS:
        rows = [{k: v for k, v in row.items() if k not in aot.FIGURES} for row in rows_of(version)]
        have = Counter(map(json.dumps, rows))
        assert have == wanted, f"compile again: {list((wanted - have) + (have - wanted))[:5]}"
        for architecture in aot.ARCHITECTURES:
            mine = [row for row in rows if row["architecture"] == architecture]
            asked = aot_dtypes(architecture)
            assert {row["size"] for row in mine} == set(asked)
            assert {row["dtype"] for row in mine} == {d.partition("/")[0] for dtypes in asked.values() for d in dtypes}
            assert kernels_of(mine) == kernels_of(rows)
            has_engine = {f"grouped_{kernel}" for kernel in loaded_by_engine(architecture)}
            assert kernels_of(mine, stays=True) == has_engine, architecture


def kernels_of(rows: list[dict[str, Any]], *, stays: bool = False) -> set[str]:
    """Kernels of rows; ``stays``: of those whose programs stay, without the end of their names."""
    names = {row["kernel"] for row in rows}
    return {n.removesuffix("_persistent") for n in names if n.endswith("_persistent") == stays}


def loaded_by_engine(architecture: str) -> set[str]:
    """Kernels for which a shipped table has a row of programs that stay, by the names that launches have."""
    tables = importlib.import_module("ple_fast_kernels").TABLES
    kinds = tables[TABLE_OF.get(architecture, architecture)]
    found = {kind.partition("/")[0].removeprefix("persistent_") for kind in kinds if kind.startswith("persistent_")}
    return {"linear_fwd" if name == "linear" else name for name in found}


def test_faults_are_found() -> None:
    row = {
        "architecture": "sm_90", "size": "small", "dtype": "bfloat16", "precision": "-", "kernel": "input_grad",
        "widths": [8, 8], "tile": [64, 64, 64], "warps": 4, "stages": 3,
        "registers": 90, "spills": 0, "shared": 232_448, "mma": 0, "warp_group_mma": 4,
    }  # fmt: skip
    assert not aot.faults([row, {**row, "tile": [32, 64, 64], "mma": 4, "warp_group_mma": 0}])
    assert "spills 8 bytes" in aot.faults([{**row, "spills": 8}])[0]
    assert "more shared memory" in aot.faults([{**row, "shared": 232_449}])[0]
    assert "more shared memory" in aot.faults([{**row, "architecture": "gfx942", "shared": 65_537}])[0]
    assert "no warp-group products" in aot.faults([{**row, "mma": 4, "warp_group_mma": 0}])[0]
    assert "no tensor cores" in aot.faults([{**row, "warp_group_mma": 0}])[0]
    sums = {**row, "kernel": "grouped_weight_grad", "warp_group_mma": 0}
    assert "no tensor cores" in aot.faults([{**sums, "multiplies": True}])[0]
    assert not aot.faults([{**sums, "multiplies": False}])
    assert "wait for each other (C7514)" in aot.faults([{**row, "serialised": ["C7514"]}])[0]
    assert "no loads by the tensor memory engine" in aot.faults([{**row, "engine_loads": 0}])[0]
    assert not aot.faults([{**row, "engine_loads": 6}])
    assert "20 shuffles in loops" in aot.faults([{**row, "kernel": "grouped_weight_grad", "loop_shuffles": 20}])[0]
    assert "out of memory" in aot.faults([{**row, "error": "out of memory"}])[0]


LISTING = """
        /*0000*/                   SHFL.BFLY PT, R0, R1, 0x1, 0x1f ;
        /*0010*/                   FADD R2, R2, R0 ;
        /*0020*/                   SHFL.BFLY PT, R3, R2, 0x2, 0x1f ;
        /*0030*/                   SHFL.IDX PT, R3, R2, RZ, 0x1f ;
        /*0040*/              @!P0 BRA 0x10 ;
        /*0050*/              @!P1 BRA 0x0 ;
        /*0060*/                   BRA 0x60 ;
"""


def test_shuffles_are_counted_in_innermost_loops_alone() -> None:
    assert shuffles_in_loops(LISTING) == 1
    assert shuffles_in_loops(LISTING.replace("@!P0 BRA 0x10", "NOP")) == 2
    assert shuffles_in_loops("") == 0


def test_the_page_shows_the_committed_tables() -> None:
    text = aot.PAGE.read_text(encoding="utf-8")
    assert quoted(text, aot.BLOCK) == aot.block(), "render it again: .venv/bin/python benchmarks/aot.py --write-page"
    assert all(f"Triton {version}" in text for version in VERSIONS)


def compiled(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    """Rows that ``aot.py`` writes."""
    run(tmp_path, "--out", str(tmp_path / "aot.json"), *arguments)
    return aot.rows_of(tmp_path / "aot.json")


def test_a_part_compiles_without_a_fault(tmp_path: Path) -> None:
    rows = compiled(tmp_path, "--architectures", "sm_90", "--sizes", "small,medium", "--dtypes", "bfloat16")
    assert {row["size"] for row in rows} == {"small", "medium"}
    assert len(rows) > 20


@pytest.mark.slow
@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_everything_compiles_without_a_fault(architecture: str, tmp_path: Path) -> None:
    rows = compiled(tmp_path, "--architectures", architecture)
    assert {row["size"] for row in rows} == set(aot_dtypes(architecture))

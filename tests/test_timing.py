"""Times of contestants are taken in turns, and ratios round by round."""

from __future__ import annotations

import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import host_time, report
from benchmarks.paired import Paired, time_paired
from benchmarks.result_files import load


def test_paired_ratios_are_taken_round_by_round() -> None:
    paired = Paired({"slow": [2.0, 40.0, 6.0], "fast": [1.0, 10.0, 2.0]}, (0.0, 0.0))
    assert paired.ratio("slow", "fast") == 3.0
    assert paired.median("slow") == 6.0
    assert paired.iqr("fast") == 4.5


def test_timing_interleaves_and_repeats_short_calls() -> None:
    order: list[str] = []
    paired = time_paired({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=4, min_sample_s=1e-4)
    assert {name: len(samples) for name, samples in paired.samples.items()} == {"a": 4, "b": 4}
    changes = sum(x != y for x, y in pairwise(order))
    assert changes >= 2 * 4 - 4  # blocks of a and b take turns; two rounds in a row may share a neighbour
    assert len(order) > 2 * 4 * 2  # an append lasts far less than a sample, so samples repeat it
    with pytest.raises(ValueError, match="at least one"):
        time_paired({})
    with pytest.raises(ValueError, match="1 or more"):
        time_paired({"a": list}, rounds=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None or sys.platform != "linux", reason="builds a library with gcc")
def test_host_time_is_measured_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    path = tmp_path / "host_time.json"
    host_time.main(["--rounds", "2", "--json", str(path)])
    found = load(tmp_path)["host_time"]
    assert [entry["mode"] for entry in found["results"]] == [*host_time.MODES]
    for entry in found["results"]:
        assert [*entry["contestants"]] == [*host_time.CASES]
        assert all(time["least_us"] > 1.0 for time in entry["contestants"].values())
    table = report.host_time_table(found).splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == [*host_time.CASES]

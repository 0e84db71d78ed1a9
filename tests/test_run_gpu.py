"""The GPU benchmark without a GPU: the same code on a tiny trunk, with the host's clock and without capture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import configs, environment, gpu_cases, report, run_gpu
from benchmarks.contestants import CONTESTANTS, GPU_CONTESTANTS
from tests.gpu_helpers import CPU, EAGER, INSTALLED, run


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gpu")
    return run(folder, "--only", ",".join(EAGER))


def test_every_contestant_runs_in_every_mode_and_execution(content: dict[str, Any]) -> None:
    assert {(case["dtype"], case["mode"]) for case in content["results"]} == {
        (dtype, mode) for dtype in configs.GPU_DTYPES for mode in configs.MODES
    }
    for case in content["results"]:
        wanted = {f"{n}{how}" for n in EAGER if case["mode"] in CONTESTANTS[n].modes for how in ("", "/graph")}
        assert set(case["contestants"]) == wanted
        assert case["failed"] == {}
        for name, row in case["contestants"].items():
            assert row["median_ms"] > 0
            assert row["ratio_to_fast"] > 0
            assert row["ratio_to_fast/graph"] > 0
            assert row["backend"] == "torch"
            assert row["peak_bytes"] is None, name
        assert case["contestants"]["fast"]["ratio_to_fast"] == 1


def test_saved_bytes_and_ceilings_are_measured_in_the_same_run(content: dict[str, Any]) -> None:
    for dtype in configs.GPU_DTYPES:
        saved = {row["contestant"]: row["saved_bytes"] for row in content["saved"] if row["dtype"] == dtype}
        assert set(saved) == set(EAGER)
        assert saved["fast_recompute"] < saved["fast"] < saved["loop"]
        (ceiling,) = [row for row in content["ceilings"] if row["dtype"] == dtype]
        assert ceiling["mm_flops_per_s"] > 0
        assert ceiling["copy_bytes_per_s"] > 0


def test_the_report_shows_them(content: dict[str, Any]) -> None:
    text = report.markdown("none", {"gpu": content})
    assert "no GPU: these times mean nothing" in text
    for name in EAGER:
        assert f"`{name}/graph`" in text
    assert text.count("### tiny") == len(configs.GPU_DTYPES)


@pytest.mark.slow
def test_compiled_contestants_run(tmp_path: Path) -> None:
    names = [name for name in INSTALLED if CONTESTANTS[name].compiled]
    found = run(tmp_path, "--only", ",".join(names), "--dtypes", "bfloat16", "--modes", "train,inference")
    for case in found["results"]:
        assert {name.partition("/")[0] for name in case["contestants"]} == {*names, "fast", "loop"}
        assert "loop_max_autotune/graph" not in case["contestants"]


def test_runs_of_the_same_code_make_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {**environment.gpu_environment(CPU), "uncommitted_changes": False}
    monkeypatch.setattr(run_gpu, "gpu_environment", lambda device, commit: dict(about))
    first = run(tmp_path, "--only", "loop", "--dtypes", "bfloat16", "--modes", "inference")
    second = run(tmp_path, "--only", "loop", "--dtypes", "bfloat16", "--modes", "forward")
    assert [case["mode"] for case in second["results"]] == ["inference", "forward"]
    assert second["results"][0] == first["results"][0]
    assert len(second["ceilings"]) == 1
    about["commit"] = "another"
    third = run(tmp_path, "--only", "loop", "--dtypes", "bfloat16", "--modes", "train")
    assert [case["mode"] for case in third["results"]] == ["train"]


def test_time_that_is_over_starts_no_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_gpu.main(["--device", "cpu", "--tiny", "--skip-missing", "--results", str(tmp_path), "--minutes", "0"])
    assert not list(tmp_path.glob("*/gpu.json"))
    assert "fast at tiny in bfloat16, train, is not measured" in capsys.readouterr().err


def test_the_file_is_written_after_every_contestant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(BaseException):
        """As a signal would."""

    measure = gpu_cases.Group.measure

    def stops(group: gpu_cases.Group, name: str) -> gpu_cases.Rows:
        if (group.mode, name) == ("inference", "bmm"):
            raise Stopped
        return measure(group, name)

    monkeypatch.setattr(gpu_cases.Group, "measure", stops)
    with pytest.raises(Stopped):
        run(tmp_path, "--only", "bmm", "--dtypes", "bfloat16")
    (path,) = tmp_path.glob("*/gpu.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    found = {case["mode"]: set(case["contestants"]) for case in content["results"]}
    both = {"fast", "fast/graph", "loop", "loop/graph"}
    assert found == {"train": {*both, "bmm", "bmm/graph"}, "inference": both}
    assert [file.name for file in path.parent.iterdir() if file.is_file()] == ["gpu.json"]
    assert "tiny" in report.markdown("none", {"gpu": content})


def test_a_second_run_goes_on_where_the_first_one_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {**environment.gpu_environment(CPU), "uncommitted_changes": False}
    monkeypatch.setattr(run_gpu, "gpu_environment", lambda device, commit: dict(about))
    case = ("--dtypes", "bfloat16", "--modes", "train")
    first = run(tmp_path, *case, "--only", "fast")
    second = run(tmp_path, *case, "--only", "bmm", "--continue")
    (before,), (after,) = first["results"], second["results"]
    assert {**after["contestants"], **before["contestants"]} == after["contestants"]
    assert set(after["contestants"]) - set(before["contestants"]) == {"bmm", "bmm/graph"}
    assert second["saved"][: len(first["saved"])] == first["saved"]
    again = run(tmp_path, *case, "--only", "bmm")
    assert again["results"][0]["contestants"] != after["contestants"], "measured again"


def test_what_is_wanted_most_comes_first() -> None:
    order = gpu_cases.in_order(configs.GPU_SIZES, list(configs.GPU_DTYPES), configs.GPU_MODES, GPU_CONTESTANTS)
    main = {
        "train": ["fast", "fast_recompute", "loop", "loop_compiled"],
        "inference": ["fast", "loop", "loop_compiled"],
    }
    assert order[:6] == [
        (size, "bfloat16", mode, main[mode]) for size in ("small", "medium", "large") for mode in ("train", "inference")
    ]
    assert order[6] == ("small", "bfloat16", "train", ["bmm", "rechub", "deepctr"])
    assert [dtype for _, dtype, *_ in order[6:12]] == ["bfloat16"] * 6
    assert [case[:3] for case in order[12:14]] == [("small", "tf32", "train"), ("small", "tf32", "inference")]
    cases = [(*case[:3], name) for case in order for name in case[3]]
    assert len(cases) == len(set(cases)) == 4 * 2 * (3 * len(GPU_CONTESTANTS) - 1)


def test_peers_that_are_not_installed_are_named_or_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = dataclasses.replace(CONTESTANTS["rechub"], requires="no_such_package")
    monkeypatch.setitem(CONTESTANTS, "rechub", absent)
    case = ("--only", "rechub", "--dtypes", "bfloat16", "--modes", "inference")
    (found,) = run(tmp_path, *case)["results"]
    assert found["failed"] == {"rechub": "no_such_package is not installed"}
    with pytest.raises(SystemExit, match="no_such_package: not installed"):
        run_gpu.main(["--device", "cpu", "--tiny", "--results", str(tmp_path), *case])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="measures on a GPU, and PyTorch sees none"):
        run_gpu.main([])
    with pytest.raises(SystemExit, match="shows that the code runs"):
        run_gpu.main(["--device", "cpu"])


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_gpu.main(["--sizes", "huge"])
    assert "--sizes: expected names out of small" in capsys.readouterr().err

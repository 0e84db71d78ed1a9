"""The GPU benchmark without a GPU: the same code on a tiny trunk, with the host's clock and without capture."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import configs, report, run_gpu
from benchmarks.contestants import CONTESTANTS, GPU_CONTESTANTS, GPU_EAGER_PEERS, baseline, build
from benchmarks.steps import WrongResultError
from ple_fast import use_backend
from tests.fake_cuda import FakeCuda

CPU = torch.device("cpu")
INSTALLED = [name for name in GPU_CONTESTANTS if CONTESTANTS[name].available()]
EAGER = [name for name in INSTALLED if not CONTESTANTS[name].compiled]


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    """The result file of a tiny run."""
    run_gpu.main(["--device", "cpu", "--tiny", "--rounds", "2", "--results", str(folder), *arguments])
    (path,) = folder.glob("*/gpu.json")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


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
    about = {**run_gpu.gpu_environment(CPU), "uncommitted_changes": False}
    monkeypatch.setattr(run_gpu, "gpu_environment", lambda device: dict(about))
    first = run(tmp_path, "--only", "loop", "--dtypes", "bfloat16", "--modes", "inference")
    second = run(tmp_path, "--only", "loop", "--dtypes", "bfloat16", "--modes", "forward")
    assert [case["mode"] for case in second["results"]] == ["inference", "forward"]
    assert second["results"][0] == first["results"][0]
    assert len(second["ceilings"]) == 1
    about["commit"] = "another"
    third = run(tmp_path, "--only", "loop", "--dtypes", "bfloat16", "--modes", "train")
    assert [case["mode"] for case in third["results"]] == ["train"]


def test_time_that_is_over_starts_no_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_gpu.main(["--device", "cpu", "--tiny", "--results", str(tmp_path), "--minutes", "1e-9"])
    assert not list(tmp_path.glob("*/gpu.json"))
    assert "is not measured" in capsys.readouterr().err


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


def measured(
    names: list[str], capture: run_gpu.Capture = run_gpu.not_captured, mode: configs.Mode = "train"
) -> dict[str, Any]:
    return run_gpu.measure(
        run_gpu.TINY, "tf32", mode, names, CPU,
        clock=run_gpu.cpu_clock, capture=capture, rounds=1, min_sample_s=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["bmm", "fast"])
def test_a_wrong_contestant_ends_the_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(name: str, config: configs.TrunkConfig, device: torch.device) -> nn.Module:
        trunk = build(name, config, device)
        with torch.no_grad():
            next(trunk.parameters()).mul_(1.5)
        return trunk

    monkeypatch.setattr(run_gpu, "build", wrong)
    with pytest.raises(WrongResultError, match=f"{name}, eager, at tiny"):
        measured([name])


def test_a_graph_that_replays_something_else_ends_the_run() -> None:
    def stale(runner: run_gpu.Runner) -> tuple[Callable[[], object], list[torch.Tensor]]:
        outputs = runner.step()
        return (lambda: [y.detach().zero_() for y in outputs]), outputs

    with pytest.raises(WrongResultError, match="bmm, graph, at tiny"):
        measured(["bmm"], stale)


def test_a_peer_that_fails_is_written_down_and_ours_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        def refuse(*arguments: Any) -> nn.Module:
            if arguments[0] == name:
                raise RuntimeError("out of memory\nand more")
            return build(*arguments)

        monkeypatch.setattr(run_gpu, "build", refuse)

    fails("bmm")
    found = measured(["fast", "bmm"])
    assert found["failed"] == dict.fromkeys(("bmm", "bmm/graph"), "RuntimeError: out of memory and more")
    assert set(found["contestants"]) == {"fast", "fast/graph"}
    fails("fast")
    with pytest.raises(RuntimeError, match="out of memory"):
        measured(["fast", "bmm"])


def test_graphs_are_left_out_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_gpu, "peak_bytes", lambda run, device: (run() and 1000) or 1000)
    monkeypatch.setattr(run_gpu, "free_bytes", lambda device: 1100)
    found = measured(["fast", "loop"])
    assert found["failed"] == {"loop/graph": "no memory left beside the others"}
    assert set(found["contestants"]) == {"fast", "loop", "fast/graph"}
    monkeypatch.setattr(run_gpu, "free_bytes", lambda device: 1300)
    assert measured(["fast", "loop"])["failed"] == {}


def test_ours_on_another_backend_than_triton_is_no_measurement() -> None:
    baseline(run_gpu.TINY)
    measured(["fast"])
    with pytest.raises(SystemExit, match="ours ran on the backend 'torch'"):
        run_gpu._backend("fast", torch.device("cuda"))


def test_ours_is_compared_and_named_on_the_triton_backend() -> None:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the interpreter is off")
    with use_backend("triton"):
        found = measured(["fast", "loop"], mode="inference")
    backends = {name: row["backend"] for name, row in found["contestants"].items()}
    assert backends == {"fast": "triton", "fast/graph": "triton", "loop": "torch", "loop/graph": "torch"}


def test_the_gpu_and_its_driver_are_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(total_memory=80, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    about = run_gpu.gpu_environment(torch.device("cuda"))
    assert about["machine"] == "nvidia-h100-80gb-hbm3"
    assert about["multiprocessors"] == 132
    assert {"driver", "cuda", "packages", "commit"} <= set(about)


def test_events_divide_the_time_by_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    assert run_gpu.cuda_clock(cuda.work, 4) == pytest.approx(1e-3)
    assert cuda.log == ["synchronize", *["work"] * 4, "synchronize"]


def test_a_step_is_warm_and_without_gradients_when_it_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    runner = run_gpu.Runner.of("loop", run_gpu.TINY, "train", CPU)
    step = runner.step

    def logged() -> list[torch.Tensor]:
        gradients = [leaf.grad for leaf in (*runner.trunk.parameters(), runner.x)]
        cuda.log.append("step" if any(g is not None for g in gradients) else "fresh step")
        return step()

    monkeypatch.setattr(runner, "step", logged)
    replay, outputs = run_gpu.cuda_graph(runner)
    assert cuda.log == [
        "wait", "stream", "fresh step", "step", "step", "wait", "capture", "fresh step", "captured",
    ]  # fmt: skip
    assert len(outputs) == run_gpu.TINY.num_tasks
    replay()
    assert cuda.log[-1] == "replay"


def case(size: str, rows: dict[str, tuple[float, float, float]]) -> dict[str, Any]:
    """A training step in bfloat16: milliseconds and both ratios per contestant."""
    times = {
        name: {"median_ms": ms, "peak_bytes": 2**20, "ratio_to_fast": eager, "ratio_to_fast/graph": graph}
        for name, (ms, eager, graph) in rows.items()
    }
    shape = {"size": size, "dtype": "bfloat16", "mode": "train", "batch": 8, "flops": 10**9, "least_bytes": 10**6}
    return {**shape, "contestants": times, "failed": {"deepctr": "it gives every level the same widths"}}


TARGETS: dict[str, Any] = {
    "results": [
        case(
            "small",
            {
                "fast": (1.0, 1.0, 5.0), "fast/graph": (0.2, 0.2, 1.0), "loop": (4.5, 4.5, 22.5),
                "bmm": (0.1, 0.1, 0.5), "bmm/graph": (0.05, 0.05, 0.25),
                "rechub": (4.25, 4.25, 21.0), "loop_compiled": (2.0, 2.0, 10.0),
                "loop_compiled/graph": (0.4, 0.4, 2.0), "loop/graph": (0.9, 0.9, 4.5),
            },
        ),
        case("large", {"fast": (4.0, 1.0, 1.0), "loop": (6.0, 1.5, 1.5)}),
    ],
    "saved": [
        {"size": "large", "dtype": "bfloat16", "contestant": name, "saved_bytes": size}
        for name, size in (("fast", 60), ("fast_recompute", 12), ("loop", 100))
    ],
    "ceilings": [
        {"size": size, "dtype": "bfloat16", "mm_flops_per_s": 5e11, "copy_bytes_per_s": 1e9}
        for size in ("small", "large")
    ],
}  # fmt: skip


def test_targets_are_printed_as_reached_or_missed() -> None:
    assert report.gpu_targets(TARGETS) == [
        "small: ours eager over the best eager per-expert peer (`rechub`): 4.25, wanted at least 4: reached",
        "small: ours in a CUDA graph over the best eager per-expert peer (`rechub`): 21.00, wanted at least 10: "
        "reached",
        "small: ours in a CUDA graph over the best compiled or graphed per-expert peer (`loop_compiled/graph`): 2.00, "
        "wanted at least 2.5: missed by 0.50",
        "small: ours eager over `bmm`, which is stacked: 0.10",
        "small: ours in a CUDA graph over `bmm/graph`, which is stacked: 0.25",
        "large: ours eager over the best eager per-expert peer (`loop`): 1.50, wanted at least 2: missed by 0.50",
        "large: ours in a CUDA graph over the best compiled or graphed per-expert peer: not measured, wanted at "
        "least 1.3",
        "large: share of what the ceilings allow: 0.50, wanted at least 0.7: missed by 0.20",
        "large, bfloat16: `fast` saves for backward, in units of the eager loop's: 0.60, wanted at most 0.65: reached",
        "large, bfloat16: `fast_recompute` saves for backward, in units of the eager loop's: 0.12, "
        "wanted at most 0.1: missed by 0.02",
    ]


def test_the_table_says_what_the_results_say() -> None:
    lines = report.gpu_table(TARGETS).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert ["`bmm`", "0.10", "1.00", ""] in rows
    assert ["**`fast/graph`**", "0.20", "1.00", ""] in rows
    assert ["ceilings of this GPU", "2.00", "", ""] in rows
    assert lines.count("Not run: `deepctr`: it gives every level the same widths.") == 2


def test_the_targets_are_those_that_were_agreed() -> None:
    small, medium, large = (configs.GPU_TARGETS[size] for size in ("small", "medium", "large"))
    assert (small.eager_over_eager, small.graph_over_eager, small.graph_over_compiled) == (4, 10, 2.5)
    assert (medium.eager_over_eager, medium.graph_over_compiled) == (3, 1.7)
    assert (large.eager_over_eager, large.graph_over_compiled, large.roofline) == (2, 1.3, 0.7)
    assert configs.SAVED_TARGETS == {"fast": 0.65, "fast_recompute": 0.1}
    wide = configs.SIZES["paper_gpu"]
    assert (wide.batch, wide.in_features, wide.num_tasks) == (8192, 512, 2)
    assert (wide.task_experts, wide.shared_experts) == (4, 4)
    assert wide.level_units() == ((256,), (128,))
    assert set(GPU_EAGER_PEERS) == {"loop", "rechub", "deepctr"}

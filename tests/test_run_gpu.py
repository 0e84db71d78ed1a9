"""The GPU benchmark without a GPU: the same code on a tiny trunk, with the host's clock and without capture."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import configs, environment, gpu_cases, gpu_report, gpu_steps, report, run_gpu
from benchmarks.contestants import CONTESTANTS, GPU_CONTESTANTS, GPU_EAGER_PEERS, build
from benchmarks.gradients import INPUT, OUTPUTS, PARAMETER, Places
from benchmarks.loop import baseline
from benchmarks.oracles import Oracles
from benchmarks.paired import cuda_clock, host_clock
from benchmarks.steps import WrongResultError
from ple_fast import use_backend
from tests.fake_cuda import FakeCuda

CPU = torch.device("cpu")
INSTALLED = [name for name in GPU_CONTESTANTS if CONTESTANTS[name].available()]
EAGER = [name for name in INSTALLED if not CONTESTANTS[name].compiled]


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    """The result file of a tiny run."""
    run_gpu.main(["--device", "cpu", "--tiny", "--rounds", "2", "--skip-missing", "--results", str(folder), *arguments])
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


def group(capture: gpu_steps.Capture = gpu_steps.not_captured, mode: configs.Mode = "train") -> gpu_cases.Group:
    return gpu_cases.Group(run_gpu.TINY, mode, CPU, clock=host_clock, capture=capture, rounds=1, min_sample_s=0.0)


def with_build(monkeypatch: pytest.MonkeyPatch, change: Callable[[str, nn.Module], nn.Module]) -> None:
    """Contestants that somebody has changed."""

    def built(name: str, config: configs.TrunkConfig, device: torch.device) -> nn.Module:
        return change(name, build(name, config, device))

    monkeypatch.setattr(gpu_steps, "build", built)


@pytest.mark.parametrize("name", ["bmm", "fast"])
def test_a_wrong_contestant_has_no_figure_and_fails_the_run_after_all_others(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(built: str, trunk: nn.Module) -> nn.Module:
        if built == name:
            with torch.no_grad():
                next(trunk.parameters()).mul_(1.5)
        return trunk

    with_build(monkeypatch, wrong)
    case = ("--only", "bmm", "--dtypes", "tf32", "--modes", "train,inference")
    with pytest.raises(SystemExit, match=f"{name} at tiny in tf32, train: {name}, eager, at tiny .* outputs by"):
        run(tmp_path, *case)
    (path,) = tmp_path.glob("*/gpu.json")
    for found in json.loads(path.read_text(encoding="utf-8"))["results"]:
        assert {key.partition("/")[0] for key in found["contestants"]} == {"fast", "bmm", "loop"} - {name}
        assert set(found["failed"]) == {name, f"{name}/graph"}


@pytest.mark.parametrize("name", [n for n in EAGER if n != "loop"])
def test_the_gradient_of_every_parameter_is_compared_by_name(name: str) -> None:
    """One parameter's gradient halved, in turn, where a norm over all of them would not see the small ones."""
    config = run_gpu.TINY
    oracles = Oracles(config, "train", CPU)
    runner = gpu_steps.Runner.of(name, config, "train", CPU)
    found = runner.results(runner.step())
    oracles.check(name, "eager", found)
    keys = [key for key in found if key.startswith(PARAMETER)]
    loop = baseline(config, CONTESTANTS[name].make_up)
    without = {key for key, _ in loop.named_parameters()} - {key.removeprefix(PARAMETER) for key in keys}
    assert all(key.endswith(".bias") and CONTESTANTS[name].make_up.norm == "batch" for key in without)
    for key in keys:
        with pytest.raises(WrongResultError, match=f"{name}, eager, at tiny in float32, train, differs: {key} by"):
            oracles.check(name, "eager", {**found, key: 0.5 * found[key]})


def test_a_gradient_may_differ_by_a_sample_at_the_kink_and_no_further() -> None:
    config = run_gpu.TINY
    oracles = Oracles(config, "train", CPU)
    runner = gpu_steps.Runner.of("loop", config, "train", CPU)
    found = runner.results(runner.step())
    one = config.batch**-0.5
    for key, room in ((f"{PARAMETER}levels.1.experts.0.0.bias", one), (INPUT, 0.1 * one), (OUTPUTS, 0.0)):
        oracles.check("fast", "eager", {**found, key: found[key] * (1 + 0.9 * room)})
        with pytest.raises(WrongResultError, match=f"{key} by"):
            oracles.check("fast", "eager", {**found, key: found[key] * (1 + 1.1 * room + 2e-4)})


def test_a_contestant_without_a_parameter_of_the_loop_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(config: configs.TrunkConfig, loop: Any) -> nn.Module:
        trunk = CONTESTANTS["fast"].build(config, loop)
        with torch.no_grad():
            next(trunk.parameters())[0, 0, 0] = 0.25
        return trunk

    monkeypatch.setitem(CONTESTANTS, "bmm", dataclasses.replace(CONTESTANTS["bmm"], build=forgets))
    with pytest.raises(ValueError, match=r"bmm: .*found no levels\.0\.experts\.0\.0\.weight$"):
        Places("bmm", run_gpu.TINY)


def test_a_graph_that_replays_something_else_has_no_figure() -> None:
    def stale(runner: gpu_steps.Runner) -> tuple[Callable[[], object], list[torch.Tensor]]:
        outputs = runner.step()
        return (lambda: [y.detach().zero_() for y in outputs]), outputs

    found = group(stale)
    assert set(found.measure("bmm")) == {"bmm"}
    assert "bmm, graph, at tiny" in found.failed["bmm/graph"]
    assert found.wrong == ["fast/graph", "bmm/graph"]


def test_a_peer_that_fails_is_written_down_and_ours_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    fails = ""

    def refuse(name: str, trunk: nn.Module) -> nn.Module:
        if name == fails:
            raise RuntimeError("out of memory\nand more")
        return trunk

    with_build(monkeypatch, refuse)
    fails = "bmm"
    found = group()
    assert set(found.measure("fast")) == {"fast", "fast/graph"}
    assert found.measure("bmm") == {}
    assert found.failed == {"bmm": "RuntimeError: out of memory and more"}
    assert found.wrong == []
    fails = "fast"
    found = group()
    assert found.measure("fast") == {}
    assert found.wrong == ["fast"]
    rows = found.measure("bmm")
    assert not any(key.startswith("ratio") for row in rows.values() for key in row)


def test_a_graph_is_left_out_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_cases, "peak_bytes", lambda run, device: (run() and 1000) or 1000)
    monkeypatch.setattr(gpu_cases, "free_bytes", lambda device: 1100)
    found = group()
    assert set(found.measure("loop")) == {"loop"}
    assert found.failed["loop/graph"] == "no memory left for its graph"
    monkeypatch.setattr(gpu_cases, "free_bytes", lambda device: 1300)
    assert set(group().measure("loop")) == {"loop", "loop/graph"}


def test_ours_on_another_backend_than_triton_is_no_measurement() -> None:
    group()
    with pytest.raises(SystemExit, match="ours ran on the backend 'torch'"):
        gpu_cases.backend_of("fast", torch.device("cuda"))


def test_ours_is_compared_and_named_on_the_triton_backend() -> None:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the interpreter is off")
    with use_backend("triton"):
        found = group(mode="inference")
        rows = {**found.measure("fast"), **found.measure("loop")}
    backends = {name: row["backend"] for name, row in rows.items()}
    assert backends == {"fast": "triton", "fast/graph": "triton", "loop": "torch", "loop/graph": "torch"}


def test_the_gpu_and_its_driver_are_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(total_memory=80, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    about = environment.gpu_environment(torch.device("cuda"))
    assert about["machine"] == "nvidia-h100-80gb-hbm3"
    assert about["multiprocessors"] == 132
    assert {"driver", "cuda", "packages", "commit"} <= set(about)
    assert about["tiles"] == "shipped"


def test_the_tiles_in_use_are_written_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("PLE_FAST_TILES", str(tmp_path / "tiles.json"))
    assert environment.tiles_in_use(torch.device("cuda")) == "shipped"
    (tmp_path / "tiles.json").write_text("{}", encoding="utf-8")
    assert environment.tiles_in_use(torch.device("cuda")) == "tiles.json, sha256 44136fa355b3"
    monkeypatch.setenv("PLE_FAST_TILES", "")
    assert environment.tiles_in_use(torch.device("cuda")) == "shipped"


def test_a_tree_without_git_is_told_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.delenv(environment.COMMIT, raising=False)
    assert environment.code_version() == ("unknown", False)
    assert environment.code_version("0123abc") == ("0123abc", False)
    monkeypatch.setenv(environment.COMMIT, "0123abc-dirty")
    assert environment.code_version() == ("0123abc", True)


def test_events_divide_the_time_by_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    assert cuda_clock(cuda.work, 4) == pytest.approx(1e-3)
    assert cuda.log == ["synchronize", *["work"] * 4, "synchronize"]


def test_a_step_is_warm_and_without_gradients_when_it_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    runner = gpu_steps.Runner.of("loop", run_gpu.TINY, "train", CPU)
    step = runner.step

    def logged() -> list[torch.Tensor]:
        gradients = [leaf.grad for leaf in (*runner.trunk.parameters(), runner.x)]
        cuda.log.append("step" if any(g is not None for g in gradients) else "fresh step")
        return step()

    monkeypatch.setattr(runner, "step", logged)
    replay, outputs = gpu_steps.cuda_graph(runner)
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
    assert gpu_report.gpu_targets(TARGETS) == [
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


def test_a_run_that_ended_early_has_a_report_too() -> None:
    rows = {"loop": {"median_ms": 2.0, "peak_bytes": None}}
    early = {"results": [{**case("large", {}), "contestants": rows}], "ceilings": TARGETS["ceilings"], "saved": []}
    lines = gpu_report.gpu_targets({**early, "saved": TARGETS["saved"][:1]})
    assert "large: share of what the ceilings allow: not measured, wanted at least 0.7" in lines
    assert not any("saves for backward" in line for line in lines), "there is no loop to compare with"
    assert "| `loop` | 2.00 |" in gpu_report.gpu_table(early)


def test_the_table_says_what_the_results_say() -> None:
    lines = gpu_report.gpu_table(TARGETS).splitlines()
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

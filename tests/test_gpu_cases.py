"""Cases of the GPU benchmark: a wrong result has no figure, and what fails is written down."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import configs, gpu_cases, gpu_steps, run_gpu
from benchmarks.contestants import CONTESTANTS, build
from benchmarks.gradients import INPUT, OUTPUTS, PARAMETER, Places
from benchmarks.loop import baseline
from benchmarks.oracles import Oracles
from benchmarks.paired import cuda_clock, host_clock
from benchmarks.steps import WrongResultError
from ple_fast import use_backend
from tests.fake_cuda import FakeCuda
from tests.gpu_helpers import CPU, EAGER, run


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

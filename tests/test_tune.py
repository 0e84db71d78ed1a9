"""Tuning without a GPU: kernels run under Triton's interpreter, and the time of a launch is made up."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ple_fast import PLE, tune, tune_calls, tune_measure, tune_table
from tests.fake_cuda import FakeCuda

pytest.importorskip("triton")

from ple_fast_kernels import Class, Tile, reload_tables

tiles: Any = importlib.import_module("ple_fast_kernels._tiles")
level_tiles: Any = importlib.import_module("ple_fast_kernels._level_tiles")

CANDIDATES = (Tile(16, 16, 16, 4, 2), Tile(64, 64, 64, 4, 2))


class FakeTimer:
    """A launch takes the longer, the more rows its tile has."""

    def __init__(self) -> None:
        self.samples: list[int] = []

    def __call__(self, call: Callable[[], object]) -> tune_measure.Sampler:
        tile = self._tile_of(call)

        def sample() -> float:
            self.samples.append(tile.rows)
            return tile.rows * 1e-6

        return sample

    def _tile_of(self, call: Any) -> Tile:
        tile = (call.__defaults__ or (None,))[0]
        if tile is None:  # the shipped one
            tile = next(cell.cell_contents.tile for cell in call.__closure__ if hasattr(cell.cell_contents, "kind"))
        assert isinstance(tile, Tile)
        return tile


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    reload_tables()


def choose(kind: str) -> Sequence[Tile]:
    return [tile._replace(depth=0) if kind.startswith("combine") else tile for tile in CANDIDATES]


@pytest.fixture(scope="module")
def where(request: pytest.FixtureRequest) -> torch.device:
    """The device under test; on a CPU kernels need the interpreter, which is off where there is a GPU."""
    device = torch.device(str(request.config.getoption("--device")))
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off: --device cuda")
    return device


@pytest.fixture(scope="module")
def found(where: torch.device) -> tuple[Any, Any, FakeTimer]:
    torch.manual_seed(0)
    trunk = PLE(6, 2, num_levels=1, task_experts=1, shared_experts=1, expert_units=(5, 4), device=where)
    timer = FakeTimer()
    x = torch.randn(20, 6, device=where, requires_grad=True)
    table, measured = tune.tune(trunk, x, rounds=3, prepare=timer, choice=choose)
    return table, measured, timer


def test_every_kernel_of_a_step_is_measured(found: Any, device: torch.device) -> None:
    table, measured, timer = found
    kernels = {kind.partition("/")[0] for kind in table}
    assert kernels >= {"linear", "data_grad", "input_grad", "weight_grad", "combine", "combine_grad"}
    assert kernels & {"fused", "two_layers"}, "inference of a small level is fused"
    assert set(table) <= tiles.KINDS
    assert len(timer.samples) == 3 * sum(len(entry.seconds) for entry in measured)


def test_the_fastest_tile_wins(found: Any) -> None:
    table, measured, _ = found
    for entry in measured:
        fastest = min(entry.seconds, key=lambda tile: entry.seconds[tile])
        assert table[entry.kind][0].tile == fastest
    assert table["linear/ieee"][0].tile.rows == 16


def test_tuning_leaves_the_tables_of_the_process_alone(found: Any) -> None:
    assert tiles._own == {}
    assert tiles.asked is None
    modules = [importlib.import_module(f"ple_fast.triton_backend.{name}") for name in tune_calls.backend_modules()]
    launchers = [getattr(m, name) for m in modules for name in tune_calls.LAUNCHERS if hasattr(m, name)]
    assert len(launchers) >= len(tune_calls.LAUNCHERS)
    assert all(launcher.__module__.startswith("ple_fast_kernels") for launcher in launchers)


A, B, C = Tile(64, 64, 64), Tile(128, 128, 64, 8), Tile(128, 64, 64)


def test_amounts_of_work_become_classes() -> None:
    measured = [
        tune.Measured("half", 10, {A: 1.0, B: 2.0}),
        tune.Measured("half", 400, {A: 4.0, B: 1.0}),
        tune.Measured("half", 800, {A: 9.0, B: 1.0}),
        tune.Measured("combine", 0, {A: 3.0, C: 1.0}),
    ]
    table = tune_table.best_table(measured, processors=100)
    assert table == {"half": (Class(0, A), Class(512, B)), "combine": (Class(0, C),)}
    assert tiles._choose(table["half"], 399, 100) == A
    assert tiles._choose(table["half"], 400, 100) == B


def test_equal_amounts_are_added_and_the_shipped_tile_stays_within_noise() -> None:
    both = [tune.Measured("half", 10, {A: 1.0, B: 0.9}), tune.Measured("half", 10, {A: 1.0, B: 1.5})]
    assert tune_table.best_table(both, 100)["half"] == (Class(0, A),)
    assert tune_table.best_table([tune.Measured("half", 10, {A: 1.0, B: 0.99})], 100)["half"] == (Class(0, A),)
    assert tune_table.best_table([tune.Measured("half", 10, {A: 1.0, B: 0.97})], 100)["half"] == (Class(0, B),)


def test_amounts_that_a_table_does_not_tell_apart_are_one_entry() -> None:
    few = [tune.Measured("half", 1, {A: 1.0, B: 2.0}), tune.Measured("half", 2, {A: 9.0, B: 1.0})]
    assert tune_table.best_table(few, 1000)["half"] == (Class(0, B),), "and not two that begin at 0"
    assert tune_table.best_table([tune.Measured("half", 1, {A: 1.0}), tune.Measured("half", 2, {B: 1.0})], 1000) == {}


@pytest.mark.parametrize("operands", ["half", "tf32", "ieee"])
@pytest.mark.parametrize("limit", [65_536, 166_912, 232_448])
def test_candidates_fit_into_shared_memory(operands: str, limit: int) -> None:
    size = 2 if operands == "half" else 4
    for kernel in ("linear", "data_grad", "input_grad", "weight_grad", "fused", "two_layers"):
        chosen = tune.candidates(f"{kernel}/{operands}", "amd" if limit == 65_536 else "sm_90", size, limit)
        assert 2 <= len(chosen) <= 12
        assert len(set(chosen)) == len(chosen)
        assert all(t.stages * (t.rows + t.columns) * t.depth * size <= limit for t in chosen)
    assert tune.candidates("linear/double", "sm_90", 8, limit) == []


def test_a_fused_candidate_must_fit_into_registers() -> None:
    tiles.asked = []
    try:
        like = torch.empty(1, dtype=torch.bfloat16)  # of a CPU: the interpreter's table
        level_tiles.fused_tile(like, 64, 4, 16, "ieee")
        request = tiles.asked[0]
    finally:
        tiles.asked = None
    assert request.kind == "fused/half"
    assert request.fits(Tile(64, 32, 64, 8, 3))
    assert not request.fits(Tile(128, 128, 64, 4, 3))


def test_a_candidate_with_another_result_is_refused(monkeypatch: pytest.MonkeyPatch, where: torch.device) -> None:
    monkeypatch.setattr(tune_measure, "_agree", lambda ours, theirs: False)
    trunk = PLE(6, 2, num_levels=1, task_experts=1, shared_experts=1, expert_units=(4,), device=where)
    with pytest.raises(RuntimeError, match="differs from"):
        tune.tune(trunk, torch.randn(3, 6, device=where), prepare=FakeTimer(), choice=choose)
    assert tiles._own == {}
    monkeypatch.undo()
    ones = torch.ones(3)
    assert tune_measure._agree([ones], [ones * 1.001])
    assert not tune_measure._agree([ones], [ones * 1.1])
    assert not tune_measure._agree([ones * torch.nan], [ones])


def test_the_command_writes_a_file_that_reads_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: torch.device
) -> None:
    monkeypatch.setattr(tune_measure, "candidates", lambda kind, *rest: choose(kind))
    path = tmp_path / "deep" / "mine.json"
    monkeypatch.setenv("PLE_FAST_TILES", str(path))
    arguments = "--in-features 6 --num-tasks 2 --num-levels 1 --task-experts 1 --shared-experts 1 --expert-units 4"
    tune.main(
        [*arguments.split(), "--batch", "5", "--dtype", "float32", "--device", str(where), "--rounds", "1"],
        prepare=FakeTimer(),
    )
    assert str(path) in capsys.readouterr().out
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["trunks"][0]["batch"] == 5
    assert content["measured_us"]
    files: Any = importlib.import_module("ple_fast_kernels._tile_files")
    table = files.read_table(path, tiles.architecture(where)[0], tiles.KINDS)
    assert table["fused/ieee"][0].tile.rows == 16
    assert list(path.parent.iterdir()) == [path]


def test_a_sample_is_a_graph_of_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    sample = tune_measure.cuda_graph_sampler(cuda.work)
    before = [
        "wait",
        "stream",
        "work",
        "work",
        "wait",
        "capture",
        *["work"] * tune_measure.REPEATS,
        "captured",
        "replay",
    ]
    assert cuda.log == before
    assert sample() == pytest.approx(5e-3 / tune_measure.REPEATS)
    assert cuda.log == [*before, "replay", "synchronize"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_the_command_says_so() -> None:
    with pytest.raises(SystemExit, match="sees no GPU here; --device cpu measures this processor"):
        tune.main(["--in-features", "6", "--num-tasks", "2", "--batch", "5"])

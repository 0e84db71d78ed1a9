"""The command of ``ple_fast.tune``: several trunks in one file, stopped runs that go on, candidates that lose."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import configs
from ple_fast import PLE, tune, tune_calls, tune_measure, tune_results
from tests.programs import IMPORT_PATH
from tests.test_tune import choose, where

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from ple_fast_kernels import Tile, reload_tables

__all__ = ["where"]
ROOT = Path(__file__).resolve().parents[1]
tiles: Any = importlib.import_module("ple_fast_kernels._tiles")
TINY = {"in_features": 6, "num_tasks": 2, "num_levels": 1, "task_experts": 1, "shared_experts": 1, "batch": 5}
TRUNKS = [{**TINY, "expert_units": [4]}, {**TINY, "expert_units": [5, 4]}]


class Prepared:
    """A sampler that counts, and stops the run at a launch, as a signal would."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.count, self.stop_at = 0, stop_at

    def __call__(self, call: Callable[[], object]) -> tune_measure.Sampler:
        self.count += 1
        if self.count == self.stop_at:
            raise KeyboardInterrupt
        return lambda: 1e-6


@pytest.fixture(autouse=True)
def _few_candidates(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tune_measure, "candidates", lambda kind, *rest: choose(kind))
    yield
    reload_tables()


def run(folder: Path, trunks: Sequence[dict[str, Any]], *options: str, stop_at: int | None = None) -> tuple[Any, int]:
    """Content of the file, and how many launches with a tile were prepared."""
    names = []
    for number, trunk in enumerate(trunks):
        path = folder / f"trunk{number}.json"
        path.write_text(json.dumps(trunk), encoding="utf-8")
        names += ["--trunk", str(path)]
    prepared = Prepared(stop_at)
    arguments = [*names, "--dtype", "float32", "--device", "cpu", "--rounds", "1", "--out", str(folder / "tiles.json")]
    try:
        tune.main([*arguments, *options], prepare=prepared)
    finally:
        assert tiles._own == {}
    return json.loads((folder / "tiles.json").read_text(encoding="utf-8")), prepared.count


pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter is off")


def test_several_trunks_go_into_one_table_and_a_second_run_measures_nothing_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, count = run(tmp_path, TRUNKS)
    assert [trunk["expert_units"] for trunk in content["trunks"]] == [[4], [5, 4]]
    launches = [row[3] for row in content["measured_us"]]
    assert len(launches) == len(set(launches)), "what two trunks have in common is measured once"
    assert {"linear/ieee", "combine_grad", "data_grad/ieee"} <= set(content["tiles"])
    again, more = run(tmp_path, TRUNKS)
    assert (again["measured_us"], more) == (content["measured_us"], 0)
    assert "goes on from" in capsys.readouterr().err
    added, more = run(tmp_path, [{**TRUNKS[0], "batch": 70}])
    assert added["measured_us"][: len(launches)] == content["measured_us"]
    assert 0 < more < count
    assert len(added["trunks"]) == 3


def test_a_run_that_is_stopped_leaves_what_it_has_and_the_next_one_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, TRUNKS[1:], stop_at=8)
    partial = json.loads((tmp_path / "tiles.json").read_text(encoding="utf-8"))
    assert partial["measured_us"]
    files: Any = importlib.import_module("ple_fast_kernels._tile_files")
    assert files.read_table(tmp_path / "tiles.json", "interpreter", tiles.KINDS), "the library takes it as it is"
    content, _ = run(tmp_path, TRUNKS[1:])
    assert content["measured_us"][: len(partial["measured_us"])] == partial["measured_us"]
    (tmp_path / "whole").mkdir()
    whole, _ = run(tmp_path / "whole", TRUNKS[1:])
    assert {row[3] for row in content["measured_us"]} == {row[3] for row in whole["measured_us"]}


def test_time_that_is_over_starts_no_launch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, count = run(tmp_path, TRUNKS, "--minutes", "0")
    assert (content["measured_us"], count) == ([], 0)
    assert capsys.readouterr().err.count("time is over") == 2
    trunk = PLE(6, 2, num_levels=1, task_experts=1, shared_experts=1, expert_units=(4,))
    said: list[str] = []
    _, measured = tune.tune(trunk, torch.randn(5, 6), minutes=0, prepare=Prepared(), say=said.append)
    assert measured == []
    assert "launches are not measured" in said[0]


def test_a_file_of_another_make_begins_anew(tmp_path: Path) -> None:
    first, count = run(tmp_path, TRUNKS[:1])
    path = tmp_path / "tiles.json"
    tuner = tune_measure.Tuner(torch.device("cpu"), Prepared(), 1, print)
    said: list[str] = []
    assert len(tune_results.Results(path, tuner, said.append).measured) == len(first["measured_us"])
    changes: list[Any] = [{key: "another"} for key in ("gpu", "triton", "torch", "kernels", "architecture")]
    for change in [*changes, {"measured_us": [1]}, {"measured_us": None}, {"trunks": None}]:
        path.write_text(json.dumps({**first, **change}), encoding="utf-8")
        assert tune_results.Results(path, tuner, said.append).measured == []
        assert "begins anew" in said.pop()
    path.write_text("{", encoding="utf-8")
    assert run(tmp_path, TRUNKS[:1])[1] == count


def out_of_memory(nested: bool) -> Exception:
    error: Exception = torch.OutOfMemoryError("CUDA out of memory")
    if nested:  # as the end of a capture reports it
        try:
            try:
                raise error
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")
        except RuntimeError as found:
            error = found
    return error


@pytest.mark.parametrize(
    "error",
    [out_of_memory(False), out_of_memory(True), OutOfResources(300_000, 232_448, "shared memory")],
    ids=["memory", "memory in a capture", "shared memory"],
)
def test_a_candidate_that_does_not_fit_has_lost(error: Exception) -> None:
    def prepare(call: Any) -> tune_measure.Sampler:
        if call.__defaults__:  # a candidate, not the shipped tile
            raise error
        return lambda: 1e-6

    trunk = PLE(6, 2, num_levels=1, task_experts=1, shared_experts=1, expert_units=(4,))
    said: list[str] = []
    table, measured = tune.tune(trunk, torch.randn(5, 6), rounds=1, prepare=prepare, choice=choose, say=said.append)
    assert (table, measured) == ({}, [])
    assert said
    assert all("has lost" in text for text in said)


def test_a_launch_that_does_not_fit_even_as_shipped_is_named_and_the_others_are_measured() -> None:
    count = 0

    def prepare(call: Any) -> tune_measure.Sampler:
        nonlocal count
        count += 1
        if count == 1:
            raise out_of_memory(nested=False)
        return lambda: 1e-6

    trunk = PLE(6, 2, num_levels=1, task_experts=1, shared_experts=1, expert_units=(4,))
    said: list[str] = []
    _, measured = tune.tune(trunk, torch.randn(5, 6), rounds=1, prepare=prepare, choice=choose, say=said.append)
    assert measured
    assert any("not measured, OutOfMemoryError with the shipped tile" in text for text in said)


def test_another_error_is_no_loss() -> None:
    def prepare(call: Any) -> tune_measure.Sampler:
        raise RuntimeError("an illegal memory access was encountered")

    trunk = PLE(6, 2, num_levels=1, task_experts=1, shared_experts=1, expert_units=(4,))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune.tune(trunk, torch.randn(5, 6), prepare=prepare, choice=choose)


def test_a_wrong_candidate_fails_the_run_after_all_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_measure, "_agree", lambda ours, theirs: False)
    with pytest.raises(SystemExit, match=r"differs from .*please report it"):
        run(tmp_path, TRUNKS)
    content = json.loads((tmp_path / "tiles.json").read_text(encoding="utf-8"))
    assert len(content["trunks"]) == 2


def test_named_trunks_are_those_of_the_benchmarks() -> None:
    for name, about in tune.TRUNKS.items():
        size = configs.SIZES[name]
        trunk, x = tune._build(about, torch.float32, torch.device("meta"))
        assert (*x.shape, trunk.num_tasks) == (size.batch, size.in_features, size.num_tasks)
        assert trunk.num_levels == size.num_levels
        assert trunk.levels[0].topology.num_experts == size.num_experts
        assert trunk.levels[-1].expert_specs[0].units == size.units


def test_the_options_of_one_trunk_are_one_trunk(tmp_path: Path) -> None:
    options = tune.parser().parse_args(
        "--in-features 6 --num-tasks 2 --expert-units 5,4 --batch 7 --activation gelu".split()
    )
    assert tune.trunks_of(options) == [
        {"in_features": 6, "num_tasks": 2, "expert_units": [5, 4], "activation": "gelu", "batch": 7}
    ]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(TRUNKS), encoding="utf-8")
    options = tune.parser().parse_args(["--trunk", "small", "--trunk", str(path)])
    assert tune.trunks_of(options) == [tune.TRUNKS["small"], *TRUNKS]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "expected --trunk, or a trunk of its own options; missing: --in-features, --num-tasks, --batch"),
        ("--in-features 6 --batch 5", "missing: --num-tasks"),
        ("--trunk small --batch 5", "got both: batch"),
        ("--trunk huge", "expected one of small, medium, large, or a JSON file, got 'huge'"),
        ("--trunk small --rounds 0", "--rounds: expected 1 or more"),
        ("--trunk small --processes 0", "--processes: expected 1 or more"),
        ("--trunk small --share 2/2", "--share: expected N/M"),
    ],
)
def test_wrong_arguments_are_named(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main(arguments.split())
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("content", ["[1]", '{"in_features": 6}', '[{"batch": 0}]', "{"])
def test_a_file_without_trunks_is_named(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trunk.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit):
        tune.main(["--trunk", str(path)])
    assert str(path) in capsys.readouterr().err


def test_shares_together_run_every_candidate_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = PLE(6, 2, num_levels=1, task_experts=1, shared_experts=1, expert_units=(4,))
    x = torch.randn(5, 6, requires_grad=True)
    tuner = tune_measure.Tuner(torch.device("cpu"), Prepared(), 1, print)
    options = [Tile(16, 16, 16, 4, 2), Tile(32, 16, 16, 4, 2), Tile(16, 32, 16, 4, 2)]
    run_with: list[Any] = []
    monkeypatch.setattr(
        tune_measure.Tuner, "asked", lambda *a: tiles.Asked("linear/ieee", 1, options[0], lambda t: True)
    )
    monkeypatch.setattr(tune_calls.Call, "run", lambda self, tile=None: run_with.append(tiles._own["interpreter"]))
    (call, *_) = recorded = tune_calls.recorded(trunk, x)
    assert recorded
    run_with.clear()
    for share in range(2):
        tuner.compile(call, lambda kind: options, share, 2)
    tuner.tiles.set_table("interpreter", None)
    assert sorted(table["linear/ieee"][0].tile for table in run_with) == sorted(options)


@pytest.mark.slow
def test_processes_compile_before_anything_is_timed(tmp_path: Path) -> None:
    """The real command, in a process that times nothing: without a GPU a sample cannot be captured."""
    path = tmp_path / "trunk.json"
    path.write_text(json.dumps(TRUNKS[0]), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": IMPORT_PATH, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "ple_fast.tune", "--trunk", str(path), "--device", "cpu", "--dtype", "float32"]
    options = ["--processes", "2", "--minutes", "0", "--out", str(tmp_path / "tiles.json")]
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "compiling in 2 processes" in done.stderr
    assert "compiled for" in done.stderr


def test_a_launch_is_named_alike_in_every_process() -> None:
    program = (
        "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
        "from tests.interpreter import install; install()\n"
        "import torch\nfrom ple_fast import PLE, tune_calls\n"
        "trunk = PLE(6, 2, num_levels=1, task_experts=1, shared_experts=1, expert_units=(4,))\n"
        "print('\\n'.join(c.launch for c in tune_calls.recorded(trunk, torch.randn(5, 6, requires_grad=True))))"
    )
    environment = {**os.environ, "PYTHONPATH": IMPORT_PATH}
    found = [
        subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert found[0] == found[1]
    trunk = PLE(6, 2, num_levels=1, task_experts=1, shared_experts=1, expert_units=(4,))
    here = [call.launch for call in tune_calls.recorded(trunk, torch.randn(5, 6, requires_grad=True))]
    assert found[0].split("\n")[:-1] == here
    other = [call.launch for call in tune_calls.recorded(trunk, torch.randn(7, 6, requires_grad=True))]
    assert not set(here) & set(other)

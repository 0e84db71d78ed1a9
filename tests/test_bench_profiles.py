"""What the CPU benchmarks can vary: instructions, threads, autocast; and the floor of the fastest ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import configs, profiles, run, steps
from benchmarks.bare_best import BEST_FLOOR
from benchmarks.configs import TrunkConfig
from benchmarks.environment import machine_name, products_in_use
from benchmarks.gradients import INPUT, OUTPUTS, PARAMETER, kinks, usual
from benchmarks.report import norms_table, spreads_table
from benchmarks.result_files import load, write
from benchmarks.steps import WrongResultError, check, make_step
from ple_fast.torch_backend import products
from ple_fast.torch_backend.table_in_use import using
from tests.product_helpers import nth_ways

TINY = TrunkConfig("tiny-bench", 40, 12, 2, task_experts=1, shared_experts=1, units=(8, 6))


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_the_best_floor_is_every_product_of_the_step_by_its_fastest_way(
    mode: configs.Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_kinds: list[str] = []

    def counted(kind: str, name: str, way: Any) -> Any:
        def compute(*arguments: Any) -> Any:
            run_kinds.append(f"{kind}: {name}")
            return way(*arguments)

        return compute

    for kind, ways in (
        ("linear", products._LINEAR),
        ("grouped", products._GROUPED),
        ("grouped_weight_grad", products._GROUPED_WEIGHT_GRAD),
    ):
        for name, way in ways.items():
            monkeypatch.setitem(ways, name, counted(kind, name, way))
    step = make_step(BEST_FLOOR, TINY, mode)
    assert step.trunk is None
    run_kinds.clear()
    step.run()
    kinds = [entry.partition(":")[0] for entry in run_kinds]
    # Gates and experts of the first level share an input; the second layers of both levels are grouped.
    assert kinds.count("linear") == 2 and kinds.count("grouped") == 2
    assert ("grouped_weight_grad" in kinds) == (mode == "train")
    before = list(run_kinds)
    run_kinds.clear()
    step.run()
    assert run_kinds == before, "which way is chosen once"


def test_under_autocast_a_contestant_may_be_off_by_twice_what_the_loop_is() -> None:
    config = TINY.under_autocast("bfloat16")
    modes: tuple[configs.Mode, ...] = ("train", "inference")
    for mode in modes:
        for name in ("loop", "fast", "bmm"):
            step = make_step(name, config, mode)
            outputs: Any = step.run()
            assert outputs[0].dtype == torch.bfloat16
    with torch.random.fork_rng(devices=[]):
        trunk = make_step("fast", config, "inference").trunk
    assert trunk is not None
    with torch.no_grad():
        next(trunk.parameters()).mul_(1.1)
    with pytest.raises(WrongResultError, match="fast at tiny-bench, inference: outputs differ"):
        check("fast", trunk, config, "inference")


def test_one_row_under_autocast_may_lie_at_a_kink_and_outputs_may_not() -> None:
    assert kinks(INPUT, 1) == 0.1 and kinks(f"{PARAMETER}of a name", 4) == 0.5
    assert kinks(OUTPUTS, 1) == 0.0
    assert kinks(INPUT, 1 << 16) < 1e-3
    for seed in range(5):
        config = TINY.under_autocast("bfloat16").at(1)
        with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
            patch.setattr(steps, "SEED", seed)
            make_step("fast", config, "train")


def test_a_parameter_may_be_off_as_far_as_the_one_that_is_off_most() -> None:
    """In low precision which of them the baseline has nearly right is luck."""
    own = {f"{PARAMETER}a": 0.01, f"{PARAMETER}b": 0.05, OUTPUTS: 0.2}
    assert usual(own, 0.125) == 0.05 and usual(own, 0.02) == 0.02
    assert usual({OUTPUTS: 0.2}, 0.125) == 0.0


def test_norms_under_autocast_count_no_bytes() -> None:
    entry = {"peer": "a", "ours": "b", "mode": "train", "batch": 4, "ratio": 1.5, "peer_ms": 3.0, "ours_ms": 2.0}
    shown = norms_table({"results": [entry], "saved": []})
    assert "1.50 x" in shown and "MiB" not in shown
    counts = [{"contestant": name, "saved_bytes": 1 << 20} for name in ("a", "b")]
    assert "saved, MiB" in norms_table({"results": [entry], "saved": counts})


def test_the_table_of_profiles_leads_with_the_worst_of_grid_and_norms() -> None:
    def grid(low: float) -> dict[str, Any]:
        points = [
            {"point": f"b{i}", "train": {"ratio": low + i}, "inference": {"ratio": low + 2 * i}} for i in range(3)
        ]
        return {"results": points}

    norms = {"results": [{"peer": "a", "mode": "inference", "batch": 4, "ratio": 0.5}]}
    shown = spreads_table({"good": {"grid": grid(1.5)}, "bad": {"grid": grid(1.0), "norms": norms}, "none": {}})
    lines = shown.splitlines()[2:]
    assert lines == [
        "| bad | 1.00 x at `b0`; 2.00 x in the middle | 1.00 x at `b0`; 3.00 x in the middle |  | 0.50 x `a`, 4 |",
        "| good | 1.50 x at `b0`; 2.50 x in the middle | 1.50 x at `b0`; 3.50 x in the middle |  |  |",
    ]


def test_a_folder_says_what_differs_from_two_threads_and_float32() -> None:
    name = machine_name()
    assert name.startswith("cpu-") and name.endswith(torch.backends.cpu.get_cpu_capability().lower())
    assert run.folder_name(configs.THREADS, "float32") == name
    assert run.folder_name(1, "bf16") == f"{name}-1thread-bf16"


def test_results_say_which_table_of_products_was_in_use() -> None:
    assert products_in_use().endswith(".json") or products_in_use().startswith("none: ")
    with using(nth_ways(0)._replace(source="/somewhere/own.json")):
        assert products_in_use() == "own.json"


def test_a_folder_that_mixes_machines_is_refused(tmp_path: Path) -> None:
    about = {"cpu": "Some", "cores": 2, "cpu_capability": "AVX512"}
    write(tmp_path / "grid.json", "grid", {"results": []}, about)
    write(tmp_path / "norms.json", "norms", {"results": []}, about)
    assert set(load(tmp_path)) == {"grid", "norms"}
    write(tmp_path / "norms.json", "norms", {"results": []}, about | {"cpu_capability": "AVX2"})
    with pytest.raises(ValueError, match=r"got grid.json: Some, 2, AVX512; norms.json: .*AVX2"):
        load(tmp_path)


@pytest.mark.parametrize("profile", profiles.PROFILES)
def test_a_profile_runs_in_a_process_of_its_own(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []

    class Done:
        returncode = 3

    def start(command: list[str], env: dict[str, str], check: bool) -> Done:
        started.append((command, env))
        return Done()

    monkeypatch.setattr("benchmarks.profiles.subprocess.run", start)
    with pytest.raises(SystemExit) as left:
        run.main(["--profile", profile, "--only", "grid"])
    assert left.value.code == 3
    ((command, env),) = started
    assert command[-4:] == ["--profile", profile, "--only", "grid"]
    assert {"ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"} <= env.keys()
    assert env["TORCHINDUCTOR_CACHE_DIR"].endswith(profile)


def test_only_some_parts_run_under_autocast(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--dtype", "bf16", "--only", "scaling,grid"])
    assert "--dtype bf16: only grid, head_to_head, norms, got scaling" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="nothing to emulate")
def test_avx2_is_emulated(tmp_path: Path) -> None:
    status = profiles.run_emulated(
        "avx2", ["--profile", "avx2", "--quick", "--only", "grid", "--results", str(tmp_path)]
    )
    assert status == 0
    (folder,) = tmp_path.iterdir()
    content = json.loads((folder / "grid.json").read_text(encoding="utf-8"))
    assert folder.name.endswith("-avx2") and content["environment"]["cpu_capability"] == "AVX2"

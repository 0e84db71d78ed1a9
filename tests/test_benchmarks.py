"""The benchmarks measure what they say: equal results, counted work, and a README that quotes the committed figures."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ple_fast
from benchmarks import host_time, report, scaling, whole_model
from benchmarks.analytic import work
from benchmarks.bare_gemm import BareGemm
from benchmarks.configs import (
    GRID,
    HEAD_TO_HEAD,
    HOST_ROUNDS,
    KUAIRAND,
    MODES,
    ROUNDS,
    SCALING_BATCHES,
    SCALING_RANKS,
    SIZES,
    WHOLE_MODEL,
    Mode,
    TrunkConfig,
    suite_config,
)
from benchmarks.contestants import CONTESTANTS, NORM_PAIRS, OURS, build
from benchmarks.contestants import HEAD_TO_HEAD as RIVALS
from benchmarks.environment import ROOT
from benchmarks.gradients import ALL, INPUT, OUTPUTS, PARAMETER
from benchmarks.loop import LoopPLE, baseline
from benchmarks.paired import Paired, time_paired
from benchmarks.peers import import_deepctr
from benchmarks.rendering import quoted, with_block
from benchmarks.result_files import load, write
from benchmarks.saved_bytes import cost, saved_bytes
from benchmarks.steps import WrongResultError, check, errors, make_step
from tests.ranks import run_ranks

TINY = TrunkConfig("tiny", 6, 5, 3, units=(7, 4), dtype="float64")
EAGER = [name for name, entry in CONTESTANTS.items() if name != "loop" and not entry.compiled]


def trunk_of(name: str, config: TrunkConfig) -> nn.Module:
    if requires := CONTESTANTS[name].requires:
        pytest.importorskip(requires)
    return build(name, config)


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name in EAGER for mode in CONTESTANTS[name].modes])
def test_a_contestant_computes_what_the_loop_computes(name: str, mode: Mode) -> None:
    found = errors(name, trunk_of(name, TINY), TINY, mode)
    gradients = {key for key in found if key.startswith(PARAMETER)}
    assert set(found) - gradients == {OUTPUTS} | (set() if mode == "inference" else {INPUT, ALL})
    assert bool(gradients) is (mode != "inference")
    assert max(found.values()) < 1e-12, found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loop_compiled", "loop_batch_linear", "loop_frozen"])
def test_a_compiled_loop_computes_what_the_loop_computes(name: str) -> None:
    torch._dynamo.reset()
    modes: list[Mode] = ["train", "inference"]
    for mode in modes:
        if mode in CONTESTANTS[name].modes:
            check(name, build(name, TINY), TINY, mode)


@pytest.mark.parametrize("name", [name for name in EAGER if not CONTESTANTS[name].same_widths])
def test_levels_of_other_widths_are_computed_and_counted_too(name: str) -> None:
    narrowing = TrunkConfig("narrowing", 6, 5, 3, units=(7, 6), later_units=(4,), num_levels=3, dtype="float64")
    assert narrowing.level_units() == ((7, 6), (4,), (4,))
    for mode in CONTESTANTS[name].modes:
        assert max(errors(name, build(name, narrowing), narrowing, mode).values()) < 1e-12
    with FlopCounterMode(display=False) as counter:
        BareGemm(narrowing).step("train")()
    assert counter.get_total_flops() == work(narrowing, "train").product_flops


def test_a_peer_that_knows_one_width_says_so() -> None:
    with pytest.raises(ValueError, match=r"rechub: gives every level the same widths"):
        build("rechub", SIZES["paper_gpu"])


@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_contestant_is_refused_before_it_is_timed(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(name: str, config: TrunkConfig) -> nn.Module:
        trunk = build(name, config)
        with torch.no_grad():
            next(trunk.parameters()).view(-1)[0] += 0.5
        return trunk

    monkeypatch.setattr("benchmarks.steps.build", wrong)
    with pytest.raises(WrongResultError, match=r"bmm at tiny, .* differ by"):
        make_step("bmm", TINY, mode)


def test_a_result_that_is_nan_is_refused() -> None:
    trunk = baseline(TINY)
    with torch.no_grad():
        next(trunk.parameters()).fill_(math.nan)
    with pytest.raises(WrongResultError, match="inf"):
        check("loop", trunk, TINY, "inference")


@pytest.mark.parametrize("input_grad", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("units", [(7,), (7, 4), (7, 6, 4)])
def test_the_bare_products_do_the_analytic_work(units: tuple[int, ...], mode: Mode, input_grad: bool) -> None:
    config = TrunkConfig("any", 6, 5, 3, task_experts=2, shared_experts=1, units=units, num_levels=3)
    with FlopCounterMode(display=False) as counter:
        BareGemm(config, input_grad=input_grad).step(mode)()
    assert counter.get_total_flops() == work(config, mode, input_grad=input_grad).product_flops


@pytest.mark.parametrize("input_grad", [True, False])
def test_the_loop_does_the_analytic_work(input_grad: bool) -> None:
    config = SIZES["cpu"].at(8)
    step = make_step("loop", config, "train", input_grad=input_grad)
    with FlopCounterMode(display=False) as counter:
        step.run()
    assert counter.get_total_flops() == work(config, "train", input_grad=input_grad).flops


def test_the_size_of_the_head_to_head_is_the_one_that_was_asked_for() -> None:
    cpu = SIZES["cpu"]
    assert (cpu.in_features, cpu.num_tasks, cpu.task_experts, cpu.shared_experts) == (512, 3, 2, 2)
    assert (cpu.units, cpu.num_levels, cpu.dtype) == ((256, 128), 2, "float32")
    assert set(HEAD_TO_HEAD) == {("train", 4096), ("train", 256), *(("inference", b) for b in (4096, 256, 1))}
    assert work(cpu, "train").product_flops == pytest.approx(45.4e9, rel=0.01)
    assert suite_config("cpu-256") == cpu.at(256)
    with pytest.raises(ValueError, match="expected one of"):
        suite_config("huge")


def test_the_grid_covers_what_it_promises() -> None:
    assert (min(c.batch for c in GRID), max(c.batch for c in GRID)) == (1, 65536)
    for batch in {c.batch for c in GRID}:
        points = [c for c in GRID if c.batch == batch]
        assert {min(c.num_tasks for c in points), max(c.num_tasks for c in points)} == {2, 8}
        assert {min(len(c.units) for c in points), max(len(c.units) for c in points)} == {1, 4}
    assert len({c.name for c in GRID}) == len(GRID)
    assert ROUNDS >= 15


def test_saved_bytes_of_a_known_graph() -> None:
    x, w = torch.randn(10, 4, requires_grad=True), torch.randn(4, 3, requires_grad=True)

    def forward() -> list[torch.Tensor]:
        h = (x @ w).tanh()  # saves x and w (left out), and its own output
        return [h * h, h.view(-1)[:3].exp()]  # saves h again (once), and 3 numbers

    assert saved_bytes(forward, [x, w]) == (10 * 3 + 3) * 4
    assert saved_bytes(forward) == (10 * 3 + 3 + 10 * 4 + 4 * 3) * 4


def test_saved_bytes_sees_what_a_function_hides_on_its_context() -> None:
    class Hiding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.hidden = {"inside": [x.exp()]}
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return grad * ctx.hidden["inside"][0]

    hide: Any = Hiding.apply
    x = torch.randn(5, requires_grad=True)
    assert saved_bytes(lambda: [hide(x) + 1], [x]) == 5 * 4


def test_cost_counts_operators_but_no_views() -> None:
    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [(x + x)[:, :4].sigmoid() for _ in range(3)]

    config = TrunkConfig("any", 6, 5, 3, units=(4,))
    measured = cost(Doubled(), config)
    assert measured.forward_operators == 3 * 2  # add, sigmoid
    assert measured.saved_bytes == 3 * 6 * 4 * 4  # the outputs of sigmoid
    assert measured.backward_operators > 3


@pytest.mark.parametrize(("name", "limit"), [("fast", 0.65), ("fast_recompute", 0.1)])
def test_ours_saves_less_for_backward_than_the_loop(name: str, limit: float) -> None:
    config = SIZES["cpu"].at(512)
    loop = cost(build("loop", config), config).saved_bytes
    assert cost(build(name, config), config).saved_bytes <= limit * loop


def test_importing_deepctr_asks_no_package_index() -> None:
    pytest.importorskip("deepctr_torch")
    code = (
        "import requests, threading\n"
        "def refuse(*a, **k): raise SystemExit('asked the package index')\n"
        "requests.get = refuse\n"
        "from benchmarks.peers import import_deepctr\n"
        "import_deepctr()\n"
        "started = [t.name for t in threading.enumerate() if t is not threading.main_thread()]\n"
        "assert not [n for n in started if 'check' in n], started\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Please check the latest version" not in done.stdout
    assert import_deepctr().__name__ == "PLE"


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


@pytest.mark.parametrize("name", [name for name in RIVALS if name not in (*OURS, "bare_gemm")])
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


def test_the_readme_quotes_the_committed_results() -> None:
    text = report.README.read_text(encoding="utf-8")
    machine = report.readme_source(text)
    files = load(ROOT / "benchmarks" / "results" / machine)
    assert quoted(text, "cpu") == report.readme_block(machine, files), (
        "render it again: .venv/bin/python benchmarks/report.py --write-readme"
    )


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


def page_block(kind: str) -> str:
    """What the page of a result file quotes of it."""
    return quoted(report.BLOCKS[kind].page.read_text(encoding="utf-8"), kind)


def test_the_page_on_performance_quotes_the_committed_norms() -> None:
    machine = report.readme_source(report.README.read_text(encoding="utf-8"))
    norms = load(ROOT / "benchmarks" / "results" / machine)["norms"]
    assert page_block("norms") == report.block("norms", machine, norms), (
        "render it again: .venv/bin/python benchmarks/report.py --write-readme"
    )
    cases = [(peer, ours, *case) for peer, ours in NORM_PAIRS for case in HEAD_TO_HEAD]
    assert [(e["peer"], e["ours"], e["mode"], e["batch"]) for e in norms["results"]] == cases
    assert all(entry["rounds"] >= 15 for entry in norms["results"])
    assert {entry["contestant"] for entry in norms["saved"]} == {name for pair in NORM_PAIRS for name in pair}


@pytest.mark.parametrize(("peer", "ours"), NORM_PAIRS)
def test_ours_with_norms_or_dropout_saves_less_than_the_peer(peer: str, ours: str) -> None:
    config = SIZES["cpu"].at(512)
    assert cost(trunk_of(ours, config), config).saved_bytes <= 0.7 * cost(trunk_of(peer, config), config).saved_bytes


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


def test_the_page_on_scale_quotes_the_committed_scaling() -> None:
    """Nothing, as long as nothing was measured."""
    machine = report.readme_source(report.README.read_text(encoding="utf-8"))
    found = load(ROOT / "benchmarks" / "results" / machine).get("scaling")
    page = page_block("scaling")
    assert page == ("" if found is None else report.block("scaling", machine, found)), (
        "render it again: .venv/bin/python benchmarks/report.py --write-readme"
    )
    if found is not None:
        cases = [(batch, ranks) for batch in SCALING_BATCHES for ranks in SCALING_RANKS]
        assert [(entry["batch_per_rank"], entry["ranks"]) for entry in found["results"]] == cases
        assert all(entry["rounds"] >= ROUNDS for entry in found["results"])


TINY_MODEL = replace(KUAIRAND, fields=(("user", 7), ("item", 9)), width=4, units=(6, 5), tower_units=(3,))


@pytest.mark.slow
def test_ranks_are_timed_together() -> None:
    paired = scaling.measure(TINY_MODEL, (8, 5), (1, 2), rounds=2)
    cases = [
        scaling.case(trunk, batch, ranks, apart=apart)
        for batch in (8, 5)
        for ranks, apart in ((1, False), (2, False), (2, True))
        for trunk in scaling.TRUNKS
    ]
    assert list(paired.samples) == cases
    for samples in paired.samples.values():
        assert len(samples) == 2
        assert min(samples) > 1e-4  # a step, and not the wait of a rank that has none


def losses_of_rank(batch: int) -> dict[str, torch.Tensor]:
    group = dist.group.WORLD
    assert group is not None
    steps = {trunk: scaling.make_step(trunk, TINY_MODEL, batch, group) for trunk in scaling.TRUNKS}
    return {trunk: torch.stack([step() for _ in range(3)]) for trunk, step in steps.items()}


def wrong_rank() -> None:
    def build_wrong(name: str, config: TrunkConfig) -> nn.Module:
        trunk = build(name, config)
        if name == "fast":
            with torch.no_grad():
                for parameter in trunk.parameters():
                    parameter.add_(0.5)
        return trunk

    with mock.patch.object(scaling, "build", build_wrong):
        scaling.time_ranks(TINY_MODEL, (8,), (1, 2), 1)


@pytest.mark.slow
def test_both_trunks_of_the_scaling_train_alike() -> None:
    first, second = run_ranks(2, losses_of_rank, 8)
    for losses in (first, second):
        torch.testing.assert_close(losses["fast"], losses["loop"], rtol=1e-5, atol=0)
    assert not torch.allclose(first["fast"], second["fast"])  # rows of its own on each rank
    with pytest.raises(RuntimeError, match="WrongResultError: 8 rows on each of 1 ranks: expected the same losses"):
        run_ranks(2, wrong_rank)


def test_committed_results_are_complete_and_not_quick() -> None:
    machine = report.readme_source(report.README.read_text(encoding="utf-8"))
    files = load(ROOT / "benchmarks" / "results" / machine)
    head = files["head_to_head"]
    assert [(entry["mode"], entry["batch"]) for entry in head["results"]] == list(HEAD_TO_HEAD)
    for entry in head["results"]:
        expected = {name for name in RIVALS if name == "bare_gemm" or entry["mode"] in CONTESTANTS[name].modes}
        assert set(entry["contestants"]) == expected
        assert entry["rounds"] >= 15
    assert [entry["point"] for entry in files["grid"]["results"]] == [c.name for c in GRID]
    assert {entry["contestant"] for entry in head["saved"]} >= {*OURS, "loop"}


def test_the_page_on_swapping_quotes_the_committed_whole_models() -> None:
    machine = report.readme_source(report.README.read_text(encoding="utf-8"))
    found = load(ROOT / "benchmarks" / "results" / machine)["whole_model"]
    results = found["results"]
    page = page_block("whole_model")
    assert page == report.block("whole_model", machine, {"results": results, "environment": found["environment"]}), (
        "render it again: .venv/bin/python benchmarks/report.py --write-readme"
    )
    assert [(entry["library"], entry["mode"], entry["batch"]) for entry in results] == [
        (library, *case) for library in whole_model.LIBRARIES for case in WHOLE_MODEL
    ]
    for entry in results:
        assert set(entry["contestants"]) == set(whole_model.VARIANTS)
        assert entry["rounds"] >= ROUNDS


def test_the_page_on_benchmarks_quotes_the_committed_host_time() -> None:
    machine = report.readme_source(report.README.read_text(encoding="utf-8"))
    found = load(ROOT / "benchmarks" / "results" / machine)["host_time"]
    page = page_block("host_time")
    assert page == report.block("host_time", machine, found), (
        "render it again: .venv/bin/python benchmarks/report.py --write-readme"
    )
    assert [entry["mode"] for entry in found["results"]] == [*host_time.MODES]
    for entry in found["results"]:
        assert [*entry["contestants"]] == [*host_time.CASES]
        assert entry["rounds"] >= HOST_ROUNDS
        assert entry["contestants"][host_time.OURS]["ratio_to_loop"] <= host_time.TARGETS[entry["mode"]]


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


def test_the_loop_is_seeded() -> None:
    first, second = (baseline(TINY) for _ in range(2))
    assert isinstance(first, LoopPLE)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("library", whole_model.LIBRARIES)
def test_whole_models_agree_before_they_are_timed(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("train", "inference"):
        steps = whole_model.make_steps(library, mode, 8, whole_model.QUICK_VARIANTS, TINY_MODEL)
        results = {name: step() for name, step in steps.items()}
        torch.testing.assert_close(results["accelerated"], results["original"], rtol=1e-4, atol=1e-6)
    accelerate = ple_fast.accelerate

    def wrong(model: nn.Module, **options: Any) -> None:
        accelerate(model, **options)
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if name.endswith("bias") and "tower" in name).add_(1)

    monkeypatch.setattr(ple_fast, "accelerate", wrong)
    with pytest.raises(WrongResultError, match="accelerated, inference at 8"):
        whole_model.make_steps(library, "inference", 8, whole_model.QUICK_VARIANTS, TINY_MODEL)

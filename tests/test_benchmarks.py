"""Every contestant of the benchmarks computes what the loop computes, and its work is counted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.analytic import work
from benchmarks.bare_gemm import BareGemm
from benchmarks.configs import (
    MODES,
    SIZES,
    Mode,
    TrunkConfig,
)
from benchmarks.contestants import CONTESTANTS, build
from benchmarks.environment import ROOT
from benchmarks.gradients import ALL, INPUT, OUTPUTS, PARAMETER
from benchmarks.loop import LoopPLE, baseline
from benchmarks.peers import import_deepctr
from benchmarks.steps import WrongResultError, check, errors, make_step
from tests.benchmark_helpers import trunk_of
from tests.programs import run_python

TINY = TrunkConfig("tiny", 6, 5, 3, units=(7, 4), dtype="float64")


EAGER = [name for name, entry in CONTESTANTS.items() if name != "loop" and not entry.compiled]


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
    done = run_python("-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Please check the latest version" not in done.stdout
    assert import_deepctr().__name__ == "PLE"


def test_the_loop_is_seeded() -> None:
    first, second = (baseline(TINY) for _ in range(2))
    assert isinstance(first, LoopPLE)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)

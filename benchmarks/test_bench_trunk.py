"""Forward, training step and inference of every trunk at every size, with pytest-benchmark.

Each contestant passes the correctness gate first (``steps.make_step``). ``extra_info`` holds FLOPs, bytes, bytes saved
for backward and operator counts. Run through ``make bench``, or ``python -m pytest benchmarks``.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.analytic import work
from benchmarks.configs import MODES, Mode, TrunkConfig, suite_config
from benchmarks.contestants import CONTESTANTS, OURS, build
from benchmarks.saved_bytes import Cost, cost
from benchmarks.steps import make_step


@lru_cache
def _cost(name: str, config: TrunkConfig) -> Cost:
    return cost(build(name, config), config)


def _backend(name: str) -> str:
    """The backend that did the work: ours says which one it chose."""
    if name not in OURS:
        return "torch"
    from ple_fast.backend import last_backend

    choice = last_backend()
    assert choice is not None
    return choice.name


@pytest.mark.parametrize("mode", MODES)
def test_bench_trunk(benchmark: BenchmarkFixture, size: str, contestant: str, mode: Mode) -> None:
    config, entry = suite_config(size), CONTESTANTS[contestant]
    if not entry.available():
        pytest.skip(f"{entry.requires} is not installed: pip install 'ple-fast[bench]'")
    if not entry.supports(config):
        pytest.skip(f"{contestant} gives every level the same widths")
    if mode not in entry.modes:
        pytest.skip(f"{contestant} has no {mode}")
    step = make_step(contestant, config, mode)
    benchmark.group = f"{size} {mode}"
    amount = work(config, mode)
    benchmark.extra_info.update(
        size=size,
        contestant=contestant,
        mode=mode,
        backend=_backend(contestant),
        flops=amount.flops,
        product_flops=amount.product_flops,
        least_bytes=amount.least_bytes,
        parameters=sum(p.numel() for p in step.trunk.parameters()) if step.trunk is not None else 0,
    )
    if mode != "inference":
        benchmark.extra_info.update(dataclasses.asdict(_cost(contestant, config)))
    benchmark(step.run)

"""Forward, training step and inference of every trunk at every size, with pytest-benchmark.

Each contestant passes the correctness gate first (``steps.make_step``). ``extra_info`` holds FLOPs, bytes, bytes saved
for backward and operator counts. Run through ``make bench``, or ``python -m pytest benchmarks``.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.analytic import work
from benchmarks.configs import MODES, Mode, TrunkConfig, suite_config
from benchmarks.contestants import CONTESTANTS, build
from benchmarks.gpu_cases import backend_of
from benchmarks.saved_bytes import Cost, cost
from benchmarks.steps import make_step


@lru_cache
def _cost(name: str, config: TrunkConfig) -> Cost:
    return cost(build(name, config), config)


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
    benchmark.extra_info.update(
        size=size,
        contestant=contestant,
        mode=mode,
        backend=backend_of(contestant, torch.device("cpu")),
        **work(config, mode).counts(),
        parameters=sum(p.numel() for p in step.trunk.parameters()) if step.trunk is not None else 0,
    )
    if mode != "inference":
        benchmark.extra_info.update(dataclasses.asdict(_cost(contestant, config)))
    benchmark(step.run)

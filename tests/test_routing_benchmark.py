"""The benchmark of skipped experts: what it compares, and what its files hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import report, routing
from benchmarks.configs import ROUNDS, ROUTING_EXPERTS, RoutingConfig
from benchmarks.result_files import read, write
from benchmarks.steps import WrongResultError
from tests.test_committed_results import quoted_results

TINY = RoutingConfig(batch=9, in_features=5, num_tasks=3, units=(6, 4), top_k=2, joint_k=1)


def test_both_compute_the_same_and_are_written(tmp_path: Path) -> None:
    results = routing.measure(TINY, (4, 8), rounds=2)
    assert [(own["mode"], own["experts"]) for own in results] == [(m, e) for e in (4, 8) for m in routing.MODES]
    assert all(1 <= own["read_per_row"] <= 1 + 3 for own in results)
    write(tmp_path / "routing.json", "routing", {"results": results})
    lines = report.block("routing", "some", read(tmp_path / "routing.json", "routing")).splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 2 + 4
    assert "9 rows of 5 features, experts of 6 and 4 units, 3 tasks" in "\n".join(lines)


def test_experts_that_nobody_chooses_are_skipped() -> None:
    level = routing.make_level(TINY, 8)
    x = torch.randn(9, 5)
    assert level.gate.bias is not None
    with torch.no_grad():
        level.gate.bias.view(3, 8)[:, 2:] -= 100.0  # two are left to choose from
        for layer in level.blocks[0].layers:  # type: ignore[union-attr]  # of the block
            layer.weight[2:] = float("nan")
        assert routing.routed(level, x).isfinite().all()


def test_nothing_is_timed_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(level: Any, x: Tensor) -> Tensor:
        return 2 * right(level, x)

    right = routing.routed
    monkeypatch.setattr(routing, "routed", wrong)
    with pytest.raises(WrongResultError, match="4 experts: dense and routed differ"):
        routing.steps_of(TINY, 4)


def test_the_page_quotes_the_committed_file() -> None:
    """Nothing, as long as nothing was measured."""
    for own in quoted_results("routing"):
        assert own["rounds"] >= ROUNDS and own["experts"] in ROUTING_EXPERTS

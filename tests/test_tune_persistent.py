"""Programs that stay against kernels that load by pointers, measured without a GPU: times are made up by what a call
launches."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ple_fast import PLE, tune, tune_measure
from ple_fast.tune_library import STAYING, Compared, library_rows
from tests.test_tune import where

pytest.importorskip("triton")

from ple_fast_kernels import Class, Tile
from tests.persistent_helpers import KERNELS, launched

__all__ = ["where"]
tiles: Any = importlib.import_module("ple_fast_kernels._tiles")
TILE = Tile(32, 32, 32, 4, 2)
SHIPPED = {kind: (Class(512, TILE),) for kind in STAYING}


def entry(work: float, pointers: float, staying: float) -> Compared:
    return Compared(STAYING[0], "", work, pointers, staying)


def test_programs_stay_from_where_they_have_won_all_that_was_measured() -> None:
    def row(*compared: Compared) -> Any:
        return library_rows(compared, SHIPPED, 0.02)[STAYING[0]]

    assert row(entry(600.0, 2.0, 1.0)) == (Class(512, TILE),), "as shipped: nothing below was measured"
    assert row(entry(100.0, 2.0, 1.0), entry(900.0, 2.0, 1.0)) == (Class(100, TILE),)
    assert row(entry(600.0, 1.0, 2.0), entry(900.0, 2.0, 1.0)) == (Class(900, TILE),)
    assert row(entry(900.0, 1.0, 0.99)) == (), "within noise: never"


def prepare_as(wins: bool) -> Callable[[Callable[[], object]], tune_measure.Sampler]:
    """Makes what stays faster, or slower."""

    def prepare(call: Callable[[], object]) -> tune_measure.Sampler:
        with launched() as found:
            call()
        stays = any(name in KERNELS.values() for name, _ in found)
        return lambda: 1e-6 if stays == wins else 2e-6

    return prepare


@pytest.mark.parametrize("wins", [True, False])
def test_products_of_a_trunk_are_compared(
    wins: bool, where: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = tiles.architecture(where)[0]
    monkeypatch.setitem(tiles.TABLES, name, {**tiles.TABLES[name], **SHIPPED})
    trunk = PLE(24, 2, num_levels=1, task_experts=1, shared_experts=1, expert_units=(40, 24), dtype=torch.bfloat16)
    x = torch.randn(40, 24, dtype=torch.bfloat16).to(where).requires_grad_()
    table, measured = tune.tune(trunk.to(where), x, rounds=1, prepare=prepare_as(wins), choice=lambda kind: [])
    compared = [m for m in measured if isinstance(m, Compared) and m.kind in STAYING]
    assert {m.kind for m in compared} == set(STAYING)
    assert all((m.library < m.kernels) is wins and not m.product for m in compared)
    for kind in STAYING:
        least = min(int(m.work) for m in compared if m.kind == kind)
        assert table[kind] == ((Class(least, TILE),) if wins else SHIPPED[kind]), "512 results were not measured"
    assert tiles._own == {} and tiles.asked is None
    tune.save(tmp_path / "mine.json", table, measured, where, {})
    results: Any = importlib.import_module("ple_fast.tune_results")
    content = json.loads((tmp_path / "mine.json").read_text(encoding="utf-8"))
    read = results._entries(content)
    assert [m for m in read if isinstance(m, Compared) and m.kind in STAYING] == compared

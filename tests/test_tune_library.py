"""The library against the kernels, measured without a GPU: times are made up by what a call launches."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ple_fast import PLE, tune, tune_measure
from ple_fast.tune_library import Compared, library_rows, plain_of
from tests.test_tune import choose, where

pytest.importorskip("triton")

from ple_fast_kernels import Library, Tile, reload_tables

__all__ = ["where"]
tiles: Any = importlib.import_module("ple_fast_kernels._tiles")
library: Any = importlib.import_module("ple_fast_kernels.library")
SHIPPED = {"library/half": Library(30, 30, None)}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    reload_tables()


def entry(work: float, kernels: float, ours: float, product: str = "linear") -> Compared:
    return Compared("library/half", product, work, kernels, ours)


def least(*compared: Compared) -> int | None:
    row = library_rows(compared, SHIPPED, 0.02)["library/half"]
    assert isinstance(row, Library)
    return row.linear


def test_the_library_is_taken_from_where_it_has_won_all_that_was_measured() -> None:
    assert least(entry(5.5, 2.0, 1.0), entry(60.0, 2.0, 1.0)) == 5
    assert least(entry(5.0, 1.0, 2.0), entry(20.0, 2.0, 1.0), entry(60.0, 2.0, 1.0)) == 20
    assert least(entry(60.0, 1.0, 2.0)) is None, "and not from 30 on, as shipped"
    assert least(entry(60.0, 1.0, 0.99)) is None, "within noise"
    assert least(entry(20.2, 1.0, 2.0), entry(20.4, 9.0, 1.0)) == 20, "equal amounts are added"


def test_what_was_not_measured_stays_as_shipped() -> None:
    assert least(entry(60.0, 2.0, 1.0)) == 30, "between what was won and nothing that was lost"
    assert least(entry(5.0, 1.0, 2.0)) == 30
    assert least(entry(40.0, 1.0, 2.0), entry(60.0, 2.0, 1.0)) == 60
    row = library_rows([entry(60.0, 1.0, 2.0)], SHIPPED, 0.02)["library/half"]
    assert row == Library(None, 30, None)
    assert library_rows([], SHIPPED, 0.02) == {}
    assert library_rows([entry(1.0, 2.0, 1.0, "weight_grad")], {}, 0.02) == {"library/half": Library(None, None, 1)}


def in_library(seen: list[int], call: Callable[[], object]) -> bool:
    """Whether a call leaves its product to the library."""
    seen.clear()
    call()
    return bool(seen)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each product of the library."""
    found: list[int] = []
    run = library._product

    def product(a: Tensor, b: Tensor, out: Tensor, summand: Tensor | None) -> None:
        found.append(1)
        run(a, b, out, summand)

    monkeypatch.setattr(library, "_product", product)
    return found


def small(where: torch.device, activation: str = "relu") -> tuple[PLE, Tensor]:
    """A trunk of one level, and its input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"task_experts": 1, "shared_experts": 1, "expert_units": (5, 4), "num_levels": 1}
        trunk = PLE(6, 2, activation=activation, dtype=torch.bfloat16, **sizes).to(where)
        return trunk, torch.randn(4, 6, dtype=torch.bfloat16).to(where).requires_grad_()


@pytest.mark.parametrize("wins", [True, False])
def test_plain_products_of_a_trunk_are_compared(
    wins: bool, seen: list[int], where: torch.device, tmp_path: Path
) -> None:
    def prepare(call: Callable[[], object]) -> tune_measure.Sampler:
        seconds = 1e-6 if in_library(seen, call) == wins else 2e-6
        return lambda: seconds

    trunk, x = small(where, activation="prelu")
    table, measured = tune.tune(trunk, x, rounds=1, prepare=prepare, choice=lambda kind: [])
    compared = [m for m in measured if isinstance(m, Compared)]
    assert {(m.kind, m.product) for m in compared} == {("library/half", name) for name in Library._fields}
    assert all((m.library < m.kernels) is wins for m in compared)
    assert table["library/half"] == (Library(0, 0, 0) if wins else Library())
    assert tiles._own == {} and library.asked is None
    tune.save(tmp_path / "mine.json", table, measured, where, {})
    files: Any = importlib.import_module("ple_fast_kernels._tile_files")
    assert files.read_table(tmp_path / "mine.json", tiles.architecture(where)[0], tiles.KINDS) == table
    rows = json.loads((tmp_path / "mine.json").read_text(encoding="utf-8"))["kernels_library_us"]
    assert len(rows) == len(compared) and rows[0][3:5] == ([2.0, 1.0] if wins else [1.0, 2.0])


def test_tiles_are_measured_in_the_kernels_where_the_table_routes_the_library(
    seen: list[int], where: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = tiles.architecture(where)[0]
    monkeypatch.setitem(tiles.TABLES, name, {**tiles.TABLES[name], "library/half": Library(0, 0, 0)})
    trunk = PLE(6, 2, num_levels=1, task_experts=1, shared_experts=1, expert_units=(5, 4), dtype=torch.bfloat16).to(
        where
    )
    x = torch.randn(20, 6, device=where, dtype=torch.bfloat16, requires_grad=True)
    grads = ("input_grad/half", "weight_grad/half")

    def choice(kind: str) -> Sequence[Tile]:
        return choose(kind)[:1] if kind in grads else []

    _, measured = tune.tune(trunk, x, rounds=1, prepare=lambda call: lambda: 1.0, choice=choice)
    kinds = {m.kind for m in measured if isinstance(m, tune.Measured)}
    assert kinds == set(grads)


def test_other_precisions_are_not_compared(where: torch.device) -> None:
    from ple_fast_kernels import grouped_input_grad
    from ple_fast_kernels.tables import Readers

    readers = Readers.build((0, 0), 1)
    for dtype, precision in ((torch.float64, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")):
        d, weight, out = (torch.randn(*shape, dtype=dtype, device=where) for shape in ((9, 2, 5), (2, 5, 6), (9, 1, 6)))
        found = plain_of(partial(grouped_input_grad, d, weight, readers, out, precision=precision))
        assert (found is not None) is (precision == "tf32")
    work = 2 * 9 * 10 * 6 / 1e9 * 128 / tiles.architecture(where)[1]
    assert found[:2] == ("library/tf32", "input_grad") and found.work == pytest.approx(work)


def test_a_result_of_the_library_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch, where: torch.device) -> None:
    def wrong(a: Tensor, b: Tensor, out: Tensor, summand: Tensor | None) -> None:
        out.fill_(1.0)

    monkeypatch.setattr(library, "_product", wrong)
    trunk = PLE(6, 2, num_levels=1, task_experts=1, shared_experts=1, expert_units=(5, 4), dtype=torch.bfloat16).to(
        where
    )
    x = torch.randn(20, 6, device=where, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(RuntimeError, match="by the library differs"):
        tune.tune(trunk, x, rounds=1, prepare=lambda call: lambda: 1.0, choice=lambda kind: [])
    assert tiles._own == {}

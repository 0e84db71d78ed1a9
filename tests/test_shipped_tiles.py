"""Every tile of the shipped tables in every kernel that reads it, as a GPU runs it in a level: aligned operands, ragged
rows, more steps than stages; against float64, twice.

With ``--device cuda`` these are the rows of that GPU's architecture. In the interpreter, to which warps and stages mean
nothing, the largest tile of every kernel runs, and the others are marked slow.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.runtime.jit import JITFunction

from ple_fast_kernels import TABLES, Class, Tile, architecture, set_table
from ple_fast_kernels._launch import CACHED_VERSIONS
from ple_fast_kernels._tile_files import PERSISTENT
from ple_fast_kernels._tile_tables import MIXTURES
from tests.kernel_helpers import hold, tf32
from tests.shipped_tiles import KERNELS, cases_of, readers_of, rows_of
from tests.shipped_tiles.cases import Case, Kernel

tiles: Any = importlib.import_module("ple_fast_kernels._tiles")
MANY = 70
"""Row tiles on a GPU: with two members of two tiles each more than two tiles for each of 132 multiprocessors."""


def parameters(device: str) -> list[Any]:
    """The cases of a device."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return [pytest.param(case, id=str(case)) for case in cases_of(architecture(torch.device(device))[0])]
    found: dict[tuple[Any, ...], Case] = {}
    for case in (case for name in TABLES for case in cases_of(name)):
        tile = case.tile
        key = (case.kernel, case.operands, case.dtype, tile.rows, tile.columns, tile.depth, case.widths)
        if key not in found or found[key].tile.stages < tile.stages:
            found[key] = case
    tails = [case for case in found.values() if case.widths == "tails" and case.dtype == torch.bfloat16]
    quick = [
        max((case for case in tails if case.kernel == name), key=lambda case: case.tile.rows * case.tile.columns)
        for name in KERNELS
    ]
    return [
        pytest.param(case, id=str(case), marks=() if case in quick else pytest.mark.slow) for case in found.values()
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", parameters(str(metafunc.config.getoption("--device"))))


@contextmanager
def table_of(case: Case, device: torch.device) -> Iterator[list[Any]]:
    """The device's table has this tile alone; the list is of what launchers ask for."""
    name, _ = architecture(device)
    stays = {row: () for row in TABLES[name] if row.startswith(PERSISTENT)}  # only where the case is of one of them
    set_table(name, {**stays, case.asks: (Class(0, case.tile),)})
    tiles.asked = []
    try:
        yield tiles.asked
    finally:
        tiles.asked = None
        set_table(name, None)


@contextmanager
def launches_through_triton(device: torch.device) -> Iterator[None]:
    """None: what ran before comes out of the cache of compiled kernels."""
    if device.type != "cuda" or torch.version.hip or triton.__version__.rpartition(".")[0] not in CACHED_VERSIONS:
        yield
        return
    with mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as slow:
        yield
    assert slow.call_count == 0, "aligned operands, and yet the launch cache was passed by"


@pytest.mark.usefixtures("guard_bands")
def test_a_shipped_tile(case: Case, device: torch.device) -> None:
    with table_of(case, device) as asked:
        work = KERNELS[case.kernel].make(case, device, MANY if device.type == "cuda" else 1)
        first = work.run()
        with launches_through_triton(device):
            again = work.run()
    chosen = [entry.tile for entry in asked if entry.kind == case.asks]
    assert chosen and all(is_tile(tile, case) for tile in chosen), f"expected {case.tile}, got {chosen}"
    assert first.keys() == work.truths.keys()
    for name, truth in work.truths.items():
        hold(name, first[name], *truth, read=tf32 if case.operands == "tf32" else None)
        one, two = first[name], again[name]
        assert one is not None and two is not None and torch.equal(one, two), f"{name}: other bits"


def is_tile(tile: Tile | None, case: Case) -> bool:
    """A product takes the table's tile as it is; mixtures cut it to their units."""
    if tile is None or case.operands:
        return tile == case.tile
    return (tile.warps, tile.stages) == (case.tile.warps, case.tile.stages)


def lacking(architecture: str, kernels: dict[str, Kernel]) -> list[str]:
    """Rows of a table, with the kernel that reads them, whose tiles have no case among those of ``kernels``."""
    with mock.patch.dict(KERNELS, kernels, clear=True):
        covered = {(case.reads, case.row, case.tile) for case in cases_of(architecture)}
    return [
        f"{architecture}: {row} as {reader} reads it, {entry.tile}"
        for row, classes in rows_of(architecture).items()
        for reader in readers_of(architecture, row) or ("nobody",)
        for entry in classes
        if (reader, row, entry.tile) not in covered
    ]


@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_every_table_has_a_case_in_every_kernel_that_reads_it(name: str) -> None:
    assert lacking(name, KERNELS) == [], "give it an entry in KERNELS of tests/shipped_tiles/__init__.py"


def test_a_row_without_a_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLES, "sm_90", {**TABLES["sm_90"], "swapped/half": (Class(0, Tile(64, 64, 64)),)})
    assert len(lacking("sm_90", KERNELS)) == 1
    without = {name: kernel for name, kernel in KERNELS.items() if kernel.reads != "input_grad"}
    assert {line.partition(" as ")[2].split()[0] for line in lacking("sm_90", without)} == {"swapped", "input_grad"}


@pytest.mark.parametrize("name", TABLES)
def test_a_kernel_reads_the_row_that_its_case_is_of(name: str) -> None:
    """By the library's own look-up."""
    for row, classes in rows_of(name).items():
        for reader in readers_of(name, row):
            if row not in MIXTURES:
                assert tiles.classes_of(name, reader, row.rpartition("/")[2]) == classes


def test_depths_are_two_steps_beyond_the_stages_and_rows_are_ragged() -> None:
    for name in TABLES:
        for case in cases_of(name):
            if case.operands:
                assert case.along >= (case.tile.stages + 2) * case.tile.depth
                assert (case.across(case.tile.columns) % case.tile.columns == 0) == (case.widths == "multiples")

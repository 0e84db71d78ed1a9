"""Choice of tiles: shipped tables, tables that a process sets, files of one GPU; all without a GPU."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ple_fast_kernels import TABLES, Class, Tile, architecture, reload_tables, set_table

tiles: Any = importlib.import_module("ple_fast_kernels._tiles")
files: Any = importlib.import_module("ple_fast_kernels._tile_files")
DEVICE = torch.device("cuda", 0)
LIKE = SimpleNamespace(device=DEVICE, dtype=torch.bfloat16)
MINE = Tile(32, 32, 32, 2, 2)


def tile() -> Tile:
    """What a large product on the fake GPU gets."""
    chosen: Tile = tiles.matmul_tile("linear", LIKE, 65536, 512, 20, "ieee")
    return chosen


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, int]]:
    """A GPU that is none, an empty cache folder, and how often the properties were asked for."""
    counts = {"read": 0}
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA Fake 100")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PLE_FAST_TILES", raising=False)
    read = files.read_for

    def counted(*arguments: Any) -> Any:
        counts["read"] += 1
        return read(*arguments)

    monkeypatch.setattr(tiles, "read_for", counted)
    tiles._architecture.cache_clear()
    reload_tables()
    yield counts
    tiles._architecture.cache_clear()
    set_table("sm_90", None)
    reload_tables()


def saved(path: Path, **changes: Any) -> Path:
    """A file of one row, with changes to its head."""
    files.write_table(path, {"linear/half": (Class(0, MINE),)}, "sm_90", {"gpu": "NVIDIA Fake 100"})
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def cached() -> Path:
    path: Path = files.tiles_path("NVIDIA Fake 100")
    return path


def test_without_a_file_the_shipped_table_is_used_and_the_disk_is_asked_once(gpu: dict[str, int]) -> None:
    assert tile() == TABLES["sm_90"]["half"][-1].tile
    assert tiles.table_of(DEVICE) == ("sm_90", 132)
    for _ in range(3):
        tile()
    assert gpu["read"] == 1


def test_the_file_of_a_gpu_is_picked_up_from_the_cache_folder(tmp_path: Path) -> None:
    assert cached() == tmp_path / "cache" / "ple_fast" / "tiles-nvidia-fake-100.json"
    saved(cached())
    assert tile() == MINE
    assert architecture(DEVICE) == ("sm_90", 132)
    other = tiles.matmul_tile("data_grad", LIKE, 65536, 512, 20, "ieee")
    assert other == TABLES["sm_90"]["half"][-1].tile, "rows that the file lacks stay as shipped"


def test_the_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cached() == tmp_path / ".cache" / "ple_fast" / "tiles-nvidia-fake-100.json"


def test_a_named_file_wins_over_the_cache_and_a_set_table_over_both(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved(cached())
    named = tmp_path / "mine.json"
    files.write_table(named, {"linear/half": (Class(0, MINE._replace(warps=8)),)}, "sm_90", {})
    monkeypatch.setenv("PLE_FAST_TILES", str(named))
    assert tile() == MINE._replace(warps=8)
    set_table("sm_90", {"linear/half": (Class(0, MINE._replace(stages=4)),)})
    assert tile() == MINE._replace(stages=4)
    set_table("sm_90", {})
    assert tile() == TABLES["sm_90"]["half"][-1].tile
    set_table("sm_90", None)
    assert tile() == MINE._replace(warps=8)
    monkeypatch.setenv("PLE_FAST_TILES", "")
    reload_tables()
    assert tile() == TABLES["sm_90"]["half"][-1].tile, "empty: no file at all"


BROKEN = {
    "another schema": ({"schema": 2}, "expected schema 1, got 2"),
    "another kind": ({"kind": "aot"}, "kind 'tiles'"),
    "another architecture": ({"architecture": "sm_80"}, "holds tiles for 'sm_80'"),
    "no rows": ({"tiles": []}, "expected an object"),
    "an unknown row": ({"tiles": {"linear/int8": []}}, "no kernel reads the rows linear/int8"),
    "no entries": ({"tiles": {"half": []}}, "begin with 0"),
    "falling entries": ({"tiles": {"half": [[0, [64, 64]], [9, [64, 64]], [5, [64, 64]]]}}, "rise"),
    "a width that is no power of two": ({"tiles": {"half": [[0, [64, 96, 64, 4, 3, 8]]]}}, "powers of two"),
    "no tile": ({"tiles": {"half": [[0, "wide"]]}}, r"half: expected \[\[tiles"),
}


@pytest.mark.parametrize(("changes", "message"), BROKEN.values(), ids=list(BROKEN))
def test_a_broken_file_that_was_named_is_an_error_and_in_the_cache_a_warning(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved(cached(), **changes)
    with pytest.warns(RuntimeWarning, match=f"shipped tiles: .*{message}"):
        chosen = tile()
    assert chosen == TABLES["sm_90"]["half"][-1].tile
    tile()  # warns no more: a warning of ours is an error in these tests
    monkeypatch.setenv("PLE_FAST_TILES", str(saved(tmp_path / "named.json", **changes)))
    reload_tables()
    with pytest.raises(ValueError, match=f"PLE_FAST_TILES: .*named.json.*{message}"):
        tile()


def test_a_named_file_must_exist_and_be_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "absent.json"
    monkeypatch.setenv("PLE_FAST_TILES", str(path))
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        tile()
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        tile()


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((11, 0), "sm_100"),
        ((12, 0), "sm_80"),
    ],
)
def test_a_gpu_gets_the_table_that_its_shared_memory_holds(
    capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    tiles._architecture.cache_clear()
    assert architecture(DEVICE) == (name, 100)


def test_shipped_tables_have_only_rows_that_a_kernel_reads() -> None:
    for table in TABLES.values():
        assert set(table) <= tiles.KINDS
        for classes in table.values():
            assert classes[0].tiles == 0
            assert [c.tiles for c in classes] == sorted(c.tiles for c in classes)


def test_more_work_gets_larger_tiles() -> None:
    chosen = [tiles.matmul_tile("linear", LIKE, rows, 256, 8, "ieee") for rows in (128, 1024, 4096, 65536)]
    areas = [t.rows * t.columns for t in chosen]
    assert areas == sorted(areas)
    assert areas[0] < areas[-1]


@pytest.mark.parametrize("mixtures", [1, 4, 8, 17])
@pytest.mark.parametrize("backward", [False, True])
def test_sums_of_all_mixtures_fit_into_registers(mixtures: int, backward: bool) -> None:
    chosen = tiles.combine_tile(LIKE, 4096, 64, mixtures, backward=backward)
    assert mixtures * chosen.rows * chosen.columns <= tiles.MIXED_ELEMENTS * 32 * chosen.warps

"""Choice of tiles: shipped tables, tables that a process sets, files of one GPU; all without a GPU."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ple_fast_kernels import TABLES, Class, Library, Parts, Tile, architecture, reload_tables, set_table

tiles: Any = importlib.import_module("ple_fast_kernels._tiles")
level_tiles: Any = importlib.import_module("ple_fast_kernels._level_tiles")
files: Any = importlib.import_module("ple_fast_kernels._tile_files")
library: Any = importlib.import_module("ple_fast_kernels.library")
DEVICE = torch.device("cuda", 0)
LIKE = SimpleNamespace(device=DEVICE, dtype=torch.bfloat16)
MINE = Tile(32, 32, 32, 2, 2)
WIDEST: Tile = importlib.import_module("ple_fast_kernels._tile_tables")._SM90["half"][-1].tile
"""What the shipped table has for the largest products."""


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
    assert tile() == WIDEST
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
    assert other == WIDEST, "rows that the file lacks stay as shipped"


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
    assert tile() == WIDEST
    set_table("sm_90", None)
    assert tile() == MINE._replace(warps=8)
    monkeypatch.setenv("PLE_FAST_TILES", "")
    reload_tables()
    assert tile() == WIDEST, "empty: no file at all"


NEVER = {"linear": None, "input_grad": None, "weight_grad": None}
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
    "a schema that is true": ({"schema": True}, "expected schema 1, got True"),
    "a schema that is a float": ({"schema": 1.0}, "expected schema 1, got 1.0"),
    "an architecture of another type": ({"architecture": ["sm_90"]}, "holds tiles for"),
    "two entries from 0": ({"tiles": {"half": [[0, [64, 64, 64]], [0, [64, 64, 32]]]}}, "begin with 0 and rise"),
    "a row that is text": ({"tiles": {"half": "00"}}, r"half: expected \[\[tiles"),
    "an infinity": ({"tiles": {"half": [[0, [math.inf, 64, 64]]]}}, "Infinity is no number of JSON"),
    "a float": ({"tiles": {"half": [[0, [64.7, 64, 64]]]}}, "of ints"),
    "a whole float": ({"tiles": {"half": [[0, [64.0, 64, 64]]]}}, "of ints"),
    "text": ({"tiles": {"half": [[0, ["64", 64, 64]]]}}, "of ints"),
    "a bool": ({"tiles": {"half": [[False, [64, 64, 64]]]}}, "of ints"),
    "seven numbers": ({"tiles": {"half": [[0, [64, 64, 64, 4, 3, 8, 1]]]}}, "of ints"),
    "one number": ({"tiles": {"half": [[0, [64]]]}}, "of ints"),
    "too many rows": ({"tiles": {"half": [[0, [2**40, 64, 64]]]}}, "at most 1048576 elements"),
    "rows of 1": ({"tiles": {"half": [[0, [1, 64, 64]]]}}, "sizes of 16 or more"),
    "columns of 2": ({"tiles": {"linear/tf32": [[0, [64, 2, 64]]]}}, "sizes of 16 or more"),
    "no depth": ({"tiles": {"fused/half": [[0, [64, 64]]]}}, "the depth too"),
    "a depth of 8": ({"tiles": {"weight_grad/half": [[0, [64, 64, 8]]]}}, "sizes of 16 or more"),
    "1,024 warps": ({"tiles": {"half": [[0, [64, 64, 64, 1024]]]}}, "at most 32 warps"),
    "100 stages": ({"tiles": {"half": [[0, [64, 64, 64, 4, 100]]]}}, "1 stage or more, of at most"),
    "no stage": ({"tiles": {"half": [[0, [64, 64, 64, 4, 0]]]}}, "1 stage or more"),
    "a group of 0": ({"tiles": {"half": [[0, [64, 64, 64, 4, 3, 0]]]}}, "a group of 1"),
    "a group that is too large": ({"tiles": {"half": [[0, [64, 64, 64, 4, 3, 2**40]]]}}, "a group of 1"),
    "negative sizes": ({"tiles": {"half": [[0, [-64, 64, 64]]]}}, "powers of two"),
    "a depth of mixtures": ({"tiles": {"combine": [[0, [8, 128, 64]]]}}, "depth 0"),
    "a library's row of tiles": ({"tiles": {"library/half": [[0, [64, 64, 64]]]}}, "library/half: expected {linear,"),
    "a library's row that lacks a product": ({"tiles": {"library/half": {"linear": 1, "weight_grad": 2}}}, "or null"),
    "a library's row of another product": ({"tiles": {"library/tf32": {**NEVER, "data_grad": 1}}}, "or null"),
    "an amount of work below 0": ({"tiles": {"library/tf32": {**NEVER, "linear": -1}}}, "0 or more"),
    "an amount of work that is true": ({"tiles": {"library/half": {**NEVER, "linear": True}}}, "an int"),
    "an amount of work that is a float": ({"tiles": {"library/half": {**NEVER, "linear": 2.0}}}, "an int"),
    "a library for ieee": ({"tiles": {"library/ieee": NEVER}}, "no kernel reads the rows library/ieee"),
    "tiles that are a library's row": ({"tiles": {"half": NEVER}}, r"half: expected \[\[tiles"),
    "programs that stay in float32": ({"tiles": {"persistent_linear/tf32": []}}, "no kernel reads the rows"),
    "programs that stay at a work below 0": ({"tiles": {"persistent_linear/half": [[-1, [64, 64, 64]]]}}, "0 or more"),
    "programs that stay, falling": (
        {"tiles": {"persistent_linear/half": [[9, [64, 64, 64]], [5, [64, 64, 64]]]}},
        "that rise",
    ),
    "a block that the engine does not load": (
        {"tiles": {"persistent_data_grad/half": [[0, [16, 512, 16]]]}},
        "sizes of 256 or less",
    ),
    "parts of no tile": ({"tiles": {"weight_grad_parts": [[64, 8, 100, 4, 2]]}}, "weight_grad_parts: expected"),
    "parts that are text": ({"tiles": {"weight_grad_parts": [[64, 8, 100, [64, 64, 64], "2"]]}}, "of ints"),
    "no part": ({"tiles": {"weight_grad_parts": [[64, 8, 100, [64, 64, 64], 0]]}}, "1 or more"),
    "more parts than rows": ({"tiles": {"weight_grad_parts": [[4, 8, 100, [64, 64, 64], 5]]}}, "no more than rows"),
    "parts of tiles": ({"tiles": {"weight_grad_parts": [[0, [64, 64, 64]]]}}, "weight_grad_parts: expected"),
    "mixtures of 2": ({"tiles": {"combine_grad": [[0, [8, 2]]]}}, "sizes of 4 or more"),
}


@pytest.mark.parametrize(("changes", "message"), BROKEN.values(), ids=list(BROKEN))
def test_a_broken_file_that_was_named_is_an_error_and_in_the_cache_a_warning(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved(cached(), **changes)
    with pytest.warns(RuntimeWarning, match=f"shipped tiles: .*{message}"):
        chosen = tile()
    assert chosen == WIDEST
    tile()  # warns no more: a warning of ours is an error in these tests
    monkeypatch.setenv("PLE_FAST_TILES", str(saved(tmp_path / "named.json", **changes)))
    reload_tables()
    with pytest.raises(ValueError, match=f"PLE_FAST_TILES: .*named.json.*{message}"):
        tile()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[" * 100_000 + "]" * 100_000, "\x00", '"a"', "1", "null", '{"a": NaN}']
)
def test_no_text_in_the_cache_stops_a_launch(text: str) -> None:
    cached().parent.mkdir(parents=True)
    cached().write_text(text, encoding="utf-8")
    with pytest.warns(RuntimeWarning, match="shipped tiles"):
        assert tile() == WIDEST


def test_a_user_without_a_home_folder_gets_the_shipped_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert tile() == WIDEST
    monkeypatch.setenv("PLE_FAST_TILES", "~/tiles.json")
    reload_tables()
    with pytest.raises(ValueError, match=r"PLE_FAST_TILES: '~/tiles\.json' names no file"):
        tile()


def test_a_cache_folder_that_cannot_be_looked_into_holds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = os.stat

    def forbidden(path: Any, **options: Any) -> Any:
        if str(path) == str(cached()):
            raise PermissionError(13, "Permission denied", str(path))
        return looked(path, **options)

    monkeypatch.setattr(os, "stat", forbidden)
    assert tile() == WIDEST


def test_every_shipped_tile_may_stand_in_a_file(tmp_path: Path) -> None:
    for name, table in TABLES.items():
        path = tmp_path / f"{name}.json"
        files.write_table(path, table, name, {})
        assert files.read_table(path, name, tiles.KINDS) == table


def test_a_wavefront_counts_as_two_warps(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    for warps, name, fits in ((32, "sm_90", True), (16, "amd", True), (32, "amd", False)):
        files.write_table(path, {"half": (Class(0, Tile(64, 64, 64, warps, 2)),)}, name, {})
        with nullcontext() if fits else pytest.raises(ValueError, match="at most 16 warps"):
            files.read_table(path, name, tiles.KINDS)


def test_threads_write_one_file_whole_and_leave_no_other(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    with ThreadPoolExecutor(8) as pool:
        writes = [pool.submit(files.write_table, path, TABLES["sm_90"], "sm_90", {}) for _ in range(64)]
        for write in writes:
            write.result()
    assert files.read_table(path, "sm_90", tiles.KINDS) == TABLES["sm_90"]
    assert [file.name for file in tmp_path.iterdir()] == ["tiles.json"]


def test_a_write_that_fails_leaves_the_old_file_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = saved(tmp_path / "tiles.json")
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        files.write_table(path, TABLES["sm_90"], "sm_90", {})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["tiles.json"]


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
        for kind, classes in table.items():
            if isinstance(classes, Library):
                continue
            begins = [c.tiles for c in classes if isinstance(c, Class)]
            assert len(begins) == len(classes), "how a launch is cut follows from a GPU, not from an architecture"
            assert begins[0] == 0 or kind.startswith(files.PERSISTENT)
            assert begins == sorted(begins)


HALF, FLOAT, DOUBLE = (
    SimpleNamespace(device=DEVICE, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)
)


def takes(like: Any = HALF, precision: str = "ieee", product: str = "linear", rows: int = 65536) -> bool:
    """Whether ``(rows, 1024)`` over 1024 is the library's: 137 billions of operations at 65,536 rows."""
    taken: bool = library.takes_library(product, like, rows, 1024, 1024, precision)
    return taken


def test_the_library_takes_large_plain_products_in_half_and_tf32_only() -> None:
    for product in Library._fields:
        assert takes(product=product) and takes(FLOAT, "tf32", product)
        assert not takes(product=product, rows=4096) and not takes(FLOAT, "tf32", product, 512)
        assert not takes(FLOAT, "ieee", product) and not takes(DOUBLE, "ieee", product)


def test_architectures_without_a_model_keep_the_kernels() -> None:
    with_library = {name for name, table in TABLES.items() if any(kind.startswith("library") for kind in table)}
    assert with_library == {"sm_90", "sm_100"}


def test_the_amount_of_work_grows_with_the_multiprocessors() -> None:
    for least, taken in ((133, True), (134, False)):  # 137.4 billions, at 132 of 128 multiprocessors
        set_table("sm_90", {"library/half": Library(linear=least)})
        assert takes() is taken
        assert not takes(product="weight_grad"), "None: never"
    set_table("sm_90", {"library/half": Library(weight_grad=0)})
    assert takes(product="weight_grad", rows=1) and not takes()


def test_a_file_may_route_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = Library(None, 7, 0)
    files.write_table(tmp_path / "mine.json", {"library/half": row}, "sm_90", {})
    assert files.read_table(tmp_path / "mine.json", "sm_90", tiles.KINDS) == {"library/half": row}
    monkeypatch.setenv("PLE_FAST_TILES", str(tmp_path / "mine.json"))
    assert not takes() and takes(product="weight_grad", rows=1)
    assert takes(FLOAT, "tf32"), "rows that the file lacks stay as shipped"


def test_a_file_may_say_into_how_many_parts_a_weight_gradient_is_cut(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    like = SimpleNamespace(device=DEVICE, element_size=lambda: 2)
    block = Tile(128, 128, 64, 8, 4)
    model = tiles.row_splits(like, 16384, 40, 1 << 20, block)
    row = (Parts(16384, 40, 1 << 20, block, model + 30),)
    files.write_table(tmp_path / "mine.json", {"weight_grad_parts": row}, "sm_90", {})
    assert files.read_table(tmp_path / "mine.json", "sm_90", tiles.KINDS) == {"weight_grad_parts": row}
    monkeypatch.setenv("PLE_FAST_TILES", str(tmp_path / "mine.json"))
    reload_tables()
    assert tiles.row_splits(like, 16384, 40, 1 << 20, block) == model + 30
    for rows, programs, size, other in (
        (16385, 40, 1 << 20, block), (16384, 41, 1 << 20, block), (16384, 40, 1 << 21, block),
        (16384, 40, 1 << 20, block._replace(depth=32)),
    ):  # fmt: skip
        assert tiles.row_splits(like, rows, programs, size, other) < model + 30, "the model chooses"


def test_deterministic_algorithms_keep_the_kernels() -> None:
    assert takes()
    torch.use_deterministic_algorithms(True)
    try:
        assert not takes()
    finally:
        torch.use_deterministic_algorithms(False)


LOADED = Tile(128, 256, 64, 8, 3)


def staying(kernel: str = "linear", like: Any = HALF, rows: int = 65536, columns: int = 512) -> Tile | None:
    """The tile of a product of 20 members whose programs stay."""
    found: Tile | None = tiles.persistent_tile(kernel, like, rows, columns, 20)
    return found


def test_programs_stay_for_large_products_in_half_alone() -> None:
    for kernel in ("linear", "data_grad"):
        assert staying(kernel) == LOADED
        assert staying(kernel, FLOAT) is None and staying(kernel, DOUBLE) is None
        assert staying(kernel, rows=512) is None, "320 results"
        assert staying(kernel, columns=128) is None, "half of a tile would be empty"
    assert staying("input_grad") is None


def test_a_row_says_from_which_work_on_programs_stay() -> None:
    results = 65536 // 128 * 4 * 20  # at 132 of 128 multiprocessors
    for least, taken in ((results * 128 // 132, True), (results * 128 // 132 + 1, False)):
        set_table("sm_90", {"persistent_linear/half": (Class(least, LOADED),)})
        assert (staying() == LOADED) is taken
    set_table("sm_90", {"persistent_linear/half": (Class(0, MINE), Class(99, LOADED))})
    assert (staying(rows=32), staying(), staying(columns=64)) == (MINE, LOADED, MINE)
    set_table("sm_90", {"persistent_linear/half": ()})
    assert staying() is None


def test_a_file_may_say_that_no_programs_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    rows = {"persistent_linear/half": (), "persistent_data_grad/half": (Class(7, LOADED),)}
    files.write_table(path, rows, "sm_90", {})
    assert files.read_table(path, "sm_90", tiles.KINDS) == rows
    monkeypatch.setenv("PLE_FAST_TILES", str(path))
    assert staying() is None and staying("data_grad", rows=128) == LOADED
    files.write_table(path, rows, "sm_80", {})
    with pytest.raises(ValueError, match="only sm_90 and sm_100 have a tensor memory engine"):
        files.read_table(path, "sm_80", tiles.KINDS)


def test_as_many_programs_stay_as_run_at_a_time() -> None:
    like = torch.empty(1, dtype=torch.bfloat16)
    fake = SimpleNamespace(device=DEVICE, dtype=torch.bfloat16, element_size=like.element_size)
    assert tiles.persistent_programs(fake, LOADED, 10_000) == 132
    assert tiles.persistent_programs(fake, LOADED, 7) == 7
    assert tiles.persistent_programs(fake, Tile(64, 64, 64, 4, 3), 10_000) == 132 * 4


def test_more_work_gets_larger_tiles() -> None:
    chosen = [tiles.matmul_tile("linear", LIKE, rows, 256, 8, "ieee") for rows in (128, 1024, 4096, 65536)]
    areas = [t.rows * t.columns for t in chosen]
    assert areas == sorted(areas)
    assert areas[0] < areas[-1]


def test_a_tile_is_no_deeper_than_its_product() -> None:
    whole = Tile(64, 64, 64, 4, 4)
    depths = {depth: tiles.cut_depth(whole, depth).depth for depth in (1, 16, 17, 32, 33, 64, 1000)}
    assert depths == {1: 16, 16: 16, 17: 32, 32: 32, 33: 64, 64: 64, 1000: 64}


@pytest.mark.parametrize("mixtures", [1, 4, 8, 17])
@pytest.mark.parametrize("backward", [False, True])
def test_sums_of_all_mixtures_fit_into_registers(mixtures: int, backward: bool) -> None:
    chosen = level_tiles.combine_tile(LIKE, 4096, 64, mixtures, backward=backward)
    assert mixtures * chosen.rows * chosen.columns <= level_tiles.MIXED_ELEMENTS * 32 * chosen.warps

"""The tables of products: those that are shipped, a user's file, which one is taken, and what a broken one leads to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ple_fast.torch_backend import product_files, table_in_use
from ple_fast.torch_backend.processor import Processor, cpu_info, processor_name, this_processor
from ple_fast.torch_backend.product_files import as_json, products_path, read_table, shipped_tables, table_of
from ple_fast.torch_backend.product_table import DEFAULT, LARGEST, WAYS, Entry, Limits, Table
from ple_fast.torch_backend.table_in_use import limited, reload_tables, table, using, way_of

NOBODYS = Processor("x86_64", "AVX1024", "Nobody", "99")
WAY = Entry(8, 128, 256, ((0, "members"), (100, "rows"), (1000, "convolution")))
SOME = Table(
    "here", Limits(few_rows=5), {("float32", "grouped"): (WAY, Entry(1, 1, 1, ((0, "rows"),)))}
)  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and no file that the environment names."""
    monkeypatch.delenv(product_files.ENVIRONMENT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def write(path: Path, own: Processor, **changed: Any) -> Path:
    content = json.loads(as_json(own, 1, SOME, {"date": "today"})) | changed
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_every_shipped_table_has_a_choice_for_every_product() -> None:
    assert shipped_tables(), "none is shipped"
    seen = set()
    for processor, threads, found in shipped_tables():
        assert (processor, threads) not in seen, f"{found.source}: its class has two tables"
        seen.add((processor, threads))
        assert processor.architecture and processor.instructions and processor.vendor
        for kind, ways in WAYS.items():
            assert found.products["float32", kind], f"{found.source}: no {kind}"
            for rows in (1, 31, 32, 1000, 10**7):
                assert found.way(kind, "float32", rows, 8, 128, 256) in ways


@pytest.mark.parametrize("kind", WAYS)
def test_a_processor_that_nobody_measured_gets_pytorchs_own_products(kind: str) -> None:
    found = table_of(NOBODYS, 2)
    assert found == DEFAULT
    assert found.way(kind, "float32", 4096, 8, 128, 256) == WAYS[kind][0]
    strided = kind == "grouped_weight_grad"
    assert found.way(kind, "bfloat16", 4096, 8, 128, 256) == ("turned" if strided else WAYS[kind][0])


def test_a_class_is_told_by_all_of_its_marks_and_the_nearest_number_of_threads() -> None:
    for processor, _, _ in shipped_tables():
        for other in ({"architecture": "riscv"}, {"instructions": "AVX1024"}, {"vendor": "Nobody"}):
            assert table_of(processor._replace(**other), 1).source == DEFAULT.source
        expected = min(threads for own, threads, _ in shipped_tables() if own == processor)
        source = table_of(processor, expected).source
        assert f"-{expected}thread" in source
        assert read_table(Path(source))[0] == processor, f"{processor} takes the table of another class"
        unknown = table_of(processor._replace(family="9999"), 1).source
        of_all = [path for own, _, (path, *_) in shipped_tables() if own == processor._replace(family="")]
        assert unknown in (of_all or [DEFAULT.source]), "of one family, and taken by another"
        most = max(threads for own, threads, _ in shipped_tables() if own == processor)
        assert table_of(processor, 64 * most).source == table_of(processor, most).source


def test_a_table_gives_the_way_of_the_nearest_shape_from_its_rows_on() -> None:
    for rows, way in ((0, "members"), (99, "members"), (100, "rows"), (999, "rows"), (1000, "convolution")):
        assert SOME.way("grouped", "float32", rows, 8, 128, 256) == way
        assert SOME.way("grouped", "float32", rows, 6, 200, 256) == way
    assert SOME.way("grouped", "float32", 5000, 1, 2, 0) == "rows"
    assert SOME.way("grouped", "bfloat16", 5000, 8, 128, 256) == "members"
    assert SOME.way("linear", "float32", 5000, 8, 128, 256) == "mm"


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(as_json(NOBODYS, 3, SOME, {"date": "today", "trunks": []}), encoding="utf-8")
    assert read_table(path) == (NOBODYS, 3, SOME._replace(source=str(path)))


def test_the_users_file_goes_before_the_shipped_table(cache: Path) -> None:
    path = write(products_path(NOBODYS, 2), NOBODYS)
    assert path.parent == cache / "ple_fast" and "2threads" in path.name and "avx1024" in path.name
    assert table_of(NOBODYS, 2).source == str(path)
    assert table_of(NOBODYS, 1).source == DEFAULT.source, "a file is of one number of threads"


def test_rows_that_a_users_file_lacks_are_the_shipped_ones(cache: Path) -> None:
    processor, threads, shipped = shipped_tables()[0]
    write(products_path(processor, threads), processor)
    found = table_of(processor, threads)
    assert found.products["float32", "grouped"] == SOME.products["float32", "grouped"]
    assert found.products["float32", "linear"] == shipped.products["float32", "linear"]


def test_a_named_file_must_be_there_and_be_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "named.json"
    monkeypatch.setenv(product_files.ENVIRONMENT, str(path))
    with pytest.raises(ValueError, match=r"PLE_FAST_PRODUCTS: .*named\.json: cannot be read"):
        table_of(NOBODYS, 1)
    write(path, NOBODYS._replace(vendor="Somebody"))
    with pytest.raises(ValueError, match="is of x86_64 AVX1024 Somebody 99, this processor is x86_64 AVX1024 Nobody"):
        table_of(NOBODYS, 1)
    write(path, NOBODYS)
    assert table_of(NOBODYS, 1).source == str(path)
    monkeypatch.setenv(product_files.ENVIRONMENT, "")
    assert table_of(NOBODYS, 1).source == DEFAULT.source


def test_a_broken_relic_in_the_cache_is_told_and_left(cache: Path) -> None:
    path = products_path(NOBODYS, 1)
    path.parent.mkdir(parents=True)
    path.write_text("{", encoding="utf-8")
    with pytest.warns(RuntimeWarning, match="uses its shipped table of products: .* or remove the file"):
        assert table_of(NOBODYS, 1).source == DEFAULT.source


def test_without_a_home_there_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (product_files.ENVIRONMENT, "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def refuse(path: Path) -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "expanduser", refuse)
    assert table_of(NOBODYS, 1).source == DEFAULT.source


LIMITS = Limits()._asdict()
WRONG: dict[str, dict[str, Any]] = {
    "another kind": {"kind": "tiles"},
    "another schema": {"schema": 2},
    "schema true": {"schema": True},
    "no processor": {"processor": None},
    "a mark that is no text": {"processor": {**NOBODYS._asdict(), "family": 99}},
    "a mark too few": {"processor": {"vendor": "Nobody"}},
    "no threads": {"threads": 0},
    "threads that are no int": {"threads": 2.0},
    "a limit too few": {"limits": {"few_rows": 3}},
    "a limit below 0": {"limits": {**LIMITS, "few_rows": -1}},
    "a limit that is no int": {"limits": {**LIMITS, "few_rows": True}},
    "a limit beyond all memory": {"limits": {**LIMITS, "block_values": LARGEST.block_values + 1}},
    "no products": {"products": None},
    "another dtype": {"products": {"int8": {}}},
    "another product": {"products": {"float32": {"sum": [[1, 1, 1, [[0, "mm"]]]]}}},
    "no rows": {"products": {"float32": {"linear": []}}},
    "another way": {"products": {"float32": {"linear": [[1, 1, 1, [[0, "convolution"]]]]}}},
    "a shape of 0": {"products": {"float32": {"linear": [[1, 0, 1, [[0, "mm"]]]]}}},
    "no way from 0 on": {"products": {"float32": {"linear": [[1, 1, 1, [[5, "mm"]]]]}}},
    "rows that do not rise": {"products": {"float32": {"linear": [[1, 1, 1, [[0, "mm"], [0, "onednn"]]]]}}},
    "rows that are no int": {"products": {"float32": {"linear": [[1, 1, 1, [[0, "mm"], [1.5, "onednn"]]]]}}},
    "ways that are no list": {"products": {"float32": {"linear": [[1, 1, 1, "mm"]]}}},
    "a way that is a list": {"products": {"float32": {"linear": [[1, 1, 1, [[0, ["mm"]]]]]}}},
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_table_is_refused(what: str, tmp_path: Path) -> None:
    path = write(tmp_path / "wrong.json", NOBODYS, **WRONG[what])
    with pytest.raises(ValueError, match=r"wrong\.json: (.*expected|holds)"):
        read_table(path)


def test_a_table_is_in_use_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []

    def read(processor: Processor, threads: int) -> Table:
        reads.append(threads)
        return DEFAULT

    monkeypatch.setattr(product_files, "table_of", read)
    reload_tables()
    ask = ("grouped", torch.float32, 500, 8, 128, 256, torch.get_num_threads())
    assert [way_of(*ask), way_of(*ask)] == ["members"] * 2
    with using(SOME):
        assert way_of(*ask) == "rows" and table() is SOME
        with limited(few_rows=7):
            assert table().limits == Limits(few_rows=7) and way_of(*ask) == "rows"
        with pytest.raises(KeyError), limited(few_rows=8):
            raise KeyError
        assert table() is SOME
    assert table() is DEFAULT and way_of(*ask) == "members"
    assert len(reads) == 1, "a file is read once"
    assert table(7) is DEFAULT and reads[1:] == [7]


def test_this_processor_is_named() -> None:
    found = this_processor()
    assert found.architecture and found.instructions == torch.backends.cpu.get_cpu_capability()
    assert processor_name()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vendor_id : AuthenticAMD\ncpu family : 25\nmodel : 17\nmodel name : AMD EPYC\n\nvendor_id : Other\n", "25"),
        ("CPU implementer : 0x41\nCPU part : 0xd40\n", "0xd40"),
        ("no colon here\n", ""),
        (None, ""),
    ],
    ids=["amd", "arm", "nothing", "no-file"],
)
def test_marks_are_read_where_the_system_tells_them(
    text: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, encoding: str) -> str:
        if text is None:
            raise FileNotFoundError
        return text

    monkeypatch.setattr(Path, "read_text", read)
    cpu_info.cache_clear()
    try:
        assert this_processor().family == expected
        assert (processor_name() == "AMD EPYC (family 25, model 17)") == (expected == "25")
    finally:
        cpu_info.cache_clear()


def test_the_limits_of_a_processor_say_nothing_of_another_device() -> None:
    with limited(few_rows=7):
        assert table_in_use.limits_of(torch.zeros(1)).few_rows == 7
        assert table_in_use.limits_of(torch.zeros(1, device="meta")) == Limits()


def test_products_of_other_threads_have_tables_of_their_own(two_threads: None) -> None:
    assert table_in_use.table() is table(2)

"""Data that comes in parts: the same training, each row once an epoch, batches of one size, and nothing kept."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ple_fast.losses import TaskLoss
from ple_fast.model import Callback, Encoded, ParquetTables, Step, columns_from
from ple_fast.model.batches import PartBatches
from ple_fast.model.parts import is_parts, is_read_once
from ple_fast.model.rows import RowParts
from tests.fit_helpers import TASKS, are_equal, model, state, table
from tests.programs import run_python

SIZES = (20, 0, 1, 1, 27, 2, 12, 1)
ROWS = sum(SIZES)


def whole(rows: int = ROWS) -> dict[str, Any]:
    data, labels = table(rows)
    return {**data, **labels, "weight": np.linspace(0, 2, rows)}


def cut(columns: dict[str, Any], sizes: Any = SIZES) -> list[dict[str, Any]]:
    ends = list(itertools.accumulate(sizes))
    return [{k: v[end - size : end] for k, v in columns.items()} for size, end in zip(sizes, ends, strict=True)]


class Again:
    """Begins anew, and has no length."""

    def __init__(self, parts: Any) -> None:
        self.parts = parts
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[Any]:
        yield from self.parts


class Entries(Dataset[Any]):
    """One row each, as a user's own dataset has them."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["age"])

    def __getitem__(self, place: int) -> Any:
        row = {name: values[place] for name, values in self.columns.items()}
        return {k: row[k] for k in ("age", "amount")}, {task.name: row[task.name] for task in TASKS}


class Tables(IterableDataset[Any]):
    def __init__(self, parts: Any) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[Any]:
        yield from self.parts


def fitted(data: Any, labels: Any = None, **options: Any) -> Any:
    net = model()
    torch.manual_seed(3)
    history = net.fit(data, labels, progress=False, **{"epochs": 3, "batch_size": 8, **options})
    return net, history


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([whole()], True),
        ([pd.DataFrame(whole())], True),
        ([pl.DataFrame(whole())], True),
        ([pa.table(whole())], True),
        ([(whole(), whole())], True),
        ([(whole(), whole(), np.ones(3))], True),
        ((whole() for _ in range(2)), True),
        ([pd.DataFrame(whole()).to_records(index=False)], True),
        (pa.table(whole()).to_batches(max_chunksize=10), True),
        (pa.table(whole()).to_reader(), True),
        (Again([]), True),
        (DataLoader([1, 2]), True),  # type: ignore[arg-type]  # any list is a dataset
        (whole(), False),
        (pd.DataFrame(whole()), False),
        (pl.DataFrame(whole()), False),
        (pl.DataFrame(whole()).lazy(), False),
        (pa.table(whole()), False),
        (pd.Series([1.0]), False),
        (pl.Series([1.0]), False),
        (pa.array([1.0]), False),
        (Encoded(torch.zeros(2, 0), torch.zeros(2, 1)), False),
        ([Encoded(torch.zeros(2, 0), torch.zeros(2, 1))], True),
        ([1, 2], False),
        ([], False),
        ("age", False),
        (np.zeros(3), False),
        (torch.zeros(3), False),
        (None, False),
        (3, False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_parts_are_told_from_tables(data: Any, expected: bool) -> None:
    assert is_parts(data) == expected


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8, 31, 62, 63, 64, 100])
@pytest.mark.parametrize("seed", range(3))
def test_every_row_is_in_one_batch_and_none_is_alone(batch_size: int, seed: int) -> None:
    columns = {**whole(), "age": np.arange(ROWS, dtype=float)}
    net = model()
    batches = PartBatches(RowParts(net, cut(columns), None, None, "labels"), batch_size)
    generator = torch.Generator().manual_seed(seed)
    found = list(batches.epoch(generator, 0, 0))
    sizes = [len(batch.data) for batch in found]
    assert all(size == batch_size for size in sizes[:-1]) and batches.count == len(sizes)
    assert sizes[-1] in range(2, batch_size + 2)
    seen = torch.cat([batch.data.numbers[:, 0] for batch in found])
    expected = torch.arange(ROWS).float()
    assert torch.equal(seen.sort().values, expected) and not torch.equal(seen, expected)
    for batch in found:
        watch = torch.from_numpy(columns["watch"]).float()[batch.data.numbers[:, 0].long()]
        assert torch.equal(batch.labels.targets["watch"], watch), "labels of other rows"
    again = PartBatches(RowParts(net, cut(columns), None, None, "labels"), batch_size)
    rest = list(again.epoch(torch.Generator().manual_seed(seed), 0, 3))
    assert all(torch.equal(a.data.numbers, b.data.numbers) for a, b in zip(found[3:], rest, strict=True))


@pytest.mark.parametrize("rows", [63, 64, 65, 72, 73])
def test_one_part_trains_to_the_bit_as_its_table_does(rows: int) -> None:
    columns = whole(rows)
    net, history = fitted(columns, batch_size=8)
    for data in ([columns], Again([pa.table(columns)]), [(columns, columns)]):
        other, found = fitted(data, batch_size=8)
        assert are_equal(state(net), state(other))
        assert [result.loss for result in history] == [result.loss for result in found]
        assert [result.tasks for result in history] == [result.tasks for result in found]


def test_weights_may_be_columns_of_the_parts() -> None:
    columns = whole()
    net, history = fitted(columns, sample_weight=columns["weight"])
    parts = [(columns, columns, columns["weight"])]
    by_name = dict.fromkeys(model().task_names, "weight")
    given: list[tuple[Any, Any]] = [([columns], "weight"), (parts, None), ([columns], by_name)]
    given += [(columns, "weight"), (pd.DataFrame(columns), by_name)]
    for data, weight in given:
        other, found = fitted(data, sample_weight=weight)
        assert are_equal(state(net), state(other))
        assert [result.tasks for result in history] == [result.tasks for result in found]
    by_task, _ = fitted(columns, sample_weight={"watch": columns["weight"]})
    other, _ = fitted([columns], sample_weight={"watch": "weight"})
    assert are_equal(state(by_task), state(other))
    assert not are_equal(state(by_task), state(net))
    with pytest.raises(TypeError, match="sample_weight: expected weights with encoded rows"):
        fitted(net.encode(columns), columns, sample_weight="weight")


def test_a_loader_decides_the_batches() -> None:
    columns = whole()
    sizes: list[int] = []

    class Seen(Callback):
        def after_step(self, model: Any, step: Step) -> None:
            sizes.append(step.rows)

    fitted(DataLoader(Entries(columns), batch_size=21), batch_size=None, epochs=2, callbacks=[Seen()])
    assert sizes == [21, 42, 64] * 2, "a row that is left over joins the batch before it"
    with pytest.raises(ValueError, match="batch_size: expected none beside a DataLoader"):
        fitted(DataLoader(Entries(columns), batch_size=21))
    sizes.clear()
    loader = DataLoader(Tables(cut(columns)), batch_size=None)  # which hands tables on as they are
    fitted(loader, batch_size=30, epochs=1, callbacks=[Seen()])
    assert sizes == [30, 60, 64]


def test_encoded_rows_are_parts_too() -> None:
    columns = whole()
    encoded = model().encode(columns)
    net, _ = fitted(columns)
    other, _ = fitted([(encoded, columns)])
    assert are_equal(state(net), state(other))
    with pytest.raises(TypeError, match="got encoded rows alone"):
        fitted([encoded])


def test_what_decides_the_order_is_told_each_epoch_once_and_later_calls_count_on() -> None:
    parts = Again(cut(whole()))
    net, _ = fitted(parts, epochs=2)
    net.fit(parts, epochs=2, batch_size=8, progress=False)
    assert parts.epochs == [0, 1, 2, 3]
    net.fit(parts, epochs=1, batch_size=8, seed=5, progress=False)
    assert parts.epochs[4:] == [0], "a training that begins anew"
    inner, outer = Again(cut(whole())), Again([])
    loader = DataLoader(Tables(cut(whole())), batch_size=None)
    loader.dataset.set_epoch = inner.set_epoch  # type: ignore[attr-defined]  # as a dataset of the user's has it
    fitted(loader, epochs=2)
    assert inner.epochs == [0, 1] and outer.epochs == []


def test_three_calls_of_one_epoch_are_one_call_of_three(tmp_path: Path) -> None:
    parts = cut(whole())
    net, history = fitted(parts, epochs=3)
    other = model()
    torch.manual_seed(3)
    found = [other.fit(parts, epochs=1, batch_size=8, progress=False)[0] for _ in range(3)]
    assert are_equal(state(net), state(other))
    assert [result.loss for result in history] == [result.loss for result in found]


def test_validation_and_evaluate_of_parts_are_those_of_the_table() -> None:
    columns, held = whole(), whole(40)
    options: dict[str, Any] = {"metrics": {"auc", "rmse"}, "score": "auc"}
    pair = (held, held)
    weighed = (held, held, held["weight"])
    several: list[tuple[Any, Any]] = [
        (pair, Again(cut(held, (3, 0, 37)))),
        (pair, cut(held, (3, 37))),  # a list of two tables is no pair of data and labels
        (pair, ([held], None)),
        (pair, held),
        (pair, pd.DataFrame(held)),
        (weighed, Again([weighed])),
    ]
    for known, parts in several:
        net, history = fitted(columns, validation=known, **options)
        other, found = fitted(columns, validation=parts, **options)
        assert are_equal(state(net), state(other))
        for one, two in zip(history, found, strict=True):
            assert one.validation is not None and two.validation is not None
            flat, of_parts = one.validation.flat(), two.validation.flat()
            assert flat.keys() == of_parts.keys()
            assert [flat[k] for k in flat] == pytest.approx([of_parts[k] for k in flat], rel=1e-5)
    net = model()
    whole_numbers = net.evaluate(held, metrics={"auc", "mae"}).flat()
    of_parts = net.evaluate(iter(cut(held, (3, 0, 37))), metrics={"auc", "mae"}).flat()
    assert list(whole_numbers.values()) == pytest.approx(list(of_parts.values()), rel=1e-5)


def test_a_score_of_the_users_gets_the_labels_of_all_parts() -> None:
    held = whole(40)
    seen = []

    def score(predictions: Any, labels: Any) -> float:
        seen.append((len(predictions["watch"]), labels["watch"]))
        return 0.0

    fitted(whole(), validation=Again(cut(held, (3, 0, 37))), score=score, epochs=1)
    assert seen[0][0] == 40
    np.testing.assert_array_equal(seen[0][1], held["watch"].astype(np.float32))


def test_labels_in_parts_are_standardised_as_whole_ones() -> None:
    columns = {**whole(), "watch": 1e6 + 1e5 * whole()["watch"]}
    tasks = (TASKS[0], TaskLoss("watch", "regression", standardise=True), TASKS[2])
    nets = []
    for data in (columns, cut(columns)):
        net = model(tasks=tasks)
        net.fit(data, batch_size=8, progress=False)
        nets.append(net)
    one, two = (net.tasks[1] for net in nets)
    assert (one.mean, one.std) == pytest.approx((two.mean, two.std), rel=1e-12) and one.std > 1e4


def test_parts_warn_of_labels_as_tables_do() -> None:
    columns = {**whole(), "click": np.full(ROWS, np.nan), "watch": 1e6 * whole()["watch"]}
    with pytest.warns(UserWarning, match="scale near 1"), pytest.warns(UserWarning, match="none at all for 'click'"):
        fitted(cut(columns), epochs=2)


@pytest.mark.parametrize("kind", ["list", "loader", "parquet"])
@pytest.mark.parametrize("stop", [1, 3, 5, 7, 8, 9, 12])
def test_a_killed_training_over_parts_goes_on_to_the_bit(kind: str, stop: int, tmp_path: Path) -> None:
    columns = whole()
    pq.write_table(pa.table(columns), tmp_path / "log.parquet", row_group_size=10)

    def data() -> Any:
        if kind == "loader":
            return DataLoader(Entries(columns), batch_size=16, shuffle=True)  # of PyTorch's own generator
        return cut(columns) if kind == "list" else ParquetTables(tmp_path / "log.parquet", shuffle=True)

    class Stop(Callback):
        steps = 0

        def after_step(self, model: Any, step: Step) -> None:
            self.steps += 1
            if self.steps == stop:
                raise RuntimeError("killed")

    own: dict[str, Any] = {"batch_size": None if kind == "loader" else 16, "epochs": 3}
    net, history = fitted(data(), **own)
    file = tmp_path / "checkpoint.pt"
    own |= {"checkpoint": file, "checkpoint_every": 1, "resume": True}
    with pytest.raises(RuntimeError, match="killed"):
        fitted(data(), **own, callbacks=[Stop()])
    other = model()
    torch.manual_seed(77 if file.exists() else 3)
    found = other.fit(data(), progress=False, **own)
    assert are_equal(state(net), state(other))
    assert [(r.loss, r.rows) for r in history] == [(r.loss, r.rows) for r in found]


def test_what_is_read_once_is_refused_before_it_is_needed_again() -> None:
    columns = whole()
    assert is_read_once(iter([columns])) and not is_read_once([columns])
    _, history = fitted(iter(cut(columns)), epochs=1)
    assert history[0].rows == ROWS
    with pytest.raises(ValueError, match=r"data: expected parts that can be read again.*list_iterator"):
        fitted(iter(cut(columns)))
    with pytest.raises(ValueError, match="validation: expected parts that can be read again"):
        fitted(columns, epochs=1, validation=iter(cut(columns)))
    tasks = (TASKS[0], TaskLoss("watch", "regression", standardise=True), TASKS[2])
    with pytest.raises(ValueError, match="data: expected parts that can be read again"):
        model(tasks=tasks).fit(iter(cut(columns)), batch_size=8, progress=False)


@pytest.mark.parametrize(
    ("error", "message", "data", "options"),
    [
        (ValueError, "labels: expected none beside data that comes in parts", [whole()], {"labels": whole()}),
        (TypeError, "sample_weight: expected the name of a column", [whole()], {"sample_weight": np.ones(ROWS)}),
        (ValueError, "validation: .*beside data that comes in parts", [whole()], {"validation": 0.1}),
        (ValueError, "expected data of at least one row, got none", cut(whole(), (0,)), {}),
        (ValueError, "expected data of at least one row, got none", Again([]), {}),
        (TypeError, r"expected tables.*got list of 1, 2 as part 2", [whole(), [1, 2]], {}),
        (TypeError, "expected columns by name", [whole(), 3], {}),
        (ValueError, "got neither for 'click'", [table()[0]], {}),
        (ValueError, "a column 'weighs'", [whole()], {"sample_weight": "weighs"}),
        (ValueError, "every part to have weights", [(whole(), whole()), (whole(), whole(), np.ones(ROWS))], {}),
        (ValueError, "got both", [(whole(), whole(), np.ones(ROWS))], {"sample_weight": "weight"}),
        (ValueError, "part 2: .*one label per row", [whole(), (whole(), whole(3))], {}),
        (ValueError, "part 2: column 'age': .*missing", [whole(), {**whole(), "age": np.full(ROWS, np.nan)}], {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parts_are_refused_in_sentences(error: Any, message: str, data: Any, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        fitted(data, **options)


MIXED = {
    "country": ["de", "fr", None, "it", "de", "it", "es"],
    "item": [3, 1, 4, 1, 5, 9, 2],
    "tags": [["a"], [], ["b", "a"], None, ["c", "c", "c"], ["a"], []],
    "history": [[7, 1], [2], [], [3], [8, 2, 8, 2], [], [1]],
    "user": [10**15 + k for k in range(7)],
    "age": [20.0, 31.0, np.nan, 44.0, 23.0, 61.0, 18.0],
    "one": [5.0] * 7,
}


def test_columns_of_parts_are_those_of_the_whole() -> None:
    options: dict[str, Any] = {
        "categorical": ["country", "item", "tags", "history", "user"],
        "numeric": ["age", "one"],
        "pooling": {"tags": "sum", "history": "mean"},
        "share": {"history": "item"},
        "buckets": {"user": 100},
        "min_count": 2,
    }
    expected = columns_from(MIXED, **options)
    assert columns_from([MIXED], **options) == expected
    for sizes in ((3, 4), (1, 0, 6), (1,) * 7):
        parts = cut(MIXED, sizes)
        given: list[Any] = [parts, iter(parts), Again(parts), [(part, {}) for part in parts]]
        for data in given:
            found = columns_from(data, **options)
            assert found[:5] == expected[:5]
            for one, two in zip(found[5:], expected[5:], strict=True):
                assert (one.name, one.missing) == (two.name, two.missing)  # type: ignore[union-attr]  # Numeric
                assert (one.mean, one.std) == pytest.approx((two.mean, two.std), rel=1e-12)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="column 'country': expected at least one row"):
        columns_from(cut(MIXED, (0,)), **options)
    with pytest.raises(TypeError, match="got encoded rows as part 1"):
        columns_from([Encoded(torch.zeros(2, 1), torch.zeros(2, 0))], numeric=["age"])
    long = [{"tags": [["a"] * n]} for n in [1] * 199 + [300]]
    with pytest.raises(ValueError, match=r"longest row has 300 values.*99 % of its rows have 1 or fewer"):
        columns_from(long, categorical=["tags"], pooling={"tags": "sum"})


def test_parquet_files_are_read_group_by_group(tmp_path: Path) -> None:
    columns = whole()
    frame = pa.table(columns)
    (tmp_path / "in").mkdir()
    pq.write_table(frame.slice(0, 40), tmp_path / "in" / "a.parquet", row_group_size=16)
    pq.write_table(frame.slice(40), tmp_path / "in" / "b.parquet", row_group_size=100)
    files = ParquetTables(tmp_path / "in", columns=["age", "click"])
    assert len(files) == 4 and files.rows == ROWS
    assert [table.num_rows for table in files] == [16, 16, 8, 24]
    assert pa.concat_tables(files).equals(frame.select(["age", "click"]))
    assert pa.concat_tables(ParquetTables([tmp_path / "in" / "b.parquet"])).equals(frame.slice(40))
    shuffled = ParquetTables(str(tmp_path / "in"), shuffle=True, seed=1)
    orders = []
    for epoch in (0, 1, 2, 3, 0):
        shuffled.set_epoch(epoch)
        orders.append([table.num_rows for table in shuffled])
    assert orders[0] == orders[4] and len(set(map(tuple, orders))) > 1
    assert all(sorted(order) == [8, 16, 16, 24] for order in orders)
    assert columns_from(files, numeric=["age"])[0].mean == pytest.approx(columns["age"].mean(), rel=1e-12)  # type: ignore[union-attr]
    (tmp_path / "none").mkdir()
    (tmp_path / "text.parquet").write_text("age,click")
    for given, message in ((tmp_path / "none", "got none"), (tmp_path / "gone", "got neither"), ([], "at least one")):
        with pytest.raises(FileNotFoundError, match=message):
            ParquetTables(given)
    with pytest.raises(ValueError, match=r"text\.parquet: expected a Parquet file"):
        ParquetTables(tmp_path / "text.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: expected a column 'price'"):
        ParquetTables(tmp_path / "in", columns=["price"])
    with pytest.raises(TypeError, match="files: expected paths, got int"):
        ParquetTables([3])  # type: ignore[list-item]  # what is tested


PROGRAM = """
import resource, sys
import numpy as np, pyarrow as pa, pyarrow.parquet as pq, torch
from ple_fast.losses import TaskLoss
from ple_fast.model import MultiTaskModel, ParquetTables, columns_from

folder, groups = sys.argv[1], int(sys.argv[2])
names = [f"n{k}" for k in range(24)]
rng = np.random.default_rng(0)
def group():
    columns = {name: rng.normal(size=20_000) for name in names}
    return pa.table({**columns, "user": rng.integers(0, 1000, 20_000), "click": (columns["n0"] > 0).astype(float)})
first = group()
with pq.ParquetWriter(f"{folder}/log-{groups}.parquet", first.schema) as file:
    for _ in range(groups):
        file.write_table(group())
data = ParquetTables(f"{folder}/log-{groups}.parquet")
assert len(data) == groups
columns = columns_from(data, categorical=["user"], numeric=names)
model = MultiTaskModel(columns, [TaskLoss("click")], trunk="hard_sharing", trunk_options={"expert_units": (4,)})
history = model.fit(data, batch_size=4096, epochs=1, progress=False)
assert history[0].rows == 20_000 * groups
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def _peak(folder: Path, groups: int) -> int:
    """KiB."""
    ran = run_python("-c", PROGRAM, str(folder), str(groups))
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """40 groups are 160 MB of columns, and half of that encoded."""
    few, many = (_peak(tmp_path, groups) for groups in (8, 40))
    assert many - few < 32 * 1024, f"{few / 1024:.0f} MiB at 8 row groups, {many / 1024:.0f} at 40"


def test_a_bar_without_an_end_is_drawn() -> None:
    steps: list[Step] = []
    net = model()
    net.fit(cut(whole()), batch_size=8, epochs=2, progress=steps.append)
    assert {step.batches for step in steps if step.epoch == 1} == {None}
    assert {step.batches for step in steps if step.epoch == 2} == {8}
    assert [step.number for step in steps] == list(range(1, 17))


def test_functools_partial_of_a_schedule_goes_on_over_parts() -> None:
    schedule = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    _, history = fitted(cut(whole()), schedule=schedule)
    assert [result.lr for result in history] == pytest.approx([1e-3, 5e-4, 2.5e-4])

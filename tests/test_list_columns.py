"""Columns of lists, shared and hashed ones in a whole model; how columns_from and declarations name them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from ple_fast.losses import TaskLoss
from ple_fast.model import Categorical, Encoded, Hashed, MultiTaskModel, Numeric, columns_from
from ple_fast_encoder.columns import Column, from_json, to_json
from tests.storage_helpers import save_version_1

TASKS = (TaskLoss("click"), TaskLoss("minutes", "regression"))
COLUMNS: list[Column] = [
    Categorical("tags", values=("a", "b", "c"), width=3, pooling="mean", max_length=4),
    Hashed("user", 50, width=3),
    Hashed("friends", 20, pooling="max", max_length=3, padding=0, keep="first"),
    Categorical("item", size=30, width=5),
    Categorical("history", share="item", pooling="sum", max_length=3),
    Numeric("age"),
]


def log(rows: int = 64, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns, and labels that depend on the lists alone."""
    rng = np.random.default_rng(seed)
    tags = [list(map(str, rng.choice(["a", "b", "c", "d"], rng.integers(0, 5)))) for _ in range(rows)]
    data = {
        "tags": tags,
        "user": rng.integers(0, 10**12, rows),
        "friends": rng.integers(0, 9, (rows, 3)),
        "item": rng.integers(0, 40, rows),
        "history": [rng.integers(0, 30, rng.integers(0, 6)) for _ in range(rows)],
        "age": rng.normal(size=rows),
    }
    labels = {"click": ["a" in row for row in tags], "minutes": [float(row.count("b")) for row in tags]}
    return data, labels


def model(columns: Any = COLUMNS, **options: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    trunk = {"num_levels": 1, "task_experts": 1, "shared_experts": 1, "expert_units": (16, 8)}
    return MultiTaskModel(columns, TASKS, trunk_options=trunk, tower_units=(), **options)


def test_a_model_learns_from_lists() -> None:
    data, labels = log(512)
    net = model()
    history = net.fit(data, labels, epochs=30, batch_size=64, lr=0.02, validation=log(256, seed=1))
    assert history[-1].loss < history[0].loss / 2
    predicted = net.predict(log(256, seed=1)[0])["click"]
    assert np.mean((predicted > 0.5) == log(256, seed=1)[1]["click"]) > 0.85


def test_a_history_trains_the_embeddings_of_the_items() -> None:
    columns = [Categorical("item", size=3, width=2), Categorical("history", share="item", pooling="sum", max_length=2)]
    net = model(columns)
    before = net.embedding.tables[0].weight.detach().clone()  # type: ignore[operator]  # a table
    net.fit({"item": [0, 0], "history": [[2], [2, 0]]}, {"click": [1, 0], "minutes": [1, 2]})
    changed: Any = net.embedding.tables[0].weight != before
    assert changed.any(dim=1).tolist() == [False, True, False, True], (
        "item 0 by itself, item 2 by the histories, item 1 by nobody"
    )


def test_the_state_has_one_table_for_each_width_and_nothing_more() -> None:
    names = [name for name in model().state_dict() if name.startswith("embedding.")]
    assert names == ["embedding.tables.0.weight", "embedding.tables.1.weight", "embedding.tables.2.weight"]
    shapes = [tuple(model().state_dict()[name].shape) for name in names]
    assert shapes == [(4 + 51, 3), (21, 4), (31, 5)]


def test_a_saved_model_keeps_its_columns_and_predicts_the_same(tmp_path: Path) -> None:
    data, labels = log()
    net = model()
    net.fit(data, labels)
    net.save(tmp_path)
    loaded = MultiTaskModel.load(tmp_path)
    assert loaded.columns == net.columns == tuple(COLUMNS)
    for name, predicted in net.predict(data).items():
        assert np.array_equal(loaded.predict(data)[name], predicted), name


def test_columns_of_one_value_are_written_as_releases_before_lists_read_them() -> None:
    plain: list[tuple[Column, dict[str, Any]]] = [
        (
            Categorical("a", values=("x",), width=3),
            {"kind": "Categorical", "name": "a", "values": ("x",), "size": None, "width": 3},
        ),
        (Categorical("a", size=3), {"kind": "Categorical", "name": "a", "values": None, "size": 3, "width": 4}),
    ]
    for column, expected in plain:
        assert to_json(column) == expected
        assert from_json(json.loads(json.dumps(to_json(column)))) == column


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.name)
def test_columns_are_json(column: Column) -> None:
    assert from_json(json.loads(json.dumps(to_json(column)))) == column


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pooling": "median"}, r"columns\[0\]: column 'tags': expected pooling to be one of"),
        ({"pooling": 3}, r"columns\[0\].pooling: expected text, got 3"),
        ({"max_length": 0}, r"columns\[0\]: column 'tags': max_length: expected 1 or more"),
        ({"max_length": "3"}, r"columns\[0\].max_length: expected an int"),
        ({"padding": []}, r"columns\[0\].padding: expected text or an int"),
        ({"keep": "middle"}, r"columns\[0\]: column 'tags': expected keep to be one of"),
        ({"novel": 1}, r"columns\[0\].novel: expected one of kind, name, values, size, width, pooling"),
        ({"share": "item"}, r"columns\[0\].values: expected one of kind, name, share"),
    ],
)
def test_a_damaged_declaration_in_a_file_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    net = model()
    columns: list[Any] = [to_json(column) for column in COLUMNS]
    save_version_1(net, tmp_path, columns=[columns[0] | change, *columns[1:]])
    with pytest.raises(ValueError, match=r"config\.json: " + says):
        MultiTaskModel.load(tmp_path)


def test_a_file_whose_shared_table_is_gone_is_refused(tmp_path: Path) -> None:
    columns = [to_json(column) for column in COLUMNS if column.name != "item"]
    save_version_1(model(), tmp_path, columns=columns)
    with pytest.raises(ValueError, match=r"config\.json: column 'history': expected share to name a column"):
        MultiTaskModel.load(tmp_path)


def test_encoded_rows_go_through_a_data_loader_and_come_in_parts() -> None:
    data, labels = log()
    net = model().eval()
    rows = net.encode(data)
    assert rows.codes.shape == (64, 2 + 4 + 3 + 3)
    assert rows.codes.dtype is torch.int32
    whole = net(rows)["click"]
    loader = DataLoader(TensorDataset(*rows, torch.as_tensor(labels["click"])), batch_size=16)
    parts = [net(Encoded(codes, numbers))["click"] for codes, numbers, _ in loader]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)
    index = torch.tensor([5, 1, 63])
    assert torch.allclose(net(rows.rows(index))["click"], whole[index], atol=1e-6)


def test_predictions_are_the_same_from_every_table() -> None:
    data, labels = log()
    net = model()
    net.fit(data, labels)
    lists = {name: [list(map(int, row)) for row in data[name]] for name in ("friends", "history")}
    expected = net.predict(data)["click"]
    for other in (pd.DataFrame(data | lists), pa.table(data | lists)):
        assert np.array_equal(net.predict(other)["click"], expected)
    assert net.predict({name: column[:0] for name, column in data.items()})["click"].shape == (0,)
    one = net.predict({name: column[:1] for name, column in data.items()})["click"]
    assert np.allclose(one, expected[:1], atol=1e-6)


def test_low_precision_and_autocast_train_on_lists() -> None:
    data, labels = log()
    assert np.isfinite(model().to(torch.bfloat16).fit(data, labels)[0].loss)
    with torch.autocast("cpu", torch.bfloat16):
        assert np.isfinite(model().fit(data, labels)[0].loss)


TABLE: dict[str, Any] = {
    "user": [1, 2, 3],
    "item": [10, 20, 30],
    "history": [[20, 40], [], [10, 20, 50]],
    "tags": [["a"], ["a", "b"], None],
    "day": ["x", "y", "x"],
    "price": [1.0, 2.0, 3.0],
    "age": [1.0, 2.0, 3.0],
}


def test_columns_from_takes_options_by_name() -> None:
    columns = columns_from(
        TABLE,
        categorical=["history", "user", "item", "tags", "day"],
        numeric=["price", "age"],
        width={"user": 8, "item": 16},
        buckets={"user": 100},
        share={"history": "item"},
        pooling={"history": "mean", "tags": "sum"},
        max_length={"tags": 5},
        keep={"history": "first"},
        numeric_width={"price": 3},
    )
    assert [dataclasses.replace(c, mean=0.0, std=1.0) if isinstance(c, Numeric) else c for c in columns] == [
        Categorical("history", share="item", pooling="mean", max_length=3, keep="first"),
        Hashed("user", 100, width=8),
        Categorical("item", values=(10, 20, 30, 40, 50), width=16),
        Categorical("tags", values=("a", "b"), width=4, pooling="sum", max_length=5),
        Categorical("day", values=("x", "y"), width=4),
        Numeric("price", width=3),
        Numeric("age"),
    ]


def test_a_shared_vocabulary_counts_the_values_of_both() -> None:
    (item, _) = columns_from(
        TABLE, categorical=["item", "history"], share={"history": "item"}, pooling={"history": "mean"}, min_count=2
    )
    assert item == Categorical("item", values=(10, 20))
    (item, _) = columns_from(
        TABLE | {"last": [50, 30, 50]}, categorical=["item", "last"], share={"last": "item"}, min_count=2
    )
    assert item == Categorical("item", values=(30, 50))


def test_a_long_row_wants_a_length() -> None:
    rows = [[1]] * 200 + [list(range(300))]
    with pytest.raises(ValueError, match=r"'x': expected max_length, because its longest row has 300 values.*99 % of"):
        columns_from({"x": rows}, categorical=["x"], pooling={"x": "mean"})
    (column,) = columns_from({"x": rows}, categorical=["x"], pooling={"x": "mean"}, max_length=300)
    assert column.max_length == 300  # type: ignore[union-attr]  # a categorical column
    (column,) = columns_from({"x": [list(range(256))]}, categorical=["x"], pooling={"x": "mean"})
    assert column.max_length == 256  # type: ignore[union-attr]


def _from(**options: Any) -> Callable[[], Any]:
    names = options.pop("categorical", ["user", "item", "history"])
    return lambda: columns_from(TABLE, categorical=names, **{"pooling": {"history": "mean"}, **options})


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (_from(width={"usr": 8}), ValueError, r"width: expected names of \['user', 'item', 'history'\], got 'usr'"),
        (_from(width={"user": 0}), ValueError, "'user': width: expected 1 or more"),
        (_from(width={"history": 3}, share={"history": "item"}), ValueError, r"width: expected names of \['user', 'it"),
        (_from(numeric_width={"user": 3}), ValueError, r"numeric_width: expected names of \[\], got 'user'"),
        (_from(buckets=100), TypeError, "buckets: expected a dict by the names of categorical columns, got 100"),
        (_from(buckets={"price": 3}), ValueError, r"buckets: expected names of \[.*\], got 'price'"),
        (_from(pooling="mean"), TypeError, "pooling: expected a dict .*got 'mean'"),
        (_from(pooling={"history": "median"}), ValueError, r"'history': expected pooling to be one of \('sum', 'mean'"),
        (_from(max_length={"user": 3}), ValueError, r"max_length: expected names of \['history'\], got 'user'"),
        (_from(max_length=0), ValueError, "'history': max_length: expected 1 or more, got 0"),
        (_from(padding=1.5), TypeError, "'history': expected padding to be text or an int, got 1.5"),
        (_from(padding=True), TypeError, "'history': expected padding to be text or an int, got True"),
        (_from(keep="middle"), ValueError, r"'history': expected keep to be one of \('last', 'first'\), got 'middle'"),
        (_from(pooling=None, categorical=["user"], max_length=3), ValueError, "max_length: expected pooling with it"),
        (_from(pooling=None, categorical=["user"], padding=0), ValueError, "padding: expected pooling with it"),
        (_from(pooling=None, categorical=["user"], keep="first"), ValueError, "keep: expected pooling with it"),
        (_from(share={"history": "itm"}), ValueError, "'history': expected share to name a column .*got 'itm'"),
        (_from(share={"history": "history"}), ValueError, "'history': expected share to name another column"),
        (_from(share={"history": ["item"]}), TypeError, "'history': expected share to be the name of a column"),
        (_from(share={"history": "item"}, buckets={"history": 3}), ValueError, "share, buckets: expected one of them"),
        (
            _from(share={"history": "item", "item": "user"}),
            ValueError,
            "'history': .*got 'item', which shares that of 'user'",
        ),
        (
            _from(categorical=["item", "tags"], pooling={"tags": "sum"}, share={"tags": "item"}),
            TypeError,
            r"'item', with those that share its embedding: expected text or ints.*\['int', 'str'\]",
        ),
        (lambda: Categorical("x", size=3, max_length=3), ValueError, "'x': expected pooling with max_length=3"),
        (lambda: Categorical("x", size=3, keep="first"), ValueError, "'x': expected pooling with keep='first'"),
        (lambda: Hashed("x", 3, padding=0), ValueError, "'x': expected pooling with padding=0"),
        (lambda: Hashed("x", 3, pooling="mean"), ValueError, "'x': expected max_length with pooling.*columns_from mea"),
        (lambda: Hashed("x", 3, pooling="mean", max_length=2.5), TypeError, "'x': max_length: expected an int"),  # type: ignore[arg-type]  # the mistakes under test
        (lambda: Categorical("x", size=3, share="y"), ValueError, "'x': expected either values or size.*share='y'"),
        (lambda: Categorical("x", share="y", width=3), ValueError, "'x': expected no width with share.*that of 'y'"),
        (lambda: Categorical("x", share="x"), ValueError, "'x': expected share to name another column"),
        (lambda: Categorical("x", share=2.5), TypeError, "'x': expected share to be the name of a column, got 2.5"),  # type: ignore[arg-type]
        (lambda: model([Categorical("x", share="y")]), ValueError, "'x': expected share to name a column"),
    ],
)
def test_declarations_of_lists_are_refused_in_sentences(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_options_of_numpy_are_pythons_own() -> None:
    fitted: Any = columns_from
    got = fitted({"a": [1], "b": [2]}, categorical=["a", "b"], width={"a": np.int64(16)}, buckets={"b": np.int8(9)})
    assert got == [Categorical("a", values=(1,), width=16), Hashed("b", 9)]
    made: Any = Categorical
    column = made(
        "x", size=3, pooling=np.str_("mean"), max_length=np.int8(3), padding=np.int64(0), keep=np.str_("first")
    )
    assert column == Categorical("x", size=3, pooling="mean", max_length=3, padding=0, keep="first")
    assert {type(getattr(column, name)) for name in ("pooling", "max_length", "padding", "keep")} == {str, int}

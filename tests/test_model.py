"""Columns, embeddings and the model around a trunk: fit, predict, save, load, and what each refuses."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ple_fast import viz
from ple_fast.losses import JointLoss, TaskLoss
from ple_fast.model import Categorical, Encoded, MultiTaskModel, Numeric, Step, columns_from, encode
from ple_fast.model.embedding import FeatureEmbedding
from ple_fast.model.trunks import TRUNKS
from tests.documents import run_document

TASKS = (TaskLoss("click"), TaskLoss("watch", "regression"), TaskLoss("rating", "multiclass", num_classes=3))
COLUMNS = (
    Categorical("country", values=("de", "fr", "it"), width=3),
    Numeric("age", mean=40.0, std=10.0),
    Categorical("hour", size=24, width=2),
    Numeric("amount", transform="log1p", missing="indicator"),
)
SMALL: dict[str, dict[str, Any]] = {
    "ple": {"num_levels": 2, "task_experts": 2, "shared_experts": 1, "expert_units": (8, 6)},
    "cgc": {"task_experts": 1, "shared_experts": 2, "expert_units": (8, 6)},
    "mmoe": {"experts": 3, "expert_units": (8, 6)},
    "ml_mmoe": {"experts": 3, "expert_units": (8, 6)},
    "adatt": {"task_experts": 2, "shared_experts": 1, "expert_units": (8, 6)},
    "cross_stitch": {"expert_units": ((8,), (6,))},
    "hard_sharing": {"expert_units": (8, 6)},
    "customized_sharing": {"expert_units": (8, 3)},
    "asymmetric_sharing": {"expert_units": (8, 6)},
    "single_task": {"expert_units": (8, 6), "activation": "tanh"},
}


def table(rows: int = 64, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns, and labels that depend on them."""
    rng = np.random.default_rng(seed)
    country = rng.choice(["de", "fr", "it", "es"], rows)  # "es" is in no vocabulary
    age = rng.uniform(20, 60, rows)
    amount = np.where(rng.random(rows) < 0.2, np.nan, rng.exponential(100, rows))
    data = {"country": country, "age": age, "hour": rng.integers(0, 24, rows), "amount": amount}
    labels = {
        "click": ((country == "de") | (age > 50)).astype(int),
        "watch": age / 40 + np.isnan(amount),
        "rating": np.where(country == "fr", 2, (age > 40).astype(int)),
    }
    return data, labels


def model(
    trunk: Any = "ple", *, tasks: Any = TASKS, columns: Any = COLUMNS, seed: int = 0, **kwargs: Any
) -> MultiTaskModel:
    torch.manual_seed(seed)
    options = SMALL.get(trunk) if isinstance(trunk, str) else None
    if trunk == "asymmetric_sharing":
        options = SMALL[trunk] | {"sources": tuple((0, k)[not k :] for k in range(len(tasks)))}
    return MultiTaskModel(columns, tasks, trunk=trunk, **{"trunk_options": options, "tower_units": (5,), **kwargs})


class Bottom(nn.Module):
    """A trunk of the user's: one layer per task."""

    def __init__(self, in_features: int, tasks: int = 3, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(in_features, width) for _ in range(tasks))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.stack([layer(x) for layer in self.layers], dim=1)


# --- columns ---


def test_codes_and_numbers_are_as_declared() -> None:
    rows = encode(
        {
            "country": np.array(["it", "xx", "de"]),
            "age": [50.0, 40.0, 25.0],
            "hour": np.array([0, 23, 24]),
            "amount": [math.e - 1, math.nan, 1 - math.e],
        },
        COLUMNS,
    )
    assert rows.codes.tolist() == [[3, 1], [0, 24], [1, 0]]
    assert rows.codes.dtype is torch.int32
    expected = [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [-1.5, -1.0, 0.0]]
    assert torch.allclose(rows.numbers, torch.tensor(expected))
    assert rows.numbers.dtype is torch.float32
    assert len(rows) == 3


@pytest.mark.parametrize(
    "column",
    [
        pd.Series(["b", None, "a", "z"], dtype="category"),
        pd.Series(["b", None, "a", "z"]),
        pd.Series(["b", None, "a", "z"], dtype="string"),
        pd.Categorical(["b", None, "a", "z"]),
        np.array(["b", None, "a", "z"], dtype=object),
        ["b", "", "a", "z"],
    ],
    ids=["categories", "text", "nullable text", "bare categories", "objects", "list"],
)
def test_text_has_the_same_codes_from_every_kind_of_column(column: Any) -> None:
    assert Categorical("c", values=("a", "b")).encode(column).tolist() == [2, 0, 1, 0]


@pytest.mark.parametrize(
    "column",
    [
        np.array([7, -1, 3, 8]),
        np.array([7.0, math.nan, 3.0, 3.5]),
        pd.Series([7, None, 3, 8], dtype="Int64"),
        pd.Series([7, None, 3, 8], dtype="category"),
        torch.tensor([7, -1, 3, 8], dtype=torch.int16),
        np.array([7, None, 3, 8], dtype=object),
    ],
    ids=["ints", "floats", "nullable ints", "categories", "tensor", "objects"],
)
@pytest.mark.parametrize("declared", [{"values": (3, 7)}, {"size": 8}], ids=["values", "size"])
def test_ints_have_the_same_codes_from_every_kind_of_column(column: Any, declared: dict[str, Any]) -> None:
    expected = [2, 0, 1, 0] if "values" in declared else [8, 0, 4, 0]
    assert Categorical("c", **declared).encode(column).tolist() == expected


def test_columns_from_measures_training_data() -> None:
    frame = pd.DataFrame(
        {
            "word": ["b", "a", "b", None],
            "flag": [True, False, True, True],
            "kind": pd.Categorical(["x", "x", "y", "x"], categories=["x", "y", "unused"]),
            "amount": [0.0, math.e - 1, math.nan, math.e**3 - 1],
            "constant": [0.1, 0.1, 0.1, 0.1],
        }
    )
    columns = columns_from(
        frame, categorical=["word", "flag", "kind"], numeric=["amount", "constant"], width=5, transform="log1p"
    )
    word, flag, kind, amount, constant = columns
    assert [c.values for c in (word, flag, kind) if isinstance(c, Categorical)] == [("a", "b"), (0, 1), ("x", "y")]
    assert isinstance(amount, Numeric)
    assert amount.missing == "indicator"
    assert math.isclose(amount.mean, 4 / 3)
    assert math.isclose(amount.std, np.std([0, 1, 3]))
    assert isinstance(constant, Numeric)
    assert constant.std == 1.0  # and not the rounding noise of equal numbers
    rare = columns_from(frame, categorical=["word"], min_count=2)[0]
    assert isinstance(rare, Categorical)
    assert rare.values == ("b",)
    assert encode(frame, columns).numbers.shape == (4, 3)


def test_large_numbers_are_standardised_in_double_precision() -> None:
    seconds = 1.7e9 + np.arange(10.0)
    column = columns_from({"time": seconds}, numeric=["time"])[0]
    got = column.encode(seconds)[:, 0]
    assert np.allclose(got, (np.arange(10) - 4.5) / np.std(np.arange(10)), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Categorical("c"), ValueError, "either values or size"),
        (lambda: Categorical("c", values=("a",), size=3), ValueError, "either values or size"),
        (lambda: Categorical("c", values=("a", 1)), TypeError, "int.*str"),
        (lambda: Categorical("c", values=(1.5,)), TypeError, "float"),  # type: ignore[arg-type]  # the mistake under test
        (lambda: Categorical("c", values=("a", "b", "a")), ValueError, "'a' twice"),
        (lambda: Categorical("c", size=0), ValueError, "size"),
        (lambda: Categorical("c", size=3, width=0), ValueError, "width"),
        (lambda: Numeric("n", transform="sqrt"), ValueError, "sqrt"),  # type: ignore[arg-type]  # the mistake under test
        (lambda: Numeric("n", std=0.0), ValueError, "std above 0"),
        (lambda: Numeric("n", width=-1), ValueError, "width"),
        (lambda: Categorical("c", values=("a",)).encode([1, 2]), TypeError, "'c'.*strings"),
        (lambda: Categorical("c", values=(1, 2)).encode(["a"]), TypeError, "'c'.*ints, got text"),
        (lambda: Categorical("c", size=2).encode(["a"]), TypeError, "'c'.*ints, got text"),
        (lambda: Categorical("c", size=2).encode(np.array(["2020"], "datetime64[s]")), TypeError, "datetime"),
        (lambda: Categorical("c", size=2).encode([[1]]), ValueError, "'c'.*one value per row.*list"),
        (lambda: Categorical("c", size=2).encode(np.ones((1, 1))), ValueError, r"'c'.*\(1, 1\)"),
        (lambda: Numeric("n").encode([1.0, math.nan]), ValueError, "1 of 2 missing.*indicator"),
        (lambda: Numeric("n").encode([math.inf]), ValueError, "'n'.*finite"),
        (lambda: Numeric("n").encode(["1"]), TypeError, "'n'.*numbers"),
        (lambda: Numeric("n", std=1e-20).encode([1e30]), ValueError, r"'n'.*float32.*1e\+30"),
        (lambda: columns_from({"a": [1]}, numeric=["b"]), ValueError, r"'b', got \['a'\]"),
        (lambda: columns_from({"a": [1]}, categorical=["a"], numeric=["a"]), ValueError, r"\['a'\] more than once"),
        (lambda: columns_from({"a": []}, numeric=["a"]), ValueError, "at least one row"),
        (lambda: columns_from({"a": [1.5]}, categorical=["a"]), TypeError, "float.*numeric"),
        (lambda: columns_from({"a": [1]}, categorical=["a"], min_count=0), ValueError, "min_count"),
        (lambda: encode({"a": [1], "b": [1, 2]}, [Numeric("a"), Numeric("b")]), ValueError, "'a': 1, 'b': 2"),
        (lambda: FeatureEmbedding([]), ValueError, "at least one"),
    ],
)
def test_columns_refuse_in_sentences(make: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


# --- embeddings ---


def test_features_are_the_rows_of_the_tables_and_the_numbers() -> None:
    columns = (*COLUMNS, Categorical("day", size=7, width=3), Numeric("score", width=2))
    torch.manual_seed(0)
    embedding = FeatureEmbedding(columns)
    data = table(16)[0] | {"day": np.arange(16) % 8, "score": np.linspace(-2, 2, 16)}
    rows = encode(data, columns)
    country, hour, day = rows.codes.long().unbind(1)
    wide, narrow = (t.weight for t in reversed(list(embedding.tables)) if isinstance(t, nn.Embedding))
    assert wide.shape == (4 + 8, 3)
    assert narrow.shape == (25, 2)
    assert embedding.number_weight is not None and embedding.number_bias is not None
    score = torch.relu(rows.numbers[:, 3:] * embedding.number_weight + embedding.number_bias)
    expected = torch.cat([narrow[hour], wide[country], wide[4 + day], rows.numbers[:, :3], score], dim=1)
    got = embedding(rows)
    assert torch.equal(got, expected)
    assert got.shape == (16, embedding.out_features)


def test_gradients_of_the_tables_add_up_over_rows(device: torch.device) -> None:
    columns = (Categorical("a", size=3, width=2), Categorical("b", size=2, width=2))
    embedding = FeatureEmbedding(columns).to(device)
    a, b = np.array([0, 0, 2, 9]), np.array([1, 1, 1, 0])
    cotangent = torch.arange(16.0, device=device).view(4, 4)
    embedding(encode({"a": a, "b": b}, columns).to(device)).backward(cotangent)
    (table_of,) = embedding.tables
    assert isinstance(table_of, nn.Embedding)
    expected = torch.zeros(7, 2, device=device)
    for row in range(4):
        expected[a[row] + 1 if a[row] < 3 else 0] += cotangent[row, :2]
        expected[4 + b[row] + 1] += cotangent[row, 2:]
    assert table_of.weight.grad is not None
    assert torch.equal(table_of.weight.grad, expected)


def test_the_unknown_value_starts_at_zero_and_learns() -> None:
    net = model()
    table_of = net.embedding.tables[1]
    assert isinstance(table_of, nn.Embedding)
    assert not table_of.weight[0].any()
    assert table_of.weight[1:].all(dim=1).all()
    net.fit(*table(), epochs=1, batch_size=16)
    assert table_of.weight[0].any()


def test_embeddings_come_to_life_from_the_meta_device() -> None:
    with torch.device("meta"):
        embedding = FeatureEmbedding(COLUMNS)
    embedding.to_empty(device="cpu")
    embedding.reset_parameters()
    assert embedding(encode(table(4)[0], COLUMNS)).isfinite().all()


@pytest.mark.parametrize("field", [0, 1], ids=["codes", "numbers"])
def test_rows_of_another_model_are_refused(field: int) -> None:
    rows = list(encode(table(4)[0], COLUMNS))
    rows[field] = rows[field][:, :1]
    with pytest.raises(ValueError, match=r"expected shape \(B, [23]\), got \(4, 1\)"):
        model()(Encoded(*rows))


# --- the model ---


@pytest.mark.parametrize("trunk", TRUNKS)
def test_every_trunk_learns(trunk: str) -> None:
    data, labels = table(256)
    net = model(trunk)
    results = net.fit(data, labels, epochs=30, batch_size=32, lr=1e-2)
    assert results[-1].loss < 0.5 * results[0].loss
    outputs = net(data)
    assert {name: tuple(output.shape) for name, output in outputs.items()} == {
        "click": (256,),
        "watch": (256,),
        "rating": (256, 3),
    }
    predictions = net.predict(data)
    assert np.mean((predictions["click"] > 0.5) == labels["click"]) > 0.85
    assert np.mean(predictions["rating"].argmax(1) == labels["rating"]) > 0.85


def test_a_model_is_its_parts() -> None:
    """Embedding, trunk, tower and link function by hand; each task reads its own mixture."""
    net = model().eval()
    data, _ = table(8)
    mixtures = net.trunk(net.embedding(net.encode(data)))
    outputs = [tower(mixtures[:, k]) for k, tower in enumerate(net.towers)]
    predictions = net.predict(data)
    assert np.allclose(predictions["click"], outputs[0][:, 0].sigmoid().detach(), atol=1e-6)
    assert np.allclose(predictions["watch"], outputs[1][:, 0].detach(), atol=1e-6)
    assert np.allclose(predictions["rating"], outputs[2].softmax(1).detach(), atol=1e-6)


def test_a_step_of_fit_is_adam_on_the_joint_loss() -> None:
    data, labels = table(12)
    by_fit, by_hand = model(), model()
    by_fit.fit(data, labels, epochs=1, batch_size=12, lr=0.01)
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=0.01)
    targets = {name: torch.as_tensor(label) for name, label in labels.items()}
    JointLoss(TASKS)(by_hand(data), targets).total.backward()
    optimizer.step()
    for (name, ours), theirs in zip(by_fit.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4), name
    assert int(by_fit.joint_loss.epoch) == 1


def test_the_seed_fixes_the_order_and_nothing_else_does() -> None:
    data, labels = table()

    def trained(seed: int) -> Tensor:
        net = model()
        torch.manual_seed(int(torch.randint(1000, ()).item()))  # the global generator is elsewhere each time
        net.fit(data, labels, epochs=2, batch_size=16, seed=seed)
        output: Tensor = net(data)["click"]
        return output

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def test_missing_labels_teach_nothing() -> None:
    data, labels = table()
    first, second = model(), model()
    gaps = labels | {"watch": np.full(64, np.nan), "rating": np.full(64, -1)}
    with pytest.warns(UserWarning, match="none at all for 'watch', 'rating'"):
        first.fit(data, gaps, epochs=1, batch_size=16)
    assert first(data)["watch"].isfinite().all()
    for ours, initial in zip(first.towers[1].parameters(), second.towers[1].parameters(), strict=True):
        assert torch.equal(ours, initial)
    assert not torch.equal(next(first.towers[0].parameters()), next(second.towers[0].parameters()))


def test_events_in_a_chain_are_multiplied() -> None:
    tasks = (TaskLoss("click"), TaskLoss("buy"))
    plain, chain = model(tasks=tasks), model(tasks=tasks, given={"buy": "click"})
    data, labels = table()
    separate, joint = plain.predict(data), chain.predict(data)
    assert np.allclose(joint["click"], separate["click"])
    assert np.allclose(joint["buy"], separate["click"] * separate["buy"], atol=1e-6)
    chain.fit(data, {"click": labels["click"], "buy": labels["click"] * (data["age"] > 40)}, epochs=2, batch_size=16)
    assert (chain.predict(data)["buy"] <= chain.predict(data)["click"]).all()


def test_validation_stops_early_and_restores_the_best_epoch() -> None:
    data, labels = table()
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.2])
    seen: list[Tensor] = []
    net = model(trunk_options=SMALL["ple"] | {"norm": "batch"})

    def score(predictions: dict[str, Any], _: Any) -> float:
        seen.append(torch.from_numpy(predictions["click"]))
        return next(scores)

    results = net.fit(data, labels, epochs=10, batch_size=16, validation=(data, labels), score=score, patience=2)
    assert [result.score for result in results] == [0.1, 0.5, 0.4, 0.3]
    assert np.allclose(net.predict(data)["click"], seen[1], atol=1e-6)  # batch norm's statistics are restored as well
    assert not np.allclose(seen[1], seen[3], atol=1e-6)


def test_the_default_score_is_minus_the_joint_loss() -> None:
    data, labels = table()
    net = model(tasks=[TaskLoss("click", weight=2.0, gamma=0.5), TaskLoss("watch", "regression")])
    validation = table(10_000, seed=1)  # more than one batch
    validation[1]["watch"][: len(validation[1]["watch"]) * 3 // 4] = np.nan  # in some batches only
    result = net.fit(data, labels, batch_size=16, validation=validation)[0]
    targets = {name: torch.as_tensor(label) for name, label in validation[1].items()}
    expected = net.joint_loss(net.eval()(validation[0]), targets).total.item()
    assert result.score == pytest.approx(-expected, rel=1e-5)


def test_an_interrupted_training_keeps_the_best_epoch() -> None:
    data, labels = table()
    net = model()
    best: list[Any] = []

    def interrupt(step: Step) -> None:
        if step.epoch == 2 and step.batch == 2:
            raise KeyboardInterrupt

    def score(predictions: dict[str, Any], _: Any) -> float:
        best.append(predictions["click"])
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        net.fit(data, labels, epochs=3, batch_size=16, validation=(data, labels), score=score, progress=interrupt)
    assert np.array_equal(net.predict(data)["click"], best[0])


def test_progress_counts_every_batch_and_a_lone_row_joins_the_last() -> None:
    data, labels = table(33)
    steps: list[Step] = []
    options = SMALL["ple"] | {"norm": "batch"}
    model(trunk_options=options).fit(data, labels, epochs=2, batch_size=16, progress=steps.append)
    assert [(step.epoch, step.batch) for step in steps] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(step.batches == 2 and step.epochs == 2 for step in steps)
    assert all(math.isfinite(float(step.loss)) and not step.loss.requires_grad for step in steps)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    data, labels = table()
    model().fit(data, labels, epochs=2, batch_size=16, progress=True)
    assert "epoch 2/2" in capsys.readouterr().out


def test_modes_come_back_and_nothing_requires_grad() -> None:
    data, labels = table()
    net = model(tower_dropout=0.5)
    net.train()
    net.towers[1].eval()
    before = {name: module.training for name, module in net.named_modules()}
    first, second = net.predict(data), net.predict(data, batch_size=7)
    assert np.allclose(first["click"], second["click"], atol=1e-6)  # no dropout
    net.gate_weights(data)
    net.fit(data, labels, batch_size=16, validation=(data, labels))
    assert {name: module.training for name, module in net.named_modules()} == before
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_no_rows_give_empty_predictions() -> None:
    predictions = model().predict({name: column[:0] for name, column in table()[0].items()})
    assert [predictions[name].shape for name in ("click", "watch", "rating")] == [(0,), (0,), (0, 3)]


def test_encoded_rows_go_through_a_data_loader() -> None:
    data, labels = table()
    net = model()
    rows = net.encode(data)
    assert net.encode(rows) is rows
    loader = DataLoader(TensorDataset(*rows, torch.as_tensor(labels["click"])), batch_size=32)
    whole = net(data)["click"]
    parts = [net(Encoded(codes, numbers))["click"] for codes, numbers, _ in loader]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_gate_weights_go_into_the_picture(trunk: str) -> None:
    net = model(trunk)
    data, _ = table(20)
    gates = net.gate_weights(data, batch_size=8)
    assert len(gates) == (2 if trunk in ("ple", "ml_mmoe", "adatt", "cross_stitch") else 1)
    for level, topology in zip(gates, net.topologies, strict=True):
        assert [tuple(g.shape) for g in level] == [(20, len(experts)) for experts in topology.mixture_experts]
        for o, weights in enumerate(level):
            if o in topology.gated_mixtures and not topology.has_offsets:
                assert torch.allclose(weights.sum(1), torch.ones(20), atol=1e-5)
    uses = viz.gate_use(gates, net.topologies, net.task_names, model=trunk)
    assert len(uses) == sum(topology.num_mixtures for topology in net.topologies)
    if trunk != "customized_sharing":  # two mixtures per task
        assert {use.gate for use in uses} >= {"click", "watch", "rating"}


def test_low_precision_parameters_work() -> None:
    data, labels = table()
    net = model().to(torch.bfloat16)
    assert math.isfinite(net.fit(data, labels, batch_size=16)[0].loss)
    assert net.predict(data)["watch"].dtype == np.float32


@pytest.mark.parametrize("form", ["module", "function"])
def test_a_trunk_of_ones_own(form: str, tmp_path: Path) -> None:
    data, labels = table()
    width = FeatureEmbedding(COLUMNS).out_features
    net = model(Bottom(width) if form == "module" else Bottom)
    net.fit(data, labels, epochs=2, batch_size=16)
    net.save(tmp_path)
    with pytest.raises(ValueError, match="expected the trunk, of class Bottom"):
        MultiTaskModel.load(tmp_path)
    loaded = MultiTaskModel.load(tmp_path, trunk=Bottom(width) if form == "module" else Bottom)
    assert np.array_equal(loaded.predict(data)["click"], net.predict(data)["click"])
    with pytest.raises(TypeError, match="Bottom"):
        net.gate_weights(data)


# --- save and load ---


@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_saved_model_predicts_the_same(trunk: str, tmp_path: Path) -> None:
    data, labels = table()
    net = model(
        trunk, tower_activation="gelu", tower_dropout=0.1, given={"like": "click"}, tasks=[*TASKS, TaskLoss("like")]
    )
    net.fit(data, labels | {"like": labels["click"]}, epochs=2, batch_size=16)
    net.save(tmp_path / "new" / "folder")
    loaded = MultiTaskModel.load(tmp_path / "new" / "folder")
    assert not loaded.training
    assert loaded.columns == net.columns
    assert loaded.tasks == net.tasks
    assert int(loaded.joint_loss.epoch) == 2
    for name, predicted in net.predict(data).items():
        assert np.array_equal(loaded.predict(data)[name], predicted), name
    assert [file.name for file in (tmp_path / "new" / "folder").iterdir()] == ["model.safetensors"]


def test_dtype_and_statistics_are_kept(tmp_path: Path) -> None:
    data, _ = table()
    columns = columns_from(data, categorical=["country", "hour"], numeric=["age", "amount"], transform="log1p")
    net = model(columns=columns).to(torch.float64)
    net.save(tmp_path)
    loaded = MultiTaskModel.load(tmp_path)
    assert next(loaded.parameters()).dtype is torch.float64
    assert loaded.columns == tuple(columns)  # to the last bit of each mean
    assert torch.equal(loaded(data)["watch"], net.eval()(data)["watch"])


def test_a_trunk_that_is_not_wanted_is_refused(tmp_path: Path) -> None:
    model().save(tmp_path)
    with pytest.raises(ValueError, match="expected none: it is 'ple'"):
        MultiTaskModel.load(tmp_path, trunk=Bottom)


# --- errors ---

Make = Callable[[], Any]


def _fit(**kwargs: Any) -> Make:
    data, labels = table(8)
    return lambda: model().fit(**{"data": data, "labels": labels, **kwargs})


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: model("transformer", trunk_options={}), ValueError, "one of ple, cgc.*'transformer'"),
        (
            lambda: model(trunk_options={"num_heads": 3}),
            TypeError,
            r"trunk_options: expected options of 'ple', num_levels, .*expert_units.*; got \['num_heads'\]",
        ),
        (lambda: model("asymmetric_sharing", trunk_options={}), TypeError, "expected sources, which 'asymm"),
        (lambda: model(trunk_options=["norm"]), TypeError, r"trunk_options: expected a dict, got \['norm'\]"),
        (lambda: model(7), TypeError, "trunk: expected a name, a module, or a function of in_features, got 7"),
        (lambda: model(given=["click"]), TypeError, "given: expected a dict"),
        (
            lambda: model(columns=COLUMNS[0]),
            TypeError,
            "columns: expected a sequence of Categorical and Numeric, got C",
        ),
        (lambda: model(columns=["age"]), TypeError, "columns: expected Categorical or Numeric.*got 'age'"),
        (lambda: model(tasks=TASKS[0]), TypeError, "tasks: expected a sequence of TaskLoss"),
        (lambda: model(tower_units=64), TypeError, r"tower_units: expected the widths.*\(64,\), got 64"),
        (lambda: model(tower_units=(8, 0)), ValueError, r"tower_units\[1\]: expected 1 or more, got 0"),
        (lambda: model(tower_units=(8.0,)), TypeError, r"tower_units\[0\]: expected an int"),
        (lambda: model(tower_dropout=math.nan), ValueError, "tower_dropout: expected a rate from 0 to 1, got nan"),
        (lambda: model(tower_dropout="0.5"), TypeError, "tower_dropout: expected a number"),
        (lambda: model(tower_activation=["relu"]), ValueError, r"tower_activation.*got \['relu'\]"),
        (
            lambda: model(trunk_options={"activation": nn.ReLU}),
            ValueError,
            r"options\['activation'\].*by its name",
        ),
        (lambda: model(Bottom, trunk_options={"width": 3}), ValueError, "a trunk of your own"),
        (lambda: model(functools.partial(Bottom, tasks=2)), ValueError, r"\(B, 3, H\).*got shape \(2, 2, 4\)"),
        (lambda: model(lambda width: nn.Linear(width, 3)), ValueError, r"Linear to return.*got shape \(2, 3\)"),
        (lambda: model(lambda width: "module"), TypeError, "return a module"),
        (lambda: model(tower_activation="mish"), ValueError, "tower_activation.*'mish'"),
        (lambda: model(columns=[COLUMNS[0]] * 2), ValueError, r"\['country'\] more than once"),
        (lambda: model(columns=[]), ValueError, "at least one"),
        (lambda: model(tasks=[]), ValueError, "at least one TaskLoss"),
        (lambda: model(given={"click": "buy"}), ValueError, "two of the tasks"),
        (lambda: model(given={"click": "watch"}), ValueError, "the condition first"),
        (lambda: model(given={"rating": "click"}), ValueError, "binary tasks"),
        (_fit(data={"age": [1]}), ValueError, r"expected a column 'country', got \['age'\]"),
        (_fit(labels={"click": [1] * 8}), ValueError, "labels: expected a column 'watch'"),
        (_fit(labels=table(9)[1]), ValueError, r"labels\['click'\].*\(8,\), got shape \(9,\)"),
        (_fit(labels=table(8)[1] | {"click": [2] * 8}), ValueError, r"labels\['click'\].*0 to 1"),
        (_fit(labels=table(8)[1] | {"rating": [3] * 8}), ValueError, r"labels\['rating'\].*classes 0 to 2"),
        (_fit(labels=table(8)[1] | {"click": ["yes"] * 8}), TypeError, r"labels\['click'\].*numbers"),
        (_fit(epochs=0), ValueError, "epochs"),
        (_fit(batch_size=0), ValueError, "batch_size"),
        (_fit(patience=2), ValueError, "validation"),
        (_fit(score=lambda p, y: 0.0), ValueError, "validation"),
        (_fit(validation=(table(4)[0], table(5)[1])), ValueError, "validation labels.*4.*5"),
        (_fit(validation=0.1), TypeError, r"validation: expected \(data, labels\) of rows.*got 0.1; split the rows"),
        (_fit(validation=encode(table(4)[0], COLUMNS)), TypeError, "validation: expected .*got Encoded"),
        (_fit(validation=table(4)[0]), TypeError, "validation: expected .*got dict"),
        (_fit(optimizer="adam"), TypeError, r"optimizer: expected a class.*torch\.optim\.Adam, got 'adam'"),
        (
            _fit(optimizer=lambda p, lr: None),
            TypeError,
            "optimizer: expected the function to return an optimizer, got N",
        ),
        (_fit(lr="1e-3"), TypeError, "lr: expected a number, got '1e-3'"),
        (_fit(seed=0.5), TypeError, "seed: expected an int, got 0.5"),
        (_fit(epochs=True), TypeError, "epochs: expected an int, got True"),
        (_fit(validation=table(4), score="auc"), TypeError, "score: expected a function, got 'auc'"),
        (_fit(progress="bar"), TypeError, "progress: expected a function, got 'bar'"),
        (_fit(validation=table(4), score=lambda p, y: math.nan), FloatingPointError, "validation score, got nan"),
        (_fit(labels=table(8)[1] | {"watch": [3e38] * 8}), FloatingPointError, "epoch 1: expected a finite loss"),
        (
            lambda: model().fit({name: column[:0] for name, column in table()[0].items()}, {}),
            ValueError,
            "at least one row",
        ),
        (lambda: model().predict({"age": [1]}), ValueError, "'country'"),
        (
            lambda: model().requires_grad_(False).fit(*table(8)),
            ValueError,
            "parameters that require a gradient, got a model whose parameters are frozen",
        ),
    ],
)
def test_the_model_refuses_in_sentences(make: Make, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    "data",
    [
        torch.zeros(8, 4),
        np.zeros((8, 4)),
        [1, 2],
        (torch.zeros(8, 2), torch.zeros(8, 2)),
        pd.Series([1.0]),
        "age",
        3,
        None,
    ],
    ids=lambda data: type(data).__name__,
)
def test_what_has_no_columns_by_name_is_refused_without_its_contents(data: Any) -> None:
    net = model()
    for call in (net.predict, net.gate_weights, net.encode, net, lambda d: net.fit(d, {})):
        with pytest.raises(TypeError, match=r"^data: expected columns by name.*'country', 'age'.*got .+") as caught:
            call(data)
        assert len(str(caught.value)) < 250
    with pytest.raises(
        TypeError, match=r"^labels: expected one column \(64,\) per task by name.*'click': array.*got"
    ) as caught:
        net.fit(table()[0], data)
    assert len(str(caught.value)) < 250


def test_labels_of_two_axes_are_refused_by_their_shape() -> None:
    data, labels = table()
    with pytest.raises(TypeError, match=r"got ndarray of shape \(64, 2\)"):
        model().fit(data, np.zeros((64, 2)))  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ValueError, match=r"labels\['click'\]: expected one .* per row.*got shape \(64, 2\)"):
        model().fit(data, labels | {"click": np.zeros((64, 2))})


def test_a_state_of_another_number_of_tasks_is_refused_before_anything_is_loaded() -> None:
    one, three = model("hard_sharing", tasks=TASKS[:1]), model("hard_sharing", seed=1)
    kept = {name: value.clone() for name, value in one.state_dict().items()}
    says = r"expected the state of a model of 1 tasks, \['click'\], got one of 3; build the model with the tasks"
    with pytest.raises(ValueError, match=says):
        one.load_state_dict(three.state_dict())
    assert all(torch.equal(value, kept[name]) for name, value in one.state_dict().items())
    missing, unexpected = one.load_state_dict(three.state_dict(), strict=False)  # who asks for it gets what fits
    assert not missing
    assert unexpected == [name for name in three.state_dict() if name.startswith(("towers.1", "towers.2"))]


@pytest.mark.parametrize("count", [np.int64, np.uint8, torch.tensor], ids=["int64", "uint8", "tensor"])
def test_scalar_options_of_other_libraries_build_and_train_the_same_model(count: Any, tmp_path: Path) -> None:
    data, labels = table()
    expected = model(tower_units=(5, 4), tower_dropout=0.25, trunk_options=SMALL["ple"] | {"norm": "layer"})
    options = {
        "num_levels": count(2),
        "task_experts": count(2),
        "shared_experts": count(1),
        "expert_units": np.array([8, 6]),
        "norm": np.str_("layer"),
        "gate_bias": np.True_,
    }
    net = model(tower_units=np.array([5, 4]), tower_dropout=np.float32(0.25), trunk_options=options)
    assert net.columns == expected.columns
    plain = {"epochs": 2, "batch_size": 16, "patience": 2, "seed": 3, "validation": (data, labels)}
    torch.manual_seed(0)
    first = expected.fit(data, labels, lr=0.5**9, **plain)  # type: ignore[arg-type]
    torch.manual_seed(0)
    counts = {name: count(value) for name, value in plain.items() if isinstance(value, int)}
    second = net.fit(data, labels, lr=np.float32(0.5**9), validation=(data, labels), **counts)  # type: ignore[arg-type]
    assert [(r.loss, r.score) for r in second] == [(r.loss, r.score) for r in first]
    net.save(tmp_path)
    again = MultiTaskModel.load(tmp_path).predict(data, batch_size=count(7))
    assert np.array_equal(again["click"], expected.predict(data, batch_size=7)["click"])


def test_the_document_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every snippet of docs/model.md, one after the other."""
    monkeypatch.chdir(tmp_path)
    scope, _ = run_document("docs/model.md")
    assert sorted(scope["predictions"]) == ["click", "minutes"]
    assert (tmp_path / "gates.png").is_file()

"""The model around a trunk: fit, predict, save and load."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ple_fast import viz
from ple_fast.losses import JointLoss, TaskLoss
from ple_fast.model import Encoded, MultiTaskModel, Step, columns_from
from ple_fast.model.embedding import FeatureEmbedding
from ple_fast.model.trunks import TRUNKS
from tests.documents import run_document
from tests.model_helpers import COLUMNS, SMALL, TASKS, Bottom, model, table


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
    losses = net.joint_loss(net.eval()(validation[0]), targets).per_task
    expected = sum(task.weight * losses[task.name].item() for task in net.tasks)  # the weights of epoch 0
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
    assert len(gates) == (2 if trunk in ("ple", "ml_mmoe", "adatt", "stem", "home", "cross_stitch") else 1)
    for level, topology in zip(gates, net.topologies, strict=True):
        assert [tuple(g.shape) for g in level] == [(20, len(experts)) for experts in topology.mixture_experts]
        for o, weights in enumerate(level):
            is_softmax = topology.mixture_kind is not None and topology.mixture_kind[o] == "softmax"
            if is_softmax and not topology.has_offsets:
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


def test_the_document_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every snippet of docs/model.md, one after the other."""
    monkeypatch.chdir(tmp_path)
    scope, _ = run_document("docs/model.md")
    assert sorted(scope["predictions"]) == ["click", "minutes"]
    assert (tmp_path / "gates.png").is_file()

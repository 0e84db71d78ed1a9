"""Embeddings of each slot's own: those of as many models side by side, in training, files and whatever is served."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ple_fast import PLE, STEM, MMoE
from ple_fast.losses import TaskLoss
from ple_fast.model import Categorical, Encoded, Hashed, MultiTaskModel, Numeric
from ple_fast.model.embedding import FeatureEmbedding
from ple_fast_encoder import Encoder
from tests.model_helpers import SMALL, TASKS, model, table
from tests.ranks import run_ranks

COLUMNS = (
    Numeric("age", mean=40.0, std=10.0),
    Categorical("country", values=("de", "fr", "it"), width=3),
    Categorical("hour", size=24, width=2),
    Categorical("seen", share="hour", pooling="mean", max_length=3),
    Hashed("user", 30, width=3),
    Numeric("amount", transform="log1p", missing="indicator", width=4),
    Categorical("tags", values=("a", "b"), width=2, pooling="max", max_length=2),
)


def wide_table(rows: int = 40, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    data, labels = table(rows, seed)
    rng = np.random.default_rng(seed)
    data["seen"] = [rng.integers(0, 30, rng.integers(0, 4)) for _ in range(rows)]
    data["user"] = rng.integers(0, 10**6, rows)
    data["tags"] = [list(rng.choice(["a", "b", "c"], rng.integers(0, 3))) for _ in range(rows)]
    return data, labels


def one_slot(embedding: FeatureEmbedding, slot: int) -> FeatureEmbedding:
    """The embedding that a slot has, by itself."""
    alone, slots = FeatureEmbedding(COLUMNS), embedding.slots
    assert slots is not None
    with torch.no_grad():
        for own, whole in zip(alone.tables.parameters(), embedding.tables.parameters(), strict=True):
            own.copy_(whole.unflatten(1, (slots, -1))[:, slot])
        for name in ("number_weight", "number_bias"):
            getattr(alone, name).copy_(getattr(embedding, name)[slot])
    return alone


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_features_and_gradients_are_those_of_slots_by_themselves(sparse: bool, slots: int, rows: int) -> None:
    encoded = Encoded(*(torch.as_tensor(part) for part in Encoder(COLUMNS).encode(wide_table()[0]))).rows(slice(rows))
    embedding = FeatureEmbedding(COLUMNS, sparse=sparse, slots=slots)
    features = embedding(encoded)
    assert features.shape == (rows, slots, embedding.out_features)
    assert len(embedding.tables) == 2, "a look-up per width, whatever the number of slots"
    alone = [one_slot(embedding, slot) for slot in range(slots)]
    expected = torch.stack([own(encoded) for own in alone], 1)
    assert torch.equal(features, expected)
    cotangent = torch.randn(features.shape)
    features.backward(cotangent)
    expected.backward(cotangent)
    for place, whole in enumerate(embedding.tables.parameters()):
        assert whole.grad is not None and whole.grad.is_sparse == sparse
        grad = (whole.grad.to_dense() if sparse else whole.grad).unflatten(1, (slots, -1))
        for slot, own in enumerate(alone):
            theirs = list(own.tables.parameters())[place].grad
            torch.testing.assert_close(grad[:, slot], theirs)
    assert embedding.number_weight is not None and embedding.number_weight.grad is not None
    for slot, own in enumerate(alone):
        assert own.number_weight is not None
        torch.testing.assert_close(embedding.number_weight.grad[slot], own.number_weight.grad)


@pytest.mark.parametrize("trunk", ["stem", "ple", "cgc", "adatt", "cross_stitch"])
def test_every_trunk_with_slots_for_tasks_trains_with_them(trunk: str, tmp_path: Path) -> None:
    data, labels = wide_table()
    net = model(trunk, columns=COLUMNS, task_embeddings=True)
    slots = net.topologies[0].num_slots
    assert net.embedding.slots == slots and slots is not None and slots >= len(TASKS)
    before = copy.deepcopy(net.state_dict())
    history = net.fit(data, labels, epochs=2, batch_size=16, progress=False)
    assert np.isfinite(history[-1].loss)
    moved = [name for name, value in net.state_dict().items() if not torch.equal(value, before[name])]
    assert {"embedding.tables.0.weight", "embedding.number_weight"} <= set(moved)
    net.save(tmp_path)
    again = MultiTaskModel.load(tmp_path)
    for name, found in again.predict(data).items():
        assert np.array_equal(found, net.eval().predict(data)[name])


def test_a_task_of_stem_trains_its_own_embeddings_and_the_shared_ones() -> None:
    data, _ = wide_table()
    options = {**SMALL["stem"], "num_levels": 1, "activation": "tanh"}
    net = model("stem", columns=COLUMNS, task_embeddings=True, trunk_options=options)
    rows = net.encode(data)
    for task, name in enumerate(net.task_names):
        net.zero_grad()
        net(rows)[name].square().sum().backward()
        for weight in net.embedding.tables.parameters():
            assert weight.grad is not None
            used = weight.grad.unflatten(1, (4, -1)).abs().sum((0, 2))
            assert [slot for slot in range(4) if used[slot] > 0] == [task, 3], "exactly zero elsewhere"


def test_files_name_them_only_where_there_are_some(tmp_path: Path) -> None:
    for name, own in (("without", False), ("with", True)):
        model("stem", task_embeddings=own).save(tmp_path / name)
    key = b"task_embeddings"
    assert key not in (tmp_path / "without" / "model.safetensors").read_bytes()
    assert key in (tmp_path / "with" / "model.safetensors").read_bytes()


def test_a_trunk_of_ones_own_has_them_too(tmp_path: Path) -> None:
    def build(width: int) -> nn.Module:
        return PLE(width, 3, num_levels=1, expert_units=(5,))

    data, _ = table()
    net = model(build, task_embeddings=True).eval()
    net.save(tmp_path)
    again = MultiTaskModel.load(tmp_path, trunk=build)
    assert all(np.array_equal(value, net.predict(data)[name]) for name, value in again.predict(data).items())
    with pytest.raises(ValueError, match="the weights are not those of this model"):
        MultiTaskModel.load(tmp_path, trunk=lambda width: PLE(width, 3, num_levels=1, shared_experts=0, expert_units=5))


def test_weights_of_one_embedding_are_refused() -> None:
    plain, own = model("stem"), model("stem", task_embeddings=True)
    with pytest.raises(RuntimeError, match=r"size mismatch for embedding\.tables"):
        own.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("trunk", ["mmoe", "hard_sharing", "single_task", "customized_sharing"])
def test_a_trunk_of_one_slot_is_refused(trunk: str) -> None:
    with pytest.raises(ValueError, match=r"task_embeddings: expected a trunk with a slot for each of the 3 tasks"):
        model(trunk, task_embeddings=True)


def test_a_trunk_whose_slots_nobody_knows_is_refused() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.unsqueeze(1).expand(-1, 3, -1)

    with pytest.raises(TypeError, match=r"task_embeddings: expected a trunk of levels with a topology, .* got Own"):
        model(Own(), task_embeddings=True)
    with pytest.raises(TypeError, match="task_embeddings: expected a bool, got 'yes'"):
        model("stem", task_embeddings="yes")


def test_another_trunk_must_have_as_many_slots() -> None:
    net = model("stem", task_embeddings=True)
    width = net.embedding.out_features
    net.trunk = PLE(width, 3, expert_units=(8, 6))
    assert net(table()[0])["click"].shape == (64,)
    with pytest.raises(ValueError, match=r"trunk: expected one of 4 slots, .* got MMoE, which has 1"):
        net.trunk = MMoE(width, 3, expert_units=(8, 6))
    compiled: Any = torch.compile(STEM(width, 3, expert_units=(8, 6)), backend="eager")
    net.trunk = compiled
    assert net.predict(table()[0])["click"].shape == (64,)


def test_columns_of_tasks_are_hidden_in_each_slot() -> None:
    data, _ = wide_table()
    names = [column.name for column in COLUMNS]
    options = {**SMALL["cgc"], "activation": "tanh"}
    net = model(
        "cgc", columns=COLUMNS, trunk_options=options, task_embeddings=True,
        task_columns={"click": [name for name in names if name not in ("hour", "seen")]},
    )  # fmt: skip
    other = {**data, "hour": (data["hour"] + 5) % 24}
    before, after = net.predict(data), net.predict(other)
    assert np.array_equal(before["click"], after["click"])
    assert not np.array_equal(before["watch"], after["watch"])


def test_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    data, labels = wide_table()

    def fresh() -> MultiTaskModel:
        return model("stem", columns=COLUMNS, task_embeddings=True, sparse_embeddings=True)

    how: dict[str, Any] = {"batch_size": 16, "progress": False}
    whole, broken, again = fresh(), fresh(), fresh()
    whole.fit(data, labels, epochs=3, **how)
    broken.fit(data, labels, epochs=2, checkpoint=tmp_path / "run.pt", **how)
    again.fit(data, labels, epochs=3, checkpoint=tmp_path / "run.pt", resume=True, **how)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    other = model("stem", columns=COLUMNS, sparse_embeddings=True)
    with pytest.raises(ValueError, match="expected the weights of this model"):
        other.fit(data, labels, epochs=4, checkpoint=tmp_path / "run.pt", resume=True, **how)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_autocast(dtype: torch.dtype) -> None:
    data, labels = wide_table()
    net = model("stem", columns=COLUMNS, task_embeddings=True).to(dtype)
    assert np.isfinite(net.fit(data, labels, batch_size=16, progress=False)[0].loss)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(data)["click"].isfinite().all()


def test_gate_weights_go_into_the_picture() -> None:
    from ple_fast import viz

    net = model("stem", columns=COLUMNS, task_embeddings=True)
    uses = viz.gate_use(net.gate_weights(wide_table()[0]), net.topologies, net.task_names)
    assert {use.gate for use in uses} >= set(net.task_names)


def _gradients() -> list[Tensor | None]:
    """Of each rank its rows, averaged."""
    rank = dist.get_rank()
    data, labels = wide_table(32)
    tasks = (TaskLoss("click"), TaskLoss("watch", "regression"))
    net = model("stem", columns=COLUMNS, task_embeddings=True, tasks=tasks)
    wrapped = DistributedDataParallel(net)
    rows = slice(rank * 16, rank * 16 + 16)
    targets = {name: torch.as_tensor(labels[name][rows], dtype=torch.float32) for name in net.task_names}
    net.joint_loss(wrapped(net.encode(data).rows(rows)), targets).total.backward()
    return [parameter.grad for parameter in net.parameters()]


@pytest.mark.slow
def test_ranks_average_all_of_their_gradients() -> None:
    first, second = run_ranks(2, _gradients)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("trunk", ["stem", "cgc"])
def test_the_older_exporter_to_onnx_keeps_rows_dynamic(trunk: str, tmp_path: Path) -> None:
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    net = model(trunk, columns=COLUMNS, task_embeddings=True).eval()
    rows, file = net.encode(wide_table()[0]), tmp_path / "model.onnx"
    names = ["codes", "numbers"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about checks of sizes; and that the exporter is old
        torch.onnx.export(
            net.for_inference(), tuple(rows), file, dynamo=False, input_names=names,
            dynamic_axes={name: {0: "rows"} for name in names},
        )  # fmt: skip
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for count in (1, 7, 40):
        part = rows.rows(slice(count))
        found = session.run(None, dict(zip(names, (part.codes.numpy(), part.numbers.numpy()), strict=True)))
        for own, expected in zip(found, net.predict(part).values(), strict=True):
            np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-6)

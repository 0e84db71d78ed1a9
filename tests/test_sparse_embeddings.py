"""Embeddings with sparse gradients: those of dense ones, in every mode, in saved models and over ranks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from ple_fast.model import Categorical, Encoded, MultiTaskModel
from ple_fast.model.embedding import FeatureEmbedding
from ple_fast.model.look_up import look_up
from tests.ranks import run_ranks
from tests.sparse_helpers import COLUMNS, gradients, model, same, table, weights


def test_outputs_and_gradients_are_those_of_dense_embeddings(device: torch.device) -> None:
    data, labels = table()
    labels = {name: torch.as_tensor(label, dtype=torch.float32, device=device) for name, label in labels.items()}
    dense, sparse = model(False).to(device), model().to(device)
    rows = dense.encode(data).to(device)
    assert all(torch.equal(own, other) for own, other in zip(sparse(rows).values(), dense(rows).values(), strict=True))
    pairs = zip(gradients(sparse, rows, labels), gradients(dense, rows, labels), strict=True)
    tolerance = 0.0 if device.type == "cpu" else 1e-5
    for own, other in pairs:
        assert torch.allclose(own.to_dense(), other, rtol=tolerance, atol=tolerance * 1e-3)
    assert all(weight.grad is not None and weight.grad.is_sparse for weight in weights(sparse))
    assert not any(weight.grad is None or weight.grad.is_sparse for weight in weights(dense))


@pytest.mark.parametrize("pooling", ["sum", "mean", "max"])
def test_a_place_without_a_value_is_no_row_of_the_gradient(pooling: Any) -> None:
    """It would be one of the unknown value, whose moments would fade."""
    columns = [Categorical("x", size=5, width=2, pooling=pooling, max_length=3)]
    embedding = FeatureEmbedding(columns, sparse=True)
    (weight,) = embedding.tables.parameters()
    for codes, expected in (([[-1, -1, -1], [2, 4, -1]], [2, 4]), ([[0, -1, -1]], [0]), ([[-1, -1, -1]], [])):
        weight.grad = None
        embedding(Encoded(torch.tensor(codes, dtype=torch.int32), torch.empty(len(codes), 0))).sum().backward()
        assert weight.grad is not None
        assert weight.grad._indices().tolist() == [expected]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_gradients_have_the_dtype_of_the_table(dtype: torch.dtype) -> None:
    index = torch.tensor([[1, 3], [3, 3], [0, 1]])
    dense, sparse = (torch.randn(5, 2).to(dtype).requires_grad_() for _ in range(2))
    cotangent = torch.randn(3, 2, 2).to(dtype)
    look_up(dense, index).backward(cotangent)
    look_up(sparse, index, sparse=True).backward(cotangent)
    assert dense.grad is not None and sparse.grad is not None
    assert sparse.grad.dtype == dtype
    assert torch.equal(sparse.grad.to_dense(), dense.grad)


def test_a_second_derivative_is_refused() -> None:
    weight = torch.randn(5, 2, requires_grad=True)
    found = look_up(weight, torch.tensor([[1, 3]]), sparse=True).square().sum()
    (first,) = torch.autograd.grad(found, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.to_dense().sum().backward()


def test_a_batch_without_rows_has_a_gradient_without_rows() -> None:
    net = model()
    sum(output.sum() for output in net(net.encode(table(0)[0])).values()).backward()
    assert all(weight.grad is not None and weight.grad._nnz() == 0 for weight in weights(net))


def test_autocast_and_compilation_change_no_gradient() -> None:
    rows = model().encode(table()[0])
    for autocast in (False, True):
        found = []
        for sparse in (False, True):
            embedding = model(sparse).embedding
            run = torch.compile(embedding, backend="aot_eager") if sparse else embedding
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                run(rows).square().sum().backward()
            found.append([weight.grad for weight in embedding.tables.parameters()])
        for dense, own in zip(*found, strict=True):
            assert dense is not None and own is not None and own.is_sparse
            assert torch.allclose(own.to_dense(), dense, rtol=1e-6)


def test_a_whole_graph_of_a_training_step_is_refused() -> None:
    net = model()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a compiled backward has no sparse gradients"):
        torch.compile(net.embedding, backend="aot_eager", fullgraph=True)(net.encode(table()[0]))


def test_programs_of_a_sparse_model_are_those_of_a_dense_one() -> None:
    class Tensors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = FeatureEmbedding(COLUMNS, sparse=True)

        def forward(self, codes: Tensor, numbers: Tensor) -> Tensor:
            features: Tensor = self.embedding(Encoded(codes, numbers))
            return features

    module, rows = Tensors(), model().encode(table()[0])
    expected = module(*rows)
    for strict in (False, True):
        program = torch.export.export(module, tuple(rows), strict=strict)
        assert torch.equal(program.module()(*rows), expected)
    with torch.inference_mode():
        assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(*rows), expected)
        assert torch.equal(module(*rows), expected)


def test_saved_models_are_sparse_again_and_dense_ones_have_no_new_key(tmp_path: Path) -> None:
    net = model()
    net.fit(*table(), progress=False)
    net.save(tmp_path / "sparse")
    again = MultiTaskModel.load(tmp_path / "sparse")
    assert again.embedding.sparse
    assert same(net, again)
    again.train().fit(*table(), embedding_optimizer=SGD, progress=False)
    again.embedding.sparse = False
    again.save(tmp_path / "dense")
    assert b"sparse_embeddings" in (tmp_path / "sparse" / "model.safetensors").read_bytes()
    assert b"sparse_embeddings" not in (tmp_path / "dense" / "model.safetensors").read_bytes()
    assert not MultiTaskModel.load(tmp_path / "dense").embedding.sparse


def test_a_wrapped_embedding_is_refused_by_save_and_trained_by_fit(tmp_path: Path) -> None:
    net, other = model(), model()
    net.embedding = nn.Sequential(net.embedding)  # type: ignore[assignment]  # what is tested
    with pytest.raises(ValueError, match="save: the model has been changed"):
        net.save(tmp_path)
    for each in (net, other):
        each.fit(*table(), progress=False)
    assert same(net, other)


def test_the_default_dtype_and_device_of_a_user_change_nothing() -> None:
    net = model()
    rows = net.encode(table()[0])
    with torch.device("meta"):
        net(rows)["click"].sum().backward()
    assert all(weight.grad is not None and weight.grad.device.type == "cpu" for weight in weights(net))


def test_a_large_dense_table_is_warned_of_and_others_are_not() -> None:
    columns = [Categorical("id", size=120_000, width=1), Categorical("hour", size=24, width=2)]
    data = {"id": np.arange(32), "hour": np.arange(32) % 24}
    labels = {"click": np.arange(32) % 2, "watch": np.zeros(32)}
    options: dict[str, Any] = {"progress": False, "batch_size": 16}
    with pytest.warns(UserWarning, match=r"all 120,001 rows of embedding\.tables\.0, of which a batch reads") as seen:
        model(False, columns=columns).fit(data, labels, epochs=3, **options)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    frozen = model(False, columns=columns)
    frozen.embedding.tables.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for net in (model(columns=columns), frozen, model(False)):
            own = table() if net.columns == COLUMNS else (data, labels)
            net.fit(*own, **options)


def _parallel(sparse: bool) -> list[Tensor]:
    """Gradients of DistributedDataParallel, each rank with half of the rows."""
    data, labels = table()
    net = model(sparse)
    half = slice(dist.get_rank(), None, 2)
    rows = net.encode({name: column[half] for name, column in data.items()})
    targets = {name: torch.as_tensor(label[half], dtype=torch.float32) for name, label in labels.items()}
    parallel = DistributedDataParallel(net)  # whose hooks end with it
    net.joint_loss(parallel(rows), targets).total.backward()
    return [parameter.grad.to_dense() for parameter in net.parameters() if parameter.grad is not None]


@pytest.mark.slow
def test_ranks_average_sparse_gradients_as_they_do_dense_ones() -> None:
    found = run_ranks(2, _both)
    for dense, sparse in found:
        assert len(dense) == len(sparse)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(dense, sparse, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def _both() -> tuple[list[Tensor], list[Tensor]]:
    return _parallel(False), _parallel(True)

"""Embeddings of columns of lists and of columns that share: against plain loops, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ple_fast.model import Categorical, Encoded, Hashed, Numeric, encode
from ple_fast.model.embedding import FeatureEmbedding
from ple_fast.model.pooling import pool
from ple_fast_encoder.columns import Column, owners_of
from tests.model_helpers import COLUMNS, table

POOLINGS: tuple[Any, ...] = ("sum", "mean", "max")

DATA: dict[str, Any] = {
    "country": ["de", "fr", "xx", "de", None],
    "tags": [["a", "b"], [], None, ["b", "zz", "b"], ["a"]],
    "item": [7, 8, 9, 7, 5],
    "history": [[8, 7, 9], [1], [], [7, 7, 7, 8, 9], None],
    "seen": [[1, 2], [0], [5], None, [0, 1]],
    "age": [1.0, 2.0, 3.0, 4.0, 5.0],
}


def columns_of(pooling: Any) -> list[Column]:
    """One value and several, two widths, shared and not; the owner of a table behind the one that shares it."""
    return [
        Categorical("tags", values=("a", "b"), width=3, pooling=pooling, max_length=3),
        Categorical("country", values=("de", "fr"), width=2),
        Categorical("history", share="item", pooling=pooling, max_length=4),
        Numeric("age"),
        Hashed("item", 11, width=3),
        Categorical("seen", size=3, width=2, pooling=pooling, max_length=2),
    ]


def by_loop(embedding: FeatureEmbedding, columns: Sequence[Column]) -> Tensor:
    """The features that the docstring promises, one row and one value at a time."""
    owners, embedded = owners_of(columns), [column for column in columns if not isinstance(column, Numeric)]
    widths = {column.name: owners[column.name].width or 0 for column in embedded}
    parts = []
    for table_of, width in zip(embedding.tables, sorted(set(widths.values())), strict=True):
        assert isinstance(table_of, nn.Embedding)
        first, firsts = 0, {}
        for column in embedded:
            if widths[column.name] == width and owners[column.name] is column:
                firsts[column.name] = first
                first += column.rows
        assert tuple(table_of.weight.shape) == (first, width)
        for is_pooled in (False, True):
            for column in embedded:
                if widths[column.name] == width and (column.pooling is not None) == is_pooled:
                    owner = owners[column.name]
                    own = column.encode(DATA[column.name], owner) if isinstance(column, Categorical) else (
                        column.encode(DATA[column.name])
                    )  # fmt: skip
                    rows = own.reshape(len(own), -1).tolist()
                    weight = table_of.weight[firsts[owner.name] :]
                    parts.append(torch.stack([pool_by_loop(weight, row, column.pooling) for row in rows]))
    numbers = [column.encode(DATA[column.name]) for column in columns if isinstance(column, Numeric)]
    parts += [torch.from_numpy(number).to(parts[0].dtype) for number in numbers]
    return torch.cat(parts, dim=1)


def pool_by_loop(weight: Tensor, codes: Sequence[int], pooling: str | None) -> Tensor:
    vectors = [weight[code] for code in codes if code >= 0]
    if not vectors:
        return torch.zeros_like(weight[0])
    if pooling == "max":
        return torch.stack(vectors).amax(0)
    total = sum(vectors[1:], vectors[0])
    return total / len(vectors) if pooling == "mean" else total


def made(pooling: Any, dtype: torch.dtype = torch.float64) -> tuple[FeatureEmbedding, Encoded, list[Column]]:
    columns = columns_of(pooling)
    torch.manual_seed(0)
    embedding = FeatureEmbedding(columns).to(dtype)
    with torch.no_grad():
        for parameter in embedding.parameters():  # of unknown values too
            parameter.normal_()
    return embedding, encode(DATA, columns), columns


@pytest.mark.parametrize("pooling", POOLINGS)
def test_features_and_gradients_are_those_of_a_loop(pooling: Any, device: torch.device) -> None:
    embedding, rows, columns = made(pooling)
    expected = by_loop(embedding, columns)
    cotangent = torch.randn(expected.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(expected, list(embedding.parameters()), cotangent)
    embedding.to(device)
    got = embedding(rows.to(device))
    assert got.shape == (5, embedding.out_features)
    assert torch.allclose(got.cpu(), expected, rtol=1e-12)
    for own, gradient in zip(
        torch.autograd.grad(got, list(embedding.parameters()), cotangent.to(device)), gradients, strict=True
    ):
        assert torch.allclose(own.cpu(), gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_rows_without_a_value_are_zeros_and_give_no_gradient(pooling: Any) -> None:
    columns = [Categorical("x", size=3, width=2, pooling=pooling, max_length=2)]
    embedding = FeatureEmbedding(columns)
    with torch.no_grad():
        embedding.tables[0].weight.fill_(math.nan)  # type: ignore[operator]  # a table
    got = embedding(Encoded(torch.full((2, 2), -1, dtype=torch.int32), torch.empty(2, 0)))
    assert torch.equal(got, torch.zeros(2, 2))
    got.sum().backward()
    (gradient,) = (parameter.grad for parameter in embedding.parameters())
    assert gradient is not None
    assert not gradient.any()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_an_unknown_value_in_a_list_counts_and_a_missing_one_does_not(pooling: Any) -> None:
    columns = [Categorical("x", size=2, width=1, pooling=pooling, max_length=3)]
    embedding = FeatureEmbedding(columns)
    with torch.no_grad():
        embedding.tables[0].weight.copy_(torch.tensor([[5.0], [1.0], [2.0]]))  # type: ignore[operator]
    got = embedding(encode({"x": [[0, 1, 9], [0, 1, None]]}, columns)).flatten().tolist()
    assert np.allclose(got, {"sum": [8.0, 3.0], "mean": [8 / 3, 1.5], "max": [5.0, 2.0]}[pooling])


def test_the_mean_of_embeddings_that_are_not_finite_stays_where_it_is() -> None:
    vectors = torch.tensor([[[1.0], [math.nan]], [[math.inf], [3.0]], [[2.0], [4.0]]])
    present = torch.tensor([[True, False], [True, True], [True, True]])
    for pooling, expected in (("sum", [1.0, math.inf, 6.0]), ("mean", [1.0, math.inf, 3.0]), ("max", [1, math.inf, 4])):
        assert pool(vectors, present, pooling).flatten().tolist() == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_has_derivatives_of_every_order(pooling: Any) -> None:
    torch.manual_seed(0)
    vectors = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    present = torch.tensor([[True, True, False, True], [False] * 4, [True, False, False, False]])
    assert torch.autograd.gradcheck(lambda x: pool(x, present, pooling), (vectors,))
    assert torch.autograd.gradgradcheck(lambda x: pool(x, present, pooling).square(), (vectors,))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_batches_over_functions(pooling: Any) -> None:
    vectors, present = torch.randn(5, 3, 4, 2), torch.rand(5, 3, 4) < 0.6
    got = torch.vmap(lambda x, there: pool(x, there, pooling))(vectors, present)
    assert torch.allclose(got, torch.stack([pool(*pair, pooling) for pair in zip(vectors, present, strict=True)]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_low_precision_pools_to_its_own_dtype(pooling: Any, dtype: torch.dtype) -> None:
    embedding, rows, columns = made(pooling, dtype)
    got = embedding(Encoded(rows.codes, rows.numbers.to(dtype)))
    assert got.dtype == dtype
    expected = by_loop(embedding.to(torch.float64), columns)
    assert torch.allclose(got.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


class Both(nn.Module):
    """An embedding that takes two tensors, as programs do."""

    def __init__(self, embedding: FeatureEmbedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, codes: Tensor, numbers: Tensor) -> Tensor:
        features: Tensor = self.embedding(Encoded(codes, numbers))
        return features


@pytest.mark.parametrize("pooling", POOLINGS)
def test_compiled_and_exported_programs_pool_alike_for_any_number_of_rows(pooling: Any) -> None:
    embedding, rows, _ = made(pooling, torch.float32)
    module = Both(embedding)
    expected = module(*rows)
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, tuple(rows), dynamic_shapes=({0: batch}, {0: batch}), strict=False)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for run in (program.module(), compiled):
        assert torch.allclose(run(*rows), expected)
        for part in (slice(0, 2), slice(1, 5)):
            assert torch.allclose(run(*rows.rows(part)), expected[part])
    gradients = torch.autograd.grad(compiled(*rows).square().sum(), list(embedding.parameters()))
    for own, gradient in zip(
        gradients, torch.autograd.grad(module(*rows).square().sum(), list(embedding.parameters())), strict=True
    ):
        assert torch.allclose(own, gradient)


@pytest.mark.slow  # a compiler of C++, and an exporter
@pytest.mark.parametrize("pooling", POOLINGS)
def test_inductor_and_onnx_pool_alike(pooling: Any, tmp_path: Path) -> None:
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch._dynamo.reset()  # it counts the programs of one forward, of whichever model
    embedding, rows, _ = made(pooling, torch.float32)
    module = Both(embedding)
    expected = module(*rows).detach()
    assert torch.allclose(torch.compile(module, fullgraph=True, dynamic=True)(*rows), expected, atol=1e-6)
    batch = torch.export.Dim("batch")
    file = tmp_path / "embedding.onnx"
    torch.onnx.export(module, tuple(rows), file, dynamo=True, dynamic_shapes=({0: batch}, {0: batch}), verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    for part in (slice(0, 5), slice(1, 3)):
        given = dict(zip(names, (tensor.numpy() for tensor in rows.rows(part)), strict=True))
        assert np.allclose(session.run(None, given)[0], expected[part], atol=1e-6)


def operators(embedding: FeatureEmbedding, rows: Encoded) -> list[str]:
    seen: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Seen(), torch.no_grad():  # type: ignore[no-untyped-call]  # untyped in torch
        embedding(rows)
    return seen


def test_columns_of_one_value_run_the_operators_that_they_ran_before_lists() -> None:
    one = FeatureEmbedding(COLUMNS)
    look_up = ["index", "add", "view", "index_select", "view", "view"]
    found = [name for name in operators(one, encode(table(4)[0], COLUMNS)) if name not in ("_to_copy", "lift_fresh")]
    assert [name for name in found if name not in ("_unsafe_view", "_tensor_constant")] == [*look_up * 2, "cat"]


def test_all_columns_of_one_width_are_one_look_up() -> None:
    embedding, rows, _ = made("mean")
    assert operators(embedding, rows).count("index_select") == len(embedding.tables) == 2


def test_an_embedding_with_lists_comes_to_life_from_the_meta_device() -> None:
    columns = columns_of("mean")
    with torch.device("meta"):
        embedding = FeatureEmbedding(columns)
    embedding.to_empty(device="cpu")
    embedding.reset_parameters()
    assert embedding(encode(DATA, columns)).isfinite().all()
    table_of = embedding.tables[1]
    assert isinstance(table_of, nn.Embedding)
    zero = (~table_of.weight.any(dim=1)).nonzero().flatten().tolist()
    assert zero == [0, 3], "the unknown values of tags and of item, and nobody else's"


def test_rows_with_another_number_of_places_are_refused() -> None:
    embedding, rows, _ = made("mean", torch.float32)
    with pytest.raises(ValueError, match=r"rows.codes: expected shape \(B, 11\), got \(5, 10\); use the model's own"):
        embedding(Encoded(rows.codes[:, 1:], rows.numbers))


def test_a_table_is_shared_and_not_copied() -> None:
    columns = [
        Categorical("history", share="item", pooling="mean", max_length=3),
        Categorical("item", values=(1, 2, 3), width=5),
        Categorical("last", share="item"),
    ]
    embedding = FeatureEmbedding(columns)
    assert {name: tuple(value.shape) for name, value in embedding.state_dict().items()} == {"tables.0.weight": (4, 5)}
    assert embedding.out_features == 15
    rows = encode({"item": [2, 9], "last": [2, 8], "history": [[2], [9]]}, columns)
    assert rows.codes.tolist() == [[2, 2, 2, -1, -1], [0, 0, 0, -1, -1]]
    item, last, history = embedding(rows).split(5, dim=1)
    assert torch.equal(item, last) and torch.equal(item, history)


def test_one_value_may_share_the_table_of_lists_and_lists_that_of_buckets() -> None:
    tags = Categorical("tags", values=("a", "b"), pooling="sum", max_length=2)
    columns: list[Column] = [tags, Categorical("main", share="tags")]
    assert encode({"tags": [["a", "b"], []], "main": ["b", "c"]}, columns).codes.tolist() == [[2, 1, 2], [0, -1, -1]]
    hashed: list[Column] = [Hashed("item", 100), Categorical("history", share="item", pooling="sum", max_length=2)]
    codes = encode({"item": [5, 6], "history": [[6, 5], [None]]}, hashed).codes
    assert codes[0, 1:].tolist() == [int(codes[1, 0]), int(codes[0, 0])]
    assert codes[1, 1:].tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ([Categorical("a", share="b")], r"'a': expected share to name a column with an embedding, got 'b', and col"),
        ([Categorical("a", share="b"), Numeric("b")], "got 'b', which is Numeric"),
        (
            [Categorical("a", share="b"), Categorical("b", share="c"), Categorical("c", size=2)],
            "'a': .*got 'b', which shares that of 'c'; write share='c'",
        ),
    ],
)
def test_sharing_with_a_column_that_has_no_embedding_is_refused(columns: list[Column], says: str) -> None:
    data = {"a": [1], "b": [1], "c": [1]}
    for use in (lambda: FeatureEmbedding(columns), lambda: encode(data, columns)):
        with pytest.raises(ValueError, match=says):
            use()


def test_a_column_that_shares_cannot_be_read_alone() -> None:
    column = Categorical("history", share="item")
    with pytest.raises(ValueError, match=r"'history': expected the column 'item' beside it.*encode\(data, columns\)"):
        column.encode([1])
    assert column.encode([2, 7], Categorical("item", size=4)).tolist() == [3, 0]

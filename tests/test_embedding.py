"""Embeddings of columns: their rows, their gradients, the unknown value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ple_fast.model import Categorical, Encoded, Numeric, encode
from ple_fast.model.embedding import FeatureEmbedding
from tests.model_helpers import COLUMNS, model, table


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

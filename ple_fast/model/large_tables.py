"""A warning of tables whose updates cost more than all else in a step."""

from __future__ import annotations

from torch import nn

from ple_fast_encoder.caller import warn_caller

from .embedding import FeatureEmbedding

LARGE = 100_000
"""Rows of a table from which an update of all of them is worth a word; below, most trunks cost more."""
ROWS_PER_VALUE = 50
"""Rows of a table for each value that a batch looks up, from which nearly all that is updated had no gradient."""


def warn_of_large_tables(embedding: nn.Module, batch_size: int) -> None:
    """Names the first table with dense gradients that is large, and much larger than what a batch reads of it."""
    if not isinstance(embedding, FeatureEmbedding) or embedding.sparse:
        return
    for place, (table, values) in enumerate(zip(embedding.tables, embedding.look_ups, strict=True)):
        weight = getattr(table, "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
            continue
        rows, read = len(weight), values * batch_size
        if rows > LARGE and rows > ROWS_PER_VALUE * read:
            warn_caller(
                f"fit: each step updates all {rows:,} rows of embedding.tables.{place}, of which a batch reads "
                f"{read:,} at most. MultiTaskModel(..., sparse_embeddings=True), or model.embedding.sparse = True, "
                "updates those alone, at a cost that does not grow with the table; rows that a batch does not have "
                "then stand still, where Adam goes on moving them"
            )
            return

"""Tables of products and limits for a test, whatever processor runs it."""

from __future__ import annotations

import pytest
import torch

from ple_fast.torch_backend import prepared
from ple_fast.torch_backend.product_table import DEFAULT, DTYPES, WAYS, Entry, Table
from ple_fast.torch_backend.table_in_use import set_table, table

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
COLUMNS = range(max(len(ways) for ways in WAYS.values()))
"""Numbers of the ways of each kind of product."""


def nth_ways(number: int) -> Table:
    """Of every kind of product the way of this number, or the last, at all sizes."""
    chosen = {kind: ways[min(number, len(ways) - 1)] for kind, ways in WAYS.items()}
    products: dict[tuple[str, str], tuple[Entry, ...]] = {
        (dtype, kind): (Entry(1, 1, 1, ((0, way),)),) for dtype in DTYPES for kind, way in chosen.items()
    }  # fmt: skip
    return DEFAULT._replace(source=f"ways of number {number}", products=products)


@pytest.fixture(params=COLUMNS, ids=lambda number: f"way{number}")
def ways(request: pytest.FixtureRequest) -> None:
    """Every product by its first way, by its second, by its third; conftest takes the table back."""
    set_table(torch.get_num_threads(), nth_ways(request.param))


def blocks_of(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row blocks of so many rows, for the rest of the test."""
    monkeypatch.setattr(prepared, "ROW_STEP", rows)
    found = table()
    set_table(torch.get_num_threads(), found._replace(limits=found.limits._replace(block_values=0)))

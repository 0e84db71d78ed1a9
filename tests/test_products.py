"""The products by each of their ways: same numbers, whatever the layout, and a whole level through each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ple_fast import GateSpec, MLPSpec
from ple_fast.torch_backend import products
from ple_fast.torch_backend.product_table import DTYPES, WAYS
from ple_fast.torch_backend.table_in_use import using
from tests.helpers import TOPOLOGIES, compare_low_precision, draw, level
from tests.product_helpers import COLUMNS, HAS_ONEDNN, nth_ways, ways

__all__ = ["ways"]

TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-4, 1e-4),
    torch.float16: (4e-3, 1e-2),
    torch.bfloat16: (2e-2, 8e-2),
}
"""Relative and absolute."""
LAYOUTS: dict[str, Callable[[int, int], Tensor]] = {
    "dense": lambda n, k: torch.randn(n, k),
    "transposed": lambda n, k: torch.randn(k, n).t(),
    "columns of a wider one": lambda n, k: torch.randn(n, k + 3)[:, 1:-2],
    "every second row": lambda n, k: torch.randn(2 * n, k)[::2],
    "one row expanded": lambda n, k: torch.randn(1, k).expand(n, k),
}
SHAPES = [(1, 1, 1, 1), (2, 1, 8, 8), (5, 3, 7, 2), (33, 4, 40, 17), (300, 2, 24, 16)]
"""Rows, members, units, width."""

dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


def close(found: Tensor, expected: Tensor) -> None:
    """``expected`` is float64."""
    assert found.shape == expected.shape
    rtol, atol = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol)


@dtypes
@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("weight", LAYOUTS)
@pytest.mark.parametrize("x", LAYOUTS)
@pytest.mark.parametrize(("rows", "units", "width"), [(1, 1, 1), (5, 7, 3), (33, 40, 17)])
def test_linear(rows: int, units: int, width: int, x: str, weight: str, dtype: torch.dtype) -> None:
    a, w, b = (t.to(dtype) for t in (LAYOUTS[x](rows, width), LAYOUTS[weight](units, width), torch.randn(units)))
    expected = a.double() @ w.double().t()
    close(products.linear(a, w), expected)
    close(products.linear(a, w, b), expected + b)
    close(products.linear(a, w, b, relu=True), (expected + b).relu())


@dtypes
@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("weight", LAYOUTS)
@pytest.mark.parametrize("d", LAYOUTS)
@pytest.mark.parametrize(("rows", "units", "width"), [(1, 1, 1), (5, 7, 3), (33, 40, 17)])
def test_gradients_of_linear(rows: int, units: int, width: int, d: str, weight: str, dtype: torch.dtype) -> None:
    dy, w, x = (t.to(dtype) for t in (LAYOUTS[d](rows, units), LAYOUTS[weight](units, width), torch.randn(rows, width)))
    expected = dy.double() @ w.double()
    close(products.linear_input_grad(dy, w), expected)
    close(products.linear_weight_grad(dy, x), dy.double().t() @ x.double())
    out = torch.full((rows, 2, width), torch.nan, dtype=dtype)[:, 1]  # what was there does not count
    assert products.linear_input_grad(dy, w, out) is out
    close(out, expected)
    before = out.double().clone()
    products.linear_input_grad(dy, w, out, adds=True)
    close(out, before + expected)


def _stacked(*shape: int, form: str) -> Tensor:
    if form == "members first":
        return torch.randn(shape[1], shape[0], *shape[2:]).transpose(0, 1)
    if form == "some of more":
        return torch.randn(shape[0], shape[1] + 2, *shape[2:])[:, 1:-1]
    return torch.randn(shape)


@dtypes
@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("form", ["rows first", "members first", "some of more"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "n", "units", "width"), SHAPES)
def test_grouped(rows: int, n: int, units: int, width: int, transposed: bool, form: str, dtype: torch.dtype) -> None:
    x = _stacked(rows, n, width, form=form).to(dtype)
    weight = torch.randn(n, width, units).transpose(1, 2) if transposed else torch.randn(n, units, width)
    weight, bias = weight.to(dtype), torch.randn(n, units).to(dtype)
    expected = torch.einsum("rnk,nhk->rnh", x.double(), weight.double())
    for any_order in (False, True):
        result = products.grouped(x, weight, any_order=any_order)
        assert any_order or result.is_contiguous()
        close(result, expected)
        close(products.grouped(x, weight, bias, any_order=any_order), expected + bias)
        close(products.grouped(x, weight, bias, relu=True, any_order=any_order), (expected + bias).relu())


@dtypes
@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("form", ["rows first", "members first", "some of more"])
@pytest.mark.parametrize(("rows", "n", "units", "width"), SHAPES)
def test_gradients_of_grouped(rows: int, n: int, units: int, width: int, form: str, dtype: torch.dtype) -> None:
    d, x = (_stacked(rows, n, size, form=form).to(dtype) for size in (units, width))
    weight = torch.randn(n, units, width).to(dtype)
    expected = torch.einsum("rnh,nhk->rnk", d.double(), weight.double())
    result = products.grouped_input_grad(d, weight)
    assert result.is_contiguous()
    close(result, expected)
    out = torch.full((rows, n + 1, width), torch.nan, dtype=dtype)[:, 1:]
    assert products.grouped_input_grad(d, weight, out) is out
    close(out, expected)
    before = out.double().clone()
    products.grouped_input_grad(d, weight, out, adds=True)
    close(out, before + expected)
    close(products.grouped_weight_grad(d, x), torch.einsum("rnh,rnk->nhk", d.double(), x.double()))


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("form", ["one", "stacked", "list", "list-of-views", "column-slice", "every-second-row"])
@pytest.mark.parametrize("topology", ["ple", "ple-even", "ple-last", "mmoe", "unordered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_level_through_each(topology: str, form: str, dtype: torch.dtype) -> None:
    wiring = TOPOLOGIES[topology]
    for spec in (MLPSpec((48, 32)), MLPSpec((24, 40, 32), "silu", bias=False), MLPSpec((32, 16), norm="batch")):
        module = level(wiring, spec, GateSpec((24,)) if form == "list" else GateSpec(), in_features=40)
        count = wiring.num_slots or 1
        leaves = draw(form, 600, count, 40)
        compare_low_precision(module, leaves, dtype=dtype, form=form, slots=count)


def _operands(kind: str) -> tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]:
    rows, n, units, width = 6, 3, 5, 4
    x, w, d = torch.randn(rows, width), torch.randn(units, width), torch.randn(rows, units)
    xs, ws, ds = torch.randn(rows, n, width), torch.randn(n, units, width), torch.randn(rows, n, units)
    calls: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]] = {
        "linear": (products.linear, (x, w), {}),
        "linear_input_grad": (products.linear_input_grad, (d, w), {}),
        "linear_weight_grad": (products.linear_weight_grad, (d, x), {}),
        "grouped": (products.grouped, (xs, ws), {"any_order": True}),
        "grouped_rows": (products.grouped, (xs, ws), {}),
        "grouped_input_grad": (products.grouped_input_grad, (ds, ws), {}),
        "grouped_weight_grad": (products.grouped_weight_grad, (ds, xs), {}),
    }
    return calls[kind]


@pytest.mark.parametrize("number", COLUMNS)
@pytest.mark.parametrize("kind", WAYS)
def test_every_kind_has_the_ways_of_the_table_and_takes_the_chosen_one(kind: str, number: int) -> None:
    function, operands, options = _operands(kind)
    seen: list[tuple[str, tuple[int, ...], tuple[str, ...]]] = []

    def watch(own: str, shape: tuple[int, int, int, int], ways: products.Ways, arguments: tuple[Any, ...]) -> Tensor:
        seen.append((own, shape, tuple(ways)))
        return ways[WAYS[own][0]](*arguments)

    with products.watched_by(watch):
        function(*operands, **options)
    members = 3 if kind.startswith("grouped") else 1
    assert seen == [(kind, (6, members, 5, 4), WAYS[kind])]
    if HAS_ONEDNN:
        expected = WAYS[kind][min(number, len(WAYS[kind]) - 1)]
        with using(nth_ways(number)):
            assert products.way(kind, operands[0], 6, members, 5, 4) == expected


@pytest.mark.skipif(not HAS_ONEDNN, reason="this PyTorch has no oneDNN")
def test_onednn_is_left_alone_where_it_may_not_or_cannot_run() -> None:
    def library(dtype: torch.dtype = torch.float32) -> str:
        return products.way("linear", torch.randn(64, 8).to(dtype), 64, 1, 8, 8)

    with using(nth_ways(1)):
        assert library() == "onednn"
        with torch.backends.mkldnn.flags(enabled=False):
            assert library() == "mm"
        with FlopCounterMode(display=False):
            assert library() == "mm"
        assert library(torch.float64) == "mm"
        assert products.way("linear", torch.empty(64, 8, device="meta"), 64, 1, 8, 8) == "mm"
        assert all(library(getattr(torch, name)) in WAYS["linear"] for name in DTYPES)

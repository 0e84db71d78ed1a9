"""The products by either library: same numbers, whatever the layout, and a whole level through both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ple_fast import GateSpec, MLPSpec
from ple_fast.torch_backend import grouped_linear, input_grads, products
from tests.helpers import TOPOLOGIES, compare_low_precision, draw, level

onednn_runs = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this PyTorch has no oneDNN",
)
LIBRARIES = [pytest.param(True, marks=onednn_runs, id="onednn"), pytest.param(False, id="aten")]


@pytest.fixture(params=LIBRARIES)
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every product goes to oneDNN, however small it is; or none does."""
    chosen = bool(request.param)
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: chosen)
    for module in (products, input_grads, grouped_linear):
        for limit in {"LINEAR_WORK", "GROUPED_ROWS", "TURNED_ROWS"} & vars(module).keys():
            monkeypatch.setattr(module, limit, 0)
    return chosen


LAYOUTS: dict[str, Callable[[int, int], Tensor]] = {
    "dense": lambda n, k: torch.randn(n, k),
    "transposed": lambda n, k: torch.randn(k, n).t(),
    "columns of a wider one": lambda n, k: torch.randn(n, k + 3)[:, 1:-2],
    "every second row": lambda n, k: torch.randn(2 * n, k)[::2],
    "one row expanded": lambda n, k: torch.randn(1, k).expand(n, k),
}


@pytest.mark.parametrize("weight", LAYOUTS)
@pytest.mark.parametrize("x", LAYOUTS)
@pytest.mark.parametrize(("rows", "units", "width"), [(1, 1, 1), (5, 7, 3), (33, 40, 17)])
def test_linear(onednn: bool, rows: int, units: int, width: int, x: str, weight: str) -> None:
    a, w, b = LAYOUTS[x](rows, width), LAYOUTS[weight](units, width), torch.randn(units)
    assert products.by_onednn(a) == onednn
    expected = a.double() @ w.double().t()
    torch.testing.assert_close(products.linear(a, w), expected.float())
    torch.testing.assert_close(products.linear(a, w, b), (expected + b).float())
    torch.testing.assert_close(products.linear(a, w, b, relu=True), (expected + b).relu().float())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "n", "units", "width"), [(1, 1, 1, 1), (5, 3, 7, 2), (33, 4, 40, 17), (2, 1, 8, 8)])
def test_grouped(onednn: bool, rows: int, n: int, units: int, width: int, transposed: bool) -> None:
    x = torch.randn(rows, n, width)
    weight = torch.randn(n, width, units).transpose(1, 2) if transposed else torch.randn(n, units, width)
    bias = torch.randn(n, units)
    expected = torch.einsum("rnk,nhk->rnh", x.double(), weight.double())
    result = products.grouped(x, weight)
    assert result.shape == (rows, n, units) and result.is_contiguous()
    torch.testing.assert_close(result, expected.float())
    strided = torch.randn(rows, n + 2, width)[:, 1:-1]
    torch.testing.assert_close(products.grouped(strided.copy_(x), weight, bias), (expected + bias).float())
    torch.testing.assert_close(products.grouped(x, weight, bias, relu=True), (expected + bias).relu().float())


@pytest.mark.parametrize("form", ["one", "stacked", "list", "list-of-views", "column-slice", "every-second-row"])
@pytest.mark.parametrize("topology", ["ple", "ple-even", "ple-last", "mmoe", "unordered"])
def test_a_level_through_either(onednn: bool, topology: str, form: str) -> None:
    wiring = TOPOLOGIES[topology]
    for spec in (MLPSpec((48, 32)), MLPSpec((24, 40, 32), "silu", bias=False), MLPSpec((32,), norm="batch")):
        module = level(wiring, spec, GateSpec((24,)) if form == "list" else GateSpec(), in_features=40)
        count = wiring.num_slots or 1
        leaves = draw(form, 600, count, 40)
        compare_low_precision(module, leaves, dtype=torch.float32, form=form, slots=count)


def test_the_users_switch_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: True)
    x = torch.randn(64, 8)
    assert products.by_onednn(x)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not products.by_onednn(x)
    assert not products.by_onednn(x.double())

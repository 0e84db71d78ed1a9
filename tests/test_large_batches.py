"""Batches of about 2**31 rows, whose numbers 32 bits cannot count; see ``test_large_tensors.py``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ple_fast_kernels import (
    NO_END,
    GateRuns,
    Readers,
    Tile,
    WeightGrad,
    batch_norm_merge,
    batch_norm_sums,
    grouped_data_grad,
    grouped_input_grad,
    grouped_linear_fwd,
    grouped_weight_grads,
    layer_norm_grad,
)
from tests.helpers import assert_close
from tests.kernel_helpers import values
from tests.large_tensors import HALF, SMALL, needs, same, vast

pytestmark = pytest.mark.usefixtures("outer_programs")

BATCHES = (2**31 - 5, 2**31 + 5)
"""Rows whose number wraps where it is rounded up to a tile, and more than 32 bits count."""


def column(rows: int, device: torch.device, seed: int = 0) -> Tensor:
    """``(rows, 1, 1)``, with numbers in the last three."""
    out = vast(rows, 1, 1, device=device)
    out[-3:] = values(3, 1, 1, dtype=HALF, device=device, seed=seed)
    return out


@pytest.mark.parametrize("rows", BATCHES)
def test_products(rows: int, device: torch.device) -> None:
    """The logits' tile is the second one of a row: with one alone a number of row tiles that wrapped does no harm."""
    needs(device, *[rows] * 4)
    a, w = column(rows, device), torch.full((1, 1, 1), 2.0, dtype=HALF, device=device)
    _, _, logits = grouped_linear_fwd(a, w, None, (0,), gate_weight=w[0], gates=GateRuns((0,), (0,), (1,)), tile=SMALL)
    assert logits is not None
    assert_close("logits", logits[-3:].double(), a[-3:, 0].double() * 2, 1e-6)
    y, _, _ = grouped_linear_fwd(a, w, None, (0,), tile=SMALL)
    same("y", None if y is None else y[-3:], a[-3:].double() * 2)
    out, _ = grouped_data_grad(a, w, tile=SMALL)
    same("data_grad", out[-3:], a[-3:].double() * 2)
    out = grouped_input_grad(a, w, Readers.build((0,), 1), vast(rows, 1, 1, device=device), tile=SMALL)
    same("input_grad", out[-3:], a[-3:].double() * 2)


@pytest.mark.slow
@pytest.mark.parametrize("rows", BATCHES)
def test_weight_gradient(rows: int, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    needs(device, rows, rows)
    a, d = column(rows, device), column(rows, device, 1)
    tile = None
    if device.type != "cuda":  # so that the last part is one step: it begins at 2**31, or at 2**31 - 2**15
        parts = 2**11 + 1 if rows > 2**31 else 2**11
        monkeypatch.setattr("ple_fast_kernels.weight_grad.row_splits", lambda *_: parts)
        tile = Tile(16, 16, 2**15, 4, 2)
    (found,) = grouped_weight_grads([WeightGrad(a, d, (0,), True, False)], HALF, tile=tile)
    assert found.weight is not None
    same("weight", found.weight.view(1), (a[-3:].double() * d[-3:].double()).sum().view(1))


@pytest.mark.parametrize("rows", BATCHES)
def test_sums_of_batch_norm(rows: int, device: torch.device) -> None:
    needs(device, rows, rows)
    d, z = column(rows, device), column(rows, device, 1)
    mean, rstd = torch.zeros(1, device=device), torch.ones(1, device=device)
    parts = batch_norm_sums(d, z, NO_END._replace(mean=mean, spread=rstd))[-1]
    gradient, normed = d[-3:].double(), z[-3:].double()
    assert_close("sums", parts.double().view(2), torch.stack([gradient.sum(), (gradient * normed).sum()]), 1e-4)


@pytest.mark.parametrize("rows", BATCHES)
def test_statistics_of_batch_norm(rows: int, device: torch.device) -> None:
    """Tiles of 2**25 rows, of which the last one has a mean of another size."""
    tiles = -(-rows // 2**25)
    moments = torch.zeros(tiles, 2, 1, device=device)
    moments[-1, 0] = 2.0**25
    mean, _ = batch_norm_merge(moments, rows, 2**25, 1e-5)
    last = rows - (tiles - 1) * 2**25
    assert_close(
        "mean", mean.double(), torch.full((1,), 2.0**25 * last / rows, dtype=torch.float64, device=device), 1e-5
    )


@pytest.mark.parametrize("rows", BATCHES)
def test_backward_of_layer_norm(rows: int, device: torch.device) -> None:
    """Of one unit, whose normalised value is given: ``(d - d - x d x) / deviation``."""
    needs(device, *[2 * rows] * 2, *[rows] * 3)
    d, z = column(rows, device), column(rows, device, 1)
    mean, rstd = (vast(rows, 1, dtype=torch.float32, device=device) for _ in range(2))
    rstd[-3:] = 2.0
    dz, _, _ = layer_norm_grad(d, z, NO_END._replace(mean=mean, spread=rstd), affine_grad=False)
    normed = z[-3:].double() * 2
    same("dz", dz[-3:], -normed * d[-3:].double() * normed * 2)

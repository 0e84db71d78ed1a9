"""Dropout of what is saturated or huge: kernels keep one tensor behind activation and dropout, scaled and rounded, and
give the gradient and the zeros that PyTorch gives, which keeps two."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ple_fast.torch_backend.dropout import keep_mask
from ple_fast_kernels import (
    Dropout,
    LayerEnd,
    gate_combine_bwd,
    grouped_data_grad,
    grouped_linear_fwd,
    layer_end_grad,
    wide_of,
)
from tests.helpers import TOPOLOGIES
from tests.kernel_helpers import DTYPES, apply, chain, guarded, mixtures_of, values

pytestmark = pytest.mark.usefixtures("guard_bands")

ROWS, UNITS = 21, 8
IDENTITY = ("identity", 0.0)


def dropout_of(rate: float, device: torch.device) -> Dropout:
    return Dropout(torch.tensor(11, device=device), 1, rate)


def is_kept(dropout: Dropout, like: Tensor) -> Tensor:
    return keep_mask(int(dropout.seed), dropout.layer, 0, like, dropout.rate) != 0


@pytest.mark.parametrize("rate", [0.1, 0.15, 0.3, 0.65])  # 1 / (1 - rate) is rounded up or down, by dtype
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_a_saturated_output_has_the_gradient_0_behind_dropout(
    name: str, dtype: torch.dtype, rate: float, device: torch.device
) -> None:
    """In all three kernels that take a gradient through both, as PyTorch's, whose output is exactly 1 or -1."""
    activation, dropout = (name, 0.0), dropout_of(rate, device)
    signs = values(3, UNITS, device=device).sign() if name == "tanh" else torch.ones(3, UNITS, device=device)
    a, w = torch.ones(ROWS, 3, 1, dtype=dtype, device=device), (60 * signs).unsqueeze(2).to(dtype)
    z = (60 * signs).to(dtype).expand(ROWS, -1, -1)
    y, _, _ = grouped_linear_fwd(a, w, None, (0, 1, 2), activation=activation, dropout=dropout)
    assert y is not None
    d = values(ROWS, 3, UNITS, device=device).to(dtype)
    expected = chain(d * is_kept(dropout, y), apply(z, activation), activation)
    assert not expected.any()
    end = LayerEnd(activation, dropout)
    kept = guarded(y, 2)
    assert torch.equal(layer_end_grad(guarded(d, 1), kept, end), expected)
    t = TOPOLOGIES["single-task"]
    ones = torch.ones(ROWS, t.num_weights, dtype=wide_of(dtype), device=device)
    found, _, _ = gate_combine_bwd(
        d, None, None, ones, mixtures_of(t), UNITS, dtype, kept=kept, activation=activation, dropout=dropout,
        weights_grad=False, logits_grad=False,
    )  # fmt: skip
    assert found is not None and torch.equal(found, expected)
    eye = torch.eye(UNITS, dtype=dtype, device=device).expand(3, -1, -1).contiguous()
    ours, _ = grouped_data_grad(guarded(d), eye, kept=kept, end=end)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("units", [5, 8])
def test_what_is_dropped_is_0_though_it_would_overflow(units: int, device: torch.device) -> None:
    """Forward and backward: what is dropped is not scaled first."""
    dropout = dropout_of(0.5, device)
    most = torch.finfo(torch.float32).max
    a = torch.ones(ROWS, 1, 1, device=device)
    w = torch.full((1, units, 1), most, device=device)
    y, _, _ = grouped_linear_fwd(a, w, None, (0,), dropout=dropout)
    assert y is not None
    kept = is_kept(dropout, y)
    expected = torch.where(kept, torch.full_like(y, float("inf")), torch.zeros_like(y))
    assert torch.equal(y, expected)
    assert torch.equal(layer_end_grad(torch.full_like(y, most), None, LayerEnd(IDENTITY, dropout)), expected)

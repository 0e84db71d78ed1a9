"""NaN and infinity in kernels go where PyTorch's own operators send them: running statistics, and gradients that meet
elements which dropout dropped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from ple_fast.torch_backend.dropout import keep_mask
from ple_fast_kernels import (
    Dropout,
    LayerEnd,
    Norm,
    Tile,
    batch_norm_merge,
    gate_combine_bwd,
    grouped_data_grad,
    grouped_linear_fwd,
    layer_end_grad,
)
from tests.helpers import TOPOLOGIES
from tests.kernel_helpers import guarded, mixtures_of, values

pytestmark = pytest.mark.usefixtures("guard_bands")

INF, NAN = float("inf"), float("nan")
TILE = Tile(16, 16, 16, 4, 2)
RELU = ("relu", 0.0)
aten = torch.ops.aten


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("factor", [1e-3, 0.1, 0.75, 1.0])
def test_running_statistics_take_up_what_is_not_finite(factor: float, dtype: torch.dtype, device: torch.device) -> None:
    """Of a batch, or of an earlier one: every pair of a mean that is finite or not and such a running one."""
    found = torch.tensor([1.5, INF, -INF, NAN], dtype=dtype, device=device).repeat_interleave(4)
    earlier = torch.tensor([-0.5, INF, -INF, NAN], dtype=dtype, device=device).repeat(4)
    eye = torch.eye(16, dtype=dtype, device=device).unsqueeze(0)
    a = torch.arange(80.0, dtype=dtype, device=device).view(5, 1, 16)
    moments = torch.empty(1, 2, 16, dtype=dtype, device=device)
    for bias in (found, torch.zeros_like(found)):
        norm = Norm("moments", moments, None, None, None, 1e-3)
        grouped_linear_fwd(a, eye, bias.unsqueeze(0), (0,), norm=norm, tile=TILE)
        running = [earlier.clone(), earlier.clone()]
        theirs = [t.clone() for t in running]
        batch_norm_merge(moments, 5, 16, 1e-3, running_mean=running[0], running_var=running[1], factor=factor)
        F.batch_norm(a.flatten(1) + bias, theirs[0], theirs[1], training=True, momentum=factor)
        for name, ours, expected in zip(("mean", "variance"), running, theirs, strict=True):
            assert torch.allclose(ours, expected, rtol=1e-5, equal_nan=True), f"{name}: {ours}, expected {expected}"


def hostile(*shape: int, device: torch.device) -> Tensor:
    """A gradient with NaN and infinities among its numbers."""
    d = values(*shape, device=device)
    d.view(-1)[::7], d.view(-1)[3::11], d.view(-1)[5::13] = NAN, INF, -INF
    return d


def dropped_relu(units: int, device: torch.device) -> tuple[Tensor, Tensor, Dropout]:
    """ReLU of a product before dropout by PyTorch, after it by a kernel, and the dropout."""
    a, w = values(21, 3, 5, device=device), values(3, units, 5, device=device)
    dropout = Dropout(torch.tensor(77, device=device), 2, 0.5)
    y, _, _ = grouped_linear_fwd(a, w, None, (0, 1, 2), activation=RELU, dropout=dropout)
    assert y is not None
    return torch.einsum("bmk,mhk->bmh", a, w).relu(), y, dropout


def relu_backward(d: Tensor, y: Tensor, dropout: Dropout) -> Tensor:
    """PyTorch's: dropout's backward, which multiplies by 0 where it dropped, then ReLU's, which fills in 0."""
    mask = keep_mask(int(dropout.seed), dropout.layer, 0, y, dropout.rate).to(y.dtype)
    return aten.threshold_backward(d * mask * (1 / (1 - dropout.rate)), y, 0)  # type: ignore[no-any-return]


def same(name: str, ours: Tensor | None, expected: Tensor) -> None:
    assert ours is not None
    assert expected.isnan().any()
    assert (expected == 0).any()
    assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-12, equal_nan=True), name


@pytest.mark.parametrize("units", [5, 8])
def test_gradient_that_meets_what_dropout_dropped(units: int, device: torch.device) -> None:
    """NaN where ReLU had let it through, 0 where not, in all three kernels that take a gradient through both."""
    relu, y, dropout = dropped_relu(units, device)
    assert torch.equal(y != 0, relu_backward(torch.ones_like(y), relu, dropout) != 0)
    d = hostile(21, 3, units, device=device)
    end = LayerEnd(RELU, dropout)
    expected = relu_backward(d, relu, dropout)
    same("layer_end_grad", layer_end_grad(guarded(d, 1), guarded(y, 2), end), expected)
    t = TOPOLOGIES["single-task"]
    ones = torch.ones(21, t.num_weights, dtype=torch.float64, device=device)
    found, _, _ = gate_combine_bwd(
        d, None, None, ones, mixtures_of(t), units, torch.float64, kept=guarded(y, 2), activation=RELU,
        dropout=dropout, weights_grad=False, logits_grad=False,
    )  # fmt: skip
    same("gate_combine_bwd", found, expected)
    eye = torch.eye(units, dtype=torch.float64, device=device).expand(3, -1, -1).contiguous()
    ours, _ = grouped_data_grad(guarded(d), eye, kept=guarded(y, 2), end=end)
    same("grouped_data_grad", ours, relu_backward(torch.einsum("bmh,mhk->bmk", d, eye), relu, dropout))

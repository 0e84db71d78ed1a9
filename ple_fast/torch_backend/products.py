"""The two matrix products that everything is made of, by the faster library of the machine.

PyTorch's own ``mm`` and ``bmm`` call MKL for float32. MKL does not use AVX-512 on processors that are not Intel's;
oneDNN does, and there its inner products and grouped 1x1 convolutions run at twice the rate (`fast_mm` in the README's
table is without it). Elsewhere, and for other dtypes or few rows, PyTorch's own are used. ReLU is a pass of its own:
oneDNN's, which it would apply on the way, turns NaN into 0.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_is_enabled = torch._C._get_mkldnn_enabled  # torch.backends.mkldnn.enabled, the user's switch
_modes = torch._C._len_torch_dispatch_stack

LINEAR_WORK = 1 << 19
"""Multiply-adds below which PyTorch's own product costs less than the call of oneDNN's."""
GROUPED_ROWS = 32
"""Rows below which PyTorch's own batched product is faster than a grouped convolution."""
TURNED_ROWS = 160
"""The same with a transposed weight, which a convolution needs turned round in memory."""

COPIED_ROWS = 160
"""Up to here PyTorch's batched product and a copy of its result are faster than the product into our layout."""


@cache
def _onednn_is_faster() -> bool:
    """Whether this processor has AVX-512 and is not Intel's, and this PyTorch has the operators."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "AuthenticAMD" in processor and all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS)


_OPERATORS = ("_linear_pointwise", "_convolution_pointwise")


def by_onednn(x: Tensor) -> bool:
    """Whether products of any size with ``x`` go to oneDNN.

    Not under a mode that watches operators: counters of FLOPs know those that everybody calls.
    """
    return (
        x.dtype == torch.float32 and x.device.type == "cpu" and _onednn_is_faster() and _is_enabled() and not _modes()
    )


def _is_dense(matrix: Tensor) -> bool:
    """Without gaps, as it is or transposed: with gaps oneDNN falls back to a loop that is a thousand times slower."""
    (rows, columns), (row_step, column_step) = matrix.shape, matrix.stride()
    return (row_step, column_step) in ((columns, 1), (1, rows))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """``x @ weight.T + bias``, then ReLU if asked: ``(rows, K)`` and ``(N, K)`` to ``(rows, N)``."""
    if x.shape[0] * weight.numel() >= LINEAR_WORK and by_onednn(x):
        if not _is_dense(weight):
            weight = weight.contiguous()
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    else:
        out = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    return out.relu_() if relu else out


def linear_library(x: Tensor, work: int) -> str:
    """What computes ``linear`` of rows like ``x`` with a weight of ``work`` elements, for people to read."""
    by_work = x.shape[0] * work >= LINEAR_WORK and by_onednn(x)
    return "inner product of oneDNN" if by_work else "product of PyTorch"


def grouped_library(x: Tensor, weight: Tensor) -> str:
    """What computes ``grouped``, for people to read."""
    return "grouped convolution of oneDNN" if convolves(x, weight) else "batched product of PyTorch"


def convolves(x: Tensor, weight: Tensor) -> bool:
    """Whether ``grouped`` is a convolution of oneDNN's."""
    return x.shape[0] >= (GROUPED_ROWS if weight.is_contiguous() else TURNED_ROWS) and by_onednn(x)


def grouped(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """``n`` products at once: ``(rows, n, K)``, ``(n, H, K)`` and ``(n, H)`` to a contiguous ``(rows, n, H)``."""
    rows, (n, units, width) = x.shape[0], weight.shape
    if convolves(x, weight):
        x = x.contiguous()
        # A grouped 1x1 convolution over `rows` pixels with the channels last is this product in this layout.
        image = x.as_strided((1, n * width, 1, rows), (rows * n * width, 1, rows * n * width, n * width))
        kernel = weight.contiguous().view(n * units, width, 1, 1)
        flat = None if bias is None else bias.reshape(n * units)
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            image, kernel, flat, [0, 0], [1, 1], [1, 1], n, "none", [], ""
        )
        out = y.permute(0, 2, 3, 1).reshape(rows, n, units)
    elif rows <= COPIED_ROWS:
        out = _batched(x.transpose(0, 1), weight.transpose(1, 2), bias).transpose(0, 1).contiguous()
    else:
        out = torch.empty((rows, n, units), dtype=x.dtype, device=x.device)
        _batched(x.transpose(0, 1), weight.transpose(1, 2), bias, out.transpose(0, 1))
    return out.relu_() if relu else out


def _batched(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """``(n, rows, K)``, ``(n, K, H)`` and ``(n, H)`` to ``(n, rows, H)``."""
    if bias is None:
        return torch.bmm(x, weight, out=out)
    return torch.baddbmm(bias.unsqueeze(1), x, weight, out=out)

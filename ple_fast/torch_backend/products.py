"""The matrix products that everything is made of, each by the way that is fastest on this machine.

There are several: PyTorch's own ``mm`` and ``bmm`` (MKL's for float32), oneDNN's inner product, oneDNN's grouped 1x1
convolution with the channels last, which is a grouped product; and of grouped products the order in memory in which
they are written. A table says which one a product takes. ReLU is a pass of its own: oneDNN's, which it
would apply on the way, turns NaN into 0.

Everybody sees ``(rows, n, H)``. Rows lie one after the other in memory, unless a function may return ``any_order``:
there the members may.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .product_table import ONEDNN, WAYS
from .table_in_use import way_of

_is_enabled = torch._C._get_mkldnn_enabled  # torch.backends.mkldnn.enabled, the user's switch
_modes = torch._C._len_torch_dispatch_stack
_threads = torch.get_num_threads

Ways = dict[str, Callable[..., Tensor]]
Watcher = Callable[[str, tuple[int, int, int, int], Ways, tuple[Any, ...]], Tensor]
"""Of kind, (rows, members, units, width), the ways and their arguments: computes the product itself."""
_watcher: Watcher | None = None


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Have ``watcher`` compute every product of the process meanwhile: it times them. Not for several threads."""
    global _watcher
    before, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = before


@cache
def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether this PyTorch has oneDNN's operators, and the processor runs them in this dtype."""
    if not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_convolution_pointwise")):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def way(kind: str, like: Tensor, rows: int, members: int, units: int, width: int) -> str:
    """The way of a product whose operands are like ``like``.

    Not oneDNN's under a mode that watches operators: counters of FLOPs know those that everybody calls.
    """
    if not like.is_cpu or like.dtype == torch.float64:
        return WAYS[kind][0]
    found = way_of(kind, like.dtype, rows, members, units, width, _threads())
    if found not in ONEDNN or (_is_enabled() and not _modes() and onednn_takes(like.dtype)):
        return found
    return WAYS[kind][0]


def _compute(kind: str, ways: Ways, like: Tensor, shape: tuple[int, int, int, int], *arguments: Any) -> Tensor:
    if _watcher is not None:
        return _watcher(kind, shape, ways, arguments)
    return ways[way(kind, like, *shape)](*arguments)


def _dense(matrix: Tensor) -> Tensor:
    """Without gaps, as it is or transposed: with gaps oneDNN falls back to a loop that is a thousand times slower."""
    (rows, columns), strides = matrix.shape, matrix.stride()
    return matrix if strides in ((columns, 1), (1, rows)) else matrix.contiguous()


def _inner_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, _dense(weight), bias, "none", [], "")
    return out


def _mm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


_LINEAR: Ways = {"mm": _mm, "onednn": _inner_product}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """``x @ weight.T + bias``, then ReLU if asked: ``(rows, K)`` and ``(N, K)`` to ``(rows, N)``."""
    units, width = weight.shape
    out = _compute("linear", _LINEAR, x, (x.shape[0], 1, units, width), x, weight, bias)
    return out.relu_() if relu else out


def _mm_input_grad(d: Tensor, weight: Tensor, out: Tensor | None, adds: bool) -> Tensor:
    if out is None or not adds:
        return torch.mm(d, weight) if out is None else torch.mm(d, weight, out=out)
    return torch.addmm(out, d, weight, out=out)  # addmm_ is one that counters of FLOPs do not know


def _inner_product_input_grad(d: Tensor, weight: Tensor, out: Tensor | None, adds: bool) -> Tensor:
    return _put(_inner_product(d, weight.t()), out, adds)


def _put(product: Tensor, out: Tensor | None, adds: bool) -> Tensor:
    if out is None:
        return product
    return out.add_(product) if adds else out.copy_(product)


_LINEAR_INPUT_GRAD: Ways = {"mm": _mm_input_grad, "onednn": _inner_product_input_grad}


def linear_input_grad(d: Tensor, weight: Tensor, out: Tensor | None = None, *, adds: bool = False) -> Tensor:
    """``d @ weight``: ``(rows, N)`` and ``(N, K)`` to ``(rows, K)``, into ``out`` or added to it if it is given."""
    units, width = weight.shape
    return _compute(
        "linear_input_grad", _LINEAR_INPUT_GRAD, d, (d.shape[0], 1, units, width), d, weight, out, adds
    )  # fmt: skip


# oneDNN wants one of its inputs transposed in memory. Where that is x, the result is transposed.
_LINEAR_WEIGHT_GRAD: Ways = {
    "mm": lambda d, x: torch.mm(d.t(), x),
    "onednn turns x": lambda d, x: _inner_product(x.t().contiguous(), d.t()).t(),
    "onednn turns d": lambda d, x: _inner_product(d.t().contiguous(), x.t()),
}


def linear_weight_grad(d: Tensor, x: Tensor) -> Tensor:
    """``d.T @ x``: ``(rows, N)`` and ``(rows, K)`` to ``(N, K)``, which may be a transposed view."""
    return _compute("linear_weight_grad", _LINEAR_WEIGHT_GRAD, d, (d.shape[0], 1, d.shape[1], x.shape[1]), d, x)


def batched(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """``(n, rows, K)``, ``(n, H, K)`` and ``n * H`` biases to ``(n, rows, H)``, by PyTorch's batched product."""
    if bias is None:
        return torch.bmm(x, weight.transpose(1, 2), out=out)
    return torch.baddbmm(bias.reshape(weight.shape[0], 1, -1), x, weight.transpose(1, 2), out=out)


def _members(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return batched(x.transpose(0, 1), weight, bias).transpose(0, 1)


def _copied(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _members(x, weight, bias).contiguous()


def _rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.empty((x.shape[0], *weight.shape[:2]), dtype=x.dtype, device=x.device)
    batched(x.transpose(0, 1), weight, bias, out.transpose(0, 1))
    return out


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, (n, units, width) = x.shape[0], weight.shape
    x = x.contiguous()
    # A grouped 1x1 convolution over `rows` pixels with the channels last is this product in this layout.
    image = x.as_strided((1, n * width, 1, rows), (rows * n * width, 1, rows * n * width, n * width))
    kernel = weight.contiguous().view(n * units, width, 1, 1)
    flat = None if bias is None else bias.reshape(n * units)
    y: Tensor = torch.ops.mkldnn._convolution_pointwise(image, kernel, flat, [0, 0], [1, 1], [1, 1], n, "none", [], "")
    return y.permute(0, 2, 3, 1).reshape(rows, n, units)


_GROUPED: Ways = {"members": _members, "rows": _rows, "convolution": _convolution}
_GROUPED_ROWS: Ways = {"copied": _copied, "rows": _rows, "convolution": _convolution}


def grouped(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False, any_order: bool = False
) -> Tensor:
    """``n`` products at once, then ReLU if asked: ``(rows, n, K)``, ``(n, H, K)``, ``(n, H)`` to ``(rows, n, H)``."""
    kind, ways = ("grouped", _GROUPED) if any_order else ("grouped_rows", _GROUPED_ROWS)
    out = _compute(kind, ways, x, (x.shape[0], *weight.shape), x, weight, bias)
    return out.relu_() if relu else out


def _copied_input_grad(d: Tensor, weight: Tensor, out: Tensor | None, adds: bool) -> Tensor:
    product = torch.bmm(d.transpose(0, 1), weight).transpose(0, 1)
    return product.contiguous() if out is None else _put(product, out, adds)


def _rows_input_grad(d: Tensor, weight: Tensor, out: Tensor | None, adds: bool) -> Tensor:
    if out is None:
        out = torch.empty((d.shape[0], weight.shape[0], weight.shape[2]), dtype=d.dtype, device=d.device)
    turned = out.transpose(0, 1)
    if adds:
        torch.baddbmm(turned, d.transpose(0, 1), weight, out=turned)
    else:
        torch.bmm(d.transpose(0, 1), weight, out=turned)
    return out


def _convolution_input_grad(d: Tensor, weight: Tensor, out: Tensor | None, adds: bool) -> Tensor:
    return _put(_convolution(d, weight.transpose(1, 2), None), out, adds)


_GROUPED_INPUT_GRAD: Ways = {
    "copied": _copied_input_grad, "rows": _rows_input_grad, "convolution": _convolution_input_grad
}  # fmt: skip


def grouped_input_grad(d: Tensor, weight: Tensor, out: Tensor | None = None, *, adds: bool = False) -> Tensor:
    """``(rows, n, H)`` and ``(n, H, K)`` to ``(rows, n, K)``, into ``out`` or added to it if it is given."""
    return _compute(
        "grouped_input_grad", _GROUPED_INPUT_GRAD, d, (d.shape[0], *weight.shape), d, weight, out, adds
    )  # fmt: skip


_GROUPED_WEIGHT_GRAD: Ways = {
    "batched": lambda d, x: torch.bmm(d.permute(1, 2, 0), x.transpose(0, 1)),
    "turned": lambda d, x: torch.bmm(d.transpose(0, 1).contiguous().transpose(1, 2), x.transpose(0, 1)),
}


def grouped_weight_grad(d: Tensor, x: Tensor) -> Tensor:
    """``(rows, n, H)`` and ``(rows, n, K)`` to ``(n, H, K)``."""
    shape = (d.shape[0], *d.shape[1:], x.shape[2])
    return _compute("grouped_weight_grad", _GROUPED_WEIGHT_GRAD, d, shape, d, x)


_SAID = {
    "mm": "product of PyTorch", "onednn": "inner product of oneDNN", "members": "batched product of PyTorch",
    "copied": "batched product of PyTorch, copied", "rows": "batched product of PyTorch into rows",
    "convolution": "grouped convolution of oneDNN",
}  # fmt: skip


def said_of(kind: str, x: Tensor, members: int, units: int, width: int) -> str:
    """What computes a forward product of rows like ``x``, for people to read."""
    return _SAID[way(kind, x, x.shape[0], members, units, width)]

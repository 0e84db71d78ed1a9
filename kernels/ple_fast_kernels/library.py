"""Products that are one plain product of matrices in the layout of a level, by PyTorch's own (cuBLAS).

They are so where all members of a layer read one column of the source: ``A (B, 1, K)``, ``W (n, H, K)`` and
``D (B, n, H)`` are matrices ``(B, K)``, ``(n H, K)`` and ``(B, n H)`` as they lie. Each counts as a launch. PyTorch's
settings hold, as in ``torch.nn.Linear``: TF32, and in which precision halves are added up. Which products are taken:
``takes_library``. None has an activation: cuBLAS's own ReLU turns NaN into 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _tiles
from ._launch import count
from ._tile_files import LIBRARY


class Plain(NamedTuple):
    """A plain product that a launcher asked about: the row of the table, its field, and billions of floating-point
    operations, at 128 multiprocessors."""

    kind: str
    product: str
    work: float


asked: list[Plain] | None = None
"""While a list stands here, every plain product is added to it: ``ple_fast.tune`` learns from it what to measure."""


def takes_library(product: str, like: Tensor, rows: int, columns: int, depth: int, precision: str) -> bool:
    """Whether a plain product of matrices ``(rows, columns)`` over a depth is the library's, by the table.

    Never where deterministic algorithms are asked for: without an environment variable of its own the library refuses.
    """
    if torch.are_deterministic_algorithms_enabled():
        return False
    key, processors = _tiles.table_of(like.device)
    operands, work = _tiles.kind_of(like.dtype, precision), 2.0 * rows * columns * depth * 128 / processors / 1e9
    if asked is not None:
        asked.append(Plain(LIBRARY + operands, product, work))
    least: int | None = getattr(_tiles.library_of(key, operands), product)
    return least is not None and work >= least


def is_plain(a: Tensor) -> bool:
    """Whether all members read the same rows of ``a (B, S, K)``."""
    return a.shape[1] == 1


def linear_in_library(a: Tensor, weight: Tensor, precision: str) -> bool:
    """Whether ``library_linear_fwd`` is to be taken."""
    members, units, depth = weight.shape
    return is_plain(a) and takes_library("linear", a, a.shape[0], members * units, depth, precision)


def input_grad_in_library(d: Tensor, weight: Tensor, out: Tensor, precision: str) -> bool:
    """Whether ``library_input_grad`` is to be taken: not for wider sums of several blocks."""
    members, units, depth = weight.shape
    if not is_plain(out) or out.dtype != d.dtype:
        return False
    return takes_library("input_grad", d, d.shape[0], depth, members * units, precision)


def weight_grad_in_library(a: Tensor, d: Tensor, precision: str) -> bool:
    """Whether ``library_weight_grad`` is to be taken."""
    return weight_grad_by_width(a, d.shape[1] * d.shape[2], precision)


def weight_grad_by_width(a: Tensor, width: int, precision: str) -> bool:
    """The same before D ``(B, n, H)`` is there; ``width``: n H."""
    return is_plain(a) and takes_library("weight_grad", a, width, a.shape[2], a.shape[0], precision)


def library_linear_fwd(a: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """``A[:, 0] @ W[m].T + b[m]`` of all members, ``(B, n, H)``.

    Args:
        a: ``(B, 1, K)``, rows at any stride, K contiguous. B at least 1.
        weight, bias: ``(n, H, K)`` and ``(n, H)``, contiguous.
        out: ``(B, n, H)``, its last two axes contiguous; default new.
    """
    rows, (members, units, depth) = a.shape[0], weight.shape
    if out is None:
        out = torch.empty((rows, members, units), dtype=a.dtype, device=a.device)
    matrix = weight.view(members * units, depth)
    _product(a[:, 0], matrix.t(), out.view(rows, members * units), None if bias is None else bias.view(-1))
    return out


def library_input_grad(d: Tensor, weight: Tensor, out: Tensor, *, adds: bool = False) -> Tensor:
    """``sum_m D[:, m] @ W[m]``, written into ``out (B, 1, K)`` or, with ``adds``, added to it before it is rounded.

    Args:
        d: ``(B, n, H)``, its last two axes contiguous. B at least 1.
        weight: ``(n, H, K)``, contiguous.
        out: contiguous.
    """
    rows, (members, units, depth) = d.shape[0], weight.shape
    matrix = out.view(rows, depth)
    wide = d.view(rows, members * units)
    _product(wide, weight.view(members * units, depth), matrix, matrix if adds else None)
    return out


def library_weight_grad(a: Tensor, d: Tensor) -> Tensor:
    """``D[:, m].T @ A[:, 0]`` of all members, ``(n, H, K)``.

    Args:
        a: ``(B, 1, K)``, rows at any stride, K contiguous. B at least 1.
        d: ``(B, n, H)``, its last two axes contiguous.
    """
    (rows, members, units), depth = d.shape, a.shape[2]
    out = torch.empty((members, units, depth), dtype=d.dtype, device=d.device)
    _product(d.view(rows, members * units).t(), a[:, 0], out.view(members * units, depth), None)
    return out


def _product(a: Tensor, b: Tensor, out: Tensor, summand: Tensor | None) -> None:
    """``out = a @ b``, or with ``summand + a @ b``, which may be ``out`` itself."""
    count(1)
    if summand is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(summand, a, b, out=out)

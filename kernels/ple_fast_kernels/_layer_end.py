"""What follows a layer's product, on a tile in the accumulator's dtype: norm, activation, norm; and backward.

Statistics are ``[1, N]`` (batch norm: per column) or ``[M, 1]`` (layer norm: per row), weight and bias ``[1, N]``.
``PLACE`` is where the norm stands: ``"none"``, ``"before"`` or ``"after"`` the activation.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._activations import activate, derive


class Norm(NamedTuple):
    """A norm of ``n`` members with ``H`` units, as a kernel meets it; ``kind`` says what it does with it.

    ========================  =======================================  ================================
    ``kind``                  ``first``                                ``second``
    ========================  =======================================  ================================
    ``"batch"``               read: mean ``(n H,)``                    read: variance ``(n H,)``
    ``"moments"``             written: ``(row tiles, 2, n H)``         None
    ``"row"``                 written: mean ``(B, n)``                 written: 1 / deviation ``(B, n)``
    ``"row_moments"``         written: ``(B, n, column tiles, 2)``     None
    ========================  =======================================  ================================

    Moments are the mean and the sum of squared distances from it, of the rows (or units) of one tile; the norm itself
    follows in a launch of its own. What is written may be None where nobody reads it.
    """

    kind: str
    first: Tensor | None
    second: Tensor | None
    weight: Tensor | None
    """``(n H,)`` or ``(n, H)``, contiguous; None, like the bias: 1 and 0."""
    bias: Tensor | None
    eps: float
    after: bool = False
    """After the activation."""


def norm_pointers(norm: Norm | None) -> tuple[Tensor | None, ...]:
    """First, second, weight and bias of a kernel."""
    return (None, None, None, None) if norm is None else (norm.first, norm.second, norm.weight, norm.bias)


class RunningConstants(NamedTuple):
    """Of a kernel that knows no other norm than one by running statistics."""

    PLACE: str
    EPS: float
    AFFINE: bool


class NormConstants(NamedTuple):
    """Of a kernel that meets any norm."""

    KIND: str
    PLACE: str
    EPS: float
    AFFINE: bool


_NO_NORM, _NO_RUNNING = NormConstants("none", "none", 0.0, False), RunningConstants("none", 0.0, False)


def running_constants(norm: Norm | None) -> RunningConstants:
    """Constants of a norm by running statistics, or of none."""
    if norm is None:
        return _NO_RUNNING
    assert norm.kind == "batch"
    return RunningConstants(*norm_constants(norm)[1:])


def norm_constants(norm: Norm | None) -> NormConstants:
    """Constants of a norm, or of none."""
    if norm is None:
        return _NO_NORM
    assert (norm.weight is None) == (norm.bias is None)
    return NormConstants(norm.kind, "after" if norm.after else "before", norm.eps, norm.weight is not None)


@triton.jit
def affine(Weight, Bias, o_c, m_c, AFFINE: tl.constexpr, WIDE: tl.constexpr):
    """Weight and bias of columns ``o_c``."""
    weight = tl.full(o_c.shape, 1.0, WIDE)
    bias = tl.full(o_c.shape, 0.0, WIDE)
    if AFFINE:
        weight = tl.load(Weight + o_c, mask=m_c, other=0.0).to(WIDE)
        bias = tl.load(Bias + o_c, mask=m_c, other=0.0).to(WIDE)
    return weight[None, :], bias[None, :]


@triton.jit
def column_statistics(Mean, Spread, o_c, m_c, EPS: tl.constexpr, IS_VARIANCE: tl.constexpr, WIDE: tl.constexpr):
    """Mean and 1 / deviation of columns ``o_c``."""
    mean = tl.load(Mean + o_c, mask=m_c, other=0.0).to(WIDE)
    rstd = tl.load(Spread + o_c, mask=m_c, other=1.0).to(WIDE)
    if IS_VARIANCE:
        rstd = 1.0 / tl.sqrt(rstd + EPS)
    return mean[None, :], rstd[None, :]


@triton.jit
def store_column_moments(x, m_m, rows, i_m, Moments, o_c, m_c, WIDTH: tl.constexpr):
    """Moments of the columns of a tile over its ``rows`` rows, those of the mask ``m_m``."""
    x = tl.where(m_m[:, None], x, 0.0)
    mean = tl.sum(x, 0) / rows
    gap = tl.where(m_m[:, None], x - mean[None, :], 0.0)
    p = Moments + i_m.to(tl.int64) * (2 * WIDTH) + o_c
    tl.store(p, mean, mask=m_c)
    tl.store(p + WIDTH, tl.sum(gap * gap, 0), mask=m_c)


@triton.jit
def row_moments(x, m_n, units, IS_FULL: tl.constexpr):
    """Mean and sum of squared distances of the rows of a tile over its ``units`` columns, those of the mask ``m_n``.

    ``IS_FULL``: all of them.
    """
    if not IS_FULL:
        x = tl.where(m_n[None, :], x, 0.0)
    mean = tl.sum(x, 1) / units
    gap = x - mean[:, None]
    if not IS_FULL:
        gap = tl.where(m_n[None, :], gap, 0.0)
    return mean, tl.sum(gap * gap, 1)


@triton.jit
def normalise(x, mean, rstd, weight, bias):
    return (x - mean) * rstd * weight + bias


@triton.jit
def finish(x, mean, rstd, weight, bias, PLACE: tl.constexpr, NAME: tl.constexpr, VALUE: tl.constexpr):
    """The layer's output before dropout, of the product ``x``."""
    if PLACE == "before":
        x = normalise(x, mean, rstd, weight, bias)
    x = activate(x, NAME, VALUE)
    if PLACE == "after":
        x = normalise(x, mean, rstd, weight, bias)
    return x


@triton.jit
def finish_running(x, Mean, Variance, NormW, NormBias, o_c, m_c, PLACE: tl.constexpr, EPS: tl.constexpr,
                   AFFINE: tl.constexpr, NAME: tl.constexpr, VALUE: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """``finish`` with running statistics, which are a factor and a summand per column."""
    if PLACE != "none":
        mean, rstd = column_statistics(Mean, Variance, o_c, m_c, EPS, True, WIDE)
        weight, bias = affine(NormW, NormBias, o_c, m_c, AFFINE, WIDE)
        if PLACE == "before":
            x = (x - mean) * (rstd * weight) + bias
    x = activate(x, NAME, VALUE)
    if PLACE == "after":
        x = (x - mean) * (rstd * weight) + bias
    return x


@triton.jit
def _derive_at(d, x, NAME: tl.constexpr, VALUE: tl.constexpr):
    """``d f'(x)``."""
    if NAME == "tanh" or NAME == "sigmoid":
        x = activate(x, NAME, VALUE)
    return derive(d, x, NAME, VALUE)


@triton.jit
def to_norm(d, x, mean, rstd, weight, bias, PLACE: tl.constexpr, NAME: tl.constexpr, VALUE: tl.constexpr):
    """Gradient of the norm's output and its normalised input, of ``d``, that of the layer's output before dropout."""
    if PLACE == "after":
        normed = (activate(x, NAME, VALUE) - mean) * rstd
    else:
        normed = (x - mean) * rstd
        d = _derive_at(d, normed * weight + bias, NAME, VALUE)
    return d, normed


@triton.jit
def from_norm(d, x, PLACE: tl.constexpr, NAME: tl.constexpr, VALUE: tl.constexpr):
    """Gradient of the product ``x``, of ``d``, that of the norm's input."""
    if PLACE == "after":
        d = _derive_at(d, x, NAME, VALUE)
    return d

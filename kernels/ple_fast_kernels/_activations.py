"""Activations and their derivatives, in the accumulator's dtype. A NaN stays a NaN, as in PyTorch."""

import triton
import triton.language as tl

FUSED = ("identity", "relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid")
"""What an epilogue can apply. The others have learned parameters."""
HEAVY = ("gelu", "gelu_tanh", "silu")
"""Those whose formulas need registers of their own: beside them a tile has fewer columns."""


@triton.jit
def _tanh(z):
    """By a series near zero, where the quotient of exponentials cancels; coefficients of Cephes (Moshier, 1989)."""
    t = tl.exp(-2.0 * tl.abs(z))
    y = (1.0 - t) / (1.0 + t)
    s = z * z
    if z.dtype == tl.float64:
        top = (-9.64399179425052238628e-1 * s - 9.92877231001918586564e1) * s - 1.61468768441708447952e3
        low = ((s + 1.12811678491632931402e2) * s + 2.23548839060100448583e3) * s + 4.84406305325125486048e3
        series = top / low
    else:
        series = ((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1
        series = series * s - 3.33332819422e-1
    return tl.where(tl.abs(z) < 0.625, z + z * s * series, tl.where(z < 0, -y, y))


@triton.jit
def _gelu_gate(z):
    """``(1 + tanh(u)) / 2`` of the approximated gelu, which is the sigmoid of ``2 u``."""
    return 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))


@triton.jit
def activate(z, NAME: tl.constexpr, VALUE: tl.constexpr):
    """``f(z)``."""
    if NAME == "relu":
        z = tl.where(z < 0, 0.0, z)
    elif NAME == "leaky_relu":
        z = tl.where(z < 0, z * VALUE, z)
    elif NAME == "gelu":
        z = 0.5 * z * (1.0 + tl.math.erf(z * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        z = z * _gelu_gate(z)
    elif NAME == "silu":
        z = z / (1.0 + tl.exp(-z))
    elif NAME == "tanh":
        z = _tanh(z)
    elif NAME == "sigmoid":
        z = 1.0 / (1.0 + tl.exp(-z))
    return z


@triton.jit
def derive(d, kept, NAME: tl.constexpr, VALUE: tl.constexpr):
    """``d f'(z)``; ``kept``: the output for relu, tanh, sigmoid and a leaky slope above 0, else the input ``z``."""
    if NAME == "relu":
        d = tl.where(kept <= 0, 0.0, d)
    elif NAME == "leaky_relu":
        d = tl.where(kept > 0, d, d * VALUE)
    elif NAME == "gelu":
        cdf = 0.5 * (1.0 + tl.math.erf(kept * 0.7071067811865476))
        d = d * (cdf + kept * 0.3989422804014327 * tl.exp(-0.5 * kept * kept))
    elif NAME == "gelu_tanh":
        s = _gelu_gate(kept)
        inner = 1.5957691216057308 * (1.0 + 0.134145 * kept * kept)
        d = d * (s + kept * (s * (1.0 - s)) * inner)
    elif NAME == "silu":
        s = 1.0 / (1.0 + tl.exp(-kept))
        # The slope first: with ``d`` between its factors the compiler takes the exponential twice, in two layouts.
        d = d * (s * (1.0 + kept * (1.0 - s)))
    elif NAME == "tanh":
        d = d * ((1.0 - kept) * (1.0 + kept))  # the square would be rounded before the difference
    elif NAME == "sigmoid":
        d = d * kept * (1.0 - kept)
    return d

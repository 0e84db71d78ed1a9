"""Mean and standard deviation of values that may come in parts."""

from __future__ import annotations

import math

import numpy as np

from ple_fast_encoder.tables import Array


class Moments:
    """Count, mean and variance of values, one part after the other (Chan, Golub and LeVeque, 1983)."""

    def __init__(self) -> None:
        self.count, self.mean, self.variance = 0, 0.0, 0.0

    def add(self, values: Array) -> None:
        """Some values, float64 ``(n,)``. What overflows is infinite: whoever keeps it refuses that."""
        if not len(values):
            return
        with np.errstate(over="ignore", invalid="ignore"):
            mean, variance = values.mean(), values.var()
            if self.count:
                total = self.count + len(values)
                share, step = len(values) / total, mean - self.mean
                variance = (1 - share) * self.variance + share * variance + share * (1 - share) * step * step
                mean = self.mean + share * step
        self.count, self.mean, self.variance = self.count + len(values), float(mean), float(variance)

    def mean_and_std(self) -> tuple[float, float]:
        """The deviation of what is constant up to rounding, and of nothing, is 1."""
        # What rounding alone leaves of a constant (the same paper), as in scikit-learn.
        # A product, because a power of floats that overflows raises.
        rounding = self.count * float(np.finfo(np.float64).eps)
        mean, variance = self.mean, self.variance
        noise = rounding * variance + (rounding * mean) * (rounding * mean)
        is_constant = math.isfinite(variance) and variance <= noise
        return mean, 1.0 if is_constant else math.sqrt(variance)


def mean_and_std(values: Array) -> tuple[float, float]:
    """Of float64 values."""
    moments = Moments()
    moments.add(values)
    return moments.mean_and_std()

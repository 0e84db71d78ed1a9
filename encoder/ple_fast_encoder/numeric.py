"""Columns of numbers: transformed and standardised, what is missing made a feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .scalars import check_count, check_number, own_scalar, shown
from .tables import Array, cells_of

Missing = Literal["error", "indicator", "mean"]


@dataclass(frozen=True)
class Numeric:
    """A column of numbers, standardised: ``(f(x) - mean) / std``, computed in float64.

    Args:
        name: the column.
        transform: f: ``"log1p"``, for amounts: ``sign(x) log(1 + |x|)``; ``None``: as it is.
        mean, std: of the transformed training data; :func:`columns_from` measures them.
        missing: what a missing number (NaN) is: ``"error"``; ``"mean"``; or ``"indicator"``: the mean, and a second
            feature that is 1 where the number is missing. Training must meet some for that feature to mean anything.
        width: ``None``: the number itself is a feature. Otherwise each number (and indicator) becomes ``relu(x w + b)``
            with learned w and b of this width (Gorishniy et al., NeurIPS 2022).

    Raises:
        TypeError: a mean or std that is no number.
        ValueError: an unknown transform or treatment, a mean that is not finite, a std that is not above 0, a width
            below 1.
    """

    name: str
    transform: Literal["log1p"] | None = None
    mean: float = 0.0
    std: float = 1.0
    missing: Missing = "error"
    width: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", own_scalar(self.name))
        for field in ("mean", "std"):
            object.__setattr__(self, field, check_number(f"column {self.name!r}: {field}", getattr(self, field)))
        for field, choices in (("transform", ("log1p", None)), ("missing", ("error", "indicator", "mean"))):
            if getattr(self, field) not in choices:
                got = getattr(self, field)
                raise ValueError(f"column {self.name!r}: expected {field} to be one of {choices}, got {shown(got)}")
        if not np.isfinite(self.mean) or not np.isfinite(self.std) or self.std <= 0:
            raise ValueError(
                f"column {self.name!r}: expected a finite mean and a finite std above 0, got {self.mean} and {self.std}"
            )
        if self.width is not None:
            object.__setattr__(self, "width", check_count(f"column {self.name!r}: width", self.width))

    @property
    def features(self) -> int:
        """Numbers per row: 1, and one more for an indicator."""
        return 2 if self.missing == "indicator" else 1

    def transformed(self, column: Any) -> Array:
        """``f(x)``, float64 ``(B,)``; NaN stays where the number is missing.

        Raises:
            TypeError: the column holds no numbers.
            ValueError: it is not one-dimensional, or holds an infinity.
        """
        cells = cells_of(f"column {self.name!r}", column)
        values = cells.numbers("numbers (declare it Categorical, or convert it)")
        if np.isinf(values).any():
            raise ValueError(f"{cells.where}: expected finite numbers, got {int(np.isinf(values).sum())} infinite")
        return np.sign(values) * np.log1p(np.abs(values)) if self.transform == "log1p" else values

    def check_present(self, absent: Array) -> None:
        """ValueError where one of ``absent (B,)``, bool, is True: a missing number (NaN)."""
        if absent.any():
            raise ValueError(
                f"column {self.name!r}: expected numbers, got {absent.sum()} of {len(absent)} missing (NaN); fill them "
                'in, or give the column missing="mean" (a trained model can have it too) or, in training, '
                '"indicator"; columns_from(..., missing=) asks for one beforehand'
            )

    def encode(self, column: Any) -> Array:
        """Features of a column, float32 ``(B, features)``, finite.

        Raises:
            TypeError: the column holds no numbers.
            ValueError: it holds an infinity, or NaN with ``missing="error"``.
        """
        values = self.transformed(column)
        absent = np.isnan(values)
        if self.missing == "error":
            self.check_present(absent)
        with np.errstate(over="ignore"):  # what overflows is named below
            scaled = np.where(absent, 0.0, (values - self.mean) / self.std).astype(np.float32)
        if not np.isfinite(scaled).all():
            raise ValueError(
                f"column {self.name!r}: expected numbers within float32 once standardised (mean {self.mean:g}, "
                f"std {self.std:g}), got {np.nanmin(values):g} to {np.nanmax(values):g}"
            )
        parts = [scaled, absent.astype(np.float32)] if self.missing == "indicator" else [scaled]
        return np.stack(parts, axis=1)

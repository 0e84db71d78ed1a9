"""Everything that reads a column, for the tests of tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ple_fast.model import Categorical, Numeric, columns_from
from ple_fast_encoder.tables import label_values


def readers(
    numeric: Numeric | None = None, *, ints: tuple[int, ...] = (1, 2), texts: tuple[str, ...] = ("a", "b")
) -> list[Callable[[Any], Any]]:
    """Everything that reads a column, of the name x."""
    return [
        (numeric or Numeric("x", missing="indicator")).encode,
        Categorical("x", size=3).encode,
        Categorical("x", values=ints).encode,
        Categorical("x", values=texts).encode,
        lambda column: columns_from({"x": column}, categorical=["x"]),
        lambda column: columns_from({"x": column}, numeric=["x"]),
        lambda column: label_values("column 'x'", column),
    ]

"""Which way computes a product fastest, as measured: one table for each class of processors and number of threads.

Nothing is timed at run time. A processor that nobody measured gets ``DEFAULT``: PyTorch's own products, which everybody
calls.
"""

from __future__ import annotations

import math
from typing import NamedTuple

WAYS: dict[str, tuple[str, ...]] = {
    "linear": ("mm", "onednn"),
    "linear_input_grad": ("mm", "onednn"),
    "linear_weight_grad": ("mm", "onednn turns x", "onednn turns d"),
    "grouped": ("members", "rows", "convolution"),
    "grouped_rows": ("copied", "rows", "convolution"),
    "grouped_input_grad": ("copied", "rows", "convolution"),
    "grouped_weight_grad": ("batched", "turned"),
}
"""Of each kind of product (``products.py``) the ways to compute it; the first is PyTorch's own."""
ONEDNN = frozenset({"onednn", "onednn turns x", "onednn turns d", "convolution"})
"""The ways that are oneDNN's."""
DTYPES = ("float32", "bfloat16", "float16")


class Limits(NamedTuple):
    """Where a level goes another way altogether."""

    few_rows: int = 32
    """Rows below which inference takes the short path, ``few_rows.py``."""
    few_rows_training: int = 96
    """The same of a training step."""
    wide_rows: int = 1 << 12
    """Rows up to which the short path reads the weights of the first layer expert by expert, not as one matrix."""
    block_values: int = 13 << 18
    """Activations of a row block, over all layers of a level."""


LARGEST = Limits(1 << 12, 1 << 12, 1 << 12, 1 << 32)
"""What a file may ask for."""


class Entry(NamedTuple):
    """One shape of a product: so many members, each ``(rows, width)`` times ``(width, units)``."""

    members: int
    units: int
    width: int
    ways: tuple[tuple[int, str], ...]
    """From so many rows on this way; the first begins at 0."""


class Table(NamedTuple):
    """What is known of a class of processors."""

    source: str
    """A file, or why it is the default."""
    limits: Limits
    products: dict[tuple[str, str], tuple[Entry, ...]]
    """By dtype and kind."""

    def way(self, kind: str, dtype: str, rows: int, members: int, units: int, width: int) -> str:
        """Of the measured shape that is nearest."""
        entries = self.products.get((dtype, kind))
        if not entries:
            return WAYS[kind][0]

        def distance(entry: Entry) -> float:
            pairs = ((entry.members, members), (entry.units, units), (entry.width, width))
            return sum(abs(math.log2(a / max(b, 1))) for a, b in pairs)

        return [way for start, way in min(entries, key=distance).ways if start <= rows][-1]


ANY = Entry(1, 1, 1, ((0, "turned"),))
DEFAULT = Table(
    "no table is of this processor",
    Limits(),
    # PyTorch's batched product copies strided operands of low precision, element by element on every processor.
    {("bfloat16", "grouped_weight_grad"): (ANY,), ("float16", "grouped_weight_grad"): (ANY,)},
)
"""Of a processor that nobody measured; its rows are also those that a table lacks."""

"""Part of ``ple_fast.tune``: the products of running steps on a CPU, each timed where it stands, and the table that
follows.

A product alone, on warm operands, says little: in a step its operands have just been written and its result finds other
things in the caches. So every product of a step is computed now by one of its ways, now by another, and timed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor

from .torch_backend.product_table import WAYS, Entry
from .torch_backend.products import Ways

GAIN = 0.03
"""Another way must beat PyTorch's own by so much: less is noise."""
IN_A_ROW = 2
"""Calls of one way before the next one's turn: the first follows another way, whose work it may find undone."""
RARELY = 4
"""A way that takes so many times the least so far has lost."""


class Product(NamedTuple):
    """Products that are timed together."""

    dtype: str
    kind: str
    """Of ``WAYS``."""
    rows: int
    members: int
    units: int
    width: int


def product_of(kind: str, shape: tuple[int, int, int, int], arguments: tuple[Any, ...]) -> Product:
    """What a watcher of ``products.watched_by`` is called with."""
    like: Tensor = arguments[0]
    return Product(str(like.dtype).removeprefix("torch."), kind, *shape)


class Samples:
    """Seconds by product and way; a watcher for ``products.watched_by``."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[Product, dict[str, list[float]]] = {}
        self._calls: dict[Product, int] = defaultdict(int)
        self._clock = clock
        self.met: set[Product] = set()
        """Since it was cleared."""

    def __call__(self, kind: str, shape: tuple[int, int, int, int], ways: Ways, arguments: tuple[Any, ...]) -> Tensor:
        product = product_of(kind, shape, arguments)
        self.met.add(product)
        found = self.seconds.setdefault(product, {name: [] for name in ways})
        names = self._not_lost(product)
        turn, number = divmod(self._calls[product], IN_A_ROW)
        self._calls[product] += 1
        name = names[turn % len(names)]
        begin = self._clock()
        result = ways[name](*arguments)
        seconds = self._clock() - begin
        if number == IN_A_ROW - 1:
            found[name].append(seconds)
        return result

    def enough(self, count: int) -> bool:
        """Whether every product that was met has so many samples of each way that has not lost."""
        return all(
            len(self.seconds[product][name]) >= count for product in self.met for name in self._not_lost(product)
        )

    def _not_lost(self, product: Product) -> list[str]:
        """The ways that have not taken ``RARELY`` times the least."""
        found = {name: statistics.median(own) if own else 0.0 for name, own in self.seconds[product].items()}
        best = min((seconds for seconds in found.values() if seconds), default=math.inf)
        return [name for name, seconds in found.items() if seconds < RARELY * best]

    def medians(self) -> dict[Product, dict[str, float]]:
        """Of all samples; products that came too seldom to know every way are left out."""
        return {
            product: {name: statistics.median(own) for name, own in ways.items()}
            for product, ways in self.seconds.items()
            if all(ways.values())
        }


def fastest(seconds: dict[str, float], kind: str) -> str:
    """PyTorch's own way, unless another is faster by ``GAIN``."""
    own = WAYS[kind][0]
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[best] < (1 - GAIN) * seconds[own] else own


def rows_of_table(
    medians: dict[Product, dict[str, float]], dtypes: Iterable[str]
) -> dict[tuple[str, str], tuple[Entry, ...]]:
    """The rows of a table. Between two measured numbers of rows the border is in the middle, in powers of two."""
    found: dict[tuple[str, str], list[Entry]] = {}
    shapes: dict[tuple[str, str, int, int, int], list[tuple[int, str]]] = defaultdict(list)
    for product, seconds in medians.items():
        dtype, kind, rows, *shape = product
        shapes[(dtype, kind, shape[0], shape[1], shape[2])].append((rows, fastest(seconds, kind)))
    for dtype in dtypes:
        for kind in WAYS:
            for (own_dtype, own_kind, *shape), measured in sorted(shapes.items()):
                if (own_dtype, own_kind) == (dtype, kind):
                    ways = _borders(sorted(measured))
                    found.setdefault((dtype, kind), []).append(Entry(shape[0], shape[1], shape[2], ways))
    return {key: tuple(entries) for key, entries in found.items()}


def _borders(measured: list[tuple[int, str]]) -> tuple[tuple[int, str], ...]:
    ways: list[tuple[int, str]] = []
    before = 0
    for rows, way in measured:
        if not ways or ways[-1][1] != way:
            ways.append((0 if not ways else max(math.isqrt(before * rows), ways[-1][0] + 1), way))
        before = rows
    return tuple(ways)

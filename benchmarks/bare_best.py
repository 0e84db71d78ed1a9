"""The floor that no library lies below: a step's products, each by the fastest way that this machine has for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ple_fast.torch_backend import products
from ple_fast.torch_backend.table_in_use import limited
from ple_fast.tune_products import Product, Samples, product_of

BEST_FLOOR = "bare_best"
"""Its name among the contestants."""
SAMPLES = 5
SECONDS = 20.0
"""What timing the ways of a step may take; each is timed at least once."""


def best_products(step: Callable[[], object]) -> Callable[[], None]:
    """A callable that computes the products of ``step``, a call of ours in its general path, in their order, each by
    the way that took the least in runs of the whole step. Their operands are kept; everything else is left out.
    """
    samples = Samples()
    calls: list[tuple[Product, products.Ways, tuple[Any, ...]]] = []

    def record(kind: str, shape: tuple[int, int, int, int], ways: products.Ways, arguments: tuple[Any, ...]) -> Tensor:
        calls.append((product_of(kind, shape, arguments), ways, arguments))
        return next(iter(ways.values()))(*arguments)

    with limited(few_rows=0, few_rows_training=0):
        end = time.monotonic() + SECONDS
        with products.watched_by(samples):
            step()
            while not samples.enough(1) or (not samples.enough(SAMPLES) and time.monotonic() < end):
                step()
        with products.watched_by(record):
            step()
    best = {product: min(seconds, key=lambda way: seconds[way]) for product, seconds in samples.medians().items()}
    chosen = [partial(ways[best[product]], *arguments) for product, ways, arguments in calls]

    def run() -> None:
        with torch.inference_mode():
            for product in chosen:
                product()

    return run

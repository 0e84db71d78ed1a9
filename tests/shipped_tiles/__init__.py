"""What runs the tiles of the shipped tables: every kernel that reads a row of them, with operands and float64 sums.

One more kernel is one more entry of ``KERNELS``; ``tests/test_shipped_tiles.py`` takes it through every tile that it
reads. No kernel is handed its tile: the table of the device is one of that tile alone, and the launcher does with it
what it does in a level (narrower where a norm or dropout follows, say).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ple_fast_kernels import TABLES, Class, Library
from ple_fast_kernels._tile_tables import MIXTURES, PRODUCTS
from tests.shipped_tiles import levels, products
from tests.shipped_tiles.cases import Case, Kernel

DTYPES_OF = {
    "half": (torch.bfloat16, torch.float16),
    "tf32": (torch.float32,),
    "ieee": (torch.float32,),
    "double": (torch.float64,),
    "": (torch.bfloat16, torch.float16, torch.float32, torch.float64),
}
"""Dtypes that a row serves, by its operands; mixtures name none."""

LOADED = ("multiples", "tails")
"""Widths that the tensor memory engine loads."""

KERNELS: dict[str, Kernel] = {
    "grouped_linear_fwd": Kernel("linear", products.linear),
    "grouped_linear_fwd-dropout": Kernel("linear", products.linear_with_dropout, ("tails",)),
    "grouped_linear_fwd-moments": Kernel("linear", products.linear_before_batch_norm, ("tails",)),
    "grouped_linear_fwd-persistent": Kernel("persistent_linear", products.persistent_linear, LOADED),
    "grouped_data_grad-persistent": Kernel("persistent_data_grad", products.persistent_data_grad, LOADED),
    "grouped_data_grad": Kernel("data_grad", products.data_grad),
    "grouped_data_grad-dropout": Kernel("data_grad", products.data_grad_with_dropout, ("tails",)),
    "grouped_data_grad-norm": Kernel("data_grad", products.data_grad_before_batch_norm, ("tails",)),
    "grouped_input_grad": Kernel("input_grad", products.input_grad),
    "grouped_weight_grads": Kernel("weight_grad", products.weight_grads),
    "fused_level_fwd": Kernel("fused", levels.level),
    "fused_two_layers_fwd": Kernel("two_layers", levels.two_layers),
    "gate_combine_fwd": Kernel("combine", levels.combine),
    "gate_combine_bwd": Kernel("combine_grad", levels.combine_grad),
}


def readers_of(architecture: str, row: str) -> tuple[str, ...]:
    """Names of the kernels that read a row: a row without a name serves those that have none of their own."""
    if row in MIXTURES:
        return (row,)
    name, _, operands = row.rpartition("/")
    if name:
        return (name,)
    on_a_gpu = architecture != "interpreter"
    return tuple(
        kernel
        for kernel in PRODUCTS
        if f"{kernel}/{operands}" not in TABLES[architecture]
        and not (on_a_gpu and operands == "double" and kernel in ("fused", "two_layers"))  # it has no such kernel
    )


def rows_of(architecture: str) -> dict[str, tuple[Class, ...]]:
    """Rows of a table that hold tiles."""
    rows = {row: classes for row, classes in TABLES[architecture].items() if not isinstance(classes, Library)}
    return {row: tuple(entry for entry in classes if isinstance(entry, Class)) for row, classes in rows.items()}


def cases_of(architecture: str) -> Iterator[Case]:
    """Every tile of a table times every kernel that reads it."""
    for row, classes in rows_of(architecture).items():
        for reader in readers_of(architecture, row):
            for name, kernel in KERNELS.items():
                if kernel.reads == reader:
                    for tile in dict.fromkeys(entry.tile for entry in classes):
                        for dtype in DTYPES_OF["" if row in MIXTURES else row.rpartition("/")[2]]:
                            for widths in kernel.widths:
                                yield Case(name, reader, architecture, row, tile, dtype, widths)

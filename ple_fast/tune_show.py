"""Part of ``ple_fast.tune``: what it prints, the tables in use and how far it is."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .torch_backend.processor import processor_name, this_processor
from .torch_backend.product_table import Table
from .torch_backend.table_in_use import table
from .tune_processor import Progress


def tables(device: str | None = None) -> str:
    """The tables that products on a CPU and kernels on a GPU take here; ``device``: of one of the two alone.

    Raises:
        ValueError: a GPU is asked for, and PyTorch sees none.
    """
    kind = None if device is None else torch.device(device).type
    parts = []
    if kind != "cuda":
        parts.append(products(table()))
    if kind != "cpu" and torch.cuda.is_available():
        parts.append(_tiles(torch.device(device or "cuda")))
    elif kind == "cuda":
        raise ValueError(f"--device {device}: PyTorch sees no GPU here")
    return "\n\n".join(parts)


def products(found: Table) -> str:
    """A table of this processor's products."""
    threads = torch.get_num_threads()
    about = this_processor()
    lines = [
        f"processor: {processor_name()}, {about.instructions}, {threads} thread{'s' if threads > 1 else ''}",
        f"table: {found.source}",
        "limits: " + ", ".join(f"{name} {value:,}" for name, value in found.limits._asdict().items()),
    ]
    for (dtype, kind), entries in found.products.items():
        for entry in entries:
            ways = ", ".join(f"{way} from {start:,} rows on" if start else way for start, way in entry.ways)
            lines.append(f"{dtype} {kind}: {entry.members} x ({entry.width} -> {entry.units}): {ways}")
    if not any(dtype == "float32" for dtype, _ in found.products):
        lines.append("every other product: PyTorch's own")
    return "\n".join(lines)


def _tiles(device: torch.device) -> str:
    """The tables of kernels of a GPU."""
    files = importlib.import_module("ple_fast_kernels._tile_files")
    tiles = importlib.import_module("ple_fast_kernels._tiles")
    key = tiles.table_of(device)[0]
    architecture, _, gpu = key.partition("/")  # of a GPU whose file was read
    name = torch.cuda.get_device_name(device)
    lines = [f"GPU: {name}, {architecture}", f"table: {files.tiles_path(gpu) if gpu else 'shipped'}"]
    lines += [f"{kind}: {row}" for kind, row in tiles.rows_of(key).items()]
    return "\n".join(lines)


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress bar on standard error: rich's where it is installed, else a line for each thing done."""
    try:
        from rich.console import Console
        from rich.progress import Progress as Bar
    except ImportError:

        def say(text: str, share: float) -> None:
            print(f"{100 * share:3.0f} %  {text}", file=sys.stderr, flush=True)

        yield say
        return
    with Bar(console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=1.0)

        def draw(text: str, share: float) -> None:
            bar.update(task, description=text, completed=share)

        yield draw
        bar.update(task, completed=1.0)

"""The form of a table of tiles, in memory and in the JSON file that ``ple_fast.tune`` writes for one GPU.

The file of a device is the one that ``PLE_FAST_TILES`` names, otherwise ``ple_fast/tiles-GPU.json`` in the user's cache
folder (``XDG_CACHE_HOME``, or ``~/.cache``) if it exists.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

ENVIRONMENT = "PLE_FAST_TILES"
SCHEMA = 1


class Tile(NamedTuple):
    """A kernel's block sizes, warps and pipeline stages.

    Of a product: rows and columns of the result, depth of a step. Of the weight gradient: units, inputs, rows of a
    step. Of the mixtures: rows and units.
    """

    rows: int
    columns: int
    depth: int = 0
    warps: int = 4
    stages: int = 3
    group: int = 8


class Class(NamedTuple):
    """Tiles of a row, smallest amount of work first; ``tiles`` is the number of 128 x 128 results from which an entry
    holds, at 128 multiprocessors."""

    tiles: int
    tile: Tile


Table = dict[str, tuple[Class, ...]]


def tiles_path(gpu: str) -> Path:
    """Where the file of a GPU of this name is looked for, and written to."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named).expanduser()
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path("~/.cache").expanduser()) / "ple_fast" / f"tiles-{slug}.json"


def read_for(gpu: str, architecture: str, kinds: Collection[str]) -> Table | None:
    """The table of the file of a GPU; None without a file.

    A file that ``PLE_FAST_TILES`` names must be there and be right. One in the cache folder may be a relic: if it is
    broken, a warning says so and the shipped tiles are used. An empty ``PLE_FAST_TILES`` means: no file.

    Raises:
        ValueError: the file that ``PLE_FAST_TILES`` names is missing or broken.
    """
    named = os.environ.get(ENVIRONMENT)
    if named == "":
        return None
    path = tiles_path(gpu)
    if named is None and not path.is_file():
        return None
    try:
        return read_table(path, architecture, kinds)
    except ValueError as error:
        if named is not None:
            raise ValueError(f"environment variable {ENVIRONMENT}: {error}") from error
        warnings.warn(
            f"ple_fast uses its shipped tiles: {error}; run python -m ple_fast.tune again, or remove the file",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def read_table(path: Path, architecture: str, kinds: Collection[str]) -> Table:
    """The table in a file.

    Raises:
        ValueError: it cannot be read, is of another schema or architecture, or holds what is no tile.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict) or content.get("kind") != "tiles":
        raise ValueError(f"{path}: expected a file of ple_fast.tune, with kind 'tiles'")
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {content.get('schema')!r}: another version wrote it")
    if content.get("architecture") != architecture:
        raise ValueError(f"{path}: holds tiles for {content.get('architecture')!r}, this GPU takes {architecture!r}")
    rows = content.get("tiles")
    if not isinstance(rows, dict):
        raise ValueError(f"{path}: expected an object of rows under 'tiles'")
    if unknown := sorted(set(rows) - set(kinds)):
        raise ValueError(f"{path}: no kernel reads the rows {', '.join(unknown)}")
    return {kind: _classes(path, kind, row) for kind, row in rows.items()}


def _classes(path: Path, kind: str, row: Any) -> tuple[Class, ...]:
    try:
        classes = tuple(Class(int(tiles), Tile(*map(int, tile))) for tiles, tile in row)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {kind}: expected [[tiles, [rows, columns, depth, warps, stages, group]]]") from error
    if not classes or classes[0].tiles != 0 or [c.tiles for c in classes] != sorted(c.tiles for c in classes):
        raise ValueError(f"{path}: {kind}: expected entries that begin with 0 and rise, got {row!r}")
    for _, tile in classes:
        sizes = (tile.rows, tile.columns, tile.warps, *((tile.depth,) if tile.depth else ()))
        if min(tile.stages, tile.group) < 1 or any(n < 1 or n & (n - 1) for n in sizes):
            raise ValueError(f"{path}: {kind}: expected powers of two, got {tile}")
    return classes


def write_table(path: Path, table: Table, architecture: str, about: dict[str, Any]) -> None:
    """Write a table, whole or not at all; ``about`` says what it was measured with."""
    rows = ",\n  ".join(
        f"{json.dumps(kind)}: {json.dumps([[tiles, list(tile)] for tiles, tile in classes])}"
        for kind, classes in table.items()
    )
    head = {"schema": SCHEMA, "kind": "tiles", "architecture": architecture, **about}
    lines = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(f'{{\n {lines},\n "tiles": {{\n  {rows}\n }}\n}}\n', encoding="utf-8")
    part.replace(path)

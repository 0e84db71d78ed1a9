"""The form of a table of tiles, in memory and in the JSON file that ``ple_fast.tune`` writes for one GPU.

The file of a device is the one that ``PLE_FAST_TILES`` names, otherwise ``ple_fast/tiles-GPU.json`` in the user's cache
folder (``XDG_CACHE_HOME``, or ``~/.cache``) if it exists.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

ENVIRONMENT = "PLE_FAST_TILES"
SCHEMA = 1

# What a file may ask for: no kernel compiles, or launches on any GPU, outside.
LEAST = 16
"""Of each side of a product; matrix units take no less."""
LEAST_MIXED = 4
MOST_ELEMENTS = 1 << 20
"""Of any block; Triton's limit."""
MOST_SHARED = 256 << 10
"""Bytes of shared memory for all stages of a product; no GPU has more."""
MOST_THREADS = 1024
MOST_GROUP = 1024
OPERAND_BYTES = {"half": 2, "tf32": 4, "ieee": 4, "double": 8}


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


class Library(NamedTuple):
    """From how many billions of floating-point operations on a product that is one plain product of matrices is the
    library's (cuBLAS), at 128 multiprocessors; None: never."""

    linear: int | None = None
    input_grad: int | None = None
    weight_grad: int | None = None


class Parts(NamedTuple):
    """Into how many parts a weight gradient is cut: ``parts``, where there are so many rows, programs and sums to a
    part, with this tile."""

    rows: int
    programs: int
    size: int
    tile: Tile
    parts: int


Row = tuple[Class, ...] | Library | tuple[Parts, ...]
Table = dict[str, Row]
"""Rows by name: tiles of kernels, ``library/OPERANDS``, and ``weight_grad_parts``."""
PARTS = "weight_grad_parts"
MOST_PARTS = 1024
LIBRARY = "library/"
PERSISTENT = "persistent_"
"""Of rows of kernels that load by the tensor memory engine: ``persistent_KERNEL/OPERANDS``. They begin at any amount of
work: below it, and where a row is empty or missing, the kernel that loads by pointers is taken."""
MOST_LOADED = 256
"""Of each side of a block that the engine loads."""
HAS_ENGINE = ("sm_90", "sm_100")
"""Architectures with a tensor memory engine."""


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
    try:
        path = tiles_path(gpu)
    except RuntimeError as error:  # a user without a home folder
        if named is None:
            return None
        raise ValueError(f"environment variable {ENVIRONMENT}: {named!r} names no file ({error})") from error
    if named is None and not os.path.isfile(path):  # Path.is_file raises where it may not look
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
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict) or content.get("kind") != "tiles":
        raise ValueError(f"{path}: expected a file of ple_fast.tune, with kind 'tiles'")
    if type(content.get("schema")) is not int or content["schema"] != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {content.get('schema')!r}: another version wrote it")
    if content.get("architecture") != architecture:
        raise ValueError(f"{path}: holds tiles for {content.get('architecture')!r}, this GPU takes {architecture!r}")
    rows = content.get("tiles")
    if not isinstance(rows, dict):
        raise ValueError(f"{path}: expected an object of rows under 'tiles'")
    if unknown := sorted(set(rows) - set(kinds)):
        raise ValueError(f"{path}: no kernel reads the rows {', '.join(unknown)}")
    return {kind: _row(path, kind, row, architecture) for kind, row in rows.items()}


def _row(path: Path, kind: str, row: Any, architecture: str) -> Row:
    if kind == PARTS:
        return _parts(path, row)
    return _library(path, kind, row) if kind.startswith(LIBRARY) else _classes(path, kind, row, architecture)


def _parts(path: Path, row: Any) -> tuple[Parts, ...]:
    if not isinstance(row, list) or not all(map(_is_parts, row)):
        raise ValueError(
            f"{path}: {PARTS}: expected [[rows, programs, size, [rows, columns, depth, warps, stages, group], parts]] "
            f"of ints, 1 or more, with at most {MOST_PARTS} parts, no more than rows; got {row!r:.200}"
        )
    return tuple(Parts(rows, programs, size, Tile(*tile), parts) for rows, programs, size, tile, parts in row)


def _is_parts(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != len(Parts._fields) or not _is_entry([0, entry[3]]):
        return False
    numbers = [*entry[:3], entry[4]]
    return all(type(number) is int and number > 0 for number in numbers) and entry[4] <= min(MOST_PARTS, entry[0])


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _library(path: Path, kind: str, row: Any) -> Library:
    fields = Library._fields
    if not isinstance(row, dict) or set(row) != set(fields) or not all(map(_is_amount, row.values())):
        raise ValueError(
            f"{path}: {kind}: expected {{{', '.join(fields)}}}, each a number of billions of operations (an int, 0 or "
            f"more) or null, got {row!r:.200}"
        )
    return Library(**row)


def _is_amount(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 0)


def _classes(path: Path, kind: str, row: Any, architecture: str) -> tuple[Class, ...]:
    if not isinstance(row, list) or not all(map(_is_entry, row)):
        raise ValueError(
            f"{path}: {kind}: expected [[tiles, [rows, columns, depth, warps, stages, group]]] of ints, got "
            f"{row!r:.200}"
        )
    classes = tuple(Class(tiles, Tile(*tile)) for tiles, tile in row)
    starts = [entry.tiles for entry in classes]
    # Of fused kernels several may begin at the same work: the first that fits is taken.
    rising = sorted(starts) if kind.startswith(("fused/", "two_layers/")) else sorted(set(starts))
    if kind.startswith(PERSISTENT):
        if starts != rising or any(start < 0 for start in starts):
            raise ValueError(f"{path}: {kind}: expected entries of 0 or more that rise, got {row!r:.200}")
    elif not starts or starts[0] != 0 or starts != rising:
        raise ValueError(f"{path}: {kind}: expected entries that begin with 0 and rise, got {row!r:.200}")
    for _, tile in classes:
        if wrong := _what_is_wrong(kind, tile, architecture):
            raise ValueError(f"{path}: {kind}: expected {wrong}, got {tile}")
    return classes


def _is_entry(entry: Any) -> bool:
    """Whether it is ``[tiles, [rows, columns, ...]]``, of ints."""
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], list):
        return False
    numbers = [entry[0], *entry[1]]
    return 2 <= len(entry[1]) <= len(Tile._fields) and all(type(number) is int for number in numbers)


def _what_is_wrong(kind: str, tile: Tile, architecture: str) -> str | None:
    """What a tile of a row is expected to be, and is not."""
    mixes = kind.startswith("combine")
    sizes = (tile.rows, tile.columns) if mixes else (tile.rows, tile.columns, tile.depth)
    least, threads = LEAST_MIXED if mixes else LEAST, 64 if architecture == "amd" else 32
    if any(size < 1 or size & (size - 1) for size in (*sizes, tile.warps)):
        return f"powers of two{'' if mixes else ' (the depth too)'}"
    if mixes and tile.depth:
        return "depth 0, for mixtures"
    if min(sizes) < least:
        return f"sizes of {least} or more"
    if any(a * b > MOST_ELEMENTS for i, a in enumerate(sizes) for b in sizes[:i]):
        return f"blocks of at most {MOST_ELEMENTS} elements"
    if kind.startswith(PERSISTENT) and architecture not in HAS_ENGINE:
        return f"no such row: only {' and '.join(HAS_ENGINE)} have a tensor memory engine"
    if kind.startswith(PERSISTENT) and max(sizes) > MOST_LOADED:
        return f"sizes of {MOST_LOADED} or less, for the tensor memory engine"
    if tile.warps * threads > MOST_THREADS:
        return f"at most {MOST_THREADS // threads} warps"
    if not 1 <= tile.group <= MOST_GROUP:
        return f"a group of 1 to {MOST_GROUP}"
    size = tile.rows * tile.columns * 4 if mixes else sum(sizes[:2]) * tile.depth * OPERAND_BYTES[kind.split("/")[-1]]
    if tile.stages < 1 or tile.stages * size > MOST_SHARED:
        return f"1 stage or more, of at most {MOST_SHARED} bytes together"
    return None


def _as_json(row: Row) -> Any:
    if isinstance(row, Library):
        return row._asdict()
    return [[list(value) if isinstance(value, Tile) else value for value in entry] for entry in row]


def write_table(path: Path, table: Table, architecture: str, about: dict[str, Any]) -> None:
    """Write a table, whole or not at all; ``about`` says what it was measured with."""
    rows = ",\n  ".join(f"{json.dumps(kind)}: {json.dumps(_as_json(row))}" for kind, row in table.items())
    head = {"schema": SCHEMA, "kind": "tiles", "architecture": architecture, **about}
    lines = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # of this call alone
    try:
        with part.open("x", encoding="utf-8") as handle:
            handle.write(f'{{\n {lines},\n "tiles": {{\n  {rows}\n }}\n}}\n')
            handle.flush()
            os.fsync(handle.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

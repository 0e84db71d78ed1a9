"""The tables of products in files.

Those that are shipped are in ``product_tables/``. The one that ``python -m ple_fast.tune --device cpu`` writes for a
user's machine goes before them: the file that ``PLE_FAST_PRODUCTS`` names, otherwise
``ple_fast/products-PROCESSOR-INSTRUCTIONS-Nthreads.json`` in the user's cache folder (``XDG_CACHE_HOME``, or
``~/.cache``) if it exists.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .processor import Processor, processor_name
from .product_table import DEFAULT, DTYPES, LARGEST, WAYS, Entry, Limits, Table

ENVIRONMENT = "PLE_FAST_PRODUCTS"
SCHEMA = 1
SHIPPED = Path(__file__).with_name("product_tables")


def products_path(processor: Processor, threads: int) -> Path:
    """Where the user's file is looked for, and written to."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named).expanduser()
    about = f"{processor_name()}-{processor.instructions}-{threads}threads"
    slug = re.sub(r"[^a-z0-9]+", "-", about.lower()).strip("-")
    cache_folder = os.environ.get("XDG_CACHE_HOME")
    return (
        (Path(cache_folder) if cache_folder else Path("~/.cache").expanduser()) / "ple_fast" / f"products-{slug}.json"
    )


def _users_table(processor: Processor, threads: int) -> Table | None:
    """The table of the user's file; None without one.

    A file that ``PLE_FAST_PRODUCTS`` names must be there and be right. One in the cache folder may be a relic: if it is
    broken, a warning says so and the shipped tables are used. An empty ``PLE_FAST_PRODUCTS`` means: no file.
    """
    named = os.environ.get(ENVIRONMENT)
    if named == "":
        return None
    try:
        path = products_path(processor, threads)
    except RuntimeError as error:  # a user without a home folder
        if named is None:
            return None
        raise ValueError(f"environment variable {ENVIRONMENT}: {named!r} names no file ({error})") from error
    if named is None and not os.path.isfile(path):  # Path.is_file raises where it may not look
        return None
    try:
        of, _, table = read_table(path)
        if of != processor:
            raise ValueError(f"{path}: is of {_named(of)}, this processor is {_named(processor)}")
        return table
    except ValueError as error:
        if named is not None:
            raise ValueError(f"environment variable {ENVIRONMENT}: {error}") from error
        warnings.warn(
            f"ple_fast uses its shipped table of products: {error}; run python -m ple_fast.tune --device cpu again, or "
            "remove the file",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _named(processor: Processor) -> str:
    return " ".join(part for part in processor if part)


@cache
def shipped_tables() -> tuple[tuple[Processor, int, Table], ...]:
    """Processor, threads and table of every file that is shipped."""
    return tuple(read_table(path) for path in sorted(SHIPPED.glob("*.json")))


def table_of(processor: Processor, threads: int) -> Table:
    """The user's table, or the one that is shipped for this class and the nearest number of threads, or ``DEFAULT``.

    Of a shipped table an empty family stands for all. Rows that the user's table lacks are the shipped ones.
    """
    own, shipped = _users_table(processor, threads), _shipped_table(processor, threads)
    found = shipped if own is None else own
    return found._replace(products={**DEFAULT.products, **shipped.products, **found.products})


def _shipped_table(processor: Processor, threads: int) -> Table:
    shipped = shipped_tables()
    found = [row for row in shipped if row[0] == processor] or [
        row for row in shipped if row[0] == processor._replace(family="")
    ]
    if not found:
        return DEFAULT
    return min(found, key=lambda row: abs(math.log2(row[1] / threads)))[2]


def read_table(path: Path) -> tuple[Processor, int, Table]:
    """Processor, threads and table in a file.

    Raises:
        ValueError: it cannot be read, is of another schema, or holds what is no table of products.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict) or content.get("kind") != "products":
        raise ValueError(f"{path}: expected a file of ple_fast.tune --device cpu, with kind 'products'")
    if type(content.get("schema")) is not int or content["schema"] != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {content.get('schema')!r}: another version wrote it")
    about = content.get("processor")
    if not isinstance(about, dict) or set(about) != set(Processor._fields) or not _all(str, about.values()):
        raise ValueError(
            f"{path}: expected strings {', '.join(Processor._fields)} under 'processor', got {about!r:.200}"
        )
    threads = content.get("threads")
    if type(threads) is not int or threads < 1:
        raise ValueError(f"{path}: expected 1 or more under 'threads', got {threads!r:.50}")
    limits = content.get("limits")
    if (
        not isinstance(limits, dict)
        or set(limits) != set(Limits._fields)
        or any(type(value) is not int or not 0 <= value <= getattr(LARGEST, name) for name, value in limits.items())
    ):
        raise ValueError(f"{path}: expected ints {LARGEST._asdict()} or less under 'limits', got {limits!r:.200}")
    return Processor(**about), threads, Table(str(path), Limits(**limits), _products(path, content.get("products")))


def _all(kind: type, values: Any) -> bool:
    return all(type(value) is kind for value in values)


def _products(path: Path, content: Any) -> dict[tuple[str, str], tuple[Entry, ...]]:
    found: dict[tuple[str, str], tuple[Entry, ...]] = {}
    if not isinstance(content, dict) or not set(content) <= set(DTYPES):
        raise ValueError(f"{path}: expected an object with some of {', '.join(DTYPES)} under 'products'")
    for dtype, kinds in content.items():
        if not isinstance(kinds, dict) or not set(kinds) <= set(WAYS):
            raise ValueError(f"{path}: {dtype}: expected an object with some of {', '.join(WAYS)}, got {kinds!r:.200}")
        for kind, rows in kinds.items():
            if not isinstance(rows, list) or not rows or not all(_is_entry(kind, row) for row in rows):
                raise ValueError(
                    f"{path}: {dtype}: {kind}: expected [[members, units, width, [[0, way], [rows, way], ...]]], with "
                    f"ints of 1 or more that rise, and ways out of {', '.join(WAYS[kind])}; got {rows!r:.200}"
                )
            found[dtype, kind] = tuple(_entry(*row) for row in rows)
    return found


def _entry(members: int, units: int, width: int, ways: list[list[Any]]) -> Entry:
    return Entry(members, units, width, tuple((start, way) for start, way in ways))


def _is_entry(kind: str, row: Any) -> bool:
    if not isinstance(row, list) or len(row) != 4 or not _all(int, row[:3]) or min(row[:3]) < 1:
        return False
    ways = row[3]
    if not isinstance(ways, list) or not all(isinstance(way, list) and len(way) == 2 for way in ways):
        return False
    starts = [start for start, _ in ways]
    return (
        _all(int, starts)
        and starts[:1] == [0]
        and starts == sorted(set(starts))
        and all(way in WAYS[kind] for _, way in ways)
    )


def as_json(processor: Processor, threads: int, table: Table, about: dict[str, Any]) -> str:
    """The text of a table's file; ``about`` says what it was measured with."""
    head: dict[str, Any] = {"schema": SCHEMA, "kind": "products", "processor": processor._asdict(), "threads": threads}
    head |= {**about, "limits": table.limits._asdict()}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    dtypes = []
    for dtype in dict.fromkeys(dtype for dtype, _ in table.products):
        kinds = []
        for (own, kind), entries in table.products.items():
            if own == dtype:
                rows = ",\n    ".join(json.dumps(entry) for entry in entries)
                kinds.append(f"{json.dumps(kind)}: [\n    {rows}\n   ]")
        dtypes.append(f"{json.dumps(dtype)}: {{\n   {_joined(kinds, 3)}\n  }}")
    products = f'"products": {{\n  {_joined(dtypes, 2)}\n }}'
    return f"{{\n {_joined([*lines, products], 1)}\n}}\n"


def write_table(path: Path, processor: Processor, threads: int, table: Table, about: dict[str, Any]) -> None:
    """Write a table, whole or not at all."""
    text = as_json(processor, threads, table, about)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # of this call alone
    try:
        with part.open("x", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _joined(parts: Sequence[str], indent: int) -> str:
    return (",\n" + " " * indent).join(parts)

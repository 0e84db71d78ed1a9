"""Parquet files, read row group by row group."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ple_fast_encoder.tables import listed

from ..scalars import check_count, check_flag, check_seed

SUFFIX = ".parquet"


class ParquetTables:
    """The row groups of Parquet files, each a table of pyarrow: data of any size for ``fit`` and ``columns_from``.

    A row group is what has to fit into memory; ``pyarrow.parquet.write_table(..., row_group_size=100_000)`` sets it.

    Args:
        files: a file, a folder (all ``*.parquet`` in it and below, by name), or several of them.
        columns: names of those that are read; default all. Leave out none that a model's columns, labels or weights
            need.
        shuffle: whether each epoch has the row groups in another order, which ``seed`` and the epoch decide. Rows of
            different groups never change places, so a log in the order of time is better written shuffled.

    Raises:
        ImportError: pyarrow is missing.
        TypeError: an argument of another type.
        FileNotFoundError: a file or folder that is not there, or a folder without such files.
        ValueError: a file that is no Parquet file, or lacks a column.
    """

    def __init__(
        self,
        files: str | Path | Sequence[str | Path],
        *,
        columns: Sequence[str] | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        self.files = _files(files)
        self.columns = None if columns is None else [str(name) for name in listed("columns", columns)]
        self.shuffle, self.seed = check_flag("shuffle", shuffle), check_seed(seed)
        self.epoch = 0
        self._groups: list[tuple[Path, int]] = []
        self.rows = 0
        """Of all files."""
        for file in self.files:
            with _opened(file) as opened:
                there = opened.schema_arrow.names
                if missing := [name for name in self.columns or () if name not in there]:
                    raise ValueError(f"{file}: expected a column {missing[0]!r}, got {there[:60]}")
                self._groups += [(file, group) for group in range(opened.num_row_groups)]
                self.rows += opened.metadata.num_rows

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration; ``fit`` calls it."""
        self.epoch = check_count("epoch", epoch, least=0)

    def __len__(self) -> int:
        """The number of row groups."""
        return len(self._groups)

    def __iter__(self) -> Iterator[Any]:
        """Tables, ``pyarrow.Table``, one per row group."""
        order: Iterable[int] = range(len(self._groups))
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self._groups)).tolist()
        for place in order:
            file, group = self._groups[place]
            with _opened(file) as opened:
                table = opened.read_row_group(group, columns=self.columns)
            yield table


def _files(given: Any) -> list[Path]:
    """Every file, folders by what is in them."""
    several = [given] if isinstance(given, (str, os.PathLike)) else listed("files", given)
    found: list[Path] = []
    for entry in several:
        if not isinstance(entry, (str, os.PathLike)):
            raise TypeError(f"files: expected paths, got {type(entry).__name__}")
        path = Path(entry)
        if path.is_dir():
            inside = sorted(file for file in path.rglob(f"*{SUFFIX}") if file.is_file())
            if not inside:
                raise FileNotFoundError(f"{path}: expected files *{SUFFIX} in this folder, got none")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"{path}: expected a Parquet file or a folder of them, got neither")
    if not found:
        raise FileNotFoundError("files: expected at least one Parquet file, got none")
    return found


def _opened(file: Path) -> Any:
    try:
        import pyarrow.parquet as pq
        from pyarrow import ArrowInvalid
    except ImportError as error:
        raise ImportError("ParquetTables reads with pyarrow: pip install pyarrow") from error
    try:
        return pq.ParquetFile(file)
    except ArrowInvalid as error:
        raise ValueError(f"{file}: expected a Parquet file, got {error}") from error

"""Part of ``ple_fast.tune``: the file of one GPU, written after every launch. A later run adds to it."""

from __future__ import annotations

import datetime
import hashlib
import importlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .tune_library import Compared
from .tune_measure import Tuner
from .tune_splits import Split
from .tune_table import Entry, Measured

if TYPE_CHECKING:
    from ple_fast_kernels import Table

SAME = ("gpu", "architecture", "triton", "torch", "kernels")
"""What measurements of one file have in common."""


def kernels_digest() -> str:
    """Of the source of all kernels: other kernels take other times."""
    package = importlib.import_module("ple_fast_kernels")
    digest = hashlib.sha256()
    for path in sorted(Path(package.__path__[0]).glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def make(device: torch.device) -> dict[str, Any]:
    """What a device's measurements depend on."""
    return {
        "gpu": gpu_name(device),
        "triton": _version("triton"),
        "torch": torch.__version__,
        "kernels": kernels_digest(),
    }


def gpu_name(device: torch.device) -> str:
    """As PyTorch names it; the type of a device that is none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _microseconds(seconds: float) -> float:
    return float(f"{seconds * 1e6:.4g}")


def save(path: Path, table: Table, measured: Sequence[Entry], device: torch.device, about: dict[str, Any]) -> None:
    """Write a table with what it was measured with; processes that start later use it."""
    files = importlib.import_module("ple_fast_kernels._tile_files")
    tiles = importlib.import_module("ple_fast_kernels._tiles")
    tiled = [m for m in measured if isinstance(m, Measured)]
    plain = [m for m in measured if isinstance(m, Compared)]
    splits = [m for m in measured if isinstance(m, Split)]
    head = {
        **make(device),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        **about,
        "measured_us": [
            [m.kind, m.results, [[list(tile), _microseconds(s)] for tile, s in m.seconds.items()], m.launch]
            for m in tiled
        ],
        "kernels_library_us": [
            [m.kind, m.product, m.work, _microseconds(m.kernels), _microseconds(m.library), m.launch] for m in plain
        ],
        "weight_grad_parts_us": [
            [m.rows, m.programs, m.size, list(m.tile), [[n, _microseconds(s)] for n, s in m.seconds.items()], m.launch]
            for m in splits
        ],
    }
    files.write_table(path, table, tiles.architecture(device)[0], head)
    tiles.reload_tables()


def _entries(content: dict[str, Any]) -> list[Entry]:
    """What a file holds under ``measured_us``, ``kernels_library_us`` and ``weight_grad_parts_us``."""
    from ple_fast_kernels import Tile

    found: list[Entry] = [
        Measured(kind, results, {Tile(*tile): us / 1e6 for tile, us in seconds}, launch)
        for kind, results, seconds, launch in content["measured_us"]
    ]
    found += [
        Compared(kind, product, work, kernels / 1e6, library / 1e6, launch)
        for kind, product, work, kernels, library, launch in content["kernels_library_us"]
    ]
    found += [
        Split(rows, programs, size, Tile(*tile), {parts: us / 1e6 for parts, us in seconds}, launch)
        for rows, programs, size, tile, seconds, launch in content["weight_grad_parts_us"]
    ]
    return found


class Results:
    """All that is known of one GPU: what its file had, and what is added."""

    def __init__(self, path: Path, tuner: Tuner, say: Callable[[str], None]) -> None:
        self.path, self.tuner = path, tuner
        self.measured: list[Entry] = []
        self.trunks: list[dict[str, Any]] = []
        if not path.is_file():
            return
        about = {**make(tuner.device), "architecture": tuner.architecture}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if any(content.get(key) != about[key] for key in SAME):
                say(f"{path}: is of another GPU, version or kernels, and begins anew")
                return
            self.measured, self.trunks = _entries(content), list(content["trunks"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            say(f"{path}: cannot be read as a file of ple_fast.tune, and begins anew ({error})")
            self.measured, self.trunks = [], []
            return
        if self.measured:
            say(f"{path}: goes on from {len(self.measured)} measurements")

    @property
    def known(self) -> set[str]:
        """Launches that need no measurement."""
        return {entry.launch for entry in self.measured}

    def add(self, found: Sequence[Entry]) -> None:
        """Keep what was measured of a launch, and write all of it."""
        if found:
            self.measured += found
            self.write()

    def begin(self, trunk: dict[str, Any]) -> None:
        """Note a trunk of which something is measured."""
        if trunk not in self.trunks:
            self.trunks.append(trunk)

    def write(self) -> Table:
        """The table of all that is known, into the file."""
        table = self.tuner.table_of(self.measured)
        save(self.path, table, self.measured, self.tuner.device, {"trunks": self.trunks})
        return table

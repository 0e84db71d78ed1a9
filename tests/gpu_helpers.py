"""What the tests of the GPU benchmark share: the contestants that run here, and a tiny run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks import run_gpu
from benchmarks.contestants import CONTESTANTS, GPU_CONTESTANTS

CPU = torch.device("cpu")


INSTALLED = [name for name in GPU_CONTESTANTS if CONTESTANTS[name].available()]


EAGER = [name for name in INSTALLED if not CONTESTANTS[name].compiled]


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    """The result file of a tiny run."""
    run_gpu.main(["--device", "cpu", "--tiny", "--rounds", "2", "--skip-missing", "--results", str(folder), *arguments])
    (path,) = folder.glob("*/gpu.json")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content

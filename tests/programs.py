"""Runs programs in processes of their own, with this tree in front of whatever is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORT_PATH = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "kernels", ROOT / "encoder"))
"""Of this tree, as ``PYTHONPATH`` takes it."""


def run_python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``python arguments...`` on one thread, and what it wrote."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": IMPORT_PATH, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )


def torchrun(ranks: int, *program: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``torchrun`` with so many ranks on this machine; ``program``: a file and its arguments, or ``-c`` and code."""
    if program[0] == "-c":
        program = ("--no-python", sys.executable, *program)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    return run_python(*launcher, *program, cwd=cwd)

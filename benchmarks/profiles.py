"""Processors that we don't have, emulated: every library is told to use fewer instructions than there are.

What a compiler has made for one profile must not run in another, so each has a cache folder of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.environment import ROOT

PROFILES: dict[str, tuple[str, dict[str, str]]] = {
    "avx2": (
        "AVX2",
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    ),
    "default": (
        "DEFAULT",
        {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    ),
}
"""What PyTorch then calls its instructions, and the environment."""


def is_emulated(profile: str) -> bool:
    """Whether this process runs in a profile."""
    name, environment = PROFILES[profile]
    return torch.backends.cpu.get_cpu_capability() == name and all(
        os.environ.get(key) == value for key, value in environment.items()
    )


def run_emulated(profile: str, arguments: Sequence[str]) -> int:
    """``run.py`` with these arguments in a process of the profile; its exit status."""
    cache = Path(tempfile.gettempdir()) / f"ple_fast-inductor-{os.getuid()}-{profile}"
    environment = {**os.environ, **PROFILES[profile][1], "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), *arguments]
    return subprocess.run(command, env=environment, check=False).returncode

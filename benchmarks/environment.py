"""Where and with what something was measured."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from ple_fast.torch_backend.processor import processor_name
from ple_fast.torch_backend.table_in_use import table

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "torch-rechub", "deepctr-torch", "numpy", "triton")


def machine_name() -> str:
    """A directory name for this machine with the instructions that PyTorch uses of it, say
    ``cpu-2core-amd-epyc-family-25-model-17-avx512``."""
    model = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*", "", processor_name(), flags=re.IGNORECASE)
    slug = re.sub(r"[^a-z0-9]+", "-", f"{model} {torch.backends.cpu.get_cpu_capability()}".lower()).strip("-")
    return f"cpu-{os.cpu_count()}core-{slug}"


def products_in_use() -> str:
    """The table of products that the torch backend takes, by the name of its file."""
    source = table().source
    return Path(source).name if source.endswith(".json") else f"none: {source}"


COMMIT = "PLE_FAST_COMMIT"
"""Environment variable with the commit of a tree that travelled without git."""
DIRTY = "-dirty"


def _git(*arguments: str) -> str:
    if not (ROOT / ".git").exists():  # git would look for a repository in the folders above
        return "unknown"
    command = ("git", "-C", str(ROOT), *arguments)
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def code_version(named: str | None = None) -> tuple[str, bool]:
    """Commit, and whether there were changes that can change a figure and are not committed.

    Args:
        named: the commit where there is no git, as ``git describe --always --dirty`` says it; default the environment
            variable ``PLE_FAST_COMMIT``.
    """
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit != "unknown":
        code = ("ple_fast", "kernels", "encoder", "benchmarks/*.py", "soak")
        return commit, _git("status", "--porcelain", "--", *code) not in ("", "unknown")
    name = named or os.environ.get(COMMIT) or "unknown"
    return name.removesuffix(DIRTY), name.endswith(DIRTY)


def environment(commit: str | None = None) -> dict[str, Any]:
    """Machine, versions, threads, commit and date, for the head of a result file; ``commit``: see ``code_version``."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    name, is_changed = code_version(commit)
    return {
        "machine": machine_name(),
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "products": products_in_use(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": versions,
        "commit": name,
        "uncommitted_changes": is_changed,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def tiles_in_use(device: torch.device) -> str:
    """The tile tables that the kernels take: ``shipped``, or the digest of the file for this GPU."""
    if device.type != "cuda":
        return "shipped"
    from ple_fast_kernels._tile_files import tiles_path

    path = tiles_path(torch.cuda.get_device_name(device))
    if os.environ.get("PLE_FAST_TILES") == "" or not path.is_file():
        return "shipped"
    return f"{path.name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


def gpu_environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """``environment()`` with the GPU, its driver and its tiles."""
    about = environment(commit)
    if device.type != "cuda":
        return {**about, "gpu": None, "tiles": tiles_in_use(device)}
    properties = torch.cuda.get_device_properties(device)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    name = torch.cuda.get_device_name(device)
    return {
        **about,
        "machine": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "gpu": name,
        "gpu_memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": driver,
        "cuda": torch.version.cuda or torch.version.hip,
        "tiles": tiles_in_use(device),
    }

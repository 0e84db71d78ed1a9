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

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "torch-rechub", "deepctr-torch", "numpy", "triton")


def cpu_model() -> str:
    """The processor's name as the system prints it; family and model behind one that names a whole range."""
    info = Path("/proc/cpuinfo")
    found: dict[str, str] = {}
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    if re.search(r"\d", name) or "cpu family" not in found:
        return name
    return f"{name} (family {found['cpu family']}, model {found['model']})"


def machine_name() -> str:
    """A directory name for this machine, say ``cpu-2core-amd-epyc-family-25-model-17``."""
    model = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*", "", cpu_model(), flags=re.IGNORECASE)
    slug = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    return f"cpu-{os.cpu_count()}core-{slug}"


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
        code = ("ple_fast", "kernels", "benchmarks/*.py", "soak")
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
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
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

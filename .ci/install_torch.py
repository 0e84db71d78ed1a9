"""Installs torch into the environment of the Python that runs this: the build for CPUs where there is no GPU.

On Linux the wheel on PyPI brings CUDA, gigabytes of it; PyTorch's own index has one without. pip is asked first whether
the places it is configured with (a mirror, a folder of wheels) have the build for CPUs, then whether that index has;
where neither answers within seconds, PyPI's wheel is taken.

Usage: python .ci/install_torch.py VERSION [--dry-run]
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
GPU_DEVICES = ("/dev/nvidia0", "/dev/kfd")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
SECONDS = 5
"""That a server has to answer; a question is given up after four times as many."""


def has_gpu() -> bool:
    """Whether a driver of NVIDIA's or AMD's shows a device."""
    if any(Path(device).exists() for device in GPU_DEVICES):
        return True
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        done = subprocess.run([command, "-L"], capture_output=True, encoding="utf-8", errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and "GPU" in done.stdout


def offered(version: str, *options: str) -> bool:
    """Whether pip finds this version of torch, with the options of its own; nothing is fetched but lists."""
    question = [*PIP, "--timeout", str(SECONDS), "--retries", "0", "index", "versions", "torch", *options]
    try:
        done = subprocess.run(question, capture_output=True, encoding="utf-8", errors="replace", timeout=4 * SECONDS)
    except subprocess.TimeoutExpired:
        return False
    listed = re.search(r"^Available versions: (.*)$", done.stdout, flags=re.MULTILINE)
    return listed is not None and version in listed[1].split(", ")


def choose(version: str) -> tuple[list[str], str]:
    """Arguments for ``pip install``, and what they fetch, in words."""
    plain = [f"torch=={version}"]
    release, _, label = version.partition("+")
    if platform.system() != "Linux" or label not in ("", "cpu"):
        return plain, f"torch {version}"
    cuda = "about 3 GB to fetch and 6 GB on disk"
    if not label and has_gpu():
        return plain, f"torch {version} with CUDA, because there is a GPU: {cuda}"
    build = f"{release}+cpu"
    for options in ([], ["--index-url", CPU_INDEX]):
        if offered(build, *options):
            return [*options, f"torch=={build}"], f"torch {build}, without CUDA: about 200 MB to fetch"
    return plain, f"torch {version}: no {build} at {CPU_INDEX}, and the wheel on PyPI brings CUDA: {cuda}"


def main(arguments: list[str]) -> int:
    """Says what will be fetched, and lets pip fetch it; ``--dry-run`` only prints pip's command."""
    (version,) = (argument for argument in arguments if argument != "--dry-run")
    chosen, words = choose(version)
    print(words, flush=True)
    command = [*PIP, "install", *chosen]
    print(" ".join(command), flush=True)
    return 0 if "--dry-run" in arguments else subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

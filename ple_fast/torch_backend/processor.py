"""What of a processor decides which library computes a product fastest, as far as it can be asked."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch


class Processor(NamedTuple):
    """A class of processors. Vendor and family are empty where the system does not tell."""

    architecture: str
    """``x86_64``, ``arm64``, ..."""
    instructions: str
    """The widest that PyTorch uses: ``AVX512``, ``AVX2``, ``DEFAULT``, ``SVE256``, ..."""
    vendor: str = ""
    """``AuthenticAMD``, ``GenuineIntel``; of Arm the implementer's number."""
    family: str = ""
    """A generation: of an EPYC 25 (which runs AVX-512 in halves) or 26 (which does not)."""


@cache
def cpu_info() -> dict[str, str]:
    """The first processor of ``/proc/cpuinfo``, by the names there; nothing where there is no such file."""
    found: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return found
    for line in text.splitlines():
        key, separator, value = line.partition(":")
        if separator:
            found.setdefault(key.strip(), value.strip())
    return found


def this_processor() -> Processor:
    """The one that runs this process, with the instructions that PyTorch was told to use."""
    about = cpu_info()
    machine = platform.machine().lower()
    architecture = {"amd64": "x86_64", "aarch64": "arm64"}.get(machine, machine)
    vendor = about.get("vendor_id") or about.get("CPU implementer") or ""
    family = about.get("cpu family") or about.get("CPU part") or ""
    return Processor(architecture, torch.backends.cpu.get_cpu_capability(), vendor, family)


def processor_name() -> str:
    """As the system prints it; with family and model behind a name that stands for a whole range."""
    about = cpu_info()
    name = about.get("model name") or platform.processor() or platform.machine()
    if any(letter.isdigit() for letter in name) or "cpu family" not in about:
        return name
    return f"{name} (family {about['cpu family']}, model {about['model']})"

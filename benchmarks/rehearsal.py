"""The first run on a GPU, rehearsed on a CPU: ``python benchmarks/rehearsal.py ARGS`` is ``ple_fast.tune`` with these
arguments, on tiny trunks.

Kernels run under Triton's interpreter (``TRITON_INTERPRET=1``), and a sample is a call by the host's clock: this shows
that everything is there and works together, and measures nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

import torch

TRUNKS: dict[str, dict[str, Any]] = {
    "small": {"in_features": 6, "num_tasks": 2, "num_levels": 1, "expert_units": [4], "batch": 4},
    "medium": {"in_features": 6, "num_tasks": 2, "num_levels": 1, "expert_units": [5, 4], "batch": 4},
    "large": {"in_features": 6, "num_tasks": 2, "num_levels": 2, "expert_units": [4], "batch": 20},
}
"""In place of those of ``ple_fast.tune``."""


def prepare(device: torch.device) -> None:
    """Make the interpreter right where it is not, if this process interprets."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        from tests.interpreter import install

        install()


def host_sampler(call: Callable[[], object]) -> Callable[[], float]:
    """Seconds of one call on the host."""

    def sample() -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    return sample


def main(arguments: list[str] | None = None) -> None:
    prepare(torch.device("cpu"))
    from ple_fast import tune

    tune.TRUNKS.update(TRUNKS)
    given = sys.argv[1:] if arguments is None else arguments
    tune.main(["--rounds", "1", *given], prepare=host_sampler)


if __name__ == "__main__":
    main()

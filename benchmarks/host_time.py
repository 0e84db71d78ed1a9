"""The host's time of a trunk in kernels, without a GPU: ``python benchmarks/host_time.py [--json PATH]``.

Ours runs with Triton's real compiler and launcher on a driver whose launches do nothing (``tests/stub_driver``), in
bfloat16, as for sm_90; its tensors lie in the CPU's memory, and its results mean nothing. The plain loop is timed
beside it in the same process: PyTorch's operators on a CPU, of one row in float32, so that there is next to nothing to
compute; of no row at all they take nearly as long, which is shown. Memory that is freed stays with the process, as it
does with PyTorch's allocator on a GPU. Neither has the time of a GPU driver's own launch, which the loop would pay once
for each operator. One thread, and its own time of the processor: what else runs on the machine counts little. Needs
gcc and triton.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

import torch
from torch import nn

from benchmarks import result_files
from benchmarks.configs import HOST, HOST_ROUNDS, Mode, TrunkConfig
from benchmarks.contestants import build
from benchmarks.environment import ROOT, machine_name
from benchmarks.paired import Paired, host_clock, time_paired
from benchmarks.steps import call_of, inputs
from tests import stub_driver

ARCHITECTURE, PROCESSORS = 90, 132
CASES: dict[str, tuple[str, TrunkConfig]] = {
    "fast, 1 row": ("fast", HOST.at(1)),
    "fast, 1,024 rows": ("fast", HOST),
    "loop, 1 row": ("loop", HOST.at(1).with_dtype("float32")),
    "loop, 1 row, bfloat16": ("loop", HOST.at(1)),
    "loop, no row": ("loop", HOST.at(0).with_dtype("float32")),
}
"""By name: contestant and size."""
OURS, LOOP = "fast, 1 row", "loop, 1 row"
SAMPLE_S = 0.004
KEEPS_MEMORY = {name: str(1 << 30) for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")}
"""To glibc: ask the system for no memory that was freed before."""
MODES: tuple[Mode, ...] = ("train", "inference")
TARGETS = {"train": 0.5, "inference": 0.3}
"""Of the loop's host time, at most."""


def make_call(name: str, mode: Mode) -> Callable[[], object]:
    """A training step (gradients reset, forward, backward) or an inference call of one of ``CASES``."""
    contestant, config = CASES[name]
    trunk = build(contestant, config).train(mode == "train")
    x, grads = inputs(config, input_grad=mode == "train")
    if name == "fast, 1,024 rows":  # read as one tensor: to stack so many gradients is arithmetic, on a CPU
        trunk, grads = cast(nn.Module, trunk.trunk), [torch.stack(grads, dim=1)]
    return call_of(trunk, mode, x, grads)


def _why_no_triton(device: torch.device) -> None:
    """Nothing stands in the way."""


def _table_of(device: torch.device) -> tuple[str, int]:
    return f"sm_{ARCHITECTURE}", PROCESSORS


def measure(rounds: int) -> dict[Mode, Paired]:
    """All cases of either mode, interleaved. Only in a process whose driver is the stub."""
    import ple_fast.backend
    from ple_fast import use_backend
    from ple_fast_kernels import _tiles

    with (
        mock.patch.object(ple_fast.backend, "_why_no_triton", _why_no_triton),  # a mock would cost more than a launch
        mock.patch.object(_tiles, "table_of", _table_of),
        use_backend("triton"),
    ):
        return {
            mode: time_paired(
                {name: make_call(name, mode) for name in CASES},
                rounds=rounds,
                warmup=5,
                min_sample_s=SAMPLE_S,
                clock=partial(host_clock, read=time.process_time),
            )
            for mode in MODES
        }


def _entries(found: Mapping[Mode, Paired]) -> list[dict[str, Any]]:
    entries = []
    for mode, paired in found.items():
        times = {
            name: {
                "median_us": round(1e6 * paired.median(name), 1),
                "least_us": round(1e6 * min(paired.samples[name]), 1),
                "iqr_us": round(1e6 * paired.iqr(name), 1),
                "ratio_to_loop": paired.ratio(name, LOOP),
            }
            for name in CASES
        }
        entries.append({"mode": mode, **paired.about(), "contestants": times})
    return entries


def run(rounds: int = HOST_ROUNDS) -> list[dict[str, Any]]:
    """One entry per mode, measured by a process of its own: a driver is chosen once."""
    with tempfile.TemporaryDirectory() as folder:
        variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        variables |= stub_driver.build(Path(folder)) | KEEPS_MEMORY
        variables["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), str(ROOT / "encoder")))
        command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--inside", "--rounds", str(rounds)]
        done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    entries: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return entries


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=HOST_ROUNDS)
    parser.add_argument("--json", type=Path, help="default benchmarks/results/<machine>/host_time.json")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.inside:
        stub_driver.activate(ARCHITECTURE)
        print(json.dumps(_entries(measure(options.rounds))))
        return
    entries = run(options.rounds)
    for entry in entries:
        for name, own in entry["contestants"].items():
            times = f"{own['median_us']:.0f} us, least {own['least_us']:.0f}"
            print(f"{entry['mode']}, {name}: {times}; {own['ratio_to_loop']:.2f} of {LOOP}")
    path = options.json or ROOT / "benchmarks" / "results" / machine_name() / "host_time.json"
    result_files.write(path, "host_time", {"results": entries})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

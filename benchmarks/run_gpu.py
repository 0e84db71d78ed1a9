"""Measure on a GPU: ``python benchmarks/run_gpu.py [--sizes small,medium] [--only fast,loop] [--minutes 9]``.

Every contestant in every execution, eager and (where it can be captured) in a CUDA graph, beside ours: interleaved
rounds timed by CUDA events, after its results have been compared with the loop's. Beside the times: peak memory,
bytes saved for backward, and the ceilings of this GPU, measured in the same run. Writes ``<results>/<gpu>/gpu.json``
after every contestant in every mode; cases that a run does not measure stay in the file if they are of the same GPU,
versions, tiles and commit, so that several short runs make one file. What is wanted most is measured first
(``GPU_PHASES`` in ``configs.py``).
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

import torch

from benchmarks import configs, rehearsal, report
from benchmarks.configs import TrunkConfig
from benchmarks.contestants import BASELINE, GPU_CONTESTANTS, missing
from benchmarks.environment import ROOT, gpu_environment
from benchmarks.gpu_cases import Group, ceilings, in_order, saved_bytes
from benchmarks.gpu_steps import Capture, capture_of, matmul_precision
from benchmarks.paired import clock_of
from benchmarks.result_files import GpuResults, say

TINY = TrunkConfig("tiny", 96, 10, 2, units=(8, 4))
"""For ``--tiny``: shows that the code runs."""


def _chosen(parser: argparse.ArgumentParser, option: str, text: str, known: Sequence[str]) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{option}: expected names out of {', '.join(known)}, got {', '.join(unknown)}")
    return [name for name in known if name in names]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(configs.GPU_SIZES))
    parser.add_argument("--dtypes", default=",".join(configs.GPU_DTYPES))
    parser.add_argument("--modes", default=",".join(configs.GPU_MODES))
    parser.add_argument("--only", default=",".join(GPU_CONTESTANTS), help="contestants; fast and loop are always there")
    parser.add_argument("--rounds", type=int, default=configs.GPU_ROUNDS)
    parser.add_argument("--minutes", type=float, help="start no case after so many minutes")
    parser.add_argument("--continue", action="store_true", dest="goes_on", help="measure no case that the file has")
    parser.add_argument(
        "--skip-missing", action="store_true", help="go on without peers that are not installed, and say so"
    )
    parser.add_argument("--commit", help="of the code, where there is no git: as git describe --always --dirty says it")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a trunk of a few units: shows that the code runs")
    parser.add_argument("--results", type=Path, help="folder of the results; default benchmarks/results")
    return parser


def main(arguments: list[str] | None = None, *, capture: Capture | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    sizes = _chosen(parser, "--sizes", options.sizes, configs.GPU_SIZES)
    dtypes = _chosen(parser, "--dtypes", options.dtypes, list(configs.GPU_DTYPES))
    modes = _chosen(parser, "--modes", options.modes, configs.GPU_MODES)
    wanted = _chosen(parser, "--only", options.only, GPU_CONTESTANTS)
    names = [name for name in GPU_CONTESTANTS if name in wanted or name in ("fast", BASELINE)]
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/run_gpu.py measures on a GPU, and PyTorch sees none here (make bench: on the CPU)")
    if device.type == "cpu" and not options.tiny:
        raise SystemExit("--device cpu is for --tiny: it shows that the code runs, and measures nothing")
    absent = missing(names)
    if absent and not options.skip_missing:
        raise SystemExit(
            f"{', '.join(absent)}: not installed; pip install 'ple-fast[bench]', choose by --only, or --skip-missing"
        )
    rehearsal.prepare(device)
    about = gpu_environment(device, options.commit)
    path = (options.results or ROOT / ("out/benchmarks" if options.tiny else "benchmarks/results")) / about["machine"]
    results = GpuResults(path / "gpu.json", about)
    end = time.monotonic() + 60 * options.minutes if options.minutes is not None else float("inf")
    run = _Run(results, device, options, capture or capture_of(device), end)
    run.all([TINY.name] if options.tiny else sizes, dtypes, modes, names)
    if results.content["results"]:
        out = path / "report" if options.tiny else ROOT / "out" / "gpu"
        report.main([str(path), "--out", str(out)])
    for case in run.left:
        say(f"time is over: {case} is not measured")
    if run.wrong:
        raise SystemExit("these are wrong, or ours failed: " + "; ".join(run.wrong))


class _Run:
    """Case after case, until the time is over."""

    def __init__(
        self, results: GpuResults, device: torch.device, options: argparse.Namespace, capture: Capture, end: float
    ) -> None:
        self.results, self.device, self.options, self.capture, self.end = results, device, options, capture, end
        self.clock = clock_of(device)
        self.wrong: list[str] = []
        self.left: list[str] = []

    def all(self, sizes: Sequence[str], dtypes: Sequence[str], modes: Sequence[str], names: Sequence[str]) -> None:
        for size, dtype, mode, chosen in in_order(sizes, dtypes, modes, names):
            if self.options.goes_on:
                chosen = [name for name in chosen if not self.results.has_contestant(size, dtype, mode, name)]
            if not chosen:
                continue
            if time.monotonic() > self.end:
                self.left += [f"{name} at {size} in {dtype}, {mode}," for name in chosen]
                continue
            element, precision = configs.GPU_DTYPES[dtype]
            config = (TINY if size == TINY.name else configs.SIZES[size]).with_dtype(element)
            with matmul_precision(precision):
                self._group(config, dtype, mode, chosen)
            gc.collect()

    def _group(self, config: TrunkConfig, dtype: str, mode: Any, names: Sequence[str]) -> None:
        """Contestants of one size, dtype and mode."""
        tiny, results = self.options.tiny, self.results
        if not results.has("ceilings", size=config.name, dtype=dtype):
            say(f"{config.name}, {dtype}: ceilings")
            found = ceilings(config, self.device, self.clock, 1 << 16 if tiny else configs.COPY_BYTES)
            results.add("ceilings", {"size": config.name, "dtype": dtype, **found})
        say(f"{config.name}, {dtype}, {mode}")
        group = Group(
            config, mode, self.device, clock=self.clock, capture=self.capture, rounds=self.options.rounds,
            min_sample_s=1e-4 if tiny else configs.MIN_SAMPLE_S,
        )  # fmt: skip
        for name in names:
            if time.monotonic() > self.end:
                self.left.append(f"{name} at {config.name} in {dtype}, {mode},")
                continue
            rows = group.measure(name)
            results.add_case(group.about(dtype), rows, group.failed, name)
            about = {"size": config.name, "contestant": name}
            if mode == "train" and rows and not results.has("saved", **about, dtype=dtype):
                size = saved_bytes(config, name, self.device)
                if size is not None:
                    results.add("saved", {**about, "saved_bytes": size, "dtype": dtype})
            say(f"wrote {results.path}")
        self.wrong += [f"{key} at {config.name} in {dtype}, {mode}: {group.failed[key]}" for key in group.wrong]


if __name__ == "__main__":
    main()

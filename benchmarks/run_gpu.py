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
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

import torch

from benchmarks import configs, rehearsal, report
from benchmarks.configs import TrunkConfig
from benchmarks.contestants import BASELINE, CONTESTANTS, GPU_CONTESTANTS
from benchmarks.environment import ROOT, environment
from benchmarks.gpu_cases import Group, ceilings, in_order, saved_bytes
from benchmarks.gpu_steps import Capture, cpu_clock, cuda_clock, cuda_graph, matmul_precision, not_captured
from benchmarks.result_files import write
from benchmarks.run import say

TINY = TrunkConfig("tiny", 96, 10, 2, units=(8, 4))
"""For ``--tiny``: shows that the code runs."""
SAME = ("gpu", "driver", "packages", "commit", "uncommitted_changes", "tiles")
"""What cases of one file have in common."""


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


class Results:
    """The file of a GPU: what it had, if it is of the same make, and what this run adds."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.content: dict[str, list[dict[str, Any]]] = {"results": [], "saved": [], "ceilings": []}
        if not path.is_file():
            return
        old = json.loads(path.read_text(encoding="utf-8"))
        if about["uncommitted_changes"] or any(old["environment"].get(key) != about.get(key) for key in SAME):
            say(f"{path}: its cases are of another GPU, version, table of tiles or code, and are dropped")
            return
        self.content = {part: old.get(part, []) for part in self.content}

    def _find(self, part: str, **named: str) -> dict[str, Any] | None:
        return next((row for row in self.content[part] if all(row[key] == named[key] for key in named)), None)

    def has(self, size: str, dtype: str, mode: str, name: str) -> bool:
        """Whether a contestant was measured, or why it could not be is known."""
        case = self._find("results", size=size, dtype=dtype, mode=mode)
        return case is not None and any(
            key.partition("/")[0] == name for part in ("contestants", "failed") for key in case[part]
        )

    def has_ceilings(self, size: str, dtype: str) -> bool:
        return self._find("ceilings", size=size, dtype=dtype) is not None

    def has_saved(self, size: str, dtype: str, name: str) -> bool:
        return self._find("saved", size=size, dtype=dtype, contestant=name) is not None

    def add(self, part: str, row: dict[str, Any]) -> None:
        self.content[part].append(row)
        self.write()

    def add_case(
        self, about: dict[str, Any], rows: dict[str, dict[str, Any]], failed: dict[str, str], name: str
    ) -> None:
        """The rows of one contestant, in place of those that were there."""
        case = self._find("results", **{key: about[key] for key in ("size", "dtype", "mode")})
        if case is None:
            case = {**about, "contestants": {}, "failed": {}}
            self.content["results"].append(case)
        for part in ("contestants", "failed"):
            case[part] = {key: row for key, row in case[part].items() if key.partition("/")[0] != name}
        case["contestants"] |= rows
        case["failed"] |= {key: why for key, why in failed.items() if key.partition("/")[0] == name}
        self.write()

    def write(self) -> None:
        write(self.path, "gpu", self.content, self.about)


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
    missing = sorted({str(CONTESTANTS[n].requires) for n in names if not CONTESTANTS[n].available()})
    if missing and not options.skip_missing:
        raise SystemExit(
            f"{', '.join(missing)}: not installed; pip install 'ple-fast[bench]', choose by --only, or --skip-missing"
        )
    rehearsal.prepare(device)
    about = {**gpu_environment(device, options.commit)}
    path = (options.results or ROOT / ("out/benchmarks" if options.tiny else "benchmarks/results")) / about["machine"]
    results = Results(path / "gpu.json", about)
    end = time.monotonic() + 60 * options.minutes if options.minutes is not None else float("inf")
    run = _Run(results, device, options, capture or (cuda_graph if device.type == "cuda" else not_captured), end)
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
        self, results: Results, device: torch.device, options: argparse.Namespace, capture: Capture, end: float
    ) -> None:
        self.results, self.device, self.options, self.capture, self.end = results, device, options, capture, end
        self.clock = cuda_clock if device.type == "cuda" else cpu_clock
        self.wrong: list[str] = []
        self.left: list[str] = []

    def all(self, sizes: Sequence[str], dtypes: Sequence[str], modes: Sequence[str], names: Sequence[str]) -> None:
        for size, dtype, mode, chosen in in_order(sizes, dtypes, modes, names):
            if self.options.goes_on:
                chosen = [name for name in chosen if not self.results.has(size, dtype, mode, name)]
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
        if not results.has_ceilings(config.name, dtype):
            say(f"{config.name}, {dtype}: ceilings")
            found = ceilings(config, self.device, self.clock, 1 << 16 if tiny else configs.COPY_BYTES)
            rounded = {key: float(f"{value:.4g}") for key, value in found.items()}
            results.add("ceilings", {"size": config.name, "dtype": dtype, **rounded})
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
            if mode == "train" and rows and not results.has_saved(config.name, dtype, name):
                size = saved_bytes(config, name, self.device)
                if size is not None:
                    results.add("saved", {"size": config.name, "contestant": name, "saved_bytes": size, "dtype": dtype})
            say(f"wrote {results.path}")
        self.wrong += [f"{key} at {config.name} in {dtype}, {mode}: {group.failed[key]}" for key in group.wrong]


if __name__ == "__main__":
    main()

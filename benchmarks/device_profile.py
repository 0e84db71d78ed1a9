"""Where a step's time goes on a GPU: ``python benchmarks/device_profile.py --out F [--minutes 3]``.

For every size, training and inference: each kernel's calls and time by PyTorch's profiler, and the whole step by events
beside it, eager and in a CUDA graph. Then, where Nsight Compute is on the PATH, its counters of every kernel of a step.
``F/profile.json`` is written after each case.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import configs, rehearsal
from benchmarks.analytic import work
from benchmarks.device_checks import TINY, config_of, synchronize
from benchmarks.environment import gpu_environment
from benchmarks.gpu_steps import Runner, capture_of
from benchmarks.paired import clock_of
from benchmarks.result_files import say, write

SIZES = ("medium", "large", "small")
MODES: tuple[configs.Mode, ...] = ("train", "inference")
STEPS = 5
"""That the profiler records, after as many that it does not; also samples of a time, and steps of a sample."""
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats")
"""Of Nsight Compute."""


def kernels_of(step: Callable[[], object], device: torch.device, steps: int) -> list[dict[str, Any]]:
    """Kernels of a step, the longest first: calls, and microseconds in all; on a CPU operators, its own time."""
    is_cuda = device.type == "cuda"
    for _ in range(steps):
        step()
    synchronize(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        synchronize(device)
    found: dict[str, list[float]] = {}
    for event in profiler.key_averages():
        taken = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        is_kernel = not is_cuda or str(event.device_type).endswith("CUDA")
        if taken > 0 and is_kernel:
            row = found.setdefault(event.key, [0.0, 0.0])
            row[0] += event.count / steps
            row[1] += taken / steps
    rows = [{"name": name[:160], "calls": calls, "us": round(us, 2)} for name, (calls, us) in found.items()]
    return sorted(rows, key=lambda row: -float(str(row["us"])))


def case(size: str, mode: configs.Mode, device: torch.device) -> dict[str, Any]:
    """Kernels and times of one step of ours."""
    config = config_of(size)
    runner = Runner.of("fast", config, mode, device)
    clock, steps = clock_of(device), STEPS if device.type == "cuda" else 1
    rows = kernels_of(runner.step, device, steps)
    eager = min(clock(runner.step, steps) for _ in range(steps))
    replay, _ = capture_of(device)(runner)
    graph = min(clock(replay, steps) for _ in range(steps))
    amount = work(config, mode)
    return {
        "size": size, "mode": mode, "batch": config.batch, "dtype": config.dtype, "flops": amount.flops,
        "least_bytes": amount.least_bytes, "eager_us": round(eager * 1e6, 1), "graph_us": round(graph * 1e6, 1),
        "kernels_us": round(sum(float(row["us"]) for row in rows), 1), "kernels": rows[:60],
    }  # fmt: skip


def counted_step(size: str, device: torch.device) -> None:
    """A step between the marks from which to which Nsight Compute counts."""
    runner = Runner.of("fast", config_of(size), "train", device)
    for _ in range(3):
        runner.step()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.cudart().cudaProfilerStart()
    runner.step()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.cudart().cudaProfilerStop()


def counters(size: str, device: torch.device, path: Path, seconds: float) -> str:
    """Nsight Compute's counters of a training step, into a CSV file; what came of it."""
    program = shutil.which("ncu")
    if program is None:
        return "not run: ncu is not on the PATH"
    command = [
        program, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw", "--log-file",
        str(path), *(part for section in SECTIONS for part in ("--section", section)), sys.executable, __file__,
        "--counted-step", size, "--device", str(device),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds, env=os.environ)
    except subprocess.TimeoutExpired:
        return f"not through after {seconds:.0f} s"
    if done.returncode:
        return f"exit code {done.returncode}: {(done.stdout + done.stderr)[-1000:]}"
    return f"wrote {path.name}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of profile.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=3.0, help="start no case after so many minutes")
    parser.add_argument("--tiny", action="store_true", help="a trunk of a few units: shows that the code runs")
    parser.add_argument("--counted-step", metavar="SIZE", help="in this process, for Nsight Compute")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    rehearsal.prepare(device)
    if options.counted_step:
        counted_step(options.counted_step, device)
        return
    if options.out is None:
        parser.error("expected --out")
    end = time.monotonic() + 60 * options.minutes
    content: dict[str, list[dict[str, Any]]] = {"results": [], "counters": []}
    about = gpu_environment(device)
    options.out.mkdir(parents=True, exist_ok=True)

    def add(part: str, row: dict[str, Any]) -> None:
        content[part].append(row)
        write(options.out / "profile.json", "profile", content, about)

    wrong: list[str] = []
    for size in (TINY.name,) if options.tiny else SIZES:
        for mode in MODES:
            if time.monotonic() > end:
                say(f"time is over: {size}, {mode}, is not profiled")
                continue
            try:
                row = case(size, mode, device)
            except RuntimeError as error:  # of the profiler, or out of memory
                wrong.append(f"{size}, {mode}: {' '.join(str(error).split())[:300]}")
                say(wrong[-1])
                continue
            add("results", row)
            say(f"{size}, {mode}: eager {row['eager_us']} us, graph {row['graph_us']}, kernels {row['kernels_us']}")
            for kernel in row["kernels"][:12]:
                say(f"  {kernel['us']:10.1f} us  {kernel['calls']:5.1f} x  {kernel['name'][:90]}")
    for size in (TINY.name,) if options.tiny else SIZES[:2]:
        left = end - time.monotonic()
        if left < 5:
            say(f"time is over: counters of {size} are not read")
            continue
        add("counters", {"size": size, "outcome": counters(size, device, options.out / f"ncu-{size}.csv", left)})
        say(f"counters of {size}: {content['counters'][-1]['outcome']}")
    if wrong:
        raise SystemExit("; ".join(wrong))


if __name__ == "__main__":
    main()

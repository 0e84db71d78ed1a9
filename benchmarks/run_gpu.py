"""Measure on a GPU: ``python benchmarks/run_gpu.py [--sizes small,medium] [--only fast,loop] [--minutes 9]``.

Every contestant in every execution, eager and (where it can be captured) in a CUDA graph, against every other:
interleaved rounds timed by CUDA events, after its results have been compared with the loop's. Beside the times: peak
memory, bytes saved for backward, and the ceilings of this GPU, measured in the same run. Writes
``<results>/<gpu>/gpu.json``; cases that a run does not measure stay in the file if they are of the same GPU, versions
and commit, so that several short runs make one file.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

import torch
from torch import Tensor, nn

from benchmarks import configs, report
from benchmarks.analytic import work
from benchmarks.configs import Mode, TrunkConfig
from benchmarks.contestants import BASELINE, CONTESTANTS, GPU_CONTESTANTS, OURS, BareGemm, Norm, baseline, build
from benchmarks.environment import ROOT, environment
from benchmarks.paired import Clock, time_paired
from benchmarks.result_files import write
from benchmarks.run import say
from benchmarks.saved_bytes import cost
from benchmarks.steps import WrongResultError, inputs, relative

TINY = TrunkConfig("tiny", 96, 10, 2, units=(8, 4))
"""For ``--tiny``: shows that the code runs."""
CEILING_ERROR = {"bfloat16": 0.25, "float32": 2e-2}
"""What the loop itself may differ from the loop in float32, relative (Frobenius); by dtype of the trunk."""
SLACK = 1e-4
NORM_SLACK = {"bfloat16": 2**-8, "float32": SLACK}
"""What may come on top, relative. Parameter gradients are one number, their norm, and the loop's is exact by luck at
times: in bfloat16 that number may be off by one rounding."""
SELF_GRAPHED = "loop_max_autotune"
"""Has CUDA graphs of its own."""


# What runs ------------------------------------------------------------------------------------------


@dataclass
class Runner:
    """A contestant in a mode on a device, with inputs that stay where they are."""

    name: str
    trunk: nn.Module
    mode: Mode
    x: Tensor
    grads: list[Tensor]

    @classmethod
    def of(cls, name: str, config: TrunkConfig, mode: Mode, device: torch.device) -> Runner:
        """A contestant of the baseline's weights."""
        x, grads = inputs(config, input_grad=mode != "inference", device=device)
        return cls(name, build(name, config, device).train(mode != "inference"), mode, x, grads)

    def step(self) -> list[Tensor]:
        """One call: outputs; in training the gradients are in the leaves."""
        if self.name == SELF_GRAPHED:
            torch.compiler.cudagraph_mark_step_begin()
        if self.mode == "inference":
            with torch.inference_mode():
                return list(self.trunk(self.x))
        if self.mode == "forward":
            return list(self.trunk(self.x))
        for leaf in (*self.trunk.parameters(), self.x):
            leaf.grad = None
        outputs = list(self.trunk(self.x))
        torch.autograd.backward(outputs, self.grads)
        return outputs

    def results(self, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """What is compared, copied: outputs and, after a training step, gradients."""
        found = {"outputs": torch.stack([y.detach() for y in outputs]).float()}
        if self.mode == "train":
            assert self.x.grad is not None
            found["input gradient"] = self.x.grad.float()
            norms = [p.grad.double().norm() for p in self.trunk.parameters() if p.grad is not None]
            found["parameter gradients"] = torch.stack(norms).norm()
        return found


Capture = Callable[[Runner], tuple[Callable[[], object], list[Tensor]]]


def cuda_graph(runner: Runner) -> tuple[Callable[[], object], list[Tensor]]:
    """A step in a CUDA graph: what replays it, and the outputs that a replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            runner.step()
    torch.cuda.current_stream().wait_stream(stream)
    for leaf in (*runner.trunk.parameters(), runner.x):
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = runner.step()
    return graph.replay, outputs


def not_captured(runner: Runner) -> tuple[Callable[[], object], list[Tensor]]:
    """Stands in for ``cuda_graph`` where there is no GPU: the step itself."""
    outputs = runner.step()

    def replay() -> None:
        for kept, fresh in zip(outputs, runner.step(), strict=True):
            kept.detach().copy_(fresh.detach())

    return replay, outputs


def cuda_clock(call: Callable[[], object], repeats: int) -> float:
    """Seconds per call between two CUDA events."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3 / repeats


def cpu_clock(call: Callable[[], object], repeats: int) -> float:
    """Seconds per call on the host, for ``--device cpu``."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


# Whether it is right --------------------------------------------------------------------------------


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Precision of float32 products within a block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Oracles:
    """Results of the loop in float32 without TF32, and what the loop in the trunk's dtype differs from them."""

    def __init__(self, config: TrunkConfig, mode: Mode, device: torch.device) -> None:
        self.config, self.mode, self.device = config, mode, device
        self._found: dict[tuple[Norm | None, bool], tuple[dict[str, Tensor], dict[str, float]]] = {}

    def of(self, name: str) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The exact results for a contestant, and the distance of the loop from them."""
        norm, gate_bias = CONTESTANTS[name].norm, CONTESTANTS[name].gate_bias
        if (norm, gate_bias) not in self._found:
            results: list[dict[str, Tensor]] = []
            learns = self.mode != "inference"
            for dtype in (torch.float32, self.config.torch_dtype):
                loop = baseline(self.config, norm=norm, gate_bias=gate_bias).to(self.device, dtype).train(learns)
                x, grads = inputs(self.config, input_grad=False, device=self.device)
                x = x.to(dtype).requires_grad_(learns)
                runner = Runner(BASELINE, loop, self.mode, x, [g.to(dtype) for g in grads])
                with matmul_precision(torch.get_float32_matmul_precision() if results else "highest"):
                    results.append(runner.results(runner.step()))
            oracle, low = results
            self._found[norm, gate_bias] = oracle, {key: relative(low[key], oracle[key]) for key in oracle}
        return self._found[norm, gate_bias]

    def check(self, name: str, execution: str, found: dict[str, Tensor]) -> None:
        """Refuse a contestant whose results differ by more than twice what the loop in its dtype does; others' by four
        times that."""
        oracle, loop = self.of(name)
        for key, value in found.items():
            if not loop[key] <= CEILING_ERROR[self.config.dtype]:
                raise WrongResultError(f"the loop itself is off by {loop[key]:.1e} in {self.config.dtype}: {key}")
            error = relative(value, oracle[key])
            times = 2 if name in OURS else 4  # other libraries mix experts in low precision
            slack = NORM_SLACK[self.config.dtype] if key == "parameter gradients" else SLACK
            if not error <= times * loop[key] + slack:
                raise WrongResultError(
                    f"{name}, {execution}, at {self.config.name} in {self.config.dtype}, {self.mode}: {key} differ by "
                    f"{error:.1e}, the loop by {loop[key]:.1e}"
                )


# What is measured beside ----------------------------------------------------------------------------


def ceilings(config: TrunkConfig, device: torch.device, clock: Clock, copy_bytes: int) -> dict[str, float]:
    """Bytes per second of a copy on the device, and FLOPs per second of the fastest ``torch.mm`` among the products of
    this trunk's own training step."""
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(clock(partial(target.copy_, source), 5) for _ in range(5))
    found = {"copy_bytes_per_s": 2 * copy_bytes / best, "mm_flops_per_s": 0.0}
    shapes: dict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]] = {}
    for a, b, out in BareGemm(config, device=device).products("train"):
        shapes.setdefault((a.shape, a.stride(), b.shape, b.stride()), (a, b, out))
    for a, b, out in shapes.values():
        best = min(clock(partial(torch.mm, a, b, out=out), 5) for _ in range(5))
        flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
        found["mm_flops_per_s"] = max(found["mm_flops_per_s"], flops / best)
    return found


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Most memory that one call holds beyond what is there before it; None without a GPU. Of a CUDA graph that call is
    its capture: a replay allocates nothing."""
    if device.type != "cuda":
        run()
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before


def saved(config: TrunkConfig, names: Sequence[str], device: torch.device) -> list[dict[str, Any]]:
    """Bytes saved for backward by every contestant that is not compiled, in this dtype."""
    rows = []
    for name in names:
        if CONTESTANTS[name].compiled or not CONTESTANTS[name].supports(config):
            continue
        measured = cost(build(name, config, device), config, device=device)
        rows.append({"size": config.name, "contestant": name, "saved_bytes": measured.saved_bytes})
        gc.collect()
    return rows


# One case -------------------------------------------------------------------------------------------


def _backend(name: str, device: torch.device) -> str:
    if name not in OURS:
        return "torch"
    from ple_fast import last_backend

    choice = last_backend()
    assert choice is not None
    if device.type == "cuda" and choice.name != "triton":
        raise SystemExit(f"ours ran on the backend {choice.name!r} ({choice.reason}): there is nothing to measure")
    return choice.name


ROOM = 1.2
"""Free memory that must be left beside all graphs, in units of the most that an eager call takes."""


def free_bytes(device: torch.device) -> float:
    """Memory of the device that nothing holds."""
    if device.type != "cuda":
        return float("inf")
    gc.collect()
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info(device)[0])


def _prepared(
    name: str,
    execution: str,
    config: TrunkConfig,
    mode: Mode,
    device: torch.device,
    oracles: Oracles,
    capture: Capture,
) -> tuple[Callable[[], object], dict[str, Any]]:
    """A contestant, warm and compared with the loop: its call, and its backend and memory."""
    runner = Runner.of(name, config, mode, device)
    for _ in range(3 if CONTESTANTS[name].compiled else 1):
        outputs = runner.step()
    row: dict[str, Any] = {"backend": _backend(name, device)}
    if execution == "eager":
        oracles.check(name, execution, runner.results(outputs))
        del outputs
        # What max-autotune holds lies in graphs of its own, which were made above.
        row["peak_bytes"] = peak_bytes(runner.step, device) if name != SELF_GRAPHED else None
        return runner.step, row
    del outputs
    captured: list[Any] = []
    row["peak_bytes"] = peak_bytes(lambda: captured.extend(capture(runner)), device)
    run, outputs = captured
    run()
    oracles.check(name, execution, runner.results(outputs))
    return run, row


def measure(
    config: TrunkConfig,
    dtype: str,
    mode: Mode,
    names: Sequence[str],
    device: torch.device,
    *,
    clock: Clock,
    capture: Capture,
    rounds: int,
    min_sample_s: float = configs.MIN_SAMPLE_S,
) -> dict[str, Any]:
    """Every contestant in every execution at one size, dtype and mode: times, ratios, memory, and who failed."""
    torch._dynamo.reset()
    oracles = Oracles(config, mode, device)
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], object]] = {}
    chosen = [name for name in names if mode in CONTESTANTS[name].modes]
    failed = {name: "it gives every level the same widths" for name in chosen if not CONTESTANTS[name].supports(config)}
    chosen = [name for name in chosen if name not in failed]
    for name in chosen:  # while there is nothing else in memory
        oracles.of(name)
    most = 0
    for execution in ("eager", "graph"):  # graphs keep their memory, so they come last, while there is room
        for name in chosen:
            if execution == "graph" and name == SELF_GRAPHED:
                continue
            key = name if execution == "eager" else f"{name}/graph"
            try:
                run, row = _prepared(name, execution, config, mode, device, oracles, capture)
            except RuntimeError as error:  # of a compiler, or out of memory: written down, unless it is ours
                if name in (*OURS, BASELINE):
                    raise
                failed[key] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                say(f"  {key}: {failed[key]}")
                continue
            if execution == "eager":
                most = max(most, row["peak_bytes"] or 0)
            elif free_bytes(device) < ROOM * most and name != "fast":
                failed[key] = "no memory left beside the others"
                continue
            calls[key], rows[key] = run, row
    paired = time_paired(calls, rounds=rounds, clock=clock, min_sample_s=min_sample_s)
    for key, row in rows.items():
        row["median_ms"] = float(f"{paired.median(key) * 1e3:.4g}")
        row["iqr_ms"] = float(f"{paired.iqr(key) * 1e3:.4g}")
        for ours in ("fast", "fast/graph"):
            if ours in rows:
                row[f"ratio_to_{ours}"] = round(paired.ratio(key, ours), 4)
    for key in sorted(rows, key=lambda k: float(rows[k]["median_ms"])):
        say(f"  {key:24s} {rows[key]['median_ms']:10.4g} ms")
    amount = work(config, mode)
    return {
        "size": config.name, "dtype": dtype, "mode": mode, "batch": config.batch, "rounds": rounds,
        "flops": amount.flops, "product_flops": amount.product_flops, "least_bytes": amount.least_bytes,
        "contestants": rows, "failed": failed,
    }  # fmt: skip


# The run --------------------------------------------------------------------------------------------


def gpu_environment(device: torch.device) -> dict[str, Any]:
    """``environment()`` with the GPU and its driver."""
    about = environment()
    if device.type != "cuda":
        return {**about, "gpu": None}
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
    }


def merged(path: Path, content: dict[str, list[dict[str, Any]]], about: dict[str, Any]) -> dict[str, Any]:
    """``content`` with the rows of the file that this run did not measure, if they are of the same make."""
    if not path.is_file():
        return content
    old = json.loads(path.read_text(encoding="utf-8"))

    def case(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in ("size", "dtype", "mode", "contestant"))

    new = {part: {case(row) for row in rows} for part, rows in content.items()}
    rest = {part: [row for row in old.get(part, []) if case(row) not in new[part]] for part in content}
    same = ("gpu", "driver", "packages", "commit", "uncommitted_changes")
    if any(old["environment"].get(key) != about.get(key) for key in same) or about["uncommitted_changes"]:
        if any(rest.values()):
            say(f"{path}: its other cases are of another GPU, version or code, and are dropped")
        return content
    return {part: rest[part] + rows for part, rows in content.items()}


def _chosen(parser: argparse.ArgumentParser, option: str, text: str, known: Sequence[str]) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{option}: expected names out of {', '.join(known)}, got {', '.join(unknown)}")
    return names


def main(arguments: list[str] | None = None, *, capture: Capture | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(configs.GPU_SIZES))
    parser.add_argument("--dtypes", default=",".join(configs.GPU_DTYPES))
    parser.add_argument("--modes", default="train,inference,forward")
    parser.add_argument("--only", default=",".join(GPU_CONTESTANTS), help="contestants; fast and loop are always there")
    parser.add_argument("--rounds", type=int, default=configs.GPU_ROUNDS)
    parser.add_argument("--minutes", type=float, help="start no case after so many minutes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a trunk of a few units: shows that the code runs")
    parser.add_argument("--results", type=Path, help="folder of the results; default benchmarks/results")
    options = parser.parse_args(arguments)
    sizes = _chosen(parser, "--sizes", options.sizes, configs.GPU_SIZES)
    dtypes = _chosen(parser, "--dtypes", options.dtypes, list(configs.GPU_DTYPES))
    modes = _chosen(parser, "--modes", options.modes, configs.MODES)
    wanted = _chosen(parser, "--only", options.only, GPU_CONTESTANTS)
    names = [name for name in GPU_CONTESTANTS if name in wanted or name in ("fast", BASELINE)]
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/run_gpu.py measures on a GPU, and PyTorch sees none here (make bench: on the CPU)")
    if device.type == "cpu" and not options.tiny:
        raise SystemExit("--device cpu is for --tiny: it shows that the code runs, and measures nothing")
    missing = sorted({str(CONTESTANTS[n].requires) for n in names if not CONTESTANTS[n].available()})
    if missing and not options.tiny:
        raise SystemExit(f"{', '.join(missing)}: not installed; pip install 'ple-fast[bench]', or choose by --only")
    names = [name for name in names if CONTESTANTS[name].available()]
    chosen = [TINY] if options.tiny else [configs.SIZES[size] for size in sizes]
    clock = cuda_clock if device.type == "cuda" else cpu_clock
    catch = capture or (cuda_graph if device.type == "cuda" else not_captured)
    about = gpu_environment(device)
    path = (options.results or ROOT / ("out/benchmarks" if options.tiny else "benchmarks/results")) / about["machine"]
    path /= "gpu.json"
    end = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    content: dict[str, list[dict[str, Any]]] = {"results": [], "saved": [], "ceilings": []}
    for size in chosen:
        for dtype in dtypes:
            if time.monotonic() > end:
                say(f"{options.minutes} minutes are over: {size.name} in {dtype} is not measured")
                continue
            name, precision = configs.GPU_DTYPES[dtype]
            config = size.with_dtype(name)
            with matmul_precision(precision):
                _size(content, config, dtype, modes, names, device, clock, catch, options, end)
            write(path, "gpu", merged(path, content, about), about)
            say(f"wrote {path}")
    if content["results"]:
        out = path.parent / "report" if options.tiny else ROOT / "out" / "gpu"
        report.main([str(path.parent), "--out", str(out)])


def _size(
    content: dict[str, list[dict[str, Any]]],
    config: TrunkConfig,
    dtype: str,
    modes: Sequence[str],
    names: Sequence[str],
    device: torch.device,
    clock: Clock,
    capture: Capture,
    options: argparse.Namespace,
    end: float,
) -> None:
    """Measure one size in one dtype, and add to ``content``."""
    tiny = options.tiny
    say(f"{config.name}, {dtype}: ceilings, saved bytes")
    found = ceilings(config, device, clock, 1 << 16 if tiny else configs.COPY_BYTES)
    rounded = {key: float(f"{value:.4g}") for key, value in found.items()}
    content["ceilings"].append({"size": config.name, "dtype": dtype, **rounded})
    content["saved"] += [{**row, "dtype": dtype} for row in saved(config, names, device)]
    for mode in modes:
        if time.monotonic() > end:
            say(f"time is over: {config.name} in {dtype}, {mode}, is not measured")
            continue
        say(f"{config.name}, {dtype}, {mode}")
        content["results"].append(
            measure(
                config, dtype, mode, names, device,  # type: ignore[arg-type]  # argparse gave a mode
                clock=clock, capture=capture, rounds=options.rounds,
                min_sample_s=1e-4 if tiny else configs.MIN_SAMPLE_S,
            )
        )  # fmt: skip
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

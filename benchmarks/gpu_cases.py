"""One case on a GPU, a contestant in a mode: compared, measured beside ours in the same rounds, and freed again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import configs
from benchmarks.analytic import work
from benchmarks.bare_gemm import BareGemm
from benchmarks.configs import Mode, TrunkConfig
from benchmarks.contestants import BASELINE, CONTESTANTS, OURS, build
from benchmarks.gpu_steps import Capture, Runner
from benchmarks.oracles import Oracles
from benchmarks.paired import Clock, time_paired
from benchmarks.result_files import say
from benchmarks.saved_bytes import cost
from benchmarks.steps import WrongResultError, inputs

ROOM = 1.2
"""Free memory that a graph needs, in units of what an eager call of the same contestant takes."""
Calls = dict[str, Callable[[], object]]
Rows = dict[str, dict[str, Any]]


def ceilings(config: TrunkConfig, device: torch.device, clock: Clock, copy_bytes: int) -> dict[str, float]:
    """Bytes per second of a copy on the device, and FLOPs per second of the fastest ``torch.mm`` among the products of
    this trunk's own training step, to four digits."""
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
    return {key: float(f"{value:.4g}") for key, value in found.items()}


def saved_bytes(config: TrunkConfig, name: str, device: torch.device) -> int | None:
    """Bytes that a contestant saves for backward, in this dtype; None where it is compiled, or not to be built."""
    if CONTESTANTS[name].compiled or not CONTESTANTS[name].supports(config):
        return None
    return cost(build(name, config, device), config, device=device).saved_bytes


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


def free_bytes(device: torch.device) -> float:
    """Memory of the device that nothing holds, after all that can be freed is."""
    if device.type != "cuda":
        return float("inf")
    gc.collect()
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info(device)[0])


def backend_of(name: str, device: torch.device) -> str:
    """What ours ran on."""
    if name not in OURS:
        return "torch"
    from ple_fast import last_backend

    choice = last_backend()
    assert choice is not None
    if device.type == "cuda" and choice.name != "triton":
        raise SystemExit(f"ours ran on the backend {choice.name!r} ({choice.reason}): there is nothing to measure")
    return choice.name


class Group:
    """All contestants of one size, dtype and mode: what they are compared with, and ours, which runs beside each."""

    def __init__(
        self,
        config: TrunkConfig,
        mode: Mode,
        device: torch.device,
        *,
        clock: Clock,
        capture: Capture,
        rounds: int,
        min_sample_s: float = configs.MIN_SAMPLE_S,
    ) -> None:
        self.config, self.mode, self.device = config, mode, device
        self.clock, self.capture, self.rounds, self.min_sample_s = clock, capture, rounds, min_sample_s
        self.oracles = Oracles(config, mode, device)
        self.data = inputs(config, input_grad=False, device=device)
        self.ours: Calls = {}
        self.rows: Rows = {}
        self.failed: dict[str, str] = {}
        self.wrong: list[str] = []
        """What must not happen: ours or the loop failed, or anyone computed something else."""
        self.ours, self.rows = self._prepared("fast")

    def about(self, dtype: str) -> dict[str, Any]:
        """The head of the case in a result file."""
        about = {"size": self.config.name, "dtype": dtype, "mode": self.mode, "batch": self.config.batch}
        return {**about, "rounds": self.rounds, **work(self.config, self.mode).counts()}

    def measure(self, name: str) -> Rows:
        """The rows of a contestant, eager and in a graph: times beside ours in the same rounds, ratios, memory. Why one
        is missing is in ``failed``."""
        if not CONTESTANTS[name].available():
            self._fails(name, f"{CONTESTANTS[name].requires} is not installed")
            return {}
        if not CONTESTANTS[name].supports(self.config):
            self._fails(name, "it gives every level the same widths")
            return {}
        calls, rows = (self.ours, self.rows) if name == "fast" else self._prepared(name)
        if rows:
            timed = {**self.ours, **calls}
            paired = time_paired(timed, rounds=self.rounds, clock=self.clock, min_sample_s=self.min_sample_s)
            for key, row in rows.items():
                row.update(paired.times(key, *self.ours))
                say(f"  {key:24s} {row['median_ms']:10.4g} ms")
        del calls
        if CONTESTANTS[name].compiled:
            torch._dynamo.reset()
        free_bytes(self.device)
        return rows

    def _fails(self, key: str, why: str) -> None:
        self.failed[key] = why
        say(f"  {key}: {why}")

    def _prepared(self, name: str) -> tuple[Calls, Rows]:
        """A contestant, warm and compared with the loop: its calls, and their backends and memory."""
        calls: Calls = {}
        rows: Rows = {}
        try:
            self.oracles.of(name)
            runner = Runner.of(name, self.config, self.mode, self.device, self.data)
        except RuntimeError as error:
            self._fails(name, _sentence(error))
            self.wrong += [name] if name in (*OURS, BASELINE) else []
            return calls, rows
        for execution in ("eager", "graph"):
            key = name if execution == "eager" else f"{name}/graph"
            if execution == "graph" and CONTESTANTS[name].self_graphed:
                continue
            if execution == "graph" and free_bytes(self.device) < ROOM * (rows.get(name, {}).get("peak_bytes") or 0):
                self._fails(key, "no memory left for its graph")
                continue
            try:
                calls[key], rows[key] = self._execution(runner, execution)
            except WrongResultError as error:
                self._fails(key, str(error))
                self.wrong.append(key)
            except RuntimeError as error:  # of a compiler, or out of memory
                self._fails(key, _sentence(error))
                self.wrong += [key] if name in (*OURS, BASELINE) else []
        return calls, rows

    def _execution(self, runner: Runner, execution: str) -> tuple[Callable[[], object], dict[str, Any]]:
        contestant = CONTESTANTS[runner.name]
        for _ in range(3 if contestant.compiled else 1):
            outputs = runner.step()
        row: dict[str, Any] = {"backend": backend_of(runner.name, self.device)}
        if execution == "eager":
            self.oracles.check(runner.name, execution, runner.results(outputs))
            del outputs
            # What graphs of its own hold was taken when they were made, above.
            row["peak_bytes"] = None if contestant.self_graphed else peak_bytes(runner.step, self.device)
            return runner.step, row
        del outputs
        captured: list[Any] = []
        row["peak_bytes"] = peak_bytes(lambda: captured.extend(self.capture(runner)), self.device)
        run, outputs = captured
        run()
        self.oracles.check(runner.name, execution, runner.results(outputs))
        return run, row


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def in_order(
    sizes: Sequence[str], dtypes: Sequence[str], modes: Sequence[str], names: Sequence[str]
) -> list[tuple[str, str, str, list[str]]]:
    """Size, dtype, mode and contestants, what is wanted most first: each phase of ``configs.GPU_PHASES`` with what no
    phase before it had, and then the rest."""
    found = []
    taken: set[tuple[str, str, str, str]] = set()
    for phase in (*configs.GPU_PHASES, configs.GpuPhase()):
        for size in sizes:
            for dtype in dtypes:
                for mode in modes:
                    chosen = [
                        name
                        for name in names
                        if mode in CONTESTANTS[name].modes
                        and phase.has(size, dtype, mode, name)
                        and (size, dtype, mode, name) not in taken
                    ]
                    taken.update((size, dtype, mode, name) for name in chosen)
                    if chosen:
                        found.append((size, dtype, mode, chosen))
    return found

"""What a first run on a GPU looks at before anything is measured.

``python benchmarks/device_checks.py PART... --out FOLDER`` with the parts ``ceilings`` (machine, copy, products),
``first_step`` (how long it takes in a fresh process, kernels compiled and kernels on disk), ``sanitizer`` (training
steps under compute-sanitizer). ``FOLDER/check.json`` is written after each finding.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

import torch

from benchmarks import configs, rehearsal
from benchmarks.configs import TrunkConfig
from benchmarks.environment import gpu_environment
from benchmarks.gpu_cases import backend_of, ceilings
from benchmarks.paired import clock_of
from benchmarks.result_files import put, say

SIZES = ("small", "medium", "large")
TOOLS = ("memcheck", "racecheck")
FOUND = 86
"""Exit code that compute-sanitizer is told to end with where it finds something."""
SANITIZED = TrunkConfig("sanitized", 300, 96, 2, units=(80, 40), dtype="bfloat16")
"""Widths and rows with tails; small, because every access is looked at."""
TINY = TrunkConfig("tiny", 20, 6, 2, num_levels=1, units=(4,))
"""For ``--tiny``: kernels are interpreted there, which takes a thousand times as long as anything else."""
PARTS = ("ceilings", "first_step", "sanitizer")


class Findings:
    """``check.json``: a key per finding, written as soon as it is there."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "check.json"
        self.content: dict[str, Any] = {}
        if self.path.is_file():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))

    def add(self, key: str, value: Any) -> None:
        self.content[key] = value
        put(self.path, json.dumps(self.content, indent=1) + "\n")
        say(f"{key}: {json.dumps(value)}")


def config_of(size: str) -> TrunkConfig:
    """A named size in bfloat16; the tiny one in float32, which the interpreter knows without help."""
    named = {TINY.name: TINY, SANITIZED.name: SANITIZED}
    return named[size] if size in named else configs.SIZES[size].with_dtype("bfloat16")


def trunk_of(config: TrunkConfig, device: torch.device, **options: Any) -> tuple[Any, torch.Tensor]:
    """Ours at a size, and an input."""
    from ple_fast import PLE

    trunk = PLE(
        config.in_features, config.num_tasks, num_levels=config.num_levels, task_experts=config.task_experts,
        shared_experts=config.shared_experts, expert_units=config.level_units(), device=device,
        dtype=config.torch_dtype, **options,
    )  # fmt: skip
    x = torch.randn(config.batch, config.in_features, device=device, dtype=config.torch_dtype, requires_grad=True)
    return trunk, x


def train(trunk: Any, x: torch.Tensor) -> None:
    """One training step."""
    y = trunk(x)
    y.backward(torch.randn_like(y))


def serve(trunk: Any, x: torch.Tensor) -> None:
    """One call in inference."""
    trunk.eval()
    with torch.inference_mode():
        trunk(x)
    trunk.train()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sanitized_steps(device: torch.device) -> None:
    """What runs under compute-sanitizer: training and inference, plain and with norm and dropout."""
    config = TINY if device.type == "cpu" else SANITIZED
    for options in ({}, {"norm": "batch", "dropout": 0.2}, {"norm": "layer"}):
        trunk, x = trunk_of(config, device, **options)
        train(trunk, x)
        serve(trunk, x)
        synchronize(device)
        backend_of("fast", device)


def first_step(size: str, device: torch.device, started: float) -> dict[str, Any]:
    """Seconds of this process from its start (``started``, since 1970) to the end of its first steps."""
    found: dict[str, Any] = {"import_s": time.time() - started}
    compiled: list[object] = []
    if device.type == "cuda":
        import triton

        triton.knobs.runtime.jit_post_compile_hook = lambda **about: compiled.append(about)

    def timed(key: str, call: Callable[[], object]) -> None:
        begin = time.perf_counter()
        call()
        synchronize(device)
        found[key] = time.perf_counter() - begin

    made: list[Any] = []
    timed("build_s", lambda: made.extend(trunk_of(config_of(size), device)))
    trunk, x = made
    timed("first_training_step_s", lambda: train(trunk, x))
    timed("second_training_step_s", lambda: train(trunk, x))
    timed("first_inference_s", lambda: serve(trunk, x))
    timed("second_inference_s", lambda: serve(trunk, x))
    rounded = {key: round(value, 4) for key, value in found.items()}
    return {"size": size, **rounded, "kernels": len(compiled), "backend": backend_of("fast", device)}


def check_ceilings(findings: Findings, device: torch.device, sizes: tuple[str, ...]) -> None:
    findings.add("environment", gpu_environment(device))
    for program in (["nvidia-smi"], ["nvcc", "--version"]):
        if shutil.which(program[0]):
            shown = subprocess.run(program, capture_output=True, text=True, check=False).stdout
            findings.add(program[0], shown.splitlines())
    copied = configs.COPY_BYTES if device.type == "cuda" else 1 << 16
    for size in sizes:
        findings.add(f"ceilings/{size}", ceilings(config_of(size), device, clock_of(device), copied))


def check_sanitizer(findings: Findings, device: torch.device, seconds: float) -> bool:
    """Whether the steps run, and no tool found an error; one that cannot run here is noted."""
    step = [sys.executable, __file__, "--sanitized-steps", "--device", str(device)]
    # Each tensor an allocation of its own: PyTorch's cache hands out parts of blocks, and a write into the next part
    # would be seen by nobody.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def look(tool: str, prefix: list[str]) -> int | None:
        begin = time.monotonic()
        try:
            done = subprocess.run(
                [*prefix, *step], env=environment, capture_output=True, text=True, check=False, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            findings.add(f"sanitizer/{tool}", {"outcome": f"not through after {seconds:.0f} s"})
            return None
        lines = (done.stdout + done.stderr).splitlines()
        outcome = {0: "no error", FOUND: "errors"}.get(done.returncode, f"does not run: exit code {done.returncode}")
        findings.add(f"sanitizer/{tool}", {
            "outcome": outcome, "seconds": round(time.monotonic() - begin, 1),
            "output": lines[:40] + lines[-40:] if len(lines) > 80 else lines,
        })  # fmt: skip
        return done.returncode

    if look("alone", []) != 0:  # without a tool, which then finds all kernels compiled
        return False
    program = shutil.which("compute-sanitizer")
    if program is None:
        findings.add("sanitizer", "compute-sanitizer is not on the PATH")
        return True
    codes = [look(tool, [program, "--tool", tool, "--error-exitcode", str(FOUND)]) for tool in TOOLS]
    return FOUND not in codes


def check_first_step(findings: Findings, device: torch.device, sizes: tuple[str, ...]) -> bool:
    """Whether every process came through. With kernels on disk the first size alone: all take about as long."""
    is_right = True
    for size in sizes:
        with tempfile.TemporaryDirectory() as cache:
            for kernels in ("kernels compiled", "kernels on disk")[: 1 + (size == sizes[0])]:
                command = [sys.executable, __file__, "--first-step", size, "--device", str(device)]
                done = subprocess.run(
                    [*command, "--started", str(time.time())], env={**os.environ, "TRITON_CACHE_DIR": cache},
                    capture_output=True, text=True, check=False,
                )  # fmt: skip
                is_right &= done.returncode == 0
                value = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr[-3000:]
                findings.add(f"first_step/{size}/{kernels}", value)
            if shared := os.environ.get("TRITON_CACHE_DIR"):  # the stages that follow need the same kernels
                shutil.copytree(cache, shared, dirs_exist_ok=True)
    return is_right


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, help="folder of check.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a trunk of a few units: shows that the code runs")
    parser.add_argument("--sanitizer-seconds", type=float, default=80.0, help="for each of its tools")
    parser.add_argument("--first-step", metavar="SIZE", help="in this process; prints what it took")
    parser.add_argument("--started", type=float, default=time.time(), help="of this process, in seconds since 1970")
    parser.add_argument("--sanitized-steps", action="store_true", help="in this process")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    rehearsal.prepare(device)
    if options.first_step:
        print(json.dumps(first_step(options.first_step, device, options.started)))
        return
    if options.sanitized_steps:
        sanitized_steps(device)
        return
    if not options.parts or options.out is None:
        parser.error(f"expected --out and some of {', '.join(PARTS)}")
    findings = Findings(options.out)
    sizes = (TINY.name,) if options.tiny else SIZES
    wrong = []
    if "ceilings" in options.parts:
        check_ceilings(findings, device, sizes)
    if "first_step" in options.parts and not check_first_step(findings, device, sizes):
        wrong.append("the first step")
    if "sanitizer" in options.parts and not check_sanitizer(findings, device, options.sanitizer_seconds):
        wrong.append("the steps under compute-sanitizer")
    if wrong:
        raise SystemExit(f"failed: {', '.join(wrong)} (see check.json)")


if __name__ == "__main__":
    main()

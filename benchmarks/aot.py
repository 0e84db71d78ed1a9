"""Compile every kernel that a trunk would launch, for GPUs that need not be here: ``python benchmarks/aot.py``.

Launches are recorded, not run: what is compiled is what the launchers ask for, with their tiles. For every one the
registers, spills, shared memory and tensor-core instructions are written to
``<results>/aot/triton-VERSION.json``. Needs triton and no GPU; not under ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

import torch

from benchmarks.configs import AOT_DTYPES, AOT_SIZES, SIZES, TrunkConfig
from benchmarks.environment import ROOT

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes of shared memory that one block may ask for."""
KERNEL_MODULES = ("grouped_linear", "gate_combine", "input_grad", "weight_grad", "fused_level")
TABLE_OF = {"gfx942": "amd"}
POINTER = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


@dataclass(frozen=True)
class Request:
    """One compilation: ``signature`` has a type per argument, ``constants`` the values of those that are constant."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int

    @property
    def label(self) -> str:
        """Kernel, dtype, precision, tile and widths, for people."""
        c = dict(self.constants)
        tile = "x".join(str(c[n]) for n in c if n.startswith("BLOCK"))
        sizes = "x".join(str(c[n]) for n in ("DEPTH", "HIDDEN", "UNITS") if n in c)
        return f"{self.kernel} {sizes} {c.get('NAME', '')} [{tile}] w{self.warps} s{self.stages}"


class _Recorder:
    """Stands in for a launch."""

    def __init__(self) -> None:
        self.requests: dict[Request, None] = {}

    def __call__(self, kernel: Any, grid: tuple[int, ...], tile: Any, device: torch.device, *arguments: Any) -> None:
        assert all(n >= 1 for n in grid), (kernel, grid)
        signature, constants = [], []
        for parameter, value in zip(kernel.params, arguments, strict=True):
            if parameter.is_constexpr or value is None:
                signature.append((parameter.name, "constexpr"))
                constants.append((parameter.name, value))
            elif isinstance(value, torch.Tensor):
                signature.append((parameter.name, POINTER[value.dtype]))
            else:
                signature.append((parameter.name, "i32"))
        name = kernel.fn.__name__
        request = Request(name, tuple(signature), tuple(constants), tile.warps, tile.stages)
        self.requests[request] = None


def recorded(config: TrunkConfig, architecture: str, precision: str = "tf32") -> list[Request]:
    """What training steps and inference of a trunk would launch on an architecture."""
    from ple_fast import PLE, backend, use_backend
    from ple_fast.triton_backend import fusion, run

    tiles = importlib.import_module("ple_fast_kernels._tiles")
    recorder = _Recorder()
    table = (TABLE_OF.get(architecture, architecture), PROCESSORS[architecture])
    modules = [importlib.import_module(f"ple_fast_kernels.{name}") for name in KERNEL_MODULES]
    with torch.random.fork_rng(devices=[]):
        ple = PLE(
            config.in_features,
            config.num_tasks,
            num_levels=config.num_levels,
            task_experts=config.task_experts,
            shared_experts=config.shared_experts,
            expert_units=config.level_units(),
            dtype=config.torch_dtype,
        )
    patches: list[Any] = [mock.patch.object(module, "launch", recorder) for module in modules]
    patches += [
        mock.patch.object(tiles, "table_of", return_value=table),
        mock.patch.object(backend, "_why_no_triton", return_value=None),
        mock.patch.object(run, "matmul_precision", return_value=precision),
        mock.patch.object(fusion, "matmul_precision", return_value=precision),
    ]
    for patch in patches:
        patch.start()
    try:
        with use_backend("triton"):
            x = torch.empty(config.batch, config.in_features, dtype=config.torch_dtype, requires_grad=True)
            y = ple(x)
            y.backward(torch.empty_like(y))
            with torch.inference_mode():
                ple(x)
    finally:
        for patch in patches:
            patch.stop()
    return list(recorder.requests)


def _tools(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=False)


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else -1


def compile_request(request: Request, architecture: str) -> dict[str, Any]:
    """Compile one request and read its resources; raises what the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    homes = [importlib.import_module(f"ple_fast_kernels.{name}") for name in KERNEL_MODULES]
    function = next(getattr(home, request.kernel) for home in homes if hasattr(home, request.kernel))
    names = [name for name, _ in request.signature]
    constants = {(names.index(name),): value for name, value in request.constants}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, (_, kind) in enumerate(request.signature) if kind.startswith("*")
    }
    source = ASTSource(fn=function, signature=dict(request.signature), constexprs=constants, attrs=attributes)
    number = int(architecture.removeprefix("sm_")) if architecture.startswith("sm_") else architecture
    is_nvidia = architecture.startswith("sm_")
    target = GPUTarget("cuda" if is_nvidia else "hip", number, 32 if is_nvidia else 64)
    compiled = triton.compile(source, target=target, options={"num_warps": request.warps, "num_stages": request.stages})
    row: dict[str, Any] = {"shared": compiled.metadata.shared}
    if not is_nvidia:
        text = compiled.asm["amdgcn"]
        row["registers"] = _number(r"\.vgpr_count:\s+(\d+)", text)
        row["spills"] = _number(r"\.vgpr_spill_count:\s+(\d+)", text)
        row["mma"] = _count(r"v_mfma", text)
        return row
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"], encoding="utf-8")
        sass = _tools("cuobjdump", "-sass", str(cubin)).stdout
        usage = _tools("cuobjdump", "-res-usage", str(cubin)).stdout
        exact = re.search(r"\.target\s+(sm_\w+)", compiled.asm["ptx"])
        assert exact is not None
        # Spills are not in the binary, only in what the assembler says, and only the newer one may read this code.
        for assembler in ("ptxas-blackwell", "ptxas") if target.arch >= 100 else ("ptxas", "ptxas-blackwell"):
            said = _tools(assembler, "-v", "--gpu-name", exact.group(1), str(ptx), "-o", str(Path(folder) / "out"))
            if said.returncode == 0:
                break
        else:
            raise RuntimeError(f"no assembler takes the code of {request.label}: {said.stderr}")
    row["registers"] = _number(r"REG:(\d+)", usage)
    row["spills"] = _number(r"(\d+) bytes spill stores", said.stderr)
    row["mma"] = _count(r"\b[HIDQ]MMA\b", sass)
    row["warp_group_mma"] = _count(r"\bHGMMA\b", sass) + _count(r"\bUTC\w*MMA\b", sass)
    return row


def _row(job: tuple[str, str, str, str, Request]) -> dict[str, Any]:
    architecture, size, dtype, precision, request = job
    row: dict[str, Any] = {
        "architecture": architecture,
        "size": size,
        "dtype": dtype,
        "precision": precision,
        "kernel": request.kernel,
        "label": request.label,
    }
    try:
        row.update(compile_request(request, architecture))
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:2000]
    return row


def jobs(
    architectures: Sequence[str], sizes: Sequence[str], dtypes: Sequence[str]
) -> Iterator[tuple[str, str, str, str, Request]]:
    """Every distinct compilation, named by the first size and dtype that asks for it."""
    for architecture in architectures:
        seen: set[Request] = set()
        for size in sizes:
            for dtype in dtypes:
                if dtype not in AOT_DTYPES[size]:
                    continue
                name, _, precision = dtype.partition("/")
                config = SIZES[size].with_dtype(name)
                for request in recorded(config, architecture, precision or "ieee"):
                    if request not in seen:
                        seen.add(request)
                        yield architecture, size, name, precision or "-", request


def table(
    architectures: Sequence[str] = ARCHITECTURES,
    sizes: Sequence[str] = AOT_SIZES,
    dtypes: Sequence[str] = ("bfloat16", "float16", "float32/tf32", "float32/ieee", "float64"),
    *,
    workers: int = 2,
) -> list[dict[str, Any]]:
    """A row per compilation; a failure has ``error``."""
    rows = []
    with ProcessPoolExecutor(workers) as pool:
        for row in pool.map(_row, jobs(architectures, sizes, dtypes)):
            rows.append(row)
            print(
                f"{row['architecture']:7s} {row['dtype']:9s}{row['precision']:5s} {row['label']:75s} "
                + (row["error"][:200] if "error" in row else
                   f"registers {row['registers']:3d} spills {row['spills']:4d} shared {row['shared']:6d} "
                   f"mma {row['mma']:3d} warp-group {row.get('warp_group_mma', 0):3d}"),
                file=sys.stderr, flush=True,
            )  # fmt: skip
    return rows


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES))
    parser.add_argument("--sizes", default=",".join(AOT_SIZES))
    parser.add_argument("--dtypes", default="bfloat16,float16,float32/tf32,float32/ieee,float64")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/aot/triton-VERSION.json")
    arguments = parser.parse_args()
    rows = table(arguments.architectures.split(","), arguments.sizes.split(","), arguments.dtypes.split(","))
    out = arguments.out or ROOT / "benchmarks" / "results" / "aot" / f"triton-{triton.__version__}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    head = json.dumps({"triton": triton.__version__, "torch": torch.__version__.partition("+")[0]})
    out.write_text(
        f'{{"schema": 1, "kind": "aot", "environment": {head}, "results": [\n  {lines}\n]}}\n', encoding="utf-8"
    )
    failed = [row for row in rows if "error" in row]
    print(f"{len(rows)} compiled, {len(failed)} failed; wrote {out}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

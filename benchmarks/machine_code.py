"""One kernel compiled for a GPU that need not be here, and what the compiler made of it: registers, spills, shared
memory, tensor-core instructions."""

from __future__ import annotations

import importlib
import io
import pkgutil
import re
import subprocess
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.launches import Request


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

    import ple_fast_kernels

    names = [module.name for module in pkgutil.iter_modules(ple_fast_kernels.__path__)]
    homes = [importlib.import_module(f"ple_fast_kernels.{name}") for name in names]
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
    options = {"num_warps": request.warps, "num_stages": request.stages}
    log = io.StringIO()
    with redirect_stdout(log), triton.knobs.nvidia.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=target, options=options)
    row: dict[str, Any] = {"shared": compiled.metadata.shared}
    asked = dict(request.constants)
    if request.kernel == "_grouped_weight_grad_kernel":  # of a layer whose weight the library takes, sums may be left
        row["multiplies"] = asked["HAS_WEIGHT"] or asked["HAS_GATES"]
    if not is_nvidia:
        text = compiled.asm["amdgcn"]
        row["registers"] = _number(r"\.vgpr_count:\s+(\d+)", text)
        row["spills"] = _number(r"\.vgpr_spill_count:\s+(\d+)", text)
        row["mma"] = _count(r"v_mfma", text)
        return row
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        # Code out of Triton's cache was assembled before.
        said = log.getvalue() if "registers" in log.getvalue() else _assembled(ptx, folder)
        if request.kernel == "_grouped_weight_grad_kernel":
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            row["loop_shuffles"] = shuffles_in_loops(_tools("cuobjdump", "-sass", str(cubin)).stdout)
    row["registers"] = _number(r"Used (\d+) registers", said)
    row["spills"] = _number(r"(\d+) bytes spill stores", said)
    row["serialised"] = sorted(set(re.findall(r"\bC75\d\d\b", said)))
    row["mma"] = _count(r"\bmma\.sync\b", ptx)
    if "tensordesc" in "".join(kind for _, kind in request.signature):
        row["engine_loads"] = _count(r"\bcp\.async\.bulk\.tensor\b", ptx)
    row["warp_group_mma"] = _count(r"\bwgmma\.mma_async\b", ptx) + _count(r"\btcgen05\.mma\b", ptx)
    return row


def shuffles_in_loops(sass: str) -> int:
    """Butterflies in the innermost loops of a listing: sums across threads that could wait for the end."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    spans = []
    for at, text in lines:
        back = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if back is not None and int(back.group(1), 16) < at:
            spans.append((int(back.group(1), 16), at))
    innermost = [(a, b) for a, b in spans if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)]
    return sum("SHFL.BFLY" in text and any(a <= at <= b for a, b in innermost) for at, text in lines)


def _assembled(ptx: str, folder: str) -> str:
    """What the assembler says of the code: spills, and products that it had to put one after the other (C75xx)."""
    exact = re.search(r"\.target\s+(sm_(\d+)\w*)", ptx)
    assert exact is not None
    assemblers = ("ptxas-blackwell", "ptxas") if int(exact.group(2)) >= 100 else ("ptxas", "ptxas-blackwell")
    source = Path(folder) / "kernel.ptx"
    source.write_text(ptx, encoding="utf-8")
    said = []
    for assembler in assemblers:  # the one that Triton takes; the older one does not read every code
        done = _tools(assembler, "-v", "--gpu-name", exact.group(1), str(source), "-o", str(Path(folder) / "out"))
        if done.returncode == 0:
            return done.stderr + done.stdout
        said.append(done.stderr)
    raise RuntimeError(f"no assembler takes the code: {said}")

"""Compile every kernel that a trunk would launch, for GPUs that need not be here: ``python benchmarks/aot.py``.

Launches are recorded, not run: what is compiled is what the launchers ask for, with their tiles. For every one the
registers, spills, shared memory and tensor-core instructions are written to
``<results>/aot/triton-VERSION.json``; ``--write-page`` puts the files' summary into ``docs/kernels.md``. Needs triton
and no GPU; not under ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

import torch

from benchmarks.configs import AOT_SIZES, SIZES, TrunkConfig, aot_dtypes
from benchmarks.environment import ROOT

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes of shared memory that one block may ask for."""
KERNEL_MODULES = (
    "grouped_linear", "data_grad", "gate_combine", "input_grad", "weight_grad", "fused_level", "batch_norm",
    "layer_end", "layer_norm", "persistent",
)  # fmt: skip
TABLE_OF = {"gfx942": "amd"}
DTYPES = ("bfloat16", "float16", "float32/tf32", "float32/ieee", "float64")
FIGURES = (
    "multiplies", "registers", "spills", "shared", "mma", "warp_group_mma", "engine_loads", "serialised",
    "loop_shuffles",
)  # fmt: skip
POINTER = {
    torch.int64: "*i64",
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

    def described(self) -> dict[str, Any]:
        """Kernel, widths, tile, warps and stages, for people."""
        c = dict(self.constants)
        return {
            "kernel": self.kernel.strip("_").removesuffix("_kernel"),
            "widths": [c[n] for n in ("DEPTH", "HIDDEN", "UNITS") if n in c],
            "tile": [c[n] for n in c if n.startswith("BLOCK")],
            "warps": self.warps,
            "stages": self.stages,
        }


def request_of(prepared: Any, arguments: Sequence[Any]) -> Request:
    """What a launch would compile."""
    kernel, tile = prepared.kernel, prepared.tile
    signature, constants = [], []
    for parameter, value in zip(kernel.params, (*arguments, *prepared.constants), strict=True):
        if parameter.is_constexpr or value is None:
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
        elif isinstance(value, torch.Tensor):
            signature.append((parameter.name, POINTER[value.dtype]))
        elif hasattr(value, "block_shape"):  # a descriptor
            kind = POINTER[value.base.dtype].removeprefix("*")
            signature.append((parameter.name, f"tensordesc<{kind}[{', '.join(map(str, value.block_shape))}]>"))
        else:
            signature.append((parameter.name, "fp32" if isinstance(value, float) else "i32"))
    return Request(kernel.fn.__name__, tuple(signature), tuple(constants), tile.warps, tile.stages)


class _Recorder:
    """Stands in for a launch."""

    def __init__(self) -> None:
        self.requests: dict[Request, None] = {}

    def __call__(self, prepared: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        assert all(n >= 1 for n in grid), (prepared.kernel, grid)
        self.requests[request_of(prepared, arguments)] = None


def _trunk(config: TrunkConfig) -> torch.nn.Module:
    """The trunk; with a norm of the logits its levels, one by one."""
    from ple_fast import PLE, ExtractionNetwork, GateSpec, MLPSpec, Topology

    if config.logits_norm is None and not config.gate_units:
        return PLE(
            config.in_features,
            config.num_tasks,
            num_levels=config.num_levels,
            task_experts=config.task_experts,
            shared_experts=config.shared_experts,
            expert_units=config.level_units(),
            norm=config.norm,
            dropout=config.dropout,
            activation=config.activation,
            dtype=config.torch_dtype,
        )
    assert config.num_levels == 1
    return ExtractionNetwork(
        config.in_features,
        Topology.ple(config.num_tasks, config.task_experts, config.shared_experts, last=True),
        experts=MLPSpec(config.units, config.activation, norm=config.norm, dropout=config.dropout),
        gate=GateSpec(config.gate_units, norm=config.norm, dropout=config.dropout, logits_norm=config.logits_norm),
        dtype=config.torch_dtype,
    )


@contextmanager
def recording(
    architecture: str, precision: str, record: Callable[..., None], library: Callable[..., None] | None
) -> Iterator[None]:
    """Nothing is launched: ``record`` gets what is prepared, grid and arguments, as on an architecture.

    ``library`` gets the operands of products that the library takes; None: it takes none, and no kernel the place of
    those that load by pointers.
    """
    from ple_fast import backend, use_backend
    from ple_fast.triton_backend import fusion, run

    tiles = importlib.import_module("ple_fast_kernels._tiles")
    table = (TABLE_OF.get(architecture, architecture), PROCESSORS[architecture])
    launch = importlib.import_module("ple_fast_kernels._launch")
    with ExitStack() as stack:
        # A function, not ``record`` itself: it takes the place of a method.
        method = mock.patch.object(
            launch.Prepared, "_launch", lambda prepared, grid, given: record(prepared, grid, given)
        )
        stack.enter_context(method)
        stack.enter_context(mock.patch.object(tiles, "table_of", return_value=table))
        module = importlib.import_module("ple_fast_kernels.library")
        if library is None:
            stack.enter_context(mock.patch.object(module, "takes_library", return_value=False))
            loaded = importlib.import_module("ple_fast_kernels.persistent")
            stack.enter_context(mock.patch.object(loaded, "persistent_tile", return_value=None))
        else:
            stack.enter_context(mock.patch.object(module, "_product", library))
        stack.enter_context(mock.patch.object(backend, "_why_no_triton", return_value=None))
        stack.enter_context(mock.patch.object(run, "matmul_precision", return_value=precision))
        stack.enter_context(mock.patch.object(fusion, "matmul_precision", return_value=precision))
        stack.enter_context(use_backend("triton"))
        yield


def recorded(config: TrunkConfig, architecture: str, precision: str = "tf32") -> list[Request]:
    """What training steps and inference of a trunk would launch on an architecture: in kernels that load by pointers
    alone, and as the tables route them."""
    recorder = _Recorder()
    with torch.random.fork_rng(devices=[]):
        ple = _trunk(config)
    for library in (None, lambda *operands: None):
        with recording(architecture, precision, recorder, library):
            x = torch.empty(config.batch, config.in_features, dtype=config.torch_dtype, requires_grad=True)
            y = ple.train()(x)
            y.backward(torch.empty_like(y))
            with torch.inference_mode():
                ple.eval()(x)
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


Job = tuple[str, str, str, str, Request]
"""Architecture, size, dtype, precision of float32 products, and what to compile."""


def _head(job: Job) -> dict[str, Any]:
    """A row without what the compiler makes of it."""
    architecture, size, dtype, precision, request = job
    named = {"architecture": architecture, "size": size, "dtype": dtype, "precision": precision}
    return {**named, **request.described()}


def _row(job: Job) -> dict[str, Any]:
    row = _head(job)
    try:
        row.update(compile_request(job[4], job[0]))
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:2000]
    return row


def _line(row: Mapping[str, Any]) -> str:
    """A row as progress on one line."""
    made = " ".join("x".join(map(str, row[key])) for key in ("widths", "tile"))
    head = " ".join(row[key] for key in ("architecture", "dtype", "precision", "kernel"))
    head += f" {made} w{row['warps']} s{row['stages']}"
    if "error" in row:
        return f"{head}: {row['error'][:200]}"
    return head + ": " + " ".join(f"{key} {row[key]}" for key in FIGURES if key in row)


def jobs(architectures: Sequence[str], sizes: Sequence[str], dtypes: Sequence[str]) -> Iterator[Job]:
    """Every distinct compilation, named by the first size and dtype that asks for it."""
    for architecture in architectures:
        seen: set[Request] = set()
        for size in sizes:
            for dtype in dtypes:
                if dtype not in aot_dtypes(architecture).get(size, ()):
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
    dtypes: Sequence[str] = DTYPES,
    *,
    workers: int = 2,
) -> list[dict[str, Any]]:
    """A row per compilation; a failure has ``error``."""
    rows = []
    with ProcessPoolExecutor(workers) as pool:
        for row in pool.map(_row, jobs(architectures, sizes, dtypes)):
            rows.append(row)
            print(_line(row), file=sys.stderr, flush=True)
    return rows


MATRIX_KERNELS = (
    "grouped_linear_fwd", "grouped_data_grad", "input_grad", "grouped_weight_grad", "fused_level_fwd",
    "fused_two_layers_fwd", "grouped_linear_fwd_persistent", "grouped_data_grad_persistent",
)  # fmt: skip
WARP_GROUP_ROWS = 64
"""Rows of a tile from which a warp group multiplies on sm_90."""


def faults(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with rows of a table, a line each: failures, spills, too much shared memory, no tensor cores."""
    found = []
    for row in rows:
        if "error" in row:
            found.append(_line(row))
            continue
        if row["spills"] != 0:
            found.append(f"spills {row['spills']} bytes: {_line(row)}")
        if row["shared"] > SHARED_LIMIT[row["architecture"]]:
            found.append(f"more shared memory than {SHARED_LIMIT[row['architecture']]}: {_line(row)}")
        multiplies = row["kernel"] in MATRIX_KERNELS and row.get("multiplies", True)
        is_half = multiplies and row["dtype"] in ("bfloat16", "float16")
        if is_half and row["mma"] + row.get("warp_group_mma", 0) == 0:
            found.append(f"no tensor cores: {_line(row)}")
        if row["kernel"] == "grouped_weight_grad" and row.get("loop_shuffles"):
            found.append(f"{row['loop_shuffles']} shuffles in loops: {_line(row)}")
        if row.get("engine_loads") == 0:
            found.append(f"no loads by the tensor memory engine: {_line(row)}")
        if row.get("serialised"):
            found.append(f"products wait for each other ({', '.join(row['serialised'])}): {_line(row)}")
        needs_warp_group = is_half and row["architecture"] == "sm_90" and row["tile"][0] >= WARP_GROUP_ROWS
        if needs_warp_group and row["mma"] and row["warp_group_mma"] == 0:
            found.append(f"no warp-group products: {_line(row)}")
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a result file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("schema") != 1 or content.get("kind") != "aot":
        raise ValueError(f"{path}: expected schema 1 and kind 'aot'; compile again")
    rows: list[dict[str, Any]] = content["results"]
    return rows


def _span(values: Iterable[int]) -> str:
    low, *_, high = sorted({*values}) * 2
    return str(low) if low == high else f"{low} to {high}"


def summary(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Per architecture a table with a row per kernel; ``tables``: rows by Triton version."""
    lines = []
    for architecture in ARCHITECTURES:
        name = "vector registers" if architecture.startswith("gfx") else "registers"
        heads = [f"{name}, {version}" for version in tables]
        lines += [
            f"### {architecture}",
            "",
            "| " + " | ".join(["kernel", "configurations", *heads, "spills", "shared memory, KiB", "products"]) + " |",
            "| " + " | ".join(["---", *["---:"] * (len(heads) + 3), "---"]) + " |",
        ]
        mine = {v: [row for row in rows if row["architecture"] == architecture] for v, rows in tables.items()}
        for kernel in dict.fromkeys(row["kernel"] for rows in mine.values() for row in rows):
            chosen = {v: [row for row in rows if row["kernel"] == kernel] for v, rows in mine.items()}
            every = [row for rows in chosen.values() for row in rows]
            cells = [f"`{kernel}`", _span(len(rows) for rows in chosen.values())]
            cells += [_span(row["registers"] for row in rows) for rows in chosen.values()]
            cells += [str(max(row["spills"] for row in every)), f"{max(row['shared'] for row in every) / 1024:.0f}"]
            warp_group = sum(row.get("warp_group_mma", 0) > 0 for row in every)
            tensor = sum(row["mma"] > 0 and not row.get("warp_group_mma", 0) for row in every)
            rest = len(every) - warp_group - tensor
            named = (("warp group or tcgen05", warp_group), ("tensor core", tensor), ("none, or FMA", rest))
            present = [(name, count) for name, count in named if count]
            cells.append(present[0][0] if len(present) == 1 else ", ".join(f"{name} {n}" for name, n in present))
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


RESULTS = ROOT / "benchmarks" / "results" / "aot"
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- benchmark:aot -->", "<!-- /benchmark:aot -->"


def block() -> str:
    """What stands between the two comments of the page: the summary of the committed files."""
    tables = {path.stem.removeprefix("triton-"): read(path) for path in sorted(RESULTS.glob("triton-*.json"))}
    return summary({f"Triton {version}": rows for version, rows in tables.items()})


def quoted(text: str, begin: str = BEGIN, end: str = END) -> str:
    """What the page holds between two comments."""
    return text.partition(begin + "\n")[2].partition(end)[0]


def write_block(begin: str, content: str, end: str) -> None:
    """Put ``content`` between two comments of the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(begin + "\n")
    PAGE.write_text(f"{before}{begin}\n{content}{end}{rest.partition(end)[2]}", encoding="utf-8")


def write(path: Path, rows: Sequence[Mapping[str, Any]], version: str) -> None:
    """One result file, a line per row."""
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    head = json.dumps({"triton": version, "torch": torch.__version__.partition("+")[0]})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'{{"schema": 1, "kind": "aot", "environment": {head}, "results": [\n  {lines}\n]}}\n', encoding="utf-8"
    )


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES))
    parser.add_argument("--sizes", default=",".join(AOT_SIZES))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--out", type=Path, help="default benchmarks/results/aot/triton-VERSION.json")
    parser.add_argument("--list", action="store_true", help="only print what would be compiled, a row per line")
    parser.add_argument("--write-page", action="store_true", help="only render the summary of the committed files")
    arguments = parser.parse_args()
    if arguments.write_page:
        write_block(BEGIN, block(), END)
        return
    asked = arguments.architectures.split(","), arguments.sizes.split(","), arguments.dtypes.split(",")
    if arguments.list:
        for job in jobs(*asked):
            print(json.dumps(_head(job)))
        return
    rows = table(*asked)
    out = arguments.out or RESULTS / f"triton-{triton.__version__}.json"
    write(out, rows, triton.__version__)
    found = faults(rows)
    print("\n".join([*found, f"{len(rows)} compiled, {len(found)} at fault; wrote {out}"]))
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""Compile every kernel that a trunk would launch, for GPUs that need not be here: ``python benchmarks/aot.py``.

Launches are recorded, not run: what is compiled is what the launchers ask for, with their tiles. For every one the
registers, spills, shared memory and tensor-core instructions are written to
``<results>/aot/triton-VERSION.json``; ``--write-page`` puts the files' summary into ``docs/kernels.md``. Needs triton
and no GPU; not under ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

import torch

from benchmarks.configs import AOT_SIZES, SIZES, TrunkConfig, aot_dtypes
from benchmarks.environment import ROOT
from benchmarks.launches import PROCESSORS, Launch, Recorder, Request, recording
from benchmarks.machine_code import compile_request
from benchmarks.rendering import table as rendered
from benchmarks.rendering import with_block
from benchmarks.result_files import read, write

ARCHITECTURES = tuple(PROCESSORS)
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes of shared memory that one block may ask for."""
DTYPES = ("bfloat16", "float16", "float32/tf32", "float32/ieee", "float64")
FIGURES = (
    "multiplies", "registers", "spills", "shared", "mma", "warp_group_mma", "engine_loads", "serialised",
    "loop_shuffles",
)  # fmt: skip


class _Scaled(torch.nn.Module):
    """Slots of an input that all of them read, and of one for each, scaled."""

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.slots = slots

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from ple_fast.functional import scaled

        y = scaled(x, x.unsqueeze(1).repeat(1, self.slots, 1))
        return scaled(y, y)


class _Towers(torch.nn.Module):
    """Towers of all tasks as one level."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        from ple_fast import ExtractionNetwork, GateSpec, MLPSpec, Topology

        self.tasks = range(config.num_tasks)
        own = tuple((k,) for k in self.tasks)
        kinds: tuple[Literal["static"], ...] = tuple("static" for _ in own)
        wiring = Topology(tuple(self.tasks), tuple(self.tasks), own, mixture_kind=kinds)
        spec = MLPSpec(config.units, last_activation="identity")
        self.level = ExtractionNetwork(
            config.in_features, wiring, experts=spec, gate=GateSpec(), dtype=config.torch_dtype
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.level(x.unsqueeze(1).repeat(1, len(self.tasks), 1))
        return y


def _trunk(config: TrunkConfig) -> torch.nn.Module:
    """The trunk; with a norm of the logits its levels, one by one."""
    from ple_fast import PLE, STEM, ExtractionNetwork, GateSpec, HoME, MLPSpec, Topology

    if config.scaled_slots:
        return _Scaled(config.scaled_slots)
    if config.has_stacked_towers:
        return _Towers(config)
    if config.groups:
        return HoME(
            config.in_features,
            config.num_tasks,
            groups=[range(first, config.num_tasks, config.groups) for first in range(config.groups)],
            task_experts=config.task_experts,
            group_experts=config.shared_experts,
            shared_experts=config.shared_experts,
            expert_units=config.level_units(),
            norm=config.norm,
            activation=config.activation,
            dtype=config.torch_dtype,
        )
    if config.is_stem:
        return STEM(
            config.in_features,
            config.num_tasks,
            num_levels=config.num_levels,
            task_experts=config.task_experts,
            shared_experts=config.shared_experts,
            expert_units=config.level_units(),
            dtype=config.torch_dtype,
        )
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
            gate_top_k=config.gate_top_k,
            gate_joint_k=config.gate_joint_k,
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


def recorded(config: TrunkConfig, architecture: str, precision: str = "tf32") -> list[Request]:
    """What training steps and inference of a trunk would launch on an architecture: in kernels that load by pointers
    alone, and as the tables route them."""
    recorder = Recorder()
    with torch.random.fork_rng(devices=[]):
        ple = _trunk(config)
    for library in (None, lambda *operands: None):
        with recording(architecture, precision, recorder, library):
            slots = (config.num_tasks + 1,) if config.is_stem else ()
            x = torch.empty(config.batch, *slots, config.in_features, dtype=config.torch_dtype, requires_grad=True)
            y = ple.train()(x)
            y.backward(torch.empty_like(y))
            with torch.inference_mode():
                ple.eval()(x)
    return list(dict.fromkeys(launch.request for launch in recorder.launches if isinstance(launch, Launch)))


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


def _span(values: Iterable[int]) -> str:
    low, *_, high = sorted({*values}) * 2
    return str(low) if low == high else f"{low} to {high}"


def summary(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Per architecture a table with a row per kernel; ``tables``: rows by Triton version."""
    parts = []
    for architecture in ARCHITECTURES:
        lines = []
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
            lines.append(cells)
        registers = "vector registers" if architecture.startswith("gfx") else "registers"
        heads = ["kernel", "configurations", *(f"{registers}, {version}" for version in tables)]
        heads += ["spills", "shared memory, KiB", "products"]
        parts += [f"### {architecture}\n", rendered(heads, lines, left=(0, len(heads) - 1)) + "\n"]
    return "\n".join(parts)


RESULTS = ROOT / "benchmarks" / "results" / "aot"
PAGE = ROOT / "docs" / "kernels.md"
BLOCK = "aot"


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of a result file."""
    rows: list[dict[str, Any]] = read(path, "aot")["results"]
    return rows


def block() -> str:
    """What stands between the two comments of the page: the summary of the committed files."""
    files = sorted(RESULTS.glob("triton-*.json"))
    return summary({f"Triton {path.stem.removeprefix('triton-')}": rows_of(path) for path in files})


def write_block(name: str, content: str) -> None:
    """Put ``content`` between two comments of the page."""
    PAGE.write_text(with_block(PAGE.read_text(encoding="utf-8"), name, content), encoding="utf-8")


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
        write_block(BLOCK, block())
        return
    asked = arguments.architectures.split(","), arguments.sizes.split(","), arguments.dtypes.split(",")
    if arguments.list:
        for job in jobs(*asked):
            print(json.dumps(_head(job)))
        return
    rows = table(*asked)
    out = arguments.out or RESULTS / f"triton-{triton.__version__}.json"
    about = {"triton": triton.__version__, "torch": torch.__version__.partition("+")[0]}
    write(out, "aot", {"results": rows}, about)
    found = faults(rows)
    print("\n".join([*found, f"{len(rows)} compiled, {len(found)} at fault; wrote {out}"]))
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""Predict what a training step of one level takes on an H200, launch by launch: ``python benchmarks/kernel_model.py``.

A prediction: **no GPU has measured this**. The launches are recorded as ``aot.py`` records them; registers, shared
memory and serialised products of each are read in the committed table of compiled kernels. The model itself is
``kernel_schedule.py``.
``--write-page`` puts the table into ``docs/kernels.md``. Needs triton and no GPU; not under ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

import torch

from benchmarks import aot
from benchmarks.configs import SIZES, TrunkConfig
from benchmarks.kernel_schedule import (
    LAUNCH,
    MEMORY,
    Prediction,
    Resources,
    Role,
    predict,
    predict_library,
    product,
)
from benchmarks.launches import PERSISTENT, Launch, LibraryProduct, Recorder, recording
from benchmarks.rendering import table

ARCHITECTURE = "sm_90"
TABLE = aot.RESULTS / "triton-3.6.0.json"
"""Of the version of Triton on the GPU machine."""
MODEL_SIZES = ("small", "medium", "large")
MODEL_DTYPES = ("bfloat16", "float32/tf32")


def recorded(config: TrunkConfig, precision: str, *, with_library: bool = True) -> list[Launch | LibraryProduct]:
    """The launches of a training step of the first level: one input for all slots, whose gradient is wanted too."""
    from ple_fast import ExtractionNetwork, GateSpec, MLPSpec, Topology

    topology = Topology.ple(config.num_tasks, config.task_experts, config.shared_experts, last=False)
    recorder = Recorder()
    with torch.random.fork_rng(devices=[]):
        level = ExtractionNetwork(
            config.in_features, topology, experts=MLPSpec(config.units), gate=GateSpec(), dtype=config.torch_dtype
        )
    with recording(ARCHITECTURE, precision, recorder, recorder.library if with_library else None):
        y = level(torch.empty(config.batch, config.in_features, dtype=config.torch_dtype, requires_grad=True))
        y.backward(torch.empty_like(y))
    return recorder.launches


def _rows(launch: Launch) -> int:
    return launch.numbers["B"]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _layer(launch: Launch) -> list[Role]:
    """Of ``grouped_linear_fwd`` and ``grouped_data_grad``: tiles of members, then of gates, by groups of rows."""
    c = dict(launch.request.constants)
    tile = (c["BLOCK_M"], c["BLOCK_N"], c["BLOCK_K"])
    size = launch.size["A" if "A" in launch.size else "D"]
    steps = _cdiv(launch.depth, tile[2])
    members = c["MEMBERS"] if "MEMBERS" in c else len(c["SLOT"]) if c.get("HAS_MEMBERS", True) else 0
    runs = len(c["GATE_SLOT"]) if c.get("HAS_GATES") else 0
    narrow = launch.operands == "tf32" and launch.role != "grouped_linear_fwd"  # its weight is as products want it
    roles, left = [], _cdiv(_rows(launch), tile[0])
    while left:
        group = min(left, c["GROUP"])
        left -= group
        columns = members * _cdiv(c["UNITS"], tile[1])
        result = size * (1 + bool(c.get("SAVE_Z")))
        if members:
            roles.append(product("tiles", group * columns, tile, steps, size, result, narrow=int(narrow)))
        if runs:
            gates = (tile[0], c["GATE_WIDTH"], tile[2])
            roles.append(product("gates", group * runs, gates, steps, size, 4))
    return roles


def _input_grad(launch: Launch) -> list[Role]:
    c = dict(launch.request.constants)
    tile = (c["BLOCK_M"], c["BLOCK_N"], c["BLOCK_K"])
    size = launch.size["Out"]
    columns = _cdiv(_rows(launch), tile[0]) * _cdiv(c["UNITS"], tile[1])
    roles = []
    for s in range(c["SLOTS"]):
        members, runs = (c[last][s] - c[first][s] for first, last in (("FIRST", "LAST"), ("RUNS_FIRST", "RUNS_LAST")))
        steps = members * _cdiv(c["DEPTH"], tile[2]) + _cdiv(runs * c["GATE_WIDTH"], tile[2])
        roles.append(product("tiles", columns, tile, steps, size, size, narrow=int(launch.operands == "tf32")))
    return roles


def _weight_grad(launch: Launch) -> list[Role]:
    """Parts of the rows one after the other: tiles of the weights, of the gates, columns of the biases."""
    c = dict(launch.request.constants)
    outer, inner, rows = tile = (c["BLOCK_O"], c["BLOCK_I"], c["BLOCK_R"])
    size, chunk = launch.size["A"], launch.numbers["CHUNK"]
    narrow = 2 * (launch.operands == "tf32")
    members, width = len(c["SLOT"]), len(c["SLOT"]) * c["UNITS"]
    columns = _cdiv(c["DEPTH"], inner)
    roles = []
    for z in range(launch.grid[1]):
        steps = max(0, _cdiv(min(chunk, _rows(launch) - z * chunk), rows))
        if c["HAS_WEIGHT"]:
            tiles = members * _cdiv(c["UNITS"], outer) * columns
            roles.append(product("tiles", tiles, tile, steps, size, 4, narrow=narrow))
        if c["HAS_GATES"]:
            gates = (inner, c["GATE_WIDTH"], rows)
            roles.append(product("gates", len(c["GATE_SLOT"]) * columns, gates, steps, size, 4, narrow=narrow))
        alone = c["HAS_BIAS"] and not c["BIAS_BESIDE"]
        for name, asked, total in (("biases", alone, width), ("gates' biases", c["HAS_GATE_BIAS"], c["LOGITS"])):
            if asked:
                roles.append(Role(name, _cdiv(total, outer), steps, 0.0, float(rows * outer * size), 4.0 * outer))
    return roles


def _memory_bytes(launch: Launch) -> float:
    """Every tensor once, and once more what the sums of columns read again beside a product."""
    c = dict(launch.request.constants)
    is_read_again = c.get("HAS_BIAS") and c.get("HAS_WEIGHT") and not c["BIAS_BESIDE"]
    again = launch.bytes.get("D", 0) if is_read_again else 0
    return float(sum(launch.bytes.values()) + again)


ROLES = {
    "grouped_linear_fwd": _layer,
    "grouped_data_grad": _layer,
    "input_grad": _input_grad,
    "grouped_weight_grad": _weight_grad,
}
LIBRARY = "library"
"""Stands for the kernel of a product that the library takes."""
BY_BYTES = ("gate_combine_fwd", "gate_combine_bwd", "reduce_parts", "norm_sums_merge")
"""Kernels that only move memory."""


def resources_of(launch: Launch, rows: Sequence[Mapping[str, Any]]) -> Resources:
    """What a table of compiled kernels has of a launch; of several alike the worst.

    A launch that the table lacks gets the worst of those with its tile, or of its kernel: ``tests/test_aot.py`` finds
    out that the table is old.
    """
    described = launch.request.described()
    kinds = dict(launch.request.signature).values()
    dtype = "bfloat16" if "*bf16" in kinds else "float32"
    mine = [
        row for row in rows
        if row["architecture"] == ARCHITECTURE and row["dtype"] == dtype and row["precision"] in ("-", "tf32")
        and row["kernel"] == described["kernel"]
    ]  # fmt: skip
    found = [row for row in mine if all(row[key] == value for key, value in described.items())]
    alike = [row for row in mine if all(row[key] == described[key] for key in ("tile", "warps", "stages"))]
    found = found or alike or mine
    if not found:
        raise LookupError(
            f"{TABLE.name} has no row of {launch.kernel} in {dtype}: compile again with benchmarks/aot.py"
        )
    return Resources(
        max(row["registers"] for row in found),
        max(row["shared"] for row in found),
        launch.request.warps,
        any(row.get("serialised") for row in found),
    )


def prediction(launch: Launch, rows: Sequence[Mapping[str, Any]]) -> Prediction:
    """What a recorded launch takes."""
    kernel, programs = launch.kernel, math.prod(launch.grid)
    if kernel in BY_BYTES:
        time = _memory_bytes(launch) / MEMORY * 1e6
        return Prediction(max(LAUNCH, time), "bytes" if time > LAUNCH else "launch", programs, programs)
    persistent = kernel != launch.role
    roles = ROLES[launch.role](launch)
    counted = sum(role.programs for role in roles)
    if counted != programs and not persistent:
        raise ValueError(f"{kernel}: the model counts {counted} programs, the launch has {programs}: change the model")
    found = resources_of(launch, rows)
    return predict(roles, _memory_bytes(launch), found, launch.operands, persistent=persistent)


def in_library(launch: Launch) -> float | None:
    """What the library would take for it, where it is one plain product of all members; the gates' part apart."""
    c = dict(launch.request.constants)
    is_product = launch.role in ROLES and launch.role != "grouped_data_grad"
    slots = c["SLOTS"] if "SLOTS" in c else len(set(c.get("SLOT", ())))
    members = c["LAST"][0] if "LAST" in c else len(c.get("SLOT", ()))
    if not is_product or slots != 1 or members < 2:
        return None
    gates = sum(launch.bytes.get(name, 0) for name in ("DL", "Logits", "GateW"))
    flops = 2.0 * _rows(launch) * launch.depth * c["UNITS"] * members
    return predict_library(flops, sum(launch.bytes.values()) - gates, launch.operands)


def step(size: str, dtype: str, rows: Sequence[Mapping[str, Any]], *, with_library: bool) -> list[dict[str, Any]]:
    """A row per launch of a training step of the first level of a trunk, in order; ``with_library``: as the tables
    route it, to the library and to programs that stay."""
    name, _, precision = dtype.partition("/")
    found = []
    for launch in recorded(SIZES[size].with_dtype(name), precision or "ieee", with_library=with_library):
        if isinstance(launch, LibraryProduct):
            time = predict_library(2.0 * math.prod(launch.shape), launch.bytes, launch.operands)
            predicted = Prediction(time, "library", 1, 1)
            about: dict[str, Any] = {"kernel": LIBRARY, "widths": list(launch.shape), "tile": [], "library": None}
        else:
            predicted, described = prediction(launch, rows), launch.request.described()
            about = {key: described[key] for key in ("kernel", "widths", "tile")} | {"library": in_library(launch)}
        head = {"size": size, "dtype": dtype, "routed": with_library}
        found.append({**head, **about, **predicted._asdict(), "waves": predicted.waves})
    return found


def steps() -> list[dict[str, Any]]:
    """Those of all sizes and dtypes, with nothing routed and as the tables route them."""
    rows = aot.rows_of(TABLE)
    routes = [(size, dtype, takes) for size in MODEL_SIZES for dtype in MODEL_DTYPES for takes in (False, True)]
    return [row for size, dtype, takes in routes for row in step(size, dtype, rows, with_library=takes)]


def totals(rows: Sequence[Mapping[str, Any]], *, routed: bool = True) -> dict[tuple[str, str], float]:
    """Microseconds of a step by size and dtype."""
    found: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["routed"] == routed:
            key = (row["size"], row["dtype"])
            found[key] = found.get(key, 0.0) + row["total"]
    return found


def _time(microseconds: float) -> str:
    return f"{microseconds:.1f}" if microseconds < 10 else f"{microseconds:,.0f}"


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Totals, the longest first; then a table of launches for each, the longest first."""
    routed, alone = totals(rows), totals(rows, routed=False)
    order = sorted(routed, key=routed.__getitem__, reverse=True)
    heads = ["size", "dtype", "predicted, µs (no GPU has measured this)", "with nothing routed"]
    parts = [table(heads, [[*key, _time(routed[key]), _time(alone[key])] for key in order], left=(0, 1))]
    heads = ["kernel", "widths", "tile", "µs", "bound by", "waves", "idle"]
    heads += ["filling, ending, serialised", "library, µs"]
    for size, dtype in order:
        lines = []
        mine = [row for row in rows if (row["size"], row["dtype"]) == (size, dtype) and row["routed"]]
        for row in sorted(mine, key=lambda row: row["total"], reverse=True):
            made = [" x ".join(map(str, row[key])) or "-" for key in ("widths", "tile")]
            bound = row["bound"] + (f", {row['last']} last" if row["idle"] > 0.05 and row["last"] != "tiles" else "")
            shares = [f"{row[key]:.0%}" for key in ("idle", "extra")]
            waves = f"{row['waves']:.2f}" if row["kernel"].removesuffix(PERSISTENT) in ROLES else "-"
            library = "-" if row["library"] is None else _time(row["library"])
            lines.append([f"`{row['kernel']}`", *made, _time(row["total"]), bound, waves, *shares, library])
        parts += [f"Predicted for {size}, {dtype}:", table(heads, lines, left=(0, 1, 2, 4))]
    return "\n\n".join(parts) + "\n"


BLOCK = "kernel_model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print a row per launch, as JSON")
    parser.add_argument("--write-page", action="store_true", help="put the tables into docs/kernels.md")
    arguments = parser.parse_args()
    rows = steps()
    if arguments.json:
        print(json.dumps(rows))
    elif arguments.write_page:
        aot.write_block(BLOCK, summary(rows))
    else:
        print(summary(rows))


if __name__ == "__main__":
    main()

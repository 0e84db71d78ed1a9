"""The report on a GPU: a table per size and dtype, the ceilings of the GPU, and the targets."""

from __future__ import annotations

from benchmarks.configs import GPU_TARGETS, SAVED_TARGETS, GpuTarget
from benchmarks.contestants import CONTESTANTS, GPU_EAGER_PEERS, OURS
from benchmarks.rendering import MODE_NAMES, mebibytes, number, software, table
from benchmarks.result_files import Result


def gpu_table(content: Result) -> str:
    """Milliseconds of every contestant: a table per size and dtype, a column per mode, the best first; below it the
    time that the ceilings of this GPU allow, and who could not run."""
    cases: dict[tuple[str, str], dict[str, Result]] = {}
    for case in content["results"]:
        cases.setdefault((case["size"], case["dtype"]), {})[case["mode"]] = case
    parts = []
    for (size, dtype), modes in cases.items():
        saved = {
            row["contestant"]: row["saved_bytes"]
            for row in content["saved"]
            if (row["size"], row["dtype"]) == (size, dtype)
        }
        names = list(dict.fromkeys(name for case in modes.values() for name in case["contestants"]))
        first = next(iter(modes.values()))
        names.sort(key=lambda n: (n not in first["contestants"], first["contestants"].get(n, {}).get("median_ms", 0.0)))
        heads = [f"{MODE_NAMES[mode]}, ms" for mode in modes]
        lines = []
        for name in names:
            rows = [case["contestants"].get(name) for case in modes.values()]
            cells = ["" if row is None else number(row["median_ms"]) for row in rows]
            peak = None if rows[0] is None else rows[0]["peak_bytes"]
            cells += [mebibytes(peak), mebibytes(saved.get(name))]
            title = f"**`{name}`**" if name.partition("/")[0] in OURS else f"`{name}`"
            lines.append([title, *cells])
        lines.append(["ceilings of this GPU", *(number(roofline_ms(content, case)) for case in modes.values()), "", ""])
        parts.append(f"### {size}, {dtype}, batch {first['batch']:,}")
        parts.append(table(["contestant", *heads, "peak memory, MiB", "saved for backward, MiB"], lines))
        failed = {name: why for case in modes.values() for name, why in case["failed"].items()}
        if failed:
            parts.append("Not run: " + "; ".join(f"`{name}`: {why}" for name, why in failed.items()) + ".")
    return "\n\n".join(parts)


def roofline_ms(content: Result, case: Result) -> float:
    """The least time of a case at the ceilings of its own run: products at the speed of the best ``torch.mm``, or least
    bytes at the speed of a copy, whichever lasts longer."""
    (found,) = (c for c in content["ceilings"] if (c["size"], c["dtype"]) == (case["size"], case["dtype"]))
    seconds = max(case["flops"] / found["mm_flops_per_s"], case["least_bytes"] / found["copy_bytes_per_s"])
    return float(seconds * 1e3)


def _verdict(value: float, target: float, *, at_most: bool = False) -> str:
    reached = value <= target if at_most else value >= target
    bound = "at most" if at_most else "at least"
    end = "reached" if reached else f"missed by {abs(target - value):.2f}"
    return f"{value:.2f}, wanted {bound} {target:g}: {end}"


def gpu_targets(content: Result) -> list[str]:
    """A line per target: what was measured, what was wanted, and whether it was reached."""
    lines = []
    for case in content["results"]:
        target = GPU_TARGETS.get(case["size"])
        if target is not None and (case["mode"], case["dtype"]) == ("train", "bfloat16"):
            lines += [f"{case['size']}: {line}" for line in _speed(content, case, target)]
    saved = {(r["size"], r["dtype"], r["contestant"]): r["saved_bytes"] for r in content["saved"]}
    for name, wanted in SAVED_TARGETS.items():
        for (size, dtype, contestant), size_bytes in saved.items():
            if contestant == name and (size, dtype, "loop") in saved:
                share = _verdict(size_bytes / saved[size, dtype, "loop"], wanted, at_most=True)
                lines.append(f"{size}, {dtype}: `{name}` saves for backward, in units of the eager loop's: {share}")
    return lines


def _speed(content: Result, case: Result, target: GpuTarget) -> list[str]:
    lines = []
    rows = case["contestants"]
    eager = [name for name in rows if name in GPU_EAGER_PEERS]
    others = [
        name for name in rows
        if CONTESTANTS[name.partition("/")[0]].compiled
        or (name.endswith("/graph") and name.partition("/")[0] in GPU_EAGER_PEERS)
    ]  # fmt: skip
    asked = (
        ("eager over the best eager per-expert peer", "ratio_to_fast", eager, target.eager_over_eager),
        (
            "in a CUDA graph over the best eager per-expert peer",
            "ratio_to_fast/graph", eager, target.graph_over_eager,
        ),
        (
            "in a CUDA graph over the best compiled or graphed per-expert peer",
            "ratio_to_fast/graph", others, target.graph_over_compiled,
        ),
    )  # fmt: skip
    for what, key, peers, wanted in asked:
        if wanted is None:
            continue
        found = {name: float(rows[name][key]) for name in peers if key in rows[name]}
        if found:
            best = min(found, key=lambda name: found[name])
            lines.append(f"ours {what} (`{best}`): {_verdict(found[best], wanted)}")
        else:
            lines.append(f"ours {what}: not measured, wanted at least {wanted:g}")
    for what, key, name in (
        ("eager", "ratio_to_fast", "bmm"), ("in a CUDA graph", "ratio_to_fast/graph", "bmm/graph"),
    ):  # fmt: skip
        if key in rows.get(name, ()):
            lines.append(f"ours {what} over `{name}`, which is stacked: {rows[name][key]:.2f}")
    if target.roofline is not None:
        ours = [float(rows[n]["median_ms"]) for n in ("fast", "fast/graph") if n in rows]
        share = f"not measured, wanted at least {target.roofline:g}"
        if ours:
            share = _verdict(roofline_ms(content, case) / min(ours), target.roofline)
        lines.append(f"share of what the ceilings allow: {share}")
    return lines


def gpu_block(content: Result) -> str:
    """Targets, times, and where they were measured."""
    about = content["environment"]
    gpu = "no GPU: these times mean nothing"
    if about["gpu"] is not None:
        gpu = f"{about['gpu']}, {about['multiprocessors']} multiprocessors, "
        gpu += f"driver {about['driver']}, CUDA {about['cuda']}"
    targets = "\n".join(f"- {line}" for line in gpu_targets(content))
    return f"{targets}\n\n## Times\n\n{gpu_table(content)}\n\n{gpu}; {about['cpu']}; {software(about)}"

"""From result files to a table and pictures: ``python benchmarks/report.py [FOLDER] [--write-readme]``.

The table stands in README.md between two comments and says which folder it came from, so a test can render it again.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

from benchmarks.bare_gemm import FLOOR
from benchmarks.configs import GPU_TARGETS, SAVED_TARGETS
from benchmarks.contestants import CONTESTANTS, GPU_EAGER_PEERS, OURS, PEERS
from benchmarks.environment import ROOT
from benchmarks.result_files import Result, load

README = ROOT / "README.md"
NORMS_PAGE = ROOT / "docs" / "performance.md"
SCALING_PAGE = ROOT / "docs" / "training_at_scale.md"
WHOLE_MODEL_PAGE = ROOT / "docs" / "accelerate.md"
HOST_TIME_PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- benchmark:cpu -->", "<!-- /benchmark:cpu -->"
_BLOCK = re.compile(r"(<!-- benchmark:(\w+) -->\n)(.*?)(<!-- /benchmark:\2 -->)", re.DOTALL)
_SOURCE = re.compile(r"\(benchmarks/results/([a-z0-9.-]+)\)")
MODE_NAMES = {"train": "forward + backward", "inference": "inference", "forward": "forward"}


def _number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def best_peer(case: Result) -> str:
    """The contestant that comes closest to ``fast``, or is ahead of it: the lowest of the median paired ratios."""
    times = case["contestants"]
    return min((name for name in PEERS if name in times), key=lambda name: float(times[name]["ratio_to_fast"]))


def ratio_to_best(case: Result) -> float:
    """How many times faster ``fast`` is than the best peer; below 1 it is slower."""
    return float(case["contestants"][best_peer(case)]["ratio_to_fast"])


def worst_case_sentence(content: Result) -> str:
    """What the README says before its table: where ``fast`` is least ahead of the best peer, or behind it."""
    cases = sorted(content["results"], key=ratio_to_best)
    worst = cases[0]
    times, best = worst["contestants"], best_peer(worst)
    rows = f"{worst['batch']:,} row{'s' if worst['batch'] > 1 else ''}"
    peer, ours = (_number(times[name]["median_ms"]) for name in (best, "fast"))
    ratio = ratio_to_best(worst)
    verdict = "`fast` is slower than the best peer" if ratio < 1 else "`fast` is least ahead of the best peer"
    sentence = (
        f"The worst case first: in {MODE_NAMES[worst['mode']]} of {rows} {verdict}, {ratio:.2f} x "
        f"(`{best}`: {CONTESTANTS[best].note}; {peer} ms against {ours} ms)."
    )
    if len(cases) == 1:
        return sentence
    others = sorted({f"{ratio_to_best(case):.2f}" for case in cases[1:]}, key=float)
    return f"{sentence} In the other cases it is {' to '.join(dict.fromkeys((others[0], others[-1])))} x as fast."


def _environment(environment: Result, threads: str | None = None) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if name != "numpy")
    dirty = " with uncommitted changes" if environment["uncommitted_changes"] else ""
    return (
        f"{environment['cpu']}, {environment['cores']} cores, {environment['cpu_capability']}, "
        f"{threads or str(environment['threads']) + ' threads'}; Python {environment['python']}, {versions}; "
        f"commit {environment['commit']}{dirty}, {environment['date']}"
    )


def head_to_head_table(content: Result) -> str:
    """Milliseconds of every contestant at every case; below, ours against the best peer, the loop and the floor."""
    cases = content["results"]
    saved = {entry["contestant"]: entry for entry in content["saved"]}
    names = list(dict.fromkeys(name for case in cases for name in case["contestants"]))
    names.sort(key=lambda name: (name not in OURS, name == FLOOR))  # stable: ours first, the floor last
    head = [f"{MODE_NAMES[case['mode']]}, {case['batch']}" for case in cases]
    lines = [
        _row(["ms per call, at batch", *head, "saved for backward, MiB", "operators"]),
        _row(["---", *["---:"] * (len(cases) + 2)]),
    ]
    for name in names:
        times = [case["contestants"].get(name) for case in cases]
        cells = ["" if time is None else _number(time["median_ms"]) for time in times]
        entry = saved.get(name)
        memory = "" if entry is None else _number(entry["saved_bytes"] / 2**20)
        operators = "" if entry is None else str(entry["forward_operators"] + entry["backward_operators"])
        title = f"**`{name}`**" if name in OURS else f"`{name}`"
        lines.append(_row([title, *cells, memory, operators]))
    share = saved["fast"]["saved_bytes"] / saved["loop"]["saved_bytes"]
    if any(set(case["contestants"]) & (set(PEERS) - {"loop"}) for case in cases):
        best = [f"{ratio_to_best(case):.2f} x, `{best_peer(case)}`" for case in cases]
        lines.append(_row(["speed-up of `fast` over the best peer", *best, "", ""]))
    loop = [f"{case['contestants']['loop']['ratio_to_fast']:.2f} x" for case in cases]
    lines.append(_row(["speed-up of `fast` over `loop`", *loop, f"{share:.2f} of `loop`", ""]))
    floor = [f"{1 / case['contestants'][FLOOR]['ratio_to_fast']:.2f} x" for case in cases]
    lines.append(_row([f"`fast` in units of `{FLOOR}`", *floor, "", ""]))
    return "\n".join(lines)


def _legend(content: Result) -> str:
    names = list(dict.fromkeys(name for case in content["results"] for name in case["contestants"]))
    notes = [f"`{name}`: {CONTESTANTS[name].note}" for name in names if name != FLOOR]
    return ". ".join([*notes, f"`{FLOOR}`: the matrix products of the step alone, by `torch.mm`"]) + "."


def _block(
    machine: str,
    kind: str,
    content: Result,
    table: str,
    *,
    factors: str = "a factor is the median",
    notes: str = "",
    threads: str | None = None,
) -> str:
    """A table, how it was measured, and the file that it is from."""
    rounds = min(int(entry["rounds"]) for entry in content["results"])
    load = max(max(entry["load"]) for entry in content["results"])
    paragraphs = [
        table,
        f"Medians of {rounds} interleaved rounds; {factors} of paired ratios. Load average of the machine up to "
        f"{load:.2f}.{notes}",
        f"{_environment(content['environment'], threads)}. Figures from benchmarks/results/{machine}/{kind}.json.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def norms_table(content: Result) -> str:
    """A row per peer: milliseconds of it and of ours, and how many times faster ours is; last, the bytes saved."""
    pairs: dict[tuple[str, str], list[Result]] = {}
    for entry in content["results"]:
        pairs.setdefault((entry["peer"], entry["ours"]), []).append(entry)
    saved = {row["contestant"]: row["saved_bytes"] for row in content["saved"]}
    lines: list[str] = []
    for (peer, ours), entries in pairs.items():
        if not lines:
            heads = [f"{MODE_NAMES[entry['mode']]}, {entry['batch']}" for entry in entries]
            lines += [_row(["ms, at batch", *heads, "saved, MiB"]), _row(["---", *["---:"] * (len(heads) + 1)])]
        cells = [f"{_number(e['peer_ms'])} / {_number(e['ours_ms'])}: **{e['ratio']:.2f} x**" for e in entries]
        theirs, own = (saved[name] / 2**20 for name in (peer, ours))
        cells.append(f"{_number(theirs)} / {_number(own)}: {own / theirs:.2f}")
        lines.append(_row([f"`{peer}` / `{ours}`", *cells]))
    return "\n".join(lines)


def norms_block(machine: str, content: Result) -> str:
    """What stands between the two comments in docs/performance.md."""
    notes = ". ".join(
        f"`{name}`: {CONTESTANTS[name].note}"
        for name in dict.fromkeys(e[side] for e in content["results"] for side in ("peer", "ours"))
    )
    return _block(machine, "norms", content, norms_table(content), notes=f" {notes}.")


def scaling_table(content: Result) -> str:
    """A row per batch and number of ranks: milliseconds, factor, and efficiencies of both trunks."""
    heads = ["rows on each rank", "ranks", "`fast`, ms", "`loop`, ms", "speed-up"]
    lines = [_row([*heads, "efficiency: `fast`", "apart", "`loop`", "apart"]), _row(["---:"] * 9)]
    for entry in content["results"]:
        fast, loop = (entry["contestants"][name] for name in ("fast", "loop"))
        cells = [f"{entry['batch_per_rank']:,}", str(entry["ranks"])]
        cells += [_number(fast["median_ms"]), _number(loop["median_ms"]), f"{loop['ratio_to_fast']:.2f} x"]
        for row in (fast, loop):
            found = [row.get(name) for name in ("efficiency", "efficiency_apart")]
            cells += ["" if entry["ranks"] == 1 else f"{value:.2f}" for value in found]
        lines.append(_row(cells))
    return "\n".join(lines)


def scaling_block(machine: str, content: Result) -> str:
    """What stands between the two comments in docs/training_at_scale.md."""
    threads = max(int(entry["threads_per_rank"]) for entry in content["results"])
    about = f"{threads} thread{'s' if threads > 1 else ''} per rank"
    factors = "factors and efficiencies are medians"
    return _block(machine, "scaling", content, scaling_table(content), factors=factors, threads=about)


def grid_sentence(content: Result) -> str:
    """The grid in one line: how many points, the lowest and the middle ratio per mode."""
    parts = []
    for mode in ("train", "inference"):
        ratios = sorted((float(entry[mode]["ratio"]), str(entry["point"])) for entry in content["results"])
        middle = statistics.median(ratio for ratio, _ in ratios)
        parts.append(
            f"{MODE_NAMES[mode]} {middle:.2f} x in the middle, {ratios[0][0]:.2f} x at worst (`{ratios[0][1]}`)"
        )
    entries = content["results"]
    spans = [
        sorted({int(entry["batch"]) for entry in entries}),
        sorted({int(entry["tasks"]) for entry in entries}),
        sorted({len(entry["units"]) for entry in entries}),
    ]
    batches, tasks, layers = (f"{span[0]:,} to {span[-1]:,}" for span in spans)
    return (
        f"Speed-up of `fast` over `loop` on a grid of {len(entries)} points (batch {batches}, {tasks} tasks, "
        f"{layers} expert layers): {'; '.join(parts)}."
    )


def grid_table(content: Result) -> str:
    """One row per point."""
    lines = [
        _row(["point", "input", "expert widths", "loop, fwd+bwd ms", "ratio", "loop, inference ms", "ratio"]),
        _row(["---", "---:", "---", *["---:"] * 4]),
    ]
    for entry in content["results"]:
        train, inference = entry["train"], entry["inference"]
        units = ", ".join(map(str, entry["units"]))
        times = [_number(train["loop_ms"]), f"{train['ratio']:.2f}"]
        times += [_number(inference["loop_ms"]), f"{inference['ratio']:.2f}"]
        lines.append(_row([f"`{entry['point']}`", str(entry["in_features"]), units, *times]))
    return "\n".join(lines)


def whole_model_table(content: Result) -> str:
    """Whole models: milliseconds of the original and the accelerated one, eager and compiled, and the speed-up."""
    variants = list(dict.fromkeys(name for case in content["results"] for name in case["contestants"]))
    lines = [
        _row(["library", "what, at batch", *(f"{name}, ms" for name in variants), "speed-up", "both compiled"]),
        _row(["---", "---", *["---:"] * (len(variants) + 2)]),
    ]
    for case in content["results"]:
        times = case["contestants"]
        what = {"train": "training step with optimizer"}.get(case["mode"], MODE_NAMES[case["mode"]])
        cells = [_number(times[name]["median_ms"]) if name in times else "" for name in variants]
        ratios = {name: times[name]["ratio_to_accelerated"] for name in times}
        cells.append(f"{ratios['original']:.2f} x")
        compiled = [ratios[name] for name in ("original/compiled", "accelerated/compiled") if name in ratios]
        cells.append(f"{compiled[0] / compiled[1]:.2f} x" if len(compiled) == 2 else "")
        lines.append(_row([case["library"], f"{what}, {case['batch']:,}", *cells]))
    return "\n".join(lines)


def host_time_table(content: Result) -> str:
    """Microseconds of the host, and the part of the loop's time."""
    entries = content["results"]
    heads = [cell for entry in entries for cell in (f"{MODE_NAMES[entry['mode']]}, us", "least", "of the loop")]
    lines = [_row(["", *heads]), _row(["---", *["---:"] * len(heads)])]
    for name in dict.fromkeys(name for entry in entries for name in entry["contestants"]):
        times = [entry["contestants"][name] for entry in entries]
        cells = [
            cell
            for time in times
            for cell in (_number(time["median_us"]), _number(time["least_us"]), f"{time['ratio_to_loop']:.2f}")
        ]
        lines.append(_row([name, *cells]))
    return "\n".join(lines)


def host_time_block(machine: str, content: Result) -> str:
    """What stands between the two comments in docs/benchmarks.md."""
    return _block(
        machine, "host_time", content, host_time_table(content), factors="a part is the median", threads="1 thread"
    )


def whole_model_block(machine: str, content: Result) -> str:
    """What stands between the two comments in docs/accelerate.md."""
    return _block(machine, "whole_model", content, whole_model_table(content))


def suite_table(content: Result) -> str:
    """The pytest-benchmark suite: a row per size and contestant, a column per mode."""
    cells: dict[tuple[str, str], dict[str, Result]] = {}
    for entry in content["results"]:
        cells.setdefault((entry["size"], entry["contestant"]), {})[entry["mode"]] = entry
    lines = [
        _row(["size", "contestant", "backend", "forward ms", "fwd+bwd ms", "inference ms", "fwd+bwd GFLOP/s"]),
        _row(["---", "---", "---", *["---:"] * 4]),
    ]
    for (size, contestant), modes in cells.items():
        times = [_number(modes[m]["median_ms"]) if m in modes else "" for m in ("forward", "train", "inference")]
        train = modes["train"]
        rate = f"{train['flops'] / train['median_ms'] / 1e6:.0f}"
        lines.append(_row([size, f"`{contestant}`", train["backend"], *times, rate]))
    return "\n".join(lines)


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
        lines = [
            f"### {size}, {dtype}, batch {first['batch']:,}",
            "",
            _row(["contestant", *heads, "peak memory, MiB", "saved for backward, MiB"]),
            _row(["---", *["---:"] * (len(heads) + 2)]),
        ]
        for name in names:
            rows = [case["contestants"].get(name) for case in modes.values()]
            cells = ["" if row is None else _number(row["median_ms"]) for row in rows]
            peak = None if rows[0] is None else rows[0]["peak_bytes"]
            kept = saved.get(name)
            cells += ["" if size is None else _number(size / 2**20) for size in (peak, kept)]
            title = f"**`{name}`**" if name.partition("/")[0] in OURS else f"`{name}`"
            lines.append(_row([title, *cells]))
        allowed = [f"{_number(roofline_ms(content, case))}" for case in modes.values()]
        lines.append(_row(["ceilings of this GPU", *allowed, "", ""]))
        failed = {name: why for case in modes.values() for name, why in case["failed"].items()}
        lines += ["", "Not run: " + "; ".join(f"`{n}`: {why}" for n, why in failed.items()) + "."] if failed else []
        parts.append("\n".join(lines))
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
        if target is None or (case["mode"], case["dtype"]) != ("train", "bfloat16"):
            continue
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
            if not found:
                lines.append(f"{case['size']}: ours {what}: not measured, wanted at least {wanted:g}")
                continue
            best = min(found, key=lambda name: found[name])
            lines.append(f"{case['size']}: ours {what} (`{best}`): {_verdict(found[best], wanted)}")
        for what, key, name in (
            ("eager", "ratio_to_fast", "bmm"), ("in a CUDA graph", "ratio_to_fast/graph", "bmm/graph"),
        ):  # fmt: skip
            if key in rows.get(name, ()):
                lines.append(f"{case['size']}: ours {what} over `{name}`, which is stacked: {rows[name][key]:.2f}")
        if target.roofline is not None:
            ours = [float(rows[n]["median_ms"]) for n in ("fast", "fast/graph") if n in rows]
            share = f"not measured, wanted at least {target.roofline:g}"
            if ours:
                share = _verdict(roofline_ms(content, case) / min(ours), target.roofline)
            lines.append(f"{case['size']}: share of what the ceilings allow: {share}")
    for name, wanted in SAVED_TARGETS.items():
        saved = {(r["size"], r["dtype"], r["contestant"]): r["saved_bytes"] for r in content["saved"]}
        for (size, dtype, contestant), size_bytes in saved.items():
            if contestant == name and (size, dtype, "loop") in saved:
                share = size_bytes / saved[size, dtype, "loop"]
                lines.append(
                    f"{size}, {dtype}: `{name}` saves for backward, in units of the eager loop's: "
                    + _verdict(share, wanted, at_most=True)
                )
    return lines


def _gpu_environment(about: Result) -> str:
    dirty = " with uncommitted changes" if about["uncommitted_changes"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in about["packages"].items() if name != "numpy")
    gpu = "no GPU: these times mean nothing"
    if about["gpu"] is not None:
        gpu = f"{about['gpu']}, {about['multiprocessors']} multiprocessors, "
        gpu += f"driver {about['driver']}, CUDA {about['cuda']}"
    made = f"commit {about['commit']}{dirty}, {about['date']}"
    return f"{gpu}; {about['cpu']}; Python {about['python']}, {versions}; {made}"


def readme_block(machine: str, files: Mapping[str, Result]) -> str:
    """What stands between the two comments in README.md."""
    content = files["head_to_head"]
    cases = content["results"]
    rounds = min(int(case["rounds"]) for case in cases)
    paragraphs = [
        worst_case_sentence(content),
        head_to_head_table(content),
        f"Medians of {rounds} interleaved rounds; a factor is the median of paired ratios. " + _legend(content),
    ]
    if "grid" in files:
        paragraphs.append(grid_sentence(files["grid"]))
    source = f"[benchmarks/results/{machine}](benchmarks/results/{machine})"
    paragraphs.append(f"{_environment(content['environment'])}. Figures from {source}; `make bench` measures again.")
    return "\n\n".join(paragraphs) + "\n"


def readme_source(text: str) -> str:
    """The machine whose results the README quotes."""
    found = _SOURCE.search(_between(text))
    if found is None:
        raise ValueError(f"README.md: expected a link to benchmarks/results/<machine> between {BEGIN} and {END}")
    return found[1]


def _between(text: str) -> str:
    found = _BLOCK.search(text)
    if found is None:
        raise ValueError(f"README.md: expected the lines {BEGIN} and {END}, found none")
    return found[3]


def quoted(text: str) -> str:
    """What a page holds between the two comments."""
    return _between(text)


def with_block(text: str, block: str) -> str:
    """The page with the block between the two comments replaced."""
    _between(text)
    return _BLOCK.sub(lambda found: f"{found[1]}{block}{found[4]}", text)


def markdown(machine: str, files: Mapping[str, Result]) -> str:
    """The whole report."""
    parts = [f"# Benchmarks on {machine}"]
    if "head_to_head" in files:
        parts += ["## Head to head", readme_block(machine, files)]
    if "norms" in files:
        parts += ["## Norms and dropout", norms_block(machine, files["norms"])]
    if "grid" in files:
        parts += ["## Grid: the loop's time over ours", grid_table(files["grid"])]
    if "whole_model" in files:
        parts += ["## Whole models", whole_model_block(machine, files["whole_model"])]
    if "scaling" in files:
        parts += ["## DistributedDataParallel", scaling_block(machine, files["scaling"])]
    if "host_time" in files:
        parts += ["## Host time of the kernels", host_time_block(machine, files["host_time"])]
    if "gpu" in files:
        parts += ["## Targets", "\n".join(f"- {line}" for line in gpu_targets(files["gpu"]))]
        parts += ["## Times", gpu_table(files["gpu"]), _gpu_environment(files["gpu"]["environment"])]
    if "suite" in files:
        parts += ["## Suite", suite_table(files["suite"]), _environment(files["suite"]["environment"])]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def plots(files: Mapping[str, Result], folder: Path) -> list[Path]:
    """The head-to-head as time over the bare products, and the grid's ratios."""
    from ple_fast.viz import plot_bars

    written = []
    if "head_to_head" in files:
        groups = {}
        for case in files["head_to_head"]["results"]:
            times = case["contestants"]
            floor = float(times[FLOOR]["median_ms"])
            label = f"{MODE_NAMES[case['mode']]}\nbatch {case['batch']:,}"
            groups[label] = {n: round(float(t["median_ms"]) / floor, 3) for n, t in times.items() if n != FLOOR}
        written.append(folder / "head_to_head.png")
        plot_bars(groups, ylabel="time / bare matrix products", xlabel="mode", log=True, path=written[-1])
    if "grid" in files:
        written.append(folder / "grid.png")
        _plot_grid(files["grid"]["results"], written[-1])
    return written


def _plot_grid(entries: Sequence[Result], path: Path) -> None:
    """A panel per mode: the speed-up over the loop against the batch, a marker per number of expert layers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), dpi=130, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, mode in zip(panels, ("train", "inference"), strict=True):
        for layers, marker in zip(range(1, 5), "os^D", strict=True):
            chosen = [entry for entry in entries if len(entry["units"]) == layers]
            places = [(entry["batch"], entry[mode]["ratio"], entry["tasks"]) for entry in chosen]
            if places:
                batch, ratio, tasks = zip(*places, strict=True)
                sizes = [10.0 * count for count in tasks]
                axes.scatter(batch, ratio, s=sizes, marker=marker, alpha=0.75, label=f"{layers} expert layers")
        axes.axhline(1.0, color="#808080", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("batch")
        axes.set_title(MODE_NAMES[mode], fontsize=10)
        axes.grid(color="#E0E0E0", linewidth=0.7)
        axes.set_axisbelow(True)
    panels[0].set_ylabel("time of loop / time of fast\n(median of paired ratios)")
    panels[1].legend(fontsize=8, title="larger marker: more tasks", title_fontsize=8)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="results/<machine>; default: what README.md quotes")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "benchmarks", help="folder of report.md and the plots"
    )
    parser.add_argument(
        "--write-readme", action="store_true", help="put the tables into README.md and the pages of docs"
    )
    options = parser.parse_args(arguments)
    readme = README.read_text(encoding="utf-8") if README.is_file() else ""
    folder = options.folder or ROOT / "benchmarks" / "results" / readme_source(readme)
    files = load(folder)
    text = markdown(folder.name, files)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "report.md").write_text(text, encoding="utf-8")
    drawn = plots(files, options.out)
    print(f"wrote {', '.join(str(path) for path in (options.out / 'report.md', *drawn))}", file=sys.stderr)
    if options.write_readme:
        README.write_text(with_block(readme, readme_block(folder.name, files)), encoding="utf-8")
        print(f"wrote {README}", file=sys.stderr)
        for kind, page, block in (
            ("norms", NORMS_PAGE, norms_block),
            ("scaling", SCALING_PAGE, scaling_block),
            ("whole_model", WHOLE_MODEL_PAGE, whole_model_block),
            ("host_time", HOST_TIME_PAGE, host_time_block),
        ):
            if kind in files:
                text = with_block(page.read_text(encoding="utf-8"), block(folder.name, files[kind]))
                page.write_text(text, encoding="utf-8")
                print(f"wrote {page}", file=sys.stderr)


if __name__ == "__main__":
    main()

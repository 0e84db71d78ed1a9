"""From result files to tables and pictures: ``python benchmarks/report.py [FOLDER] [--write-readme]``.

The README's table says which folder it came from.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

from benchmarks.bare_best import BEST_FLOOR
from benchmarks.bare_gemm import FLOOR
from benchmarks.configs import GRID_MODES
from benchmarks.contestants import CONTESTANTS, FLOORS, OURS, PEERS
from benchmarks.environment import ROOT
from benchmarks.gpu_report import gpu_block
from benchmarks.pictures import plots
from benchmarks.rendering import MODE_NAMES, mebibytes, number, quoted, software, table, with_block
from benchmarks.result_files import Result, load
from benchmarks.serving_report import serving_block

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
README_BLOCK = "cpu"
PROFILE_PARTS = ("head_to_head", "grid", "norms")
"""What is told of every machine and profile."""
NOTHING: Result = {"results": []}


FLOOR_NOTES = {
    FLOOR: "the matrix products of the step alone, by `torch.mm`",
    BEST_FLOOR: "the matrix products of the step alone, each by the fastest way that this machine has for it",
}


def readme_source(text: str) -> str:
    """The machine whose results the README quotes."""
    found = re.search(r"\(benchmarks/results/([a-z0-9.-]+)\)", quoted(text, README_BLOCK))
    if found is None:
        raise ValueError(
            "README.md: expected a link to benchmarks/results/<machine> in the block of its table, found none"
        )
    return found[1]


def _environment(environment: Result, threads: str | None = None) -> str:
    count = environment["threads"]
    products = f"; table of products: {environment['products']}" if "products" in environment else ""
    return (
        f"{environment['cpu']}, {environment['cores']} cores, {environment['cpu_capability']}, "
        f"{threads or f'{count} thread' + 's' * (count > 1)}; {software(environment)}{products}"
    )


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
    peer, ours = (number(times[name]["median_ms"]) for name in (best, "fast"))
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


def head_to_head_table(content: Result) -> str:
    """Milliseconds of every contestant at every case; below, ours against the best peer, the loop and the floor."""
    cases = content["results"]
    saved = {entry["contestant"]: entry for entry in content["saved"]}
    names = list(dict.fromkeys(name for case in cases for name in case["contestants"]))
    names.sort(key=lambda name: (name not in OURS, name in FLOORS))  # stable: ours first, the floors last
    rows = []
    for name in names:
        times = [case["contestants"].get(name) for case in cases]
        cells = ["" if time is None else number(time["median_ms"]) for time in times]
        entry = saved.get(name)
        operators = "" if entry is None else str(entry["forward_operators"] + entry["backward_operators"])
        title = f"**`{name}`**" if name in OURS else f"`{name}`"
        rows.append([title, *cells, mebibytes(entry and entry["saved_bytes"]), operators])
    share = f"{saved['fast']['saved_bytes'] / saved['loop']['saved_bytes']:.2f} of `loop`" if saved else ""
    if any(set(case["contestants"]) & (set(PEERS) - {"loop"}) for case in cases):
        best = [f"{ratio_to_best(case):.2f} x, `{best_peer(case)}`" for case in cases]
        rows.append(["speed-up of `fast` over the best peer", *best, "", ""])
    loop = [f"{case['contestants']['loop']['ratio_to_fast']:.2f} x" for case in cases]
    rows.append(["speed-up of `fast` over `loop`", *loop, share, ""])
    for floor in FLOORS:
        if floor in names:
            units = [f"{1 / case['contestants'][floor]['ratio_to_fast']:.2f} x" for case in cases]
            rows.append([f"`fast` in units of `{floor}`", *units, "", ""])
    heads = [f"{MODE_NAMES[case['mode']]}, {case['batch']}" for case in cases]
    return table(["ms per call, at batch", *heads, "saved for backward, MiB", "operators"], rows)


def _legend(content: Result) -> str:
    names = list(dict.fromkeys(name for case in content["results"] for name in case["contestants"]))
    notes = [f"`{name}`: {CONTESTANTS[name].note}" for name in names if name not in FLOORS]
    return ". ".join([*notes, *(f"`{name}`: {note}" for name, note in FLOOR_NOTES.items() if name in names)]) + "."


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


def readme_block(machine: str, files: Mapping[str, Result]) -> str:
    """What stands between the two comments in README.md."""
    content = files["head_to_head"]
    rounds = min(int(case["rounds"]) for case in content["results"])
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


def profiles_table(folders: Mapping[str, Result]) -> str:
    """Head to heads of several machines and profiles, by the names of their folders: a line each, the worst first."""
    rows: list[tuple[float, list[str]]] = []
    for name, content in folders.items():
        cells = []
        for case in content["results"]:
            floor = case["contestants"].get(BEST_FLOOR)
            units = "" if floor is None else f"; {1 / floor['ratio_to_fast']:.2f} x `{BEST_FLOOR}`"
            cells.append(f"{ratio_to_best(case):.2f} x `{best_peer(case)}`{units}")
        link = f"[{name}](benchmarks/results/{name})"
        rows.append((min(map(ratio_to_best, content["results"])), [link, *cells]))
    heads = [f"{MODE_NAMES[case['mode']]}, {case['batch']}" for case in next(iter(folders.values()))["results"]]
    return table(["speed of `fast`, at batch", *heads], [row for _, row in sorted(rows)])


def spreads_table(folders: Mapping[str, Mapping[str, Result]]) -> str:
    """Grid and norms of several machines and profiles, by the names of their folders: the worst first, an empty cell
    where nothing was measured."""
    rows: list[tuple[float, list[str]]] = []
    for name, parts in folders.items():
        cells, all_ratios = [], []
        for mode in GRID_MODES:
            ratios = sorted((float(e[mode]["ratio"]), f"`{e['point']}`") for e in parts.get("grid", NOTHING)["results"])
            all_ratios += ratios
            middle = f"; {statistics.median(r for r, _ in ratios):.2f} x in the middle" if ratios else ""
            cells.append(f"{ratios[0][0]:.2f} x at {ratios[0][1]}{middle}" if ratios else "")
        for mode in GRID_MODES:
            norms = [e for e in parts.get("norms", NOTHING)["results"] if e["mode"] == mode]
            ratios = sorted((float(e["ratio"]), f"`{e['peer']}`, {e['batch']}") for e in norms)
            all_ratios += ratios
            cells.append(f"{ratios[0][0]:.2f} x {ratios[0][1]}" if ratios else "")
        if all_ratios:
            rows.append((min(all_ratios)[0], [name, *cells]))
    heads = [f"{what}, {MODE_NAMES[mode]}" for what in ("grid", "norms and dropout") for mode in GRID_MODES]
    return table(["worst of", *heads], [row for _, row in sorted(rows)])


def profiles_block(folders: Mapping[str, Mapping[str, Result]]) -> str:
    """What the README says of all processors and profiles: the worst case, then a line for each; ``folders``: by name
    the parts that were measured, a head to head at least."""
    heads = {name: parts["head_to_head"] for name, parts in folders.items()}
    name, content = min(heads.items(), key=lambda item: min(map(ratio_to_best, item[1]["results"])))
    used = [own for parts in folders.values() for part, own in parts.items() if part in PROFILE_PARTS]
    commits = sorted({str(own["environment"]["commit"]) for own in used})
    paragraphs = [
        f"{worst_case_sentence(content)} That is {name}.",
        profiles_table(heads),
        f"How many times faster than the best peer of the case; then the time in units of `{BEST_FLOOR}`, "
        f"{FLOOR_NOTES[BEST_FLOOR]}. A name without threads is of 2, one without a dtype of float32; bf16 is autocast.",
        "The other parts, where they were measured: `fast` against `loop` on a grid of sizes (batch, tasks, expert "
        "layers), and each peer with norms or dropout, at each batch, against ours of the same modules.",
        spreads_table(folders),
        f"Commits {', '.join(commits)}.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def profiles() -> dict[str, dict[str, Result]]:
    """What is committed of each machine and profile, by the names of their folders."""
    folders = sorted(path.parent for path in RESULTS.glob("*/head_to_head.json"))
    return {
        folder.name: {part: own for part, own in load(folder).items() if part in PROFILE_PARTS} for folder in folders
    }


def norms_table(content: Result) -> str:
    """A row per peer: milliseconds of it and of ours, and how many times faster ours is; last, the bytes saved, which
    nobody counted under autocast."""
    pairs: dict[tuple[str, str], list[Result]] = {}
    for entry in content["results"]:
        pairs.setdefault((entry["peer"], entry["ours"]), []).append(entry)
    saved = {row["contestant"]: row["saved_bytes"] for row in content["saved"]}
    rows: list[list[str]] = []
    for (peer, ours), entries in pairs.items():
        cells = [f"{number(e['peer_ms'])} / {number(e['ours_ms'])}: **{e['ratio']:.2f} x**" for e in entries]
        if saved:
            cells.append(f"{mebibytes(saved[peer])} / {mebibytes(saved[ours])}: {saved[ours] / saved[peer]:.2f}")
        rows.append([f"`{peer}` / `{ours}`", *cells])
    heads = [f"{MODE_NAMES[entry['mode']]}, {entry['batch']}" for entry in next(iter(pairs.values()))]
    return table(["ms, at batch", *heads, *(["saved, MiB"] if saved else [])], rows)


def scaling_table(content: Result) -> str:
    """A row per batch and number of ranks: milliseconds, factor, and efficiencies of both trunks."""
    rows = []
    for entry in content["results"]:
        fast, loop = (entry["contestants"][name] for name in ("fast", "loop"))
        cells = [f"{entry['batch_per_rank']:,}", str(entry["ranks"])]
        cells += [number(fast["median_ms"]), number(loop["median_ms"]), f"{loop['ratio_to_fast']:.2f} x"]
        for trunk in (fast, loop):
            found = [trunk.get(name) for name in ("efficiency", "efficiency_apart")]
            cells += ["" if entry["ranks"] == 1 else f"{value:.2f}" for value in found]
        rows.append(cells)
    heads = ["rows on each rank", "ranks", "`fast`, ms", "`loop`, ms", "speed-up"]
    return table([*heads, "efficiency: `fast`", "apart", "`loop`", "apart"], rows, left=())


def grid_table(content: Result) -> str:
    """One row per point."""
    rows = []
    for entry in content["results"]:
        cells = [f"`{entry['point']}`", str(entry["in_features"]), ", ".join(map(str, entry["units"]))]
        for mode in ("train", "inference"):
            cells += [number(entry[mode]["loop_ms"]), f"{entry[mode]['ratio']:.2f}"]
        rows.append(cells)
    heads = ["point", "input", "expert widths", "loop, fwd+bwd ms", "ratio", "loop, inference ms", "ratio"]
    return table(heads, rows, left=(0, 2))


def whole_model_table(content: Result) -> str:
    """Whole models: milliseconds of the original and the accelerated one, eager and compiled, and the speed-up."""
    variants = list(dict.fromkeys(name for case in content["results"] for name in case["contestants"]))
    rows = []
    for case in content["results"]:
        times = case["contestants"]
        what = {"train": "training step with optimizer"}.get(case["mode"], MODE_NAMES[case["mode"]])
        cells = [number(times[name]["median_ms"]) if name in times else "" for name in variants]
        ratios = {name: times[name]["ratio_to_accelerated"] for name in times}
        cells.append(f"{ratios['original']:.2f} x")
        compiled = [ratios[name] for name in ("original/compiled", "accelerated/compiled") if name in ratios]
        cells.append(f"{compiled[0] / compiled[1]:.2f} x" if len(compiled) == 2 else "")
        rows.append([case["library"], f"{what}, {case['batch']:,}", *cells])
    heads = ["library", "what, at batch", *(f"{name}, ms" for name in variants), "speed-up", "both compiled"]
    return table(heads, rows, left=(0, 1))


def host_time_table(content: Result) -> str:
    """Microseconds of the host, and the part of the loop's time."""
    entries = content["results"]
    rows = []
    for name in dict.fromkeys(name for entry in entries for name in entry["contestants"]):
        cells = [name]
        for time in (entry["contestants"][name] for entry in entries):
            cells += [number(time["median_us"]), number(time["least_us"]), f"{time['ratio_to_loop']:.2f}"]
        rows.append(cells)
    heads = [cell for entry in entries for cell in (f"{MODE_NAMES[entry['mode']]}, us", "least", "of the loop")]
    return table(["", *heads], rows)


def embeddings_table(content: Result) -> str:
    """A row per kind and number of ids: milliseconds of a step, and how much more than with the fewest ids."""
    rows = []
    for entry in content["results"]:
        cells = [entry["ids"], f"{entry['rows']:,}"]
        for time in entry["contestants"].values():
            cells += [number(time["median_ms"]), f"{time['growth']:.2f} x"]
        rows.append(cells)
    kinds = content["results"][0]["contestants"]
    heads = [cell for name in kinds for cell in (f"{name} gradients, ms", "growth")]
    return table(["ids", "how many", *heads], rows)


def routing_table(content: Result) -> str:
    """A row per mode and number of experts: milliseconds of both, and what skipping would bring."""
    rows = []
    for entry in content["results"]:
        times = [number(entry["contestants"][name]["median_ms"]) for name in ("dense", "routed")]
        counts = [MODE_NAMES[entry["mode"]], str(entry["experts"]), f"{entry['read_per_row']:.1f}"]
        rows.append([*counts, *times, f"{entry['dense_over_routed']:.2f} x"])
    heads = ["", "experts", "read per row", "all computed, ms", "routed, ms", "gain of routing"]
    return table(heads, rows)


def _routing_notes(content: Result) -> str:
    own = content["results"][0]
    return (
        f" {own['batch']:,} rows of {own['in_features']} features, experts of {' and '.join(map(str, own['units']))} "
        f"units, {own['tasks']} tasks, `top_k={own['top_k']}`, `joint_k={own['joint_k']}`, weights as they are drawn."
    )


def towers_table(content: Result) -> str:
    """A row per make and numbers of tasks and rows: multiply-adds, and the gain of stacking in both modes."""
    rows: dict[tuple[str, int, int], list[str]] = {}
    for entry in sorted(content["results"], key=lambda own: (own["products"], own["mode"] != "train")):
        make = f"{entry['in_features']} to {', '.join(map(str, entry['units']))}, 1"
        row = rows.setdefault((make, entry["tasks"], entry["batch"]), [number(entry["products"] / 1e6)])
        row += [number(entry["contestants"]["one_by_one"]["median_ms"]), f"{entry['one_by_one_over_stacked']:.2f} x"]
    heads = [
        "widths",
        "towers",
        "rows",
        "million multiply-adds",
        "a step, one by one, ms",
        "gain",
        "predict, ms",
        "gain",
    ]
    return table(heads, [[make, str(tasks), f"{batch:,}", *row] for (make, tasks, batch), row in rows.items()])


def model_steps_table(content: Result) -> str:
    """A row per model, two columns per mode and batch: milliseconds, and times PLE's."""
    entries = content["results"]
    rows = []
    for name in entries[0]["contestants"]:
        cells = [name]
        for time in (entry["contestants"][name] for entry in entries):
            cells += [number(time["median_ms"]), f"{time['ratio_to_PLE']:.2f}"]
        rows.append(cells)
    heads = [
        cell for entry in entries for cell in (f"{MODE_NAMES[entry['mode']]}, {entry['batch']:,} rows, ms", "of PLE")
    ]
    return table(["model", *heads], rows)


def suite_table(content: Result) -> str:
    """The pytest-benchmark suite: a row per size and contestant, a column per mode."""
    cases: dict[tuple[str, str], dict[str, Result]] = {}
    for entry in content["results"]:
        cases.setdefault((entry["size"], entry["contestant"]), {})[entry["mode"]] = entry
    rows = []
    for (size, contestant), modes in cases.items():
        times = [number(modes[m]["median_ms"]) if m in modes else "" for m in ("forward", "train", "inference")]
        train = modes["train"]
        rate = f"{train['flops'] / train['median_ms'] / 1e6:.0f}"
        rows.append([size, f"`{contestant}`", train["backend"], *times, rate])
    heads = ["size", "contestant", "backend", "forward ms", "fwd+bwd ms", "inference ms", "fwd+bwd GFLOP/s"]
    return table(heads, rows, left=(0, 1, 2))


def _norms_notes(content: Result) -> str:
    names = dict.fromkeys(entry[side] for entry in content["results"] for side in ("peer", "ours"))
    return " " + ". ".join(f"`{name}`: {CONTESTANTS[name].note}" for name in names) + "."


def _threads_per_rank(content: Result) -> str:
    threads = max(int(entry["threads_per_rank"]) for entry in content["results"])
    return f"{threads} thread{'s' if threads > 1 else ''} per rank"


class Block(NamedTuple):
    """A table that a page quotes, between two comments of the name of its file."""

    page: Path
    table: Callable[[Result], str]
    factors: str = "a factor is the median"
    """Of paired ratios."""
    notes: Callable[[Result], str] = lambda content: ""
    threads: Callable[[Result], str | None] = lambda content: None
    """What the environment is said to have; None: what it had."""


BLOCKS: dict[str, Block] = {
    "norms": Block(ROOT / "docs" / "performance.md", norms_table, notes=_norms_notes),
    "scaling": Block(
        ROOT / "docs" / "training_at_scale.md", scaling_table, "factors and efficiencies are medians",
        threads=_threads_per_rank,
    ),
    "whole_model": Block(ROOT / "docs" / "accelerate.md", whole_model_table),
    "host_time": Block(
        ROOT / "docs" / "benchmarks.md", host_time_table, "a part is the median", threads=lambda content: "1 thread"
    ),
    "embeddings": Block(ROOT / "docs" / "model.md", embeddings_table, "growth is the median"),
    "towers": Block(ROOT / "docs" / "how_a_step_runs.md", towers_table, "a gain is the median"),
    "model_steps": Block(ROOT / "docs" / "model.md", model_steps_table, "a part is the median"),
    "routing": Block(
        ROOT / "docs" / "sparse_gates.md", routing_table, "the gain is the median", notes=_routing_notes
    ),
}  # fmt: skip


def block(kind: str, machine: str, content: Result) -> str:
    """One of ``BLOCKS``: the table, how it was measured, and the file that it is from."""
    about = BLOCKS[kind]
    rounds = min(int(entry["rounds"]) for entry in content["results"])
    load = max(max(entry["load"]) for entry in content["results"])
    paragraphs = [
        about.table(content),
        f"Medians of {rounds} interleaved rounds; {about.factors} of paired ratios. Load average of the machine up to "
        f"{load:.2f}.{about.notes(content)}",
        f"{_environment(content['environment'], about.threads(content))}. "
        f"Figures from benchmarks/results/{machine}/{kind}.json.",
    ]
    return "\n\n".join(paragraphs) + "\n"


SECTIONS: dict[str, tuple[str, Callable[[str, Mapping[str, Result]], str]]] = {
    "head_to_head": ("Head to head", readme_block),
    "norms": ("Norms and dropout", lambda machine, files: block("norms", machine, files["norms"])),
    "grid": ("Grid: the loop's time over ours", lambda machine, files: grid_table(files["grid"])),
    "whole_model": ("Whole models", lambda machine, files: block("whole_model", machine, files["whole_model"])),
    "scaling": ("DistributedDataParallel", lambda machine, files: block("scaling", machine, files["scaling"])),
    "embeddings": ("Embeddings", lambda machine, files: block("embeddings", machine, files["embeddings"])),
    "towers": ("Towers as one level", lambda machine, files: block("towers", machine, files["towers"])),
    "model_steps": (
        "Steps of whole models",
        lambda machine, files: block("model_steps", machine, files["model_steps"]),
    ),
    "routing": ("Skipping experts", lambda machine, files: block("routing", machine, files["routing"])),
    "host_time": ("Host time of the kernels", lambda machine, files: block("host_time", machine, files["host_time"])),
    "serving": ("Serving", lambda machine, files: serving_block(machine, files["serving"])),
    "gpu": ("Targets", lambda machine, files: gpu_block(files["gpu"])),
    "suite": (
        "Suite",
        lambda machine, files: f"{suite_table(files['suite'])}\n\n{_environment(files['suite']['environment'])}",
    ),
}
"""Of the report, by result file."""


def markdown(machine: str, files: Mapping[str, Result]) -> str:
    """The whole report."""
    parts = [f"# Benchmarks on {machine}"]
    for kind, (title, render) in SECTIONS.items():
        if kind in files:
            parts += [f"## {title}", render(machine, files).rstrip("\n")]
    return "\n\n".join(parts) + "\n"


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
    folder = options.folder or RESULTS / readme_source(readme)
    files = load(folder)
    text = markdown(folder.name, files)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "report.md").write_text(text, encoding="utf-8")
    drawn = plots(files, options.out)
    print(f"wrote {', '.join(str(path) for path in (options.out / 'report.md', *drawn))}", file=sys.stderr)
    if options.write_readme:
        blocks = [(README, "profiles", profiles_block(profiles()))]
        if "head_to_head" in files:
            blocks.append((README, README_BLOCK, readme_block(folder.name, files)))
        blocks += [
            (row.page, kind, block(kind, folder.name, files[kind])) for kind, row in BLOCKS.items() if kind in files
        ]
        for page, name, content in blocks:
            page.write_text(with_block(page.read_text(encoding="utf-8"), name, content), encoding="utf-8")
            print(f"wrote {page}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Measure and report: ``python benchmarks/run.py [--quick] [--only PART,PART] [--write-readme]``.

Writes ``<results>/<machine>/PART.json`` for each part, small files of medians, then renders ``report.py``. A run with
other instructions (``--profile avx2``), threads or ``--dtype`` has a folder of its own, whose name says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

import torch

from benchmarks import configs, report
from benchmarks.analytic import work
from benchmarks.contestants import (
    BASELINE,
    CONTESTANTS,
    FLOORS,
    HEAD_TO_HEAD,
    NORM_PAIRS,
    QUICK_HEAD_TO_HEAD,
    build,
    missing,
)
from benchmarks.environment import ROOT, machine_name, products_in_use
from benchmarks.paired import milliseconds, time_paired
from benchmarks.profiles import PROFILES, is_emulated, run_emulated
from benchmarks.result_files import say, write
from benchmarks.saved_bytes import cost
from benchmarks.scaling import TRUNKS, case, measure
from benchmarks.steps import make_step
from benchmarks.whole_model import LIBRARIES, QUICK_VARIANTS, VARIANTS, make_steps


def _available(names: Iterable[str], mode: configs.Mode) -> list[str]:
    """Those that exist in a mode; a peer that is not installed is an error, lest its row be missing unnoticed."""
    chosen = [name for name in names if name in FLOORS or mode in CONTESTANTS[name].modes]
    if absent := missing(chosen):
        raise SystemExit(f"{', '.join(absent)}: not installed; pip install 'ple-fast[bench]', or use --quick")
    return chosen


def _rounds(quick: bool) -> int:
    return configs.QUICK_ROUNDS if quick else configs.ROUNDS


def head_to_head(quick: bool, autocast: str = "") -> list[dict[str, Any]]:
    """Every contestant against every other at the sizes and modes that the README quotes.

    ``autocast``: the dtype of the region in which everything is called; empty: without, in float32.
    """
    size = configs.SIZES["cpu"].under_autocast(autocast)
    results = []
    for mode, batch in configs.HEAD_TO_HEAD:
        config = size.at(batch)
        torch._dynamo.reset()  # compiled loops of the last case count against the limit of recompilations
        steps = {}
        names = QUICK_HEAD_TO_HEAD if quick else HEAD_TO_HEAD
        # Without oneDNN PyTorch computes low precision by plain loops: that run says nothing.
        for name in _available([name for name in names if not (autocast and name == "fast_mm")], mode):
            say(f"head to head: {mode} at {batch}: preparing {name}")
            steps[name] = make_step(name, config, mode).run
        paired = time_paired(steps, rounds=_rounds(quick))
        times = {name: paired.times(name, "fast") for name in steps}
        about = {"size": size.name, "mode": mode, "batch": batch}
        results.append({**about, **paired.about(), **work(config, mode).counts(), "contestants": times})
        for name in sorted(times, key=lambda n: times[n]["median_ms"]):
            say(f"  {name:15s} {times[name]['median_ms']:10.4g} ms   {times[name]['ratio_to_fast']:.3f} x fast")
    return results


def saved(quick: bool, autocast: str = "") -> list[dict[str, Any]]:
    """Bytes saved for backward and operators of a training step, of every eager contestant."""
    if autocast:  # hooks would see casts that nothing keeps
        return []
    names = QUICK_HEAD_TO_HEAD if quick else HEAD_TO_HEAD
    # Of a compiled loop the hooks see only part of the graph, and no products.
    return [_saved_by(name) for name in names if name not in FLOORS and not CONTESTANTS[name].compiled]


def _saved_by(name: str) -> dict[str, Any]:
    config = configs.SIZES["cpu"]
    measured = dataclasses.asdict(cost(build(name, config), config))
    return {"contestant": name, "size": config.name, "batch": config.batch, **measured}


def norms(quick: bool, autocast: str = "") -> dict[str, list[dict[str, Any]]]:
    """Each peer with norms or dropout against ours of the same modules, and the bytes that they save for backward."""
    results = []
    pairs = [pair for pair in NORM_PAIRS if not quick or CONTESTANTS[pair[0]].available()]
    for pair in pairs:
        for mode, batch in configs.HEAD_TO_HEAD:
            config = configs.SIZES["cpu"].under_autocast(autocast).at(batch)
            peer, ours = _available(pair, mode)
            paired = time_paired({name: make_step(name, config, mode).run for name in pair}, rounds=_rounds(quick))
            entry = {
                "peer": peer,
                "ours": ours,
                "size": config.name,
                "mode": mode,
                "batch": batch,
                "ratio": paired.ratio(peer, ours),
                "peer_ms": paired.milliseconds(peer),
                "ours_ms": paired.milliseconds(ours),
                **paired.about(),
            }
            say(f"norms: {peer} {mode} {batch}: {entry['ratio']:.3f} ({peer} {entry['peer_ms']} ms)")
            results.append(entry)
    # Under autocast hooks see casts that nothing keeps.
    return {"results": results, "saved": [] if autocast else [_saved_by(name) for pair in pairs for name in pair]}


def grid(quick: bool, autocast: str = "") -> list[dict[str, Any]]:
    """Median paired ratio of the loop to ours at every point of the grid."""
    results = []
    for point in configs.GRID:
        if quick and point.name not in configs.QUICK_GRID:
            continue
        config = point.under_autocast(autocast)
        about = {"point": config.name, "batch": config.batch, "in_features": config.in_features}
        entry: dict[str, Any] = {**about, "tasks": config.num_tasks, "units": list(config.units)}
        for mode in configs.GRID_MODES:
            steps = {name: make_step(name, config, mode).run for name in (BASELINE, "fast")}
            paired = time_paired(steps, rounds=_rounds(quick))
            entry[mode] = {
                "ratio": paired.ratio(BASELINE, "fast"),
                "loop_ms": paired.milliseconds(BASELINE),
                "fast_ms": paired.milliseconds("fast"),
                **paired.about(),
            }
            say(f"grid: {config.name:14s} {mode:9s} {entry[mode]['ratio']:.3f} (loop {entry[mode]['loop_ms']} ms)")
            del steps, paired
            gc.collect()
        results.append(entry)
    return results


def whole_model(quick: bool) -> list[dict[str, Any]]:
    """Whole models of the libraries against their accelerated copies, eager and compiled."""
    absent = [whole.requires for whole in LIBRARIES.values() if not whole.available()]
    if absent:
        raise SystemExit(f"{', '.join(absent)}: not installed; pip install 'ple-fast[peers]'")
    results = []
    for library in LIBRARIES:
        for mode, batch in configs.QUICK_WHOLE_MODEL if quick else configs.WHOLE_MODEL:
            torch._dynamo.reset()
            say(f"whole model: {library}, {mode} at {batch}")
            steps = make_steps(library, mode, batch, QUICK_VARIANTS if quick else VARIANTS)
            paired = time_paired(steps, rounds=_rounds(quick))
            times = {name: paired.times(name, "accelerated") for name in steps}
            for name, entry in times.items():
                say(f"  {name:22s} {entry['median_ms']:10.4g} ms   {entry['ratio_to_accelerated']:.3f} x accelerated")
            about = {"library": library, "mode": mode, "batch": batch}
            results.append({**about, **paired.about(), "contestants": times})
            gc.collect()
    return results


def scaling(quick: bool) -> list[dict[str, Any]]:
    """A whole model's step on one rank and on more, with the fused trunk and with the loop."""
    batches = configs.QUICK_SCALING_BATCHES if quick else configs.SCALING_BATCHES
    paired = measure(configs.KUAIRAND, batches, configs.SCALING_RANKS, _rounds(quick))
    results = []
    for batch in batches:
        for ranks in configs.SCALING_RANKS:
            rows: dict[str, dict[str, float]] = {}
            for trunk in TRUNKS:
                own, single = case(trunk, batch, ranks), case(trunk, batch, 1)
                rows[trunk] = {
                    **paired.times(own),
                    "ratio_to_fast": paired.ratio(own, case("fast", batch, ranks)),
                    "efficiency": paired.ratio(single, own),
                }
                if ranks > 1:
                    rows[trunk]["efficiency_apart"] = paired.ratio(single, case(trunk, batch, ranks, apart=True))
                say(f"scaling: {own}: {rows[trunk]['median_ms']} ms, efficiency {rows[trunk]['efficiency']:.3f}")
            about = {"batch_per_rank": batch, "ranks": ranks, "threads_per_rank": 1}
            results.append({**about, **paired.about(), "contestants": rows})
    return results


def suite(quick: bool) -> list[dict[str, Any]]:
    """The pytest-benchmark suite in a process of its own, stripped to medians and ``extra_info``."""
    sizes = configs.QUICK_SUITE_SIZES if quick else configs.SUITE_SIZES
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider"]
        command += ["--sizes", ",".join(sizes)]
        command += ["--benchmark-json", str(raw), "--benchmark-warmup=on", "--benchmark-disable-gc"]
        command += ["--benchmark-columns=median,iqr,rounds", "--benchmark-max-time", "0.2" if quick else "1.0"]
        if quick:
            command += ["--contestants", "loop,reference,fast"]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if status:
            raise SystemExit(f"the pytest-benchmark suite failed (exit status {status}): nothing is written")
        found = json.loads(raw.read_text(encoding="utf-8"))["benchmarks"]
    return [
        {
            **entry["extra_info"],
            "median_ms": milliseconds(entry["stats"]["median"]),
            "iqr_ms": milliseconds(entry["stats"]["iqr"]),
            "rounds": entry["stats"]["rounds"],
        }
        for entry in found
    ]


PARTS: dict[str, Callable[[bool, str], dict[str, Any]]] = {
    "head_to_head": lambda quick, cast: {"results": head_to_head(quick, cast), "saved": saved(quick, cast)},
    "norms": norms,
    "grid": lambda quick, cast: {"results": grid(quick, cast)},
    "whole_model": lambda quick, _: {"results": whole_model(quick)},
    "scaling": lambda quick, _: {"results": scaling(quick)},
    "suite": lambda quick, _: {"results": suite(quick)},
}


AUTOCASTS = {"bf16": "bfloat16", "fp16": "float16"}
LOW_PRECISION = {"head_to_head", "norms", "grid"}
"""Parts that can be measured under autocast."""


def folder_name(threads: int, dtype: str) -> str:
    """Of the results of this machine: what differs from two threads and float32 stands behind its name."""
    parts = [machine_name()]
    if threads != configs.THREADS:
        parts.append(f"{threads}thread{'s' if threads > 1 else ''}")
    if dtype != "float32":
        parts.append(dtype)
    return "-".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a minute: fewer rounds, sizes and contestants; not for quoting"
    )
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts to measure, out of {','.join(PARTS)}")
    parser.add_argument(
        "--results", type=Path, help="folder of the results (benchmarks/results; out/benchmarks if quick)"
    )
    parser.add_argument("--write-readme", action="store_true", help="put the tables into README.md and docs")
    parser.add_argument(
        "--profile", default="native", choices=("native", *PROFILES), help="instructions: fewer than there are"
    )
    parser.add_argument("--threads", type=int, default=configs.THREADS)
    parser.add_argument("--dtype", default="float32", choices=("float32", *AUTOCASTS), help="bf16, fp16: autocast")
    options = parser.parse_args(arguments)
    if options.profile != "native" and not is_emulated(options.profile):
        raise SystemExit(run_emulated(options.profile, sys.argv[1:] if arguments is None else arguments))
    parts = options.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only: expected parts out of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    if options.quick and options.write_readme:
        parser.error("--write-readme: quick figures are not for quoting; run without --quick")
    if options.dtype != "float32" and (others := set(parts) - LOW_PRECISION):
        parser.error(
            f"--dtype {options.dtype}: only {', '.join(sorted(LOW_PRECISION))}, got {', '.join(sorted(others))}"
        )
    results = options.results or ROOT / ("out/benchmarks" if options.quick else "benchmarks/results")
    torch.set_num_threads(options.threads)
    folder = results / folder_name(options.threads, options.dtype)
    say(f"{folder.name}, products by {products_in_use()}, load average {os.getloadavg()[0]:.2f}")
    for part in parts:
        path = folder / f"{part}.json"
        write(path, part, PARTS[part](options.quick, AUTOCASTS.get(options.dtype, "")))
        say(f"wrote {path}")
    report.main([str(folder), *(["--write-readme"] if options.write_readme else [])])


if __name__ == "__main__":
    main()

"""Measure what is fastest on this machine, and keep it where the library finds it.

On a GPU, ``python -m ple_fast.tune --trunk small --trunk medium`` runs a training step and an inference call of each
trunk, and times every kernel of them with a few candidate tiles, plain products with the library, and what the tensor
memory engine can load in programs that stay. ``--trunk`` names a trunk, ``small``, ``medium`` or ``large``, or a JSON
file of one or several: objects with the keywords of ``ple_fast.PLE`` and ``batch``. All go into one table, in one file
per GPU: the one that ``PLE_FAST_TILES`` names, or ``ple_fast/tiles-GPU.json`` in the cache folder. It is written after
every launch; a second run goes on where the first one ended, and adds its trunks and dtypes. The library reads it at
the first launch on that GPU.

On a CPU, ``python -m ple_fast.tune --device cpu`` times every product of the steps of three trunks, or of those named,
by each way to compute it: PyTorch's, oneDNN's, in one order in memory or another. It takes two minutes at most, and
writes one file per processor and number of threads: the one that ``PLE_FAST_PRODUCTS`` names, or
``ple_fast/products-PROCESSOR-INSTRUCTIONS-Nthreads.json`` in the cache folder.

``--show`` prints what is chosen, and from which table. Without a file the library uses the tables that it ships, and it
never times anything by itself.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import tune_measure as tuning
from . import tune_processor, tune_show
from .scalars import check_count, check_number, shown
from .torch_backend.processor import this_processor
from .torch_backend.product_files import products_path
from .torch_backend.table_in_use import table
from .tune_calls import recorded
from .tune_candidates import candidates, has_lost
from .tune_measure import tune
from .tune_results import Results, gpu_name, save
from .tune_table import Measured
from .tune_trunks import build

__all__ = ["Measured", "candidates", "main", "save", "tune"]

TRUNKS: dict[str, dict[str, Any]] = {
    "small": {"in_features": 256, "num_tasks": 2, "expert_units": [128, 64], "batch": 4096},
    "medium": {"in_features": 512, "num_tasks": 3, "expert_units": [256, 128], "batch": 16384},
    "large": {
        "in_features": 1024, "num_tasks": 4, "task_experts": 4, "shared_experts": 4, "expert_units": [512, 256],
        "batch": 65536,
    },
}  # fmt: skip
"""A small, a medium and a large trunk: on a GPU bound by calls, by memory traffic and by products."""
FLAT = ("in_features", "num_tasks", "num_levels", "task_experts", "shared_experts", "expert_units", "activation")
COMPILED_ROWS = 4096
"""Of a batch when candidates are only compiled: kernels are the same for more rows, and memory is not."""


def _widths(text: str) -> list[int]:
    return [int(width) for width in text.split(",")]


def parser() -> argparse.ArgumentParser:
    """Of the command's arguments."""
    made = argparse.ArgumentParser(
        prog="python -m ple_fast.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--trunk", action="append", help=f"{', '.join(TRUNKS)} or a JSON file; may be repeated")
    one = made.add_argument_group("one trunk, in place of --trunk")
    one.add_argument("--in-features", type=int)
    one.add_argument("--num-tasks", type=int)
    one.add_argument("--num-levels", type=int)
    one.add_argument("--task-experts", type=int)
    one.add_argument("--shared-experts", type=int)
    one.add_argument("--expert-units", type=_widths, help="widths of an expert's layers, at every level")
    one.add_argument("--activation")
    one.add_argument("--batch", type=int)
    made.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"),
        help="default: bfloat16 on a GPU, on a CPU all that it computes",
    )  # fmt: skip
    made.add_argument(
        "--tf32", action="store_true", help='float32 products as with set_float32_matmul_precision("high")'
    )
    made.add_argument("--device", help="cuda, which is the default, or cpu; --show: both unless one is named")
    made.add_argument("--threads", type=int, help="of a CPU; default: as many as PyTorch takes")
    made.add_argument("--show", action="store_true", help="print the tables in use, and measure nothing")
    made.add_argument("--rounds", type=int, default=tuning.ROUNDS)
    made.add_argument(
        "--minutes",
        type=float,
        help="start no launch after so many minutes; on a CPU: all minutes",
    )
    made.add_argument(
        "--processes", type=int, default=1, help="compile the candidates in so many before they are timed"
    )
    made.add_argument("--share", help="N/M: compile the Nth of M shares of the candidates, and time nothing")
    made.add_argument("--out", type=Path, help="default: where the library looks for it")
    return made


def trunks_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What is to be measured: keywords of ``PLE``, and ``batch``.

    Raises:
        ValueError: no trunk, or one twice; a file that holds none.
    """
    flat = {name: getattr(options, name) for name in (*FLAT, "batch") if getattr(options, name) is not None}
    if not options.trunk:
        if missing := [name for name in ("in_features", "num_tasks", "batch") if name not in flat]:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
            raise ValueError(f"expected --trunk, or a trunk of its own options; missing: {names}")
        return [flat]
    if flat:
        raise ValueError(f"expected --trunk or the options of one trunk, got both: {', '.join(sorted(flat))}")
    found: list[dict[str, Any]] = []
    for name in options.trunk:
        found += [dict(TRUNKS[name])] if name in TRUNKS else _read(Path(name))
    return found


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--trunk: expected one of {', '.join(TRUNKS)}, or a JSON file, got {str(path)!r} ({error})"
        ) from error
    rows = content if isinstance(content, list) else [content]
    for row in rows:
        if not isinstance(row, dict) or "batch" not in row:
            raise ValueError(f"{path}: expected objects with the keywords of PLE and 'batch', got {shown(row)}")
        check_count(f"{path}: batch", row["batch"])
    return rows


def _build(about: dict[str, Any], dtype: torch.dtype, device: torch.device, most: int | None = None) -> Any:
    """A trunk and its input."""
    batch = about["batch"]
    return build(about, batch if most is None else min(batch, most), device=device, dtype=dtype)


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None, *, prepare: tuning.Prepare | None = None) -> None:
    """The command. ``prepare``: makes samplers of launches of kernels, on whatever device."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    made = parser()
    options = made.parse_args(given)
    try:
        if options.threads is not None:
            torch.set_num_threads(check_count("--threads", options.threads))
        if options.show:
            print(tune_show.tables(options.device))
            return
        # Candidates that processes compile are kernels', also where an interpreter runs them.
        if options.device == "cpu" and prepare is None and options.share is None and options.processes == 1:
            _tune_processor(options)
            return
        trunks = trunks_of(options)
        rounds, processes = check_count("--rounds", options.rounds), check_count("--processes", options.processes)
        share = _share(options.share)
    except (TypeError, ValueError) as error:
        made.error(str(error))
    options.dtype = options.dtype or "bfloat16"
    prepare = prepare or tuning.cuda_graph_sampler
    device = torch.device(options.device or "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("ple_fast.tune: PyTorch sees no GPU here; --device cpu measures this processor")
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    begin = time.monotonic()
    end = begin + 60 * options.minutes if options.minutes is not None else float("inf")
    dtype = getattr(torch, options.dtype)
    tuner = tuning.Tuner(device, prepare, rounds, say)
    if share is not None:
        _compile(tuner, trunks, dtype, device, *share)
        return
    if processes > 1:
        _compile_in_processes(given, processes, begin + (end - begin) / 2)
    files = importlib.import_module("ple_fast_kernels._tile_files")
    path = options.out or files.tiles_path(gpu_name(device))
    results = Results(path, tuner, say)
    wrong: list[str] = []
    for about in trunks:
        left = (end - time.monotonic()) / 60
        named = {**about, "dtype": options.dtype, "tf32": options.tf32}
        if left <= 0:
            say(f"time is over: {named} is not measured")
            continue
        say(f"{named}")
        results.begin(named)
        trunk, x = _build(about, dtype, device)
        try:
            tuning.tune(
                trunk, x, rounds=rounds, minutes=None if options.minutes is None else left, prepare=prepare, say=say,
                known=results.known, keep=results.add,
            )  # fmt: skip
        except RuntimeError as error:
            if not has_lost(error) and "please report it" not in str(error):
                raise
            wrong.append(str(error) or type(error).__name__)
    table = results.write()
    print(f"wrote {path}: rows of {', '.join(table) or 'no kernel'}")
    if wrong:
        raise SystemExit("; ".join(wrong))


def _tune_processor(options: argparse.Namespace) -> None:
    """Measure the products of this processor, and write their table."""
    flat = any(getattr(options, name) is not None for name in FLAT)
    trunks = trunks_of(options) if options.trunk or flat else list(tune_processor.TRUNKS)
    dtypes = tune_processor.dtypes_here() if options.dtype is None else (options.dtype,)
    minutes = tune_processor.MINUTES if options.minutes is None else check_number("--minutes", options.minutes)
    path = options.out or products_path(this_processor(), torch.get_num_threads())
    with tune_show.progress() as progress:
        found = tune_processor.measure(trunks, dtypes, minutes, progress)
        helps = options.out is not None or tune_processor.is_faster(found, trunks, dtypes, progress)
    if not helps:
        print(tune_show.products(table()))
        print("nothing is written: steps take no less with what was measured than with this table")
        return
    tune_processor.write(path, found, trunks)
    print(tune_show.products(found._replace(source=str(path))))
    print(f"wrote {path}")


def _share(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ValueError(f"--share: expected N/M with N from 0 to M - 1, got {text!r}")
    return int(number), int(count)


def _compile(
    tuner: tuning.Tuner, trunks: list[dict[str, Any]], dtype: torch.dtype, device: torch.device, share: int, count: int
) -> None:
    """Leave a share of all candidates in Triton's cache."""
    number = 0
    try:
        for about in trunks:
            trunk, x = _build(about, dtype, device, COMPILED_ROWS)
            tuner.set_table({})
            choice = tuning.default_choice(tuner, x)
            for call in recorded(trunk, x):
                tuner.compile(call, choice, (share - number) % count, count)
                number += 1
    finally:
        tuner.tiles.set_table(tuner.architecture, None)


def _compile_in_processes(given: list[str], count: int, end: float) -> None:
    """Wait until they are through, or the time is over; what they have not compiled is compiled when it is timed."""
    say(f"compiling in {count} processes")
    begin = time.monotonic()
    commands = [[sys.executable, "-m", "ple_fast.tune", *given, "--share", f"{n}/{count}"] for n in range(count)]
    started = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    try:
        for process in started:
            try:
                process.wait(None if end == float("inf") else max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
    failed = sum(process.returncode != 0 for process in started)
    said = f", {failed} of them did not end well" if failed else ""
    say(f"compiled for {time.monotonic() - begin:.0f} s{said}")


if __name__ == "__main__":
    main()

"""A whole model behind requests: ``python benchmarks/serving.py [--minutes 20] [--json FILE]``.

Open loop: arrivals are drawn beforehand at a fixed rate, whatever the server does, and the latency of a request goes
from its arrival to its predictions, so that waiting in the queue counts. Worker threads take requests from one queue,
each product runs on one thread. Contestants serve the same codes and numbers; ``nothing`` answers at once: what the
clock and the threads themselves take. Nothing is timed before all have given the same predictions.

Beside it, ``one_row``: CPU time of one thread from a row to its predictions.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch._inductor.package.package import load_package

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script this file only sees its own folder

from benchmarks import result_files
from benchmarks.configs import SEED, TrunkConfig
from benchmarks.contestants import BASELINE, build
from benchmarks.environment import ROOT, machine_name
from benchmarks.rendering import with_block
from benchmarks.result_files import say
from benchmarks.scaling import Stacked
from benchmarks.serving_report import BLOCK, PAGE, serving_block
from benchmarks.steps import WrongResultError
from ple_fast.losses import TaskLoss
from ple_fast.model import Categorical, MultiTaskModel, Numeric

Serve = Callable[[Any, Any], Any]
"""Codes int32 ``(B, C)`` and numbers float32 ``(B, N)``, arrays of NumPy, to predictions by task."""

REQUEST_ROWS, THREADS = (1, 64, 512), (1, 2, 8)
EAGER, COMPILED, AOT, ONNX, LOOP, NOTHING = "eager", "compiled", "aot_inductor", "onnx_runtime", "loop", "nothing"
CONTESTANTS = (EAGER, COMPILED, AOT, ONNX, LOOP, NOTHING)
LIMIT_S = 0.010
"""What the 99th percentile may take."""
PARTS_OF_RATE = (0.5, 0.9)
"""The fixed rates: of the rate at which the loop, eager, passes the limit."""
SEARCH_TRIALS = 6
LATE_S = 0.5
"""How far behind a server is when a trial is given up."""
LEAST_TRIAL_S, LEAST_REQUESTS = 0.3, 10
WARM_UP = 3
"""Requests that each thread answers before a trial begins."""
TOLERANCE = 1e-4
CPU_ROUNDS = 15

# Census-Income as examples/census_data.py reads it: 31 columns of categories, 7 of numbers, two tasks.
VOCABULARIES = (9, 52, 47, 3, 24, 15, 5, 10, 2, 3, 6, 8, 6, 6, 51, 38, 8, 10, 9, 10, 3, 4, 5, 43, 43, 43, 5, 3, 3, 3, 2)
NUMBERS = 7
EMBEDDING, TOWER, UNITS = 4, (16,), (64, 32)
TASKS = ("income", "never married")


def columns() -> tuple[Categorical | Numeric, ...]:
    """Of the model, with vocabularies of text."""
    categories = [
        Categorical(f"c{place}", values=tuple(f"value {code}" for code in range(size)), width=EMBEDDING)
        for place, size in enumerate(VOCABULARIES)
    ]
    return (*categories, *(Numeric(f"n{place}", transform="log1p", mean=2.0, std=1.5) for place in range(NUMBERS)))


def make_model(trunk: str) -> MultiTaskModel:
    """The model with the fused trunk or the loop, from the same weights, in eval mode."""
    width = len(VOCABULARIES) * EMBEDDING + NUMBERS
    made = build(trunk, TrunkConfig("census", 1, width, len(TASKS), units=UNITS, num_levels=2))
    inner: Any = getattr(made, "trunk", made) if trunk == "fast" else Stacked(made)
    torch.manual_seed(SEED)
    tasks = [TaskLoss(name) for name in TASKS]
    return MultiTaskModel(columns(), tasks, trunk=inner, tower_units=TOWER).eval()


def make_rows(count: int) -> list[dict[str, Any]]:
    """Rows as requests of JSON hold them."""
    draw = random.Random(SEED)
    return [
        {
            **{f"c{place}": f"value {draw.randrange(size)}" for place, size in enumerate(VOCABULARIES)},
            **{f"n{place}": round(draw.expovariate(0.1), 2) for place in range(NUMBERS)},
        }
        for _ in range(count)
    ]


def _in_torch(served: Any) -> Serve:
    def serve(codes: Any, numbers: Any) -> Any:
        with torch.inference_mode():
            found = served(torch.from_numpy(codes), torch.from_numpy(numbers))
            return {name: value.numpy() for name, value in found.items()}

    return serve


def make_contestants(names: Sequence[str], folder: Path, rows: Sequence[int]) -> dict[str, Serve]:
    """What answers requests. Compilation happens here, for requests of so many ``rows``."""
    model = make_model("fast")
    served = model.for_inference()
    data = model.encoder().rows(make_rows(max(rows)))
    example = tuple(map(torch.from_numpy, data))
    made: dict[str, Serve] = {}
    for name in names:
        say(f"making {name}")
        if name == EAGER:
            made[name] = _in_torch(served)
        elif name == COMPILED:
            made[name] = _in_torch(torch.compile(model.for_inference(plain=True), fullgraph=True, dynamic=False))
        elif name == AOT:
            batch = torch.export.Dim("batch", min=1)
            program = torch.export.export(served, example, dynamic_shapes=({0: batch}, {0: batch}))
            package = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "package.pt2"))
            made[name] = _in_torch(load_package(package, num_runners=max(THREADS)))
        elif name == ONNX:
            made[name] = _onnx(served, example, folder / "model.onnx")
        elif name == LOOP:
            made[name] = _in_torch(make_model(BASELINE).for_inference())
        else:
            empty: dict[str, Any] = {}
            made[name] = lambda codes, numbers: empty  # noqa: B023  # the one dictionary
    expected = model.predict(model.encode({c.name: [row[c.name] for row in make_rows(max(rows))] for c in columns()}))
    for name, serve in made.items():
        for count in rows:
            found = serve(data[0][:count], data[1][:count])
            for task in TASKS if name != NOTHING else ():
                if not np.allclose(found[task], expected[task][:count], rtol=TOLERANCE, atol=TOLERANCE):
                    raise WrongResultError(f"{name}, {count} rows: the predictions of {task!r} differ")
    return made


def _onnx(served: Any, example: tuple[Any, ...], file: Path) -> Serve:
    onnxruntime: Any = importlib.import_module("onnxruntime")  # it has no types
    torch.onnx.export(
        served, example, file, dynamo=True, dynamic_shapes=({0: "batch"}, {0: "batch"}), verbose=False,
        input_names=["codes", "numbers"], output_names=list(TASKS),
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda codes, numbers: dict(
        zip(TASKS, session.run(list(TASKS), {"codes": codes, "numbers": numbers}), strict=True)
    )


class Trial(NamedTuple):
    """What a fixed rate gave."""

    latencies: list[float]
    """Seconds, of the requests that were answered."""
    is_late: bool
    """Whether it was given up, because the server fell behind."""

    def percentile(self, part: float) -> float:
        """Seconds; infinite where the server fell behind."""
        ordered = sorted(self.latencies)
        if self.is_late or not ordered:
            return float("inf")
        return ordered[min(int(part * len(ordered)), len(ordered) - 1)]


def run_trial(serve: Serve, requests: Sequence[tuple[Any, Any]], threads: int, rate: float, seconds: float) -> Trial:
    """Requests at a ``rate`` per second, for so many ``seconds``, to so many worker threads."""
    draw = random.Random(SEED)
    count = max(int(rate * seconds), LEAST_REQUESTS)
    arrivals = list(itertools.accumulate(draw.expovariate(rate) for _ in range(count)))
    order = itertools.count()  # the queue: a worker takes the next number, and waits for its arrival
    latencies = [float("nan")] * count
    failures: list[BaseException] = []
    late = threading.Event()
    begin = 0.0

    def start() -> None:
        nonlocal begin
        begin = time.perf_counter() + 0.005

    # The first calls of a thread set up its pools; a server's threads live longer than a trial.
    ready = threading.Barrier(threads, start)

    def work() -> None:
        try:
            for request in requests[:WARM_UP]:
                serve(*request)
            ready.wait()
            while (place := next(order)) < count and not late.is_set():
                arrival = begin + arrivals[place]
                wait = arrival - time.perf_counter()
                if wait > 0:
                    time.sleep(wait)
                serve(*requests[place % len(requests)])
                latencies[place] = time.perf_counter() - arrival
                if latencies[place] > LATE_S:
                    late.set()
        except BaseException as error:
            failures.append(error)
            late.set()
            ready.abort()

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise next((error for error in failures if not isinstance(error, threading.BrokenBarrierError)), failures[0])
    return Trial([value for value in latencies if value == value], late.is_set())


def capacity(serve: Serve, requests: Sequence[tuple[Any, Any]], threads: int, seconds: float) -> float:
    """Requests per second of workers that never wait."""
    stop = time.perf_counter() + seconds
    counts = [0] * threads

    def work(worker: int) -> None:
        while time.perf_counter() < stop:
            serve(*requests[counts[worker] % len(requests)])
            counts[worker] += 1

    workers = [threading.Thread(target=work, args=(worker,)) for worker in range(threads)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    return max(sum(counts), 1) / seconds


def rate_at_limit(serve: Serve, requests: Sequence[tuple[Any, Any]], threads: int, seconds: float) -> float:
    """The highest rate found at which the 99th percentile stays below the limit; 0 where none was found."""
    high = 1.1 * capacity(serve, requests, threads, min(seconds, 0.5))
    low, is_low_good = min(max(high / 16, LEAST_REQUESTS / seconds), high / 2), False
    for _ in range(SEARCH_TRIALS):
        rate = (low * high) ** 0.5 if is_low_good else low
        # Once more where it was too slow: the machine may have been at something else.
        if any(run_trial(serve, requests, threads, rate, seconds).percentile(0.99) <= LIMIT_S for _ in range(2)):
            low, is_low_good = rate, True
        elif is_low_good:
            high = rate
        else:
            low, high = low / 4, rate
            if low * seconds < LEAST_REQUESTS:
                return 0.0
    return low if is_low_good else 0.0


class Case(NamedTuple):
    """Requests of so many rows to so many threads."""

    rows: int
    threads: int


def measure(
    made: Mapping[str, Serve], cases: Sequence[Case], minutes: float, requests: Mapping[int, Any]
) -> list[dict[str, Any]]:
    """An entry per case: each contestant's rate at the limit, and its percentiles at fixed rates.

    Trials are as long as the minutes that are left allow, for all cases that are left.
    """
    entries = []
    until = time.monotonic() + 60 * minutes
    trials = len(made) * (1.5 * SEARCH_TRIALS + 2 * len(PARTS_OF_RATE) + 1)  # some are repeated
    for number, case in enumerate(cases):
        seconds = max((until - time.monotonic()) / ((len(cases) - number) * trials), LEAST_TRIAL_S)
        found: dict[str, dict[str, Any]] = {}
        for name, serve in made.items():
            if name == NOTHING:  # has none
                found[name] = {"rate_at_limit": None, "rates": []}
                continue
            rate = rate_at_limit(serve, requests[case.rows], case.threads, seconds)
            found[name] = {"rate_at_limit": round(rate, 1), "rates": []}
            say(f"{case.rows} rows, {case.threads} threads, {name}: {rate:.0f} requests/s")
        loop = found[LOOP]["rate_at_limit"]
        for part in PARTS_OF_RATE:
            rate = part * loop
            for name, serve in made.items() if rate else ():
                trial = run_trial(serve, requests[case.rows], case.threads, rate, 2 * seconds)
                times = {f"p{100 * p:g}_ms": trial.percentile(p) for p in (0.5, 0.99, 0.999)}
                row = {key: None if value == float("inf") else round(1e3 * value, 3) for key, value in times.items()}
                found[name]["rates"].append({"rate": round(rate, 1), **row, "requests": len(trial.latencies)})
        about = {"rows": case.rows, "threads": case.threads, "trial_s": round(seconds, 2)}
        entries.append({**about, "contestants": found})
    return entries


def one_row(made: Mapping[str, Serve]) -> dict[str, float]:
    """CPU milliseconds from one row to its predictions, on one thread: medians."""
    import pandas as pd

    model, row = make_model("fast"), make_rows(1)[0]
    encoder = model.encoder()
    as_table = {name: [value] for name, value in row.items()}
    arrays = {name: np.array([value]) for name, value in row.items()}
    frame = pd.DataFrame(as_table)
    ways: dict[str, Callable[[], object]] = {
        "predict, a dict of lists": lambda: model.predict(as_table),
        "predict, a dict of arrays": lambda: model.predict(arrays),
        "predict, a frame": lambda: model.predict(frame),
        "encoder.rows alone": lambda: encoder.rows([row]),
    }
    for name, serve in made.items():
        if name != NOTHING:
            ways[f"encoder.rows and {name}"] = lambda serve=serve: serve(*encoder.rows([row]))  # type: ignore[misc]  # a default
    times: dict[str, list[float]] = {way: [] for way in ways}
    for call in ways.values():
        for _ in range(50):
            call()
    for _ in range(CPU_ROUNDS):
        for way, call in ways.items():
            begin = time.thread_time()
            for _ in range(20):
                call()
            times[way].append((time.thread_time() - begin) / 20)
    return {way: round(1e3 * statistics.median(found), 4) for way, found in times.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="of the load, besides compilation")
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    parser.add_argument("--rows", default=",".join(map(str, REQUEST_ROWS)), help="of a request")
    parser.add_argument("--threads", default=",".join(map(str, THREADS)))
    parser.add_argument(
        "--write-page", action="store_true", help="measure nothing: put the file's tables into the page"
    )
    parser.add_argument("--json", type=Path, help="default benchmarks/results/<machine>/serving.json")
    options = parser.parse_args(arguments)
    names = options.contestants.split(",")
    if (unknown := set(names) - set(CONTESTANTS)) or LOOP not in names:
        got = ", ".join(sorted(unknown)) or f"none of the name {LOOP}, whose rates all get"
        parser.error(f"--contestants: expected some of {', '.join(CONTESTANTS)}, got {got}")
    path = options.json or ROOT / "benchmarks" / "results" / machine_name() / "serving.json"
    if options.write_page:
        block = serving_block(path.parent.name, result_files.read(path, "serving"))
        PAGE.write_text(with_block(PAGE.read_text(encoding="utf-8"), BLOCK, block), encoding="utf-8")
        print(f"wrote {PAGE}")
        return
    sizes, threads = (tuple(map(int, text.split(","))) for text in (options.rows, options.threads))
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    rows = make_rows(max(64, *sizes))
    encoder = make_model("fast").encoder()
    requests = {size: [encoder.rows(random.Random(seed).choices(rows, k=size)) for seed in range(16)] for size in sizes}
    cases = [Case(size, count) for size in sizes for count in threads]
    with tempfile.TemporaryDirectory() as folder:
        made = make_contestants(names, Path(folder), sizes)
        alone = one_row(made)
        for way, value in alone.items():
            say(f"{way}: {value:.3f} ms of CPU")
        entries = measure(made, cases, options.minutes, requests)
    about = {"limit_ms": 1e3 * LIMIT_S, "parts_of_rate": PARTS_OF_RATE}
    load = [round(value, 2) for value in (load_before, os.getloadavg()[0])]
    result_files.write(path, "serving", {**about, "load": load, "one_row": alone, "results": entries})
    print(serving_block(path.parent.name, result_files.read(path, "serving")))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

"""What ``serving.json`` says, as tables of docs/serving_a_model.md."""

from __future__ import annotations

from benchmarks.environment import ROOT
from benchmarks.rendering import number, software, table
from benchmarks.result_files import Result

PAGE, BLOCK = ROOT / "docs" / "serving_a_model.md", "serving"
PERCENTILES = ("p50_ms", "p99_ms", "p99.9_ms")


def load_table(content: Result) -> str:
    """A row per size of a request, number of threads and contestant."""
    parts = content["parts_of_rate"]
    rows = []
    for entry in content["results"]:
        for name, own in entry["contestants"].items():
            limit = own["rate_at_limit"]
            cells = [str(entry["rows"]), str(entry["threads"]), f"`{name}`", "" if limit is None else f"{limit:,.0f}"]
            for trial in own["rates"]:
                values = [trial[percentile] for percentile in PERCENTILES]
                cells.append(" / ".join("late" if value is None else number(value) for value in values))
            rows.append(cells + [""] * (4 + len(parts) - len(cells)))
    heads = [f"ms at {part:.0%} of `loop`'s: p50 / p99 / p99.9" for part in parts]
    limit_ms = number(content["limit_ms"])
    return table(["rows", "threads", "", f"requests/s where p99 passes {limit_ms} ms", *heads], rows, left=(2,))


def one_row_table(content: Result) -> str:
    """CPU time of one row."""
    return table(["one row", "ms of CPU"], [[way, number(value)] for way, value in content["one_row"].items()])


def serving_block(machine: str, content: Result) -> str:
    """What the page quotes: both tables, how they were measured, and the file that they are from."""
    about = content["environment"]
    lengths = sorted(entry["trial_s"] for entry in content["results"])
    spans = dict.fromkeys(f"{length:g}" for length in (lengths[0], lengths[-1]))
    paragraphs = [
        load_table(content),
        one_row_table(content),
        f"Trials of {' to '.join(spans)} s, at fixed rates twice as long; each contestant's products on one thread. "
        f"Load average of the machine before and after: {' and '.join(f'{load:.2f}' for load in content['load'])}. "
        f"{about['cpu']}, {about['cores']} cores, {about['cpu_capability']}; {software(about)}. "
        f"Figures from benchmarks/results/{machine}/serving.json.",
    ]
    return "\n\n".join(paragraphs) + "\n"

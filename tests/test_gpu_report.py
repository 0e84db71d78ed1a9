"""The report of the GPU benchmark: the table, and targets reached or missed."""

from __future__ import annotations

from typing import Any

from benchmarks import configs, gpu_report
from benchmarks.contestants import GPU_EAGER_PEERS


def case(size: str, rows: dict[str, tuple[float, float, float]]) -> dict[str, Any]:
    """A training step in bfloat16: milliseconds and both ratios per contestant."""
    times = {
        name: {"median_ms": ms, "peak_bytes": 2**20, "ratio_to_fast": eager, "ratio_to_fast/graph": graph}
        for name, (ms, eager, graph) in rows.items()
    }
    shape = {"size": size, "dtype": "bfloat16", "mode": "train", "batch": 8, "flops": 10**9, "least_bytes": 10**6}
    return {**shape, "contestants": times, "failed": {"deepctr": "it gives every level the same widths"}}


TARGETS: dict[str, Any] = {
    "results": [
        case(
            "small",
            {
                "fast": (1.0, 1.0, 5.0), "fast/graph": (0.2, 0.2, 1.0), "loop": (4.5, 4.5, 22.5),
                "bmm": (0.1, 0.1, 0.5), "bmm/graph": (0.05, 0.05, 0.25),
                "rechub": (4.25, 4.25, 21.0), "loop_compiled": (2.0, 2.0, 10.0),
                "loop_compiled/graph": (0.4, 0.4, 2.0), "loop/graph": (0.9, 0.9, 4.5),
            },
        ),
        case("large", {"fast": (4.0, 1.0, 1.0), "loop": (6.0, 1.5, 1.5)}),
    ],
    "saved": [
        {"size": "large", "dtype": "bfloat16", "contestant": name, "saved_bytes": size}
        for name, size in (("fast", 60), ("fast_recompute", 12), ("loop", 100))
    ],
    "ceilings": [
        {"size": size, "dtype": "bfloat16", "mm_flops_per_s": 5e11, "copy_bytes_per_s": 1e9}
        for size in ("small", "large")
    ],
}  # fmt: skip


def test_targets_are_printed_as_reached_or_missed() -> None:
    assert gpu_report.gpu_targets(TARGETS) == [
        "small: ours eager over the best eager per-expert peer (`rechub`): 4.25, wanted at least 4: reached",
        "small: ours in a CUDA graph over the best eager per-expert peer (`rechub`): 21.00, wanted at least 10: "
        "reached",
        "small: ours in a CUDA graph over the best compiled or graphed per-expert peer (`loop_compiled/graph`): 2.00, "
        "wanted at least 2.5: missed by 0.50",
        "small: ours eager over `bmm`, which is stacked: 0.10",
        "small: ours in a CUDA graph over `bmm/graph`, which is stacked: 0.25",
        "large: ours eager over the best eager per-expert peer (`loop`): 1.50, wanted at least 2: missed by 0.50",
        "large: ours in a CUDA graph over the best compiled or graphed per-expert peer: not measured, wanted at "
        "least 1.3",
        "large: share of what the ceilings allow: 0.50, wanted at least 0.7: missed by 0.20",
        "large, bfloat16: `fast` saves for backward, in units of the eager loop's: 0.60, wanted at most 0.65: reached",
        "large, bfloat16: `fast_recompute` saves for backward, in units of the eager loop's: 0.12, "
        "wanted at most 0.1: missed by 0.02",
    ]


def test_a_run_that_ended_early_has_a_report_too() -> None:
    rows = {"loop": {"median_ms": 2.0, "peak_bytes": None}}
    early = {"results": [{**case("large", {}), "contestants": rows}], "ceilings": TARGETS["ceilings"], "saved": []}
    lines = gpu_report.gpu_targets({**early, "saved": TARGETS["saved"][:1]})
    assert "large: share of what the ceilings allow: not measured, wanted at least 0.7" in lines
    assert not any("saves for backward" in line for line in lines), "there is no loop to compare with"
    assert "| `loop` | 2.00 |" in gpu_report.gpu_table(early)


def test_the_table_says_what_the_results_say() -> None:
    lines = gpu_report.gpu_table(TARGETS).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert ["`bmm`", "0.10", "1.00", ""] in rows
    assert ["**`fast/graph`**", "0.20", "1.00", ""] in rows
    assert ["ceilings of this GPU", "2.00", "", ""] in rows
    assert lines.count("Not run: `deepctr`: it gives every level the same widths.") == 2


def test_the_targets_are_those_that_were_agreed() -> None:
    small, medium, large = (configs.GPU_TARGETS[size] for size in ("small", "medium", "large"))
    assert (small.eager_over_eager, small.graph_over_eager, small.graph_over_compiled) == (4, 10, 2.5)
    assert (medium.eager_over_eager, medium.graph_over_compiled) == (3, 1.7)
    assert (large.eager_over_eager, large.graph_over_compiled, large.roofline) == (2, 1.3, 0.7)
    assert configs.SAVED_TARGETS == {"fast": 0.65, "fast_recompute": 0.1}
    wide = configs.SIZES["paper_gpu"]
    assert (wide.batch, wide.in_features, wide.num_tasks) == (8192, 512, 2)
    assert (wide.task_experts, wide.shared_experts) == (4, 4)
    assert wide.level_units() == ((256,), (128,))
    assert set(GPU_EAGER_PEERS) == {"loop", "rechub", "deepctr"}

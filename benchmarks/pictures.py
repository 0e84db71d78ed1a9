"""Pictures out of result files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.bare_gemm import FLOOR
from benchmarks.contestants import FLOORS
from benchmarks.rendering import MODE_NAMES
from benchmarks.result_files import Result


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
            groups[label] = {n: round(float(t["median_ms"]) / floor, 3) for n, t in times.items() if n not in FLOORS}
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

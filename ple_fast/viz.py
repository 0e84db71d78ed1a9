"""Pictures: expert utilisation per gate, scores per model, lines with spread, bars (needs matplotlib).

Every function returns a ``matplotlib.figure.Figure`` and writes it where ``path`` is given (the ending decides the
format). No pyplot: no global state, no window, no display needed. Colours are Okabe and Ito's, told apart by readers
with any colour vision; markers repeat what colours say.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .topology import Topology

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
NEUTRAL = "#8C8C8C"
MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class GateUse:
    """How one gate weighs its experts over a batch: mean and standard deviation of each weight (paper, figure 8)."""

    level: str
    gate: str
    experts: tuple[str, ...]
    """Owner of each expert, in the order of the weights: a task, ``"shared"``, or ``"any"`` where no task owns one."""
    mean: tuple[float, ...]
    std: tuple[float, ...]


def gate_use(
    gates: Sequence[Sequence[Tensor]], topologies: Sequence[Topology], task_names: Sequence[str], *, model: str = ""
) -> list[GateUse]:
    """Mean and standard deviation of the gate weights that a trunk returned with ``return_gates=True``.

    Args:
        gates: per level, per mixture the weights, shape ``(B, |A(o)|)``, B at least 1.
        topologies: the wiring of each level.
        task_names: one name per task.
        model: prefix of the levels' names.

    Raises:
        ValueError: the levels, mixtures or weights do not fit the topologies, or the batch is empty.
    """
    if len(gates) != len(topologies):
        raise ValueError(f"gates: expected one entry per topology ({len(topologies)}), got {len(gates)}")
    uses = []
    for index, (weights, topology) in enumerate(zip(gates, topologies, strict=True)):
        level = f"{model} level {index + 1}".strip() if len(gates) > 1 else model or "level 1"
        if len(weights) != topology.num_mixtures:
            raise ValueError(f"gates[{index}]: expected {topology.num_mixtures} mixtures, got {len(weights)}")
        slots = _slot_names(topology, task_names)
        names = _mixture_names(topology, topologies[index + 1 : index + 2], task_names)
        for o, (weight, experts) in enumerate(zip(weights, topology.mixture_experts, strict=True)):
            if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != len(experts):
                raise ValueError(
                    f"gates[{index}][{o}]: expected shape (B >= 1, {len(experts)}), got {tuple(weight.shape)}"
                )
            values = weight.detach().to("cpu", torch.float64)
            uses.append(
                GateUse(
                    level=level,
                    gate=names[o],
                    experts=tuple(slots[topology.expert_slot[e]] for e in experts),
                    mean=tuple(values.mean(0).tolist()),
                    std=tuple(values.std(0, correction=0).tolist()),
                )
            )
    return uses


def plot_gate_use(uses: Sequence[GateUse], *, title: str | None = None, path: str | Path | None = None) -> Figure:
    """Expert utilisation: one row per level, one panel per gate, mean weight as a bar, standard deviation as a line.

    The dashed line is the weight that every expert has in a uniform gate.

    Raises:
        ValueError: ``uses`` is empty.
        ImportError: matplotlib is missing.
    """
    if not uses:
        raise ValueError("uses: expected at least one gate, got none; call gate_use first")
    levels = list(dict.fromkeys(use.level for use in uses))
    rows = [[use for use in uses if use.level == level] for level in levels]
    columns = max(map(len, rows))
    owners = list(dict.fromkeys(name for use in uses for name in use.experts))
    owned = [name for name in owners if name not in ("shared", "any")]
    styles: dict[str, dict[str, Any]] = {name: {"color": COLOURS[i % len(COLOURS)]} for i, name in enumerate(owned)}
    styles["shared"] = {"facecolor": NEUTRAL, "edgecolor": "white", "hatch": "///"}
    styles["any"] = {"facecolor": "white", "edgecolor": NEUTRAL, "hatch": "..."}
    figure = _figure(max(2.5 * columns + 0.8, 5.0), 1.75 * len(rows) + 1.0)
    # Learned scalars beside a softmax (AdaTT, cross-stitch) may leave [0, 1].
    means = [mean for use in uses for mean in use.mean]
    low, high = min(0.0, *means), max(1.0, *means)
    grid = figure.subplots(len(rows), columns, squeeze=False, sharey=True)
    for axes_row, row in zip(grid, rows, strict=True):
        for axes in axes_row[len(row) :]:
            axes.set_axis_off()
        for axes, use in zip(axes_row, row, strict=False):
            places = range(len(use.mean))
            for place, height, name in zip(places, use.mean, use.experts, strict=True):
                axes.bar(place, height, width=0.72, **styles[name])
            axes.errorbar(places, use.mean, use.std, fmt="none", ecolor="black", elinewidth=1.4)
            axes.axhline(1 / len(use.mean), color="black", linewidth=0.8, linestyle=(0, (4, 3)))
            axes.set_xticks(places, [str(1 + use.experts[:i].count(name)) for i, name in enumerate(use.experts)])
            axes.set_title(f"{use.gate} gate", fontsize=9)
            axes.set_ylim(low, high)
            _clean(axes)
        axes_row[0].set_ylabel(f"{row[0].level}\ngate weight", fontsize=9)
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = {name: f"{name} expert" for name in owned} | {"shared": "shared expert", "any": "expert of all tasks"}
    handles: list[Patch | Line2D] = [Patch(label=names[name], **styles[name]) for name in owners]
    handles.append(Line2D([], [], color="black", linewidth=1.4, label="standard deviation"))
    handles.append(Line2D([], [], color="black", linewidth=0.8, linestyle=(0, (4, 3)), label="uniform gate"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), columns + 1), fontsize=8.5)
    return _finish(figure, title, path)


def plot_scores(
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    xlabel: str = "AUC",
    title: str | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Scores per model: one panel per task, one row per model; a dot per seed, mean and standard deviation in front.

    Args:
        scores: ``scores[model][task]`` holds one score per seed; every model has the same tasks.

    Raises:
        ValueError: no model, no seed, or models with different tasks.
        ImportError: matplotlib is missing.
    """
    models = list(scores)
    if not models:
        raise ValueError("scores: expected at least one model, got none")
    tasks = list(scores[models[0]])
    for model in models:
        if list(scores[model]) != tasks or not all(len(scores[model][task]) for task in tasks):
            got = {task: len(runs) for task, runs in scores[model].items()}
            raise ValueError(f"scores[{model!r}]: expected at least one score for each of {tasks}, got {got}")
    figure = _figure(4.1 * len(tasks) + 0.9, 0.52 * len(models) + 1.3)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0], tasks, strict=True):
        for place, model in enumerate(models):
            runs = list(scores[model][task])
            mean, std = _mean_std(runs)
            colour = COLOURS[place % len(COLOURS)]
            axes.scatter(runs, [place + 0.17] * len(runs), s=20, facecolor="white", edgecolor=colour, zorder=3)
            axes.errorbar(mean, place - 0.1, xerr=std, fmt=MARKERS[place % len(MARKERS)], color=colour, capsize=3)
            axes.annotate(f"{mean:.4f}", (mean, place - 0.1), (0, 5), textcoords="offset points", ha="center", size=8)
        axes.set_yticks(range(len(models)), models)
        axes.set_ylim(len(models) - 0.5, -0.6)
        axes.margins(x=0.08)
        axes.locator_params(axis="x", nbins=6)
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.set_xlabel(f"{xlabel}, {task}")
        _clean(axes, grid="x")
    return _finish(figure, title, path)


def plot_lines(
    x: Sequence[float],
    series: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    *,
    xlabel: str,
    ylabel: str,
    baseline: float | None = None,
    title: str | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Lines of means with standard deviations: one panel per outer key, one line per inner key.

    Args:
        x: the places, one per point.
        series: ``series[panel][line]`` holds, per place of ``x``, the values of the runs there.
        baseline: a height to mark with a dashed line, say 0 for a gain.

    Raises:
        ValueError: no panel, a line whose length is not that of ``x``, or a place without a value.
        ImportError: matplotlib is missing.
    """
    if not series:
        raise ValueError("series: expected at least one panel, got none")
    for panel, lines in series.items():
        for name, points in lines.items():
            if len(points) != len(x) or not all(len(runs) for runs in points):
                got = [len(runs) for runs in points]
                raise ValueError(f"series[{panel!r}][{name!r}]: expected values at {len(x)} places, got {got} values")
    figure = _figure(4.0 * len(series) + 0.6, 3.4)
    panels = figure.subplots(1, len(series), squeeze=False, sharey=True)[0]
    names = list(dict.fromkeys(name for lines in series.values() for name in lines))
    spread = max(x) - min(x) or 1.0
    for axes, (panel, lines) in zip(panels, series.items(), strict=True):
        for name, points in lines.items():
            i = names.index(name)
            means, spreads = zip(*map(_mean_std, points), strict=True)
            shift = 0.008 * spread * (i - (len(names) - 1) / 2)  # error bars side by side, not on top of each other
            axes.errorbar(
                [place + shift for place in x],
                means,
                yerr=spreads,
                label=name,
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                capsize=2,
                linewidth=1.5,
                markersize=5,
            )
        if baseline is not None:
            axes.axhline(baseline, color="black", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_title(panel, fontsize=10)
        axes.set_xticks(x)
        axes.set_xlabel(xlabel)
        _clean(axes)
    panels[0].set_ylabel(ylabel)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), fontsize=9)
    return _finish(figure, title, path)


def plot_bars(
    groups: Mapping[str, Mapping[str, float]],
    *,
    ylabel: str,
    title: str | None = None,
    log: bool = False,
    path: str | Path | None = None,
) -> Figure:
    """Grouped bars, say the time of each contestant per batch size; the value stands above each bar.

    Args:
        groups: ``groups[group][series]`` is the height; a series may be absent from a group.
        log: a logarithmic axis; every height is then above 0.

    Raises:
        ValueError: no group, a group without a bar, or a height that the axis cannot show.
        ImportError: matplotlib is missing.
    """
    if not groups or not all(groups.values()):
        got = {group: len(bars) for group, bars in groups.items()}
        raise ValueError(f"groups: expected at least one bar in each group, got {got}")
    for group, bars in groups.items():
        for name, height in bars.items():
            if not 0 <= height < float("inf") or (log and height == 0):
                raise ValueError(f"groups[{group!r}][{name!r}]: expected a finite height, 0 or more, got {height}")
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    width = 0.84 / len(names)
    figure = _figure(max(0.42 * len(names) * len(groups) + 1.6, 5.0), 3.6)
    axes = figure.subplots()
    for i, name in enumerate(names):
        shift = (i - (len(names) - 1) / 2) * width
        found = [(place + shift, bars[name]) for place, bars in enumerate(groups.values()) if name in bars]
        places, heights = zip(*found, strict=True)
        drawn = axes.bar(places, heights, width=0.92 * width, color=COLOURS[i % len(COLOURS)], label=name)
        axes.bar_label(drawn, fmt="{:.3g}", fontsize=7.5, padding=2)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel(ylabel)
    axes.margins(y=0.12)
    if log:
        axes.set_yscale("log")
    _clean(axes)
    figure.legend(loc="outside lower center", ncols=min(len(names), 4), fontsize=9)
    return _finish(figure, title, path)


def _mean_std(runs: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over runs (n - 1 in the denominator; 0 for a single run)."""
    return statistics.fmean(runs), statistics.stdev(runs) if len(runs) > 1 else 0.0


def _slots_are_tasks(topology: Topology, tasks: int) -> bool:
    """Whether slots are the tasks', then possibly the shared one, as in PLE: gate k of the tasks reads slot k."""
    return topology.num_slots in (tasks, tasks + 1) and topology.mixture_slot[:tasks] == tuple(range(tasks))


def _slot_names(topology: Topology, task_names: Sequence[str]) -> list[str]:
    """The owner of the experts that read each slot."""
    assert topology.num_slots is not None
    if topology.num_slots == 1:
        return ["any"]
    if _slots_are_tasks(topology, len(task_names)):
        return [*task_names, "shared"][: topology.num_slots]
    return [f"slot {slot}" for slot in range(topology.num_slots)]


def _mixture_names(topology: Topology, above: Sequence[Topology], task_names: Sequence[str]) -> list[str]:
    """The tasks, where the mixtures are theirs: at the last level, and where the slots of the level above are."""
    tasks, mixtures = len(task_names), topology.num_mixtures
    if mixtures in (tasks, tasks + 1) and all(_slots_are_tasks(level, tasks) for level in above):
        return [*task_names, "shared"][:mixtures]
    return [f"mixture {o}" for o in range(mixtures)]


def _figure(width: float, height: float) -> Figure:
    """An empty figure, or the one sentence that says how to get matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("ple_fast.viz draws with matplotlib: pip install 'ple-fast[viz]'") from error
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _clean(axes: Axes, grid: str = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    axes.grid(axis="x" if grid == "x" else "y", color="#E0E0E0", linewidth=0.7)
    axes.set_axisbelow(True)


def _finish(figure: Figure, title: str | None, path: str | Path | None) -> Figure:
    if title is not None:
        figure.suptitle(title, fontsize=11)
    if path is not None:
        figure.savefig(path)
    return figure

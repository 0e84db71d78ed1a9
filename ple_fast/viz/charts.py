"""Scores per model, lines with spread, grouped bars."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ._figure import COLOURS, MARKERS, NEUTRAL, clean, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_scores(
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    xlabel: str = "AUC",
    title: str | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Scores per model: one panel per task, one row per model; a dot per run, mean and standard deviation above.

    Args:
        scores: ``scores[model][task]`` holds one score per run (seed); every model has the same tasks. One run has no
            deviation.

    Raises:
        ValueError: no model, no run, or models with different tasks.
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
    figure = new_figure(4.1 * len(tasks) + 0.9, 0.52 * len(models) + 1.6)
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    spreads = False
    for axes, task in zip(panels, tasks, strict=True):
        for place, model in enumerate(models):
            runs = list(scores[model][task])
            mean, std = _mean_std(runs)
            colour = COLOURS[place % len(COLOURS)]
            spreads = spreads or len(runs) > 1
            axes.scatter(runs, [place + 0.17] * len(runs), s=20, facecolor="white", edgecolor=colour, zorder=3)
            error = std if len(runs) > 1 else None
            axes.errorbar(mean, place - 0.1, xerr=error, fmt=MARKERS[place % len(MARKERS)], color=colour, capsize=3)
            axes.annotate(f"{mean:.4f}", (mean, place - 0.1), (0, 5), textcoords="offset points", ha="center", size=8)
        axes.set_yticks(range(len(models)), models)
        axes.set_ylim(len(models) - 0.5, -0.6)
        axes.margins(x=0.08)
        axes.locator_params(axis="x", nbins=6)
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.set_xlabel(f"{xlabel}, {task}")
        clean(axes, grid="x")
    panels[0].set_ylabel("model")
    from matplotlib.lines import Line2D

    words = "mean ± standard deviation over runs" if spreads else "mean"
    handles = [
        Line2D([], [], linestyle="-" if spreads else "", marker=MARKERS[0], color=NEUTRAL, label=words),
        Line2D([], [], linestyle="", marker="o", markerfacecolor="white", color=NEUTRAL, label="one run"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8.5)
    return finish(figure, title, path)


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
    figure = new_figure(4.0 * len(series) + 0.6, 3.4)
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
        clean(axes)
    panels[0].set_ylabel(ylabel)
    handles, labels = panels[0].get_legend_handles_labels()
    words = "mean ± standard deviation over runs"
    figure.legend(
        handles, labels, title=words, loc="outside lower center", ncols=len(names), fontsize=9, title_fontsize=9
    )
    return finish(figure, title, path)


def plot_bars(
    groups: Mapping[str, Mapping[str, float]],
    *,
    ylabel: str,
    xlabel: str | None = None,
    title: str | None = None,
    log: bool = False,
    path: str | Path | None = None,
) -> Figure:
    """Grouped bars, say the time of each contestant per batch size; the value stands above each bar.

    Args:
        groups: ``groups[group][series]`` is the height; a series may be absent from a group.
        xlabel: what the groups are, say ``"batch"``.
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
    figure = new_figure(max(0.42 * len(names) * len(groups) + 1.6, 5.0), 3.6)
    axes = figure.subplots()
    for i, name in enumerate(names):
        shift = (i - (len(names) - 1) / 2) * width
        found = [(place + shift, bars[name]) for place, bars in enumerate(groups.values()) if name in bars]
        places, heights = zip(*found, strict=True)
        drawn = axes.bar(places, heights, width=0.92 * width, color=COLOURS[i % len(COLOURS)], label=name)
        axes.bar_label(drawn, fmt="{:.3g}", fontsize=7.5, padding=2)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel(ylabel)
    if xlabel is not None:
        axes.set_xlabel(xlabel)
    axes.margins(y=0.12)
    if log:
        axes.set_yscale("log")
    clean(axes)
    figure.legend(loc="outside lower center", ncols=min(len(names), 4), fontsize=9)
    return finish(figure, title, path)


def _mean_std(runs: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over runs (n - 1 in the denominator; 0 for a single run)."""
    return statistics.fmean(runs), statistics.stdev(runs) if len(runs) > 1 else 0.0

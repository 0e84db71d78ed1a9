"""Expert utilisation per gate: the numbers, and their picture (PLE paper, figure 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..topology import Topology
from ._figure import COLOURS, NEUTRAL, clean, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


CHOSEN: dict[str, Any] = {"marker": "D", "markersize": 4.5, "markerfacecolor": "white", "markeredgecolor": "black"}


@dataclass(frozen=True)
class GateUse:
    """How one gate weighs its experts over a batch: mean and standard deviation of each weight (paper, figure 8)."""

    level: str
    gate: str
    experts: tuple[str, ...]
    """Owner of each expert, in the order of the weights: a task, ``"shared"``, or ``"any"`` where no task owns one."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rows: int | None = None
    """Rows of the batch, where they are known: the picture then says how many."""
    chosen: tuple[float, ...] | None = None
    """Share of rows in which the expert has a weight other than 0, where gates choose (``top_k``); None: in all."""


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
            chosen = (values != 0).double().mean(0)
            uses.append(
                GateUse(
                    level=level,
                    gate=names[o],
                    experts=tuple(slots[topology.expert_slot[e]] for e in experts),
                    mean=tuple(values.mean(0).tolist()),
                    std=tuple(values.std(0, correction=0).tolist()),
                    rows=len(values),
                    chosen=tuple(chosen.tolist()) if bool((chosen < 1).any()) else None,
                )
            )
    return uses


def plot_gate_use(uses: Sequence[GateUse], *, title: str | None = None, path: str | Path | None = None) -> Figure:
    """Expert utilisation: one row per level, one panel per gate, mean weight as a bar, standard deviation as a line.

    The dashed line is the weight that every expert has in a uniform gate. Where gates choose, a diamond is the share of
    rows in which an expert is chosen. The legend says all this, and how many rows the means are of.

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
    figure = new_figure(max(2.5 * columns + 0.8, 5.0), 1.95 * len(rows) + 1.0)
    # Learned scalars beside a softmax (AdaTT, cross-stitch) may leave [0, 1], and so may a mean with its deviation.
    ends = [mean + sign * std for use in uses for mean, std in zip(use.mean, use.std, strict=True) for sign in (-1, 1)]
    beyond = 0.02  # so that a line which leaves [0, 1] is seen to end
    low = min(ends) - beyond if min(ends) < 0 else 0.0
    high = max(ends) + beyond if max(ends) > 1 else 1.0
    grid = figure.subplots(len(rows), columns, squeeze=False, sharey=True)
    for axes_row, row in zip(grid, rows, strict=True):
        for axes in axes_row[len(row) :]:
            axes.set_axis_off()
        for axes, use in zip(axes_row, row, strict=False):
            axes.set_xlabel("expert", fontsize=8.5)
            places = range(len(use.mean))
            for place, height, name in zip(places, use.mean, use.experts, strict=True):
                axes.bar(place, height, width=0.72, **styles[name])
            axes.errorbar(places, use.mean, use.std, fmt="none", ecolor="black", elinewidth=1.4)
            if use.chosen is not None:
                axes.plot(places, use.chosen, linestyle="none", **CHOSEN)
            axes.axhline(1 / len(use.mean), color="black", linewidth=0.8, linestyle=(0, (4, 3)))
            axes.set_xticks(places, [str(1 + use.experts[:i].count(name)) for i, name in enumerate(use.experts)])
            axes.set_title(f"{use.gate} gate", fontsize=9)
            axes.set_ylim(low, high)
            clean(axes)
        axes_row[0].set_ylabel(f"{row[0].level}\nmean weight", fontsize=9)
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = {name: f"{name} expert" for name in owned} | {"shared": "shared expert", "any": "expert of all tasks"}
    handles: list[Patch | Line2D] = [Patch(label=names[name], **styles[name]) for name in owners]
    handles.append(Line2D([], [], color="black", linewidth=1.4, label="mean ± standard deviation"))
    handles.append(Line2D([], [], color="black", linewidth=0.8, linestyle=(0, (4, 3)), label="uniform gate"))
    if any(use.chosen is not None for use in uses):
        handles.append(Line2D([], [], linestyle="none", label="share of rows that choose it", **CHOSEN))
    figure.legend(
        handles=handles,
        title=f"mean weight and standard deviation over {_rows(uses)}",
        loc="outside lower center",
        ncols=min(len(handles), columns + 1),
        fontsize=8.5,
        title_fontsize=8.5,
    )
    return finish(figure, title, path)


def _rows(uses: Sequence[GateUse]) -> str:
    """How many rows the means are of, where all say so."""
    counts = sorted({use.rows or 0 for use in uses})
    if counts[0] == 0:
        return "the rows of a batch"
    return f"{' to '.join(f'{count:,}' for count in dict.fromkeys((counts[0], counts[-1])))} rows"


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
    """The tasks, where the mixtures are theirs: at the last level, and where the slots of the level above are.

    What is added to the output of a mixture before it is a self gate.
    """
    tasks, count = len(task_names), topology.num_outputs
    if count in (tasks, tasks + 1) and all(_slots_are_tasks(level, tasks) for level in above):
        names = [*task_names, "shared"][:count]
    else:
        names = [f"mixture {o}" for o in range(count)]
    if topology.mixture_output is None:
        return names
    outputs = topology.mixture_output
    return [f"{names[own]} self" if own in outputs[:o] else names[own] for o, own in enumerate(outputs)]

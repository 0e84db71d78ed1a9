"""The pictures show the numbers they were given; matplotlib itself is not tested."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ple_fast import Topology, viz

pytest.importorskip("matplotlib")
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

TASKS = ("income", "never married")
PLE = [Topology.ple(2, 2, 1, last=False), Topology.ple(2, 2, 1, last=True)]


def _gates(topologies: list[Topology], batch: int = 50) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(batch, len(experts), generator=generator).softmax(1) for experts in topology.mixture_experts]
        for topology in topologies
    ]


def _heights(axes: Axes) -> list[float]:
    return [patch.get_height() for patch in axes.patches if isinstance(patch, Rectangle)]


def test_gate_use_is_mean_and_std_per_expert_with_the_owners_of_the_topology() -> None:
    gates = _gates(PLE)
    uses = viz.gate_use(gates, PLE, TASKS, model="PLE")
    assert [(use.level, use.gate) for use in uses] == [
        ("PLE level 1", "income"),
        ("PLE level 1", "never married"),
        ("PLE level 1", "shared"),
        ("PLE level 2", "income"),
        ("PLE level 2", "never married"),
    ]
    assert {use.rows for use in uses} == {50}
    assert uses[1].experts == ("never married", "never married", "shared")
    assert uses[2].experts == ("income", "income", "never married", "never married", "shared")
    for use, weight in zip(uses, [w for level in gates for w in level], strict=True):
        assert use.mean == pytest.approx(weight.double().mean(0).tolist())
        assert use.std == pytest.approx(weight.double().std(0, correction=0).tolist())


def test_gate_use_names_mmoe_experts_and_topologies_with_slots_of_their_own() -> None:
    mmoe = Topology.mmoe(2, 3)
    assert {use.experts for use in viz.gate_use(_gates([mmoe]), [mmoe], TASKS, model="MMoE")} == {("any",) * 3}
    other = Topology((0, 1, 2, 3), (0,), ((0, 1, 2, 3),))
    (use,) = viz.gate_use(_gates([other]), [other], TASKS)
    assert (use.level, use.gate, use.experts[3]) == ("level 1", "mixture 0", "slot 3")


def test_gate_use_names_the_self_gates_of_home_after_what_they_are_added_to() -> None:
    groups = [[0, 2], [1]]
    topologies = [Topology.home(groups, 1, 1), Topology.home(groups, 1, 1, task_experts=2)]
    gates = [[torch.rand(4, len(experts)) for experts in t.mixture_experts] for t in topologies]
    uses = viz.gate_use(gates, topologies, ["a", "b", "c"])
    meta, task = ([use.gate for use in uses if use.level == f"level {number}"] for number in (1, 2))
    assert meta == ["mixture 0", "mixture 0 self", "mixture 1", "mixture 1 self", "mixture 2", "mixture 2 self"]
    assert task == ["a", "a self", "b", "b self", "c", "c self"]


def test_gate_use_does_not_take_the_experts_of_ml_mmoe_for_tasks() -> None:
    """As many experts as tasks: only the last level's mixtures are the tasks'."""
    levels = [Topology.ml_mmoe(2, 2, first=i == 0, last=i == 1) for i in range(2)]
    uses = viz.gate_use(_gates(levels), levels, TASKS)
    assert [use.gate for use in uses] == ["mixture 0", "mixture 1", *TASKS]
    assert [use.experts for use in uses] == [("any", "any")] * 2 + [("slot 0", "slot 1")] * 2


@pytest.mark.parametrize(
    ("mean", "std", "limits"),
    [
        ((-0.5, 1.25), (0.0, 0.0), (-0.52, 1.27)),
        ((0.125, 0.875), (0.25, 0.25), (-0.145, 1.145)),
        ((0.25, 0.75), (0.25, 0.125), (0.0, 1.0)),
    ],
)
def test_no_bar_and_no_deviation_is_cut(
    mean: tuple[float, float], std: tuple[float, float], limits: tuple[float, float]
) -> None:
    use = viz.GateUse("level 1", "income", ("income", "never married"), mean, std)
    (axes,) = (axes for axes in viz.plot_gate_use([use]).axes if axes.axison)
    assert axes.get_ylim() == pytest.approx(limits)


SCORES = {"single task": {"income": [0.93, 0.95], "college": [0.8, 0.8]}, "PLE": {"income": [0.9], "college": [0.7]}}
FIGURES: dict[str, Callable[[], Figure]] = {
    "gates": lambda: viz.plot_gate_use(viz.gate_use(_gates(PLE), PLE, TASKS, model="PLE")),
    "scores": lambda: viz.plot_scores(SCORES),
    "lines": lambda: viz.plot_lines(
        [0, 1], {"task": {"PLE": [[1.0, 3.0], [4.0]]}}, xlabel="correlation", ylabel="gain"
    ),
    "bars": lambda: viz.plot_bars({"256": {"ple_fast": 1.0}}, xlabel="batch", ylabel="ms"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_of_a_picture_has_a_name(name: str) -> None:
    panels = [axes for axes in FIGURES[name]().axes if axes.axison]
    assert all(axes.get_xlabel() for axes in panels)
    for axes in panels:  # a panel to the right shares the axis of the first one of its row
        assert axes.get_ylabel() or axes.get_subplotspec().colspan.start > 0  # type: ignore[union-attr]


def _legend(figure: Figure) -> str:
    (legend,) = figure.legends
    return "\n".join([legend.get_title().get_text(), *(text.get_text() for text in legend.get_texts())])


@pytest.mark.parametrize("name", ["gates", "scores", "lines"])
def test_a_picture_with_deviations_says_so_and_of_what(name: str) -> None:
    legend = _legend(FIGURES[name]())
    assert "mean" in legend and "standard deviation over" in legend
    assert ("50 rows" if name == "gates" else "over runs") in legend


def test_rows_that_differ_or_are_not_known_are_not_made_up() -> None:
    wide, narrow = (viz.GateUse("a", "b", ("any",), (1.0,), (0.0,), rows) for rows in (2000, 10))
    assert "over 10 to 2,000 rows" in _legend(viz.plot_gate_use([wide, narrow]))
    unknown = viz.GateUse("a", "b", ("any",), (1.0,), (0.0,))
    assert "over the rows of a batch" in _legend(viz.plot_gate_use([wide, unknown]))


def test_one_run_per_model_has_no_deviation() -> None:
    figure = viz.plot_scores({"PLE": {"income": [0.9]}})
    assert "deviation" not in _legend(figure)
    (bars,) = (c for c in figure.axes[0].containers if isinstance(c, ErrorbarContainer))
    assert not bars.has_xerr


def test_gates_that_choose_show_how_often() -> None:
    topology = Topology.mmoe(1, 3)
    weights = torch.tensor([[0.25, 0.75, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    (use,) = viz.gate_use([[weights]], [topology], ["a"])
    assert use.chosen == (0.75, 0.75, 0.0)
    figure = viz.plot_gate_use([use])
    assert "share of rows that choose it" in _legend(figure)
    (axes,) = (axes for axes in figure.axes if axes.axison)
    (diamonds,) = (line for line in axes.lines if line.get_marker() == "D")
    assert np.asarray(diamonds.get_ydata()).tolist() == [0.75, 0.75, 0.0]
    (plain,) = viz.gate_use([[weights.clamp(min=0.1)]], [topology], ["a"])
    assert plain.chosen is None and "choose" not in _legend(viz.plot_gate_use([plain]))


def test_gate_use_takes_gates_that_require_grad_and_half_precision() -> None:
    gates = [[weight.to(torch.bfloat16).requires_grad_() for weight in level] for level in _gates(PLE)]
    assert all(sum(use.mean) == pytest.approx(1, abs=2e-2) for use in viz.gate_use(gates, PLE, TASKS))


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (_gates(PLE)[:1], r"one entry per topology \(2\), got 1"),
        ([_gates(PLE)[1], _gates(PLE)[1]], r"gates\[0\]: expected 3 mixtures, got 2"),
        (_gates(PLE, batch=0), r"gates\[0\]\[0\]: expected shape \(B >= 1, 3\), got \(0, 3\)"),
        ([[w[:, :2] for w in level] for level in _gates(PLE)], r"\(B >= 1, 3\), got \(50, 2\)"),
    ],
)
def test_gate_use_refuses_gates_of_another_wiring(gates: list[list[torch.Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        viz.gate_use(gates, PLE, TASKS)


def test_plot_gate_use_draws_one_bar_per_expert_at_its_mean(tmp_path: Path) -> None:
    uses = viz.gate_use(_gates(PLE), PLE, TASKS, model="PLE")
    figure = viz.plot_gate_use(uses, title="utilisation", path=tmp_path / "gates.png")
    panels = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in panels] == [f"{use.gate} gate" for use in uses]
    for axes, use in zip(panels, uses, strict=True):
        assert _heights(axes) == pytest.approx(list(use.mean))
        assert [label.get_text() for label in axes.get_xticklabels()][-1] == "1"  # the only shared expert
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")


def test_plot_scores_shows_every_seed_and_the_mean(tmp_path: Path) -> None:
    figure = viz.plot_scores(SCORES, path=tmp_path / "auc.svg")
    income, college = figure.axes
    assert (income.get_xlabel(), college.get_xlabel()) == ("AUC, income", "AUC, college")
    assert [text.get_text() for text in income.texts] == ["0.9400", "0.9000"]
    assert np.asarray(income.collections[0].get_offsets())[:, 0].tolist() == pytest.approx([0.93, 0.95])
    assert (tmp_path / "auc.svg").read_text().startswith("<?xml")


def test_plot_lines_draws_means_and_the_baseline() -> None:
    series = {"task A": {"PLE": [[1.0, 3.0], [4.0]], "MMoE": [[0.0], [1.0]]}}
    (axes,) = viz.plot_lines([0, 1], series, xlabel="correlation", ylabel="gain", baseline=0.0).axes
    lines = {c.get_label(): c.lines for c in axes.containers if isinstance(c, ErrorbarContainer)}
    ple, _, (spread,) = lines["PLE"]
    assert np.asarray(ple.get_ydata()).tolist() == [2, 4]
    whisker = np.asarray(spread.get_paths()[0].vertices)[:, 1]
    assert whisker.tolist() == pytest.approx([2 - 2**0.5, 2 + 2**0.5])  # standard deviation of 1 and 3
    (baseline,) = (line for line in axes.lines if line.get_linestyle() == "--")
    assert np.asarray(baseline.get_ydata()).tolist() == [0, 0]


def test_plot_bars_leaves_absent_contestants_out() -> None:
    groups = {"256": {"ple_fast": 1.0, "loop": 2.0}, "4096": {"loop": 8.0}}
    (axes,) = viz.plot_bars(groups, ylabel="ms", log=True).axes
    assert sorted(_heights(axes)) == [1, 2, 8]
    assert axes.get_yscale() == "log"


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: viz.plot_gate_use([]), "at least one gate, got none"),
        (lambda: viz.plot_scores({}), "at least one model, got none"),
        (lambda: viz.plot_scores({"a": {"t": []}}), r"scores\['a'\]: expected at least one score"),
        (lambda: viz.plot_scores({"a": {"t": [1.0]}, "b": {"u": [1.0]}}), r"scores\['b'\]"),
        (lambda: viz.plot_lines([0], {}, xlabel="", ylabel=""), "at least one panel"),
        (lambda: viz.plot_lines([0, 1], {"p": {"l": [[1.0]]}}, xlabel="", ylabel=""), r"series\['p'\]\['l'\]"),
        (lambda: viz.plot_bars({"a": {}}, ylabel=""), r"at least one bar in each group, got {'a': 0}"),
        (lambda: viz.plot_bars({"a": {"x": 0.0}}, ylabel="", log=True), r"finite height, 0 or more, got 0.0"),
        (lambda: viz.plot_bars({"a": {"x": float("nan")}}, ylabel=""), "got nan"),
    ],
)
def test_wrong_values_are_named(draw: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'ple-fast\[viz\]'"):
        viz.plot_scores({"PLE": {"income": [0.9]}})

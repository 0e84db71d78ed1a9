"""What all pictures share: colours, markers, an empty figure, its axes, how it is finished.

No pyplot: no global state, no window, no display needed. Colours are Okabe and Ito's, told apart by readers with any
colour vision; markers repeat what colours say.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
NEUTRAL = "#8C8C8C"
MARKERS = "osD^vP*X"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, or the one sentence that says how to get matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("ple_fast.viz draws with matplotlib: pip install 'ple-fast[viz]'") from error
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def clean(axes: Axes, grid: str = "y") -> None:
    """No box, and lines of a grid behind what is drawn."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    axes.grid(axis="x" if grid == "x" else "y", color="#E0E0E0", linewidth=0.7)
    axes.set_axisbelow(True)


def finish(figure: Figure, title: str | None, path: str | Path | None) -> Figure:
    """Sets the title, and writes the figure where a path is given."""
    if title is not None:
        figure.suptitle(title, fontsize=11)
    if path is not None:
        figure.savefig(path)
    return figure

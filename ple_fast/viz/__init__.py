"""Pictures: expert utilisation per gate, scores per model, lines with spread, bars (needs matplotlib).

Every function returns a ``matplotlib.figure.Figure`` and writes it where ``path`` is given (the ending decides the
format). Every picture says in its legend what a bar, a line and a dot are.
"""

from __future__ import annotations

from .charts import plot_bars, plot_lines, plot_scores
from .gates import GateUse, gate_use, plot_gate_use

__all__ = ["GateUse", "gate_use", "plot_bars", "plot_gate_use", "plot_lines", "plot_scores"]

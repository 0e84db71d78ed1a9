"""Triton kernels of ``ple_fast`` and their launchers.

``__all__`` lists the launchers, their tables, and what sets their tiles. The rules are in ``kernels/README.md``.
"""

from ._activations import FUSED
from ._launch import launches
from ._tile_files import Class, Table, Tile
from ._tiles import TABLES, architecture, fused_tile, reload_tables, set_table
from .fused_level import fused_level_fwd, fused_two_layers_fwd, fused_width
from .gate_combine import gate_combine_bwd, gate_combine_fwd
from .grouped_linear import grouped_data_grad, grouped_linear_fwd
from .input_grad import grouped_input_grad
from .tables import MAX_RUN, NO_GATES, GateRuns, Mixtures, Readers
from .weight_grad import WeightGrad, WeightGradResult, grouped_weight_grads

__all__ = [
    "FUSED",
    "MAX_RUN",
    "NO_GATES",
    "TABLES",
    "Class",
    "GateRuns",
    "Mixtures",
    "Readers",
    "Table",
    "Tile",
    "WeightGrad",
    "WeightGradResult",
    "architecture",
    "fused_level_fwd",
    "fused_tile",
    "fused_two_layers_fwd",
    "fused_width",
    "gate_combine_bwd",
    "gate_combine_fwd",
    "grouped_data_grad",
    "grouped_input_grad",
    "grouped_linear_fwd",
    "grouped_weight_grads",
    "launches",
    "reload_tables",
    "set_table",
]

"""Triton kernels of ``ple_fast`` and their launchers.

``__all__`` lists the launchers, their tables, and what sets their tiles. The rules are in ``kernels/README.md``.
"""

from ._activations import FUSED
from ._dropout import Dropout
from ._launch import launches, recording, wide_of
from ._layer_end import Norm
from ._level_tiles import fused_tile
from ._replay import replayed, without_replay
from ._tile_files import Class, Library, Parts, Table, Tile
from ._tiles import TABLES, architecture, reload_tables, set_table
from .batch_norm import batch_norm_merge, batch_norm_sums, column_sums_merge, norm_sums_merge
from .data_grad import grouped_data_grad
from .fused_level import fused_level_fwd, fused_width
from .fused_two_layers import fused_two_layers_fwd
from .gate_combine import gate_combine_bwd, gate_combine_fwd
from .grouped_linear import grouped_linear_fwd, has_whole_rows, linear_tile
from .input_grad import grouped_input_grad
from .layer_end import NO_END, LayerEnd, layer_end_fwd, layer_end_grad
from .layer_norm import layer_norm_grad
from .library import library_input_grad, library_linear_fwd, library_weight_grad, weight_grad_by_width
from .scale import scale_bwd, scale_fwd
from .tables import MAX_RUN, NO_GATES, GateRuns, Mixtures, Readers
from .top_k import keep_joint, keep_top_k
from .weight_grad import WeightGrad, WeightGradResult, grouped_weight_grads

__all__ = [
    "FUSED",
    "MAX_RUN",
    "NO_END",
    "NO_GATES",
    "TABLES",
    "Class",
    "Dropout",
    "GateRuns",
    "LayerEnd",
    "Library",
    "Mixtures",
    "Norm",
    "Parts",
    "Readers",
    "Table",
    "Tile",
    "WeightGrad",
    "WeightGradResult",
    "architecture",
    "batch_norm_merge",
    "batch_norm_sums",
    "column_sums_merge",
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
    "has_whole_rows",
    "keep_joint",
    "keep_top_k",
    "launches",
    "layer_end_fwd",
    "layer_end_grad",
    "layer_norm_grad",
    "library_input_grad",
    "library_linear_fwd",
    "library_weight_grad",
    "linear_tile",
    "norm_sums_merge",
    "recording",
    "reload_tables",
    "replayed",
    "scale_bwd",
    "scale_fwd",
    "set_table",
    "weight_grad_by_width",
    "wide_of",
    "without_replay",
]

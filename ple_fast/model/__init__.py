"""A model around a trunk: embeddings of a table's columns, one tower per task, fit, predict, save and load."""

from .categorical import Categorical
from .columns import Encoded, encode
from .hashed import Hashed
from .multi_task import MultiTaskModel
from .numeric import Numeric
from .statistics import columns_from
from .training import EpochResult, Step

__all__ = [
    "Categorical",
    "Encoded",
    "EpochResult",
    "Hashed",
    "MultiTaskModel",
    "Numeric",
    "Step",
    "columns_from",
    "encode",
]

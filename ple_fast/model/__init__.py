"""A model around a trunk: embeddings of a table's columns, one tower per task, fit, predict, save and load."""

from .columns import Categorical, Encoded, Numeric, encode
from .multi_task import MultiTaskModel
from .statistics import columns_from
from .training import EpochResult, Step

__all__ = ["Categorical", "Encoded", "EpochResult", "MultiTaskModel", "Numeric", "Step", "columns_from", "encode"]

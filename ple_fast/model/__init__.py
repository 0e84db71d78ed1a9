"""A model around a trunk: embeddings of a table's columns, one tower per task, fit, predict, save and load."""

from .callbacks import Callback, StopTraining
from .checkpoint import Checkpoint
from .columns import Categorical, Encoded, Numeric, encode
from .history import EpochResult, Evaluation, History, TaskScores
from .multi_task import MultiTaskModel
from .progress import Step
from .statistics import columns_from
from .tensorboard import TensorBoard

__all__ = [
    "Callback",
    "Categorical",
    "Checkpoint",
    "Encoded",
    "EpochResult",
    "Evaluation",
    "History",
    "MultiTaskModel",
    "Numeric",
    "Step",
    "StopTraining",
    "TaskScores",
    "TensorBoard",
    "columns_from",
    "encode",
]

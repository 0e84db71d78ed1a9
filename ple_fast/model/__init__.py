"""A model around a trunk: embeddings of a table's columns, one tower per task, fit, predict, save and load."""

from .callbacks import Callback, StopTraining
from .categorical import Categorical
from .checkpoint import Checkpoint
from .columns import Encoded, encode
from .hashed import Hashed
from .history import EpochResult, Evaluation, History, TaskScores
from .multi_task import MultiTaskModel
from .numeric import Numeric
from .parquet import ParquetTables
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
    "Hashed",
    "History",
    "MultiTaskModel",
    "Numeric",
    "ParquetTables",
    "Step",
    "StopTraining",
    "TaskScores",
    "TensorBoard",
    "columns_from",
    "encode",
]

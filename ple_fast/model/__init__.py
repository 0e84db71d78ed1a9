"""A model around a trunk: embeddings of a table's columns, one tower per task, fit, predict, save and load."""

from ple_fast_encoder.categorical import Categorical
from ple_fast_encoder.hashed import Hashed
from ple_fast_encoder.numeric import Numeric

from .callbacks import Callback, StopTraining
from .checkpoint import Checkpoint
from .columns import Encoded, encode
from .history import EpochResult, Evaluation, History, TaskScores
from .multi_task import MultiTaskModel
from .parquet import ParquetTables
from .progress import Step
from .served import ServedModel
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
    "ServedModel",
    "Step",
    "StopTraining",
    "TaskScores",
    "TensorBoard",
    "columns_from",
    "encode",
]

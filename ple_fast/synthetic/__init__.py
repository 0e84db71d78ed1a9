"""Data to try a model on: tasks of controlled correlation, and the log of a video service."""

from .log import synthetic_log
from .tasks import synthetic_tasks

__all__ = ["synthetic_log", "synthetic_tasks"]

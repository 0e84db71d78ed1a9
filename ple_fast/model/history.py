"""What a training has done: per epoch and task, as objects, as flat names and numbers, and as a data frame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

Number = float | int | None


@dataclass(frozen=True)
class TaskScores:
    """One task over its own sample space."""

    loss: float | None
    """Mean loss, without the task's weight in the joint loss; None where there is no label."""
    count: int
    """Labels."""
    metrics: Mapping[str, float | None] = field(default_factory=dict, hash=False)
    """By name; None where one is undefined: an AUC of one class, anything of no label."""

    def flat(self) -> dict[str, Number]:
        """``loss``, ``count`` and the metrics."""
        return {"loss": self.loss, "count": self.count, **self.metrics}

    def __getitem__(self, name: str) -> Number:
        return self.flat()[name]


@dataclass(frozen=True)
class Evaluation:
    """A model on data that it is not trained on."""

    loss: float | None
    """The joint loss with the tasks' weights of epoch 0, so that epochs can be compared; None if no task has labels."""
    tasks: Mapping[str, TaskScores] = field(hash=False)

    def __getitem__(self, task: str) -> TaskScores:
        return self.tasks[task]

    def flat(self) -> dict[str, Number]:
        """``loss``, and of each task ``<task>/loss``, ``<task>/count`` and ``<task>/<metric>``."""
        return {"loss": self.loss, **_prefixed(self.tasks)}

    def to_frame(self) -> pd.DataFrame:
        """A row per task. ImportError: pandas is missing."""
        return _frame([scores.flat() for scores in self.tasks.values()], index=list(self.tasks))


@dataclass(frozen=True)
class EpochResult:
    """One epoch of :meth:`MultiTaskModel.fit`."""

    epoch: int
    """1 is the first."""
    loss: float
    """Mean total loss over the epoch's batches, while the weights were changing."""
    score: float | None
    """On the validation data after the epoch, higher is better; None without validation data, or where the number that
    is watched is undefined, for want of labels say."""
    seconds: float
    """Of training, without validation."""
    rows: int = 0
    """That the epoch trained on."""
    lr: float | None = None
    """Learning rate of the last step, of the optimizer's first group."""
    tasks: Mapping[str, TaskScores] = field(default_factory=dict, hash=False)
    """By task, the loss over the epoch's batches and the labels in them, while the weights were changing."""
    validation: Evaluation | None = None
    """After the epoch; None without validation data."""

    @property
    def samples_per_second(self) -> float:
        """Rows that were trained on in a second."""
        return self.rows / self.seconds if self.seconds else 0.0

    def flat(self) -> dict[str, Number]:
        """Every number by one name: ``loss``, ``train/<task>/loss``, ``val/loss``, ``val/<task>/<metric>``, ..."""
        found: dict[str, Number] = {
            "epoch": self.epoch,
            "loss": self.loss,
            "score": self.score,
            "seconds": self.seconds,
            "samples_per_second": self.samples_per_second,
            "lr": self.lr,
            **_prefixed(self.tasks, "train/"),
        }
        if self.validation is not None:
            found |= {f"val/{name}": value for name, value in self.validation.flat().items()}
        return found


class History(list[EpochResult]):
    """The results of the epochs that ran, in order."""

    watched: str | None = None
    """The number that ``score`` is, in words; None without validation data."""
    stopped: str | None = None
    """Why training ended before its last epoch, in words; None where it did not."""

    @property
    def best(self) -> EpochResult | None:
        """The epoch of the best score, the first of equals; None where none has a score."""
        return max((r for r in self if r.score is not None), key=lambda r: r.score or 0.0, default=None)

    def to_frame(self) -> pd.DataFrame:
        """A row per epoch, columns as :meth:`EpochResult.flat` names them; NaN where a number is undefined.

        Raises:
            ImportError: pandas is missing.
        """
        return _frame([result.flat() for result in self])


def result_to_plain(result: EpochResult) -> dict[str, Any]:
    """As numbers, names and dicts."""
    return asdict(result)


def result_from_plain(fields: Mapping[str, Any]) -> EpochResult:
    """What :func:`result_to_plain` was given."""
    rest = dict(fields)
    validation = rest.pop("validation")
    tasks = _scores_from_plain(rest.pop("tasks"))
    if validation is not None:
        validation = Evaluation(validation["loss"], _scores_from_plain(validation["tasks"]))
    return EpochResult(**rest, tasks=tasks, validation=validation)


def _scores_from_plain(tasks: Mapping[str, Any]) -> dict[str, TaskScores]:
    return {name: TaskScores(**scores) for name, scores in tasks.items()}


def _prefixed(tasks: Mapping[str, TaskScores], prefix: str = "") -> dict[str, Number]:
    return {f"{prefix}{task}/{name}": value for task, scores in tasks.items() for name, value in scores.flat().items()}


def _frame(rows: list[dict[str, Number]], index: list[str] | None = None) -> pd.DataFrame:
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError("to_frame makes a data frame of pandas: pip install pandas, or read flat()") from error
    frame = pd.DataFrame(rows, index=index)
    undefined = {name: float for name in frame.columns if frame[name].dtype == object}
    return frame.astype(undefined)

"""What an epoch of training adds up: losses, labels and their weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..losses import JointLossResult
from .history import TaskScores
from .network import TaskNetwork


class Sums:
    """What an epoch adds up, on the device: nothing of it is read before the epoch is over."""

    def __init__(self, model: TaskNetwork) -> None:
        device, shape = next(model.parameters()).device, (len(model.tasks),)
        self.names = model.task_names
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        """Of the joint losses, each times its batch's rows."""
        self.losses = torch.zeros(shape, dtype=torch.float64, device=device)
        self.weights = torch.zeros(shape, dtype=torch.float64, device=device)
        self.counts = torch.zeros(shape, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, result: JointLossResult, rows: int, *, has_weights: bool) -> Tensor:
        """A batch; its joint loss, detached."""
        loss = result.total.detach()
        self.total += loss * rows
        weights = torch.stack(tuple(result.sample_weights.values()))
        self.losses += torch.stack(tuple(result.per_task.values())) * weights
        self.weights += weights
        self.counts += torch.stack(tuple(result.counts.values())) if has_weights else weights
        return loss

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {"total": self.total, "losses": self.losses, "weights": self.weights, "counts": self.counts}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """What :meth:`state` gave."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def tasks(self) -> dict[str, TaskScores]:
        """The mean loss of each task, and its labels."""
        rows = zip(self.names, self.losses.tolist(), self.weights.tolist(), self.counts.tolist(), strict=True)
        return {name: TaskScores(loss / weight if count else None, count) for name, loss, weight, count in rows}

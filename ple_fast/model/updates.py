"""How gradients become a step: clipped or not, at a rate that a schedule may change."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..scalars import check_number
from .checkpoint import described
from .optimizers import clip_grad_norm
from .run import Run, steps_left


class Updates:
    """The optimizer of a run, what clips its gradients and what changes its rate.

    Raises:
        TypeError: a norm that is no number.
        ValueError: a norm that is not above 0.
    """

    def __init__(self, run: Run, clip_norm: Any = None) -> None:
        self.run, self.is_by_batch = run, run.schedule_every == "batch"
        self.clip_norm = None if clip_norm is None else check_number("clip_norm", clip_norm)
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm: expected a norm above 0, got {self.clip_norm}")
        self.gradient_norm: Tensor | None = None
        """Of the last step, before it was clipped."""
        self._rate: float | None = None

    def settings(self) -> dict[str, Any]:
        """What another training would have to share, for its checkpoint to be one of this."""
        made = self.run.make_for_tables
        return {
            "seed": self.run.seed,
            "lr": float(self.run.lr),
            "optimizer": described(self.run.make),
            "schedule": described(self.run.schedule),
            "schedule_every": self.run.schedule_every,
            "clip_norm": self.clip_norm,
            # Where there is one alone: checkpoints of older releases have no such setting.
            **({} if made is None else {"embedding_optimizer": described(made)}),
        }

    def begin(self) -> None:
        """With the optimizer and the scheduler of the last call, or with new ones."""
        self.optimizer = self.run.take_optimizer()
        self.scheduler = self.run.take_scheduler(self.optimizer)
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            if self.is_by_batch:
                raise ValueError("schedule_every: expected 'epoch' with ReduceLROnPlateau, got 'batch'")
            if self.scheduler.mode != "min":
                raise ValueError(
                    "schedule: expected ReduceLROnPlateau(mode='min'), got 'max'; fit shows it a number that falls as "
                    "the score rises"
                )

    def check_steps(self, wanted: int | None, state: dict[str, Any] | None = None) -> None:
        """ValueError where the schedule ends before so many steps; the optimizer stays that of the next call.

        Args:
            wanted: None where nobody knows yet.
            state: of the schedule in a checkpoint that training goes on from.
        """
        left = steps_left(self.scheduler, state)
        if left is None or wanted is None or wanted <= left:
            return
        self.keep()
        total = {**vars(self.scheduler), **(state or {})}["total_steps"]
        raise ValueError(
            f"schedule: expected one with {wanted} more steps, one after each {self.run.schedule_every}, got "
            f"{type(self.scheduler).__name__} with total_steps={total}, of which {left} are left; count the steps of "
            "all calls that go on with it, or train fewer epochs"
        )

    def keep(self) -> None:
        """For the next call of ``fit``."""
        self.run.keep(self.optimizer, self.scheduler)

    def load(self, optimizer: dict[str, Any], schedule: dict[str, Any] | None) -> None:
        """The states of a checkpoint."""
        self.optimizer.load_state_dict(optimizer)
        if self.scheduler is not None and schedule is not None:
            self.scheduler.load_state_dict(schedule)

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of ``loss``. ValueError, and no step, where the schedule is at its end."""
        if self.is_by_batch:
            self.check_steps(1)  # of parts nobody knew how many there are
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip_norm is not None:
            self.gradient_norm = clip_grad_norm(self.run.parameters, self.clip_norm)
        self.optimizer.step()
        if self.scheduler is not None and self.is_by_batch:
            self._rate = self._present_rate()
            self.scheduler.step()

    def end_epoch(self, watched: float | None) -> None:
        """``watched``, lower is better, is what ``ReduceLROnPlateau`` follows; it is not called for None."""
        if self.scheduler is None or self.is_by_batch:
            return
        if not isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step()
        elif watched is not None:
            # It compares with a share of the best so far, which for a number below 0 points the wrong way.
            self.scheduler.step(1.0 + watched if watched >= 0 else math.exp(watched))

    def last_rate(self) -> float | None:
        """Of the last step, until ``end_epoch``; the first group's. None of an optimizer without groups."""
        return self._rate if self.scheduler is not None and self.is_by_batch else self._present_rate()

    def _present_rate(self) -> float | None:
        groups = getattr(self.optimizer, "param_groups", None)
        return float(groups[0]["lr"]) if groups and "lr" in groups[0] else None

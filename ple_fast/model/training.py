"""The training loop: batches, epochs, early stopping."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .arguments import warn_of_none
from .batches import Batch, batches_of
from .callbacks import Callbacks, StopTraining
from .checkpoint import Checkpoint
from .configuration import task_to_json, tasks_of
from .history import EpochResult, History, result_from_plain, result_to_plain
from .labels import warn_of_scale
from .network import TaskNetwork
from .progress import Reporter, Step
from .rows import RowParts, Rows
from .scoring import Scorer
from .settings import check_state, settings_of
from .sums import Sums
from .updates import Updates

UNTRAINED = "they are not trained"


class Best(NamedTuple):
    """The epoch of the best score."""

    score: float
    epoch: int
    tensors: list[Tensor]
    """Copies of parameters and buffers."""


@torch.no_grad()
def _copied(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


@torch.no_grad()
def _restore(model: nn.Module, copies: list[Tensor]) -> None:
    for tensor, copy in zip((*model.parameters(), *model.buffers()), copies, strict=True):
        tensor.copy_(copy)


class Trainer:
    """One call of ``fit``: trains in place, every module in the mode it is in."""

    def __init__(
        self,
        model: TaskNetwork,
        rows: Rows | RowParts,
        updates: Updates,
        *,
        epochs: int,
        batch_size: int | None,
        scorer: Scorer | None,
        callbacks: Callbacks,
        reporter: Reporter,
        checkpoint: str | Path | None = None,
        checkpoint_every: int | None = None,
    ) -> None:
        self.model, self.rows, self.updates, self.epochs = model, rows, updates, epochs
        self.batches = batches_of(rows, batch_size)
        self.scorer, self.callbacks, self.reporter = scorer, callbacks, reporter
        self.is_watched = bool(reporter.wants_steps or callbacks.after_step)
        self.device = next(model.parameters()).device
        self.history = History()
        self.history.watched = None if scorer is None else scorer.watched
        self.best: Best | None = None
        self.checkpoint = None
        if checkpoint is not None:
            settings = settings_of(model, rows, self.batches.batch_size, scorer, updates)
            self.checkpoint = Checkpoint(checkpoint, settings)
        self.checkpoint_every = checkpoint_every
        self.epoch = 1  # that begins, or runs
        self.is_in_epoch = False
        self.batch = 0  # the last one of the epoch that is done
        self.steps = 0  # of all epochs
        self.rows_done = 0  # of the epoch
        self.seconds = 0.0  # of the epoch, until the last checkpoint
        self.began = 0.0  # the epoch, on the clock; later by what ran before a checkpoint
        self.sums = Sums(model)
        self.order = updates.run.generator.get_state()  # before it draws the epoch's
        self.drawn = self._generators()  # before the epoch draws from them
        self.resumed: list[Tensor] | None = None
        """Of PyTorch's generators, in mid-epoch; until the parts before are read again."""

    def train(self, *, resume: bool = False) -> History:
        """To the end of the last epoch, from the beginning or from the checkpoint, if there is one.

        With a scorer the weights of the best epoch are back at the end, also after an interruption. The optimizer of
        the run stays there where it is that of the weights. Whatever is raised has the results of the epochs that ran
        as its ``history``.

        Raises:
            FloatingPointError: the loss of an epoch is not finite.
            ValueError: a checkpoint that is damaged, of other settings, of another model or of more epochs.
        """
        state = self.checkpoint.read() if resume and self.checkpoint is not None else None
        if state is not None and self.checkpoint is not None:
            check_state(self.checkpoint, state, self.model, self.epochs)
        self.updates.begin()
        self.updates.check_steps(self._steps_to_come(state), None if state is None else state["schedule"])
        if state is not None:
            self._resume(state)
        is_complete = False
        try:
            try:
                while self.epoch <= self.epochs and not self._is_stopped():
                    self._run_epoch()
            except StopTraining as stop:
                place = f"in epoch {self.epoch}" if self.is_in_epoch else f"after epoch {len(self.history)}"
                self.history.stopped = str(stop) or f"stopped by a callback {place} of {self.epochs}"
                self._save_stop()
            is_complete = not self.is_in_epoch
        except BaseException as error:
            vars(error)["history"] = self.history
            raise
        finally:
            best = self.best
            is_put_back = best is not None and not (is_complete and best.epoch == len(self.history))
            if best is not None and is_put_back:
                _restore(self.model, best.tensors)
        if not is_put_back:
            self.updates.keep()
        if self.history.stopped is not None:
            self.reporter.say(self.history.stopped)
        return self.history

    def _steps_to_come(self, state: Mapping[str, Any] | None) -> int | None:
        """Of the schedule; None where the batches of an epoch are not known yet."""
        epoch, batch = (1, 0) if state is None else (state["epoch"], state["batch"])
        epochs, count = self.epochs - epoch + 1, self.batches.count
        if not self.updates.is_by_batch:
            return epochs
        return None if count is None else epochs * count - batch

    def _is_stopped(self) -> bool:
        """Whether patience is at its end, which the history then says, or a callback had stopped what is resumed."""
        if self.history.stopped is not None:
            return True
        if self.scorer is None or self.scorer.patience is None or self.best is None:
            return False
        ran, best = len(self.history), self.best
        if ran - best.epoch < self.scorer.patience:
            return False
        self.history.stopped = (
            f"stopped after epoch {ran} of {self.epochs}: {self.scorer.watched} was best in epoch {best.epoch}, whose "
            f"weights are back; patience={self.scorer.patience}"
        )
        return True

    def _run_epoch(self) -> None:
        for call in self.callbacks.before_epoch:
            call(self.model, self.epoch)
        self.is_in_epoch = True
        self.began = time.perf_counter() - self.seconds
        generator, sums, every = self.updates.run.generator, self.sums, self.checkpoint_every
        self.order = generator.get_state()
        if self.resumed is None:
            self.drawn = self._generators()
        else:  # a DataLoader may draw its order from them
            self._set_generators(self.drawn)
        for batch in self.batches.epoch(generator, self.updates.run.epochs, self.batch):
            self._go_on()
            if self.steps == 0 and isinstance(self.rows, RowParts):  # the labels of rows in memory were looked at
                warn_of_scale(self.model.tasks, batch.labels.targets)
            loss = self._step(batch, sums)
            self.batch, self.steps = self.batch + 1, self.steps + 1
            self.rows_done += len(batch.data)
            if self.is_watched:
                self._tell(loss)
            # What ends the epoch is written below; parts do not say beforehand which one is the last.
            if every is not None and self.steps % every == 0 and self.batch != self.batches.count:
                self.seconds = time.perf_counter() - self.began
                self._check_finite(float(sums.total))  # a good checkpoint is not replaced by one that is lost
                self._save()
        self._go_on()
        if self.epoch == 1 and isinstance(self.rows, RowParts):
            warn_of_none([name for name, scores in sums.tasks().items() if not scores.count], "labels", UNTRAINED)
        self.model.joint_loss.step_epoch()
        mean, seconds = float(sums.total) / self.rows_done, time.perf_counter() - self.began
        self._check_finite(mean)
        found, score = (None, None) if self.scorer is None else self.scorer(self.epoch)
        rate, tasks = self.updates.last_rate(), sums.tasks()
        result = EpochResult(self.epoch, mean, score, seconds, self.rows_done, rate, tasks, found)
        is_best = score is not None and (self.best is None or score > self.best.score)
        best = Best(score, self.epoch, _copied(self.model)) if score is not None and is_best else self.best
        self.history.append(result)  # with the copy at hand, whatever interrupts
        self.best = best
        self.updates.end_epoch(mean if self.scorer is None else None if score is None else -score)
        self.is_in_epoch = False
        self.epoch, self.batch, self.rows_done, self.seconds = self.epoch + 1, 0, 0, 0.0
        self.updates.run.epochs += 1
        self.sums = Sums(self.model)
        self.order = generator.get_state()
        self._save()
        self.reporter.epoch(result, self.epochs, is_best)
        for call in self.callbacks.after_epoch:
            call(self.model, result)

    def _go_on(self) -> None:
        """With the generators as a checkpoint in mid-epoch had them: what was read before it has been read again."""
        if self.resumed is not None:
            self._set_generators(self.resumed)
            self.resumed = None

    def _check_finite(self, loss: float) -> None:
        if not np.isfinite(loss):
            raise FloatingPointError(
                f"epoch {self.epoch}: expected a finite loss, got {loss}; a lower lr, or labels of a smaller scale, "
                "may mend it"
            )

    def _step(self, batch: Batch, sums: Sums) -> Tensor:
        """One batch; its joint loss, detached."""
        labels = batch.labels.to(self.device)
        joint_loss, data, gates = self.model.joint_loss, batch.data.to(self.device), None
        if joint_loss.balance is None:
            outputs = self.model(data)
        else:
            outputs, gates = self.model(data, return_gates="shares")
        result = joint_loss(outputs, labels.targets, sample_weight=labels.weights, gates=gates)
        self.updates.step(result.total)
        torch.clear_autocast_cache()  # a region around fit would go on with the weights before the step
        return sums.add(result, len(batch.data), has_weights=bool(labels.weights))

    def _tell(self, loss: Tensor) -> None:
        rate, norm = self.updates.last_rate(), self.updates.gradient_norm
        place = (self.epoch, self.epochs, self.batch, self.batches.count)
        step = Step(*place, loss, self.rows_done, rate, norm, self.steps)
        for call in self.callbacks.after_step:
            call(self.model, step)
        if self.reporter.wants_steps:
            self.reporter.step(step)

    def _generators(self) -> list[Tensor]:
        """The states of PyTorch's own generators."""
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return states

    def _set_generators(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type == "cuda" and len(states) > 1:
            torch.cuda.set_rng_state(states[1], self.device)

    def _save(self) -> None:
        """Writes the checkpoint, if there is to be one: all that the rest of the training depends on."""
        if self.checkpoint is None:
            return
        self.checkpoint.write(
            {
                "epoch": self.epoch,
                "batch": self.batch,
                "steps": self.steps,
                "rows": self.rows_done,
                "run_epochs": self.updates.run.epochs,
                "seconds": self.seconds,
                "sums": self.sums.state(),
                "history": [result_to_plain(result) for result in self.history],
                "best": None if self.best is None else self.best._asdict(),
                "tasks": [task_to_json(task) for task in self.model.tasks],
                "model": dict(self.model.state_dict()),
                "optimizer": self.updates.optimizer.state_dict(),
                "schedule": None if self.updates.scheduler is None else self.updates.scheduler.state_dict(),
                "order": self.order,
                "generators": self._generators(),
                "drawn": self.drawn,
                # Where there is one alone: checkpoints of older releases have no such entry.
                **({} if self.history.stopped is None else {"stopped": self.history.stopped}),
            }
        )

    def _save_stop(self) -> None:
        """That a callback has stopped the training, so that what resumes it does not go on."""
        if self.is_in_epoch:
            self.seconds = time.perf_counter() - self.began
            if not np.isfinite(float(self.sums.total)):  # a good checkpoint is not replaced by one that is lost
                return
        self._save()

    def _resume(self, state: Mapping[str, Any]) -> None:
        assert self.checkpoint is not None
        where = self.checkpoint.file
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():  # load_state_dict would end the run
                tensor.copy_(state["model"][name])
        self.model.tasks = tuple(tasks_of(where, state))
        self.updates.load(state["optimizer"], state["schedule"])
        self.epoch, self.batch, self.seconds = state["epoch"], state["batch"], state["seconds"]
        self.steps, self.rows_done, self.updates.run.epochs = state["steps"], state["rows"], state["run_epochs"]
        self.is_in_epoch = self.batch > 0
        self.sums.load(state["sums"])
        self.history.extend(map(result_from_plain, state["history"]))
        self.history.stopped = state.get("stopped")
        if state["best"] is not None:
            self.best = Best(**state["best"])
        self.updates.run.generator.set_state(state["order"])
        self._set_generators(state["generators"])
        if self.batch:
            self.drawn, self.resumed = state["drawn"], state["generators"]
        place = f"batch {self.batch} of epoch {self.epoch}" if self.batch else f"epoch {self.epoch - 1}"
        self.reporter.say(f"resumed after {place} of {self.epochs} from {where}")

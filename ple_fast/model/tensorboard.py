"""A callback that writes what a training does to TensorBoard."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from ple_fast_encoder import Encoder
from ple_fast_encoder.tables import Table

from ..scalars import check_count, shown
from ..viz import GateUse, gate_use
from .callbacks import Callback
from .columns import Encoded
from .history import EpochResult
from .progress import Step


class TensorBoard(Callback):
    """Scalars of each epoch, of some steps, and of what each gate weighs.

    Tags are those of :meth:`EpochResult.flat` (``loss``, ``train/click/loss``, ``val/click/auc``; step: the epoch),
    ``step/loss``, ``step/lr`` and ``step/gradient_norm`` (step: the batches of all epochs), and
    ``gates/<level>/<gate>/<expert>``, the mean weight that a gate gives to an expert over ``gates``, as
    ``ple_fast.viz.gate_use`` has it. What is undefined is left out.

    Args:
        writer: the folder of a new ``torch.utils.tensorboard.SummaryWriter``; or such a writer, or whatever has its
            ``add_scalar(tag, value, step)``.
        gates: rows over which the gates are read after each epoch, in eval mode; None leaves them out. That they can be
            read is looked at before the first step.
        every: batches between two steps that are written; each waits for the device.

    Raises:
        TypeError: a writer that has no ``add_scalar``.
        ImportError: a folder, and the package tensorboard is missing.

    ``fit`` raises TypeError of a trunk without gates, and TypeError or ValueError of ``gates`` that the model cannot
    encode.
    """

    def __init__(self, writer: str | Path | Any, *, gates: Table | Encoded | None = None, every: int = 50) -> None:
        self.gates, self.every = gates, check_count("every", every)
        self._encoded: tuple[Encoder, Encoded] | None = None
        """The rows, and what encoded them: another model has other codes."""
        if isinstance(writer, (str, Path)):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "TensorBoard writes with the package tensorboard: pip install tensorboard, or pass a writer that "
                    "has add_scalar"
                ) from error
            writer = SummaryWriter(str(writer))
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"writer: expected a folder or a SummaryWriter, got {shown(writer)}")
        self.writer: Any = writer

    def before_epoch(self, model: Any, epoch: int) -> None:
        """Finds rows and trunks without gates before they cost an epoch."""
        if self.gates is not None and (self._encoded is None or self._encoded[0] is not model.encoder()):
            self._gate_use(model, self._rows(model).rows(slice(0, 2)))

    def after_step(self, model: Any, step: Step) -> None:
        """Loss, learning rate and norm of the gradients, of some steps."""
        number = step.number
        if number % self.every:
            return
        for name, value in (("loss", step.loss), ("lr", step.lr), ("gradient_norm", step.gradient_norm)):
            self._write(f"step/{name}", value, number)

    def after_epoch(self, model: Any, result: EpochResult) -> None:
        """Every number of the epoch, and the gates."""
        for name, value in result.flat().items():
            if name != "epoch":
                self._write(name, value, result.epoch)
        if self.gates is not None:
            for use in self._gate_use(model, self._rows(model)):
                numbers: Counter[str] = Counter()
                for expert, mean in zip(use.experts, use.mean, strict=True):
                    numbers[expert] += 1
                    self._write(f"gates/{use.level}/{use.gate}/{expert} {numbers[expert]}", mean, result.epoch)
        if callable(flush := getattr(self.writer, "flush", None)):
            flush()

    def _rows(self, model: Any) -> Encoded:
        """Encoded once for a model."""
        encoder = model.encoder()
        if self._encoded is None or self._encoded[0] is not encoder:
            self._encoded = encoder, model.encode(self.gates)
        return self._encoded[1]

    def _gate_use(self, model: Any, rows: Encoded) -> list[GateUse]:
        return gate_use(model.gate_weights(rows), model.topologies, model.task_names)

    def _write(self, tag: str, value: Any, number: int) -> None:
        if value is not None:
            self.writer.add_scalar(re.sub(r"[^-/\w.]", "_", tag), float(value), number)

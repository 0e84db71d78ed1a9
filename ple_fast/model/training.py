"""The training loop: batches, epochs, early stopping."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .arguments import Labels
from .columns import Encoded
from .network import TaskNetwork
from .run import Run
from .scoring import Scorer


@dataclass(frozen=True)
class Step:
    """What a progress callback is told after each batch."""

    epoch: int
    """1 is the first."""
    epochs: int
    batch: int
    """1 is the first."""
    batches: int
    loss: Tensor
    """Total loss of the batch, detached; reading its value waits for the device."""


@dataclass(frozen=True)
class EpochResult:
    """One epoch of :meth:`MultiTaskModel.fit`."""

    epoch: int
    """1 is the first."""
    loss: float
    """Mean total loss over the epoch's batches, while the weights were changing."""
    score: float | None
    """On the validation data after the epoch, higher is better; None without validation data, or where they have no
    label."""
    seconds: float
    """Of training, without validation."""


Progress = Callable[[Step], None]


def batch_bounds(rows: int, batch_size: int) -> list[tuple[int, int]]:
    """Where batches begin and end. One row left over joins the batch before it: batch norm cannot train on one."""
    starts = list(range(0, rows, batch_size))
    if len(starts) > 1 and rows - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], rows], strict=True))


@torch.no_grad()
def _copied(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


@torch.no_grad()
def _restore(model: nn.Module, copies: list[Tensor]) -> None:
    for tensor, copy in zip((*model.parameters(), *model.buffers()), copies, strict=True):
        tensor.copy_(copy)


def train(
    model: TaskNetwork,
    rows: Encoded,
    labels: Labels,
    run: Run,
    *,
    epochs: int,
    batch_size: int,
    score: Scorer | None,
    progress: Progress | None,
) -> list[EpochResult]:
    """Trains in place, every module in the mode it is in.

    With ``score`` the weights of the best epoch are back at the end, also after an interruption. The optimizer of
    ``run`` stays there where it is that of the weights. Whatever is raised has the results of the epochs that ran as
    its ``history``.

    Raises:
        FloatingPointError: the loss of an epoch is not finite.
    """
    optimizer, joint_loss = run.take_optimizer(), model.joint_loss
    device = next(model.parameters()).device
    bounds = batch_bounds(len(rows), batch_size)
    results: list[EpochResult] = []
    best: tuple[float, int, list[Tensor]] | None = None
    is_complete = False
    try:
        for epoch in range(1, epochs + 1):
            begin = time.perf_counter()
            order = torch.randperm(len(rows), generator=run.generator, device="cpu")
            summed = torch.zeros((), dtype=torch.float64, device=device)
            for batch, (start, stop) in enumerate(bounds, 1):
                index = order[start:stop]
                target = {name: label[index].to(device) for name, label in labels.items()}
                loss = joint_loss(model(rows.rows(index).to(device)), target).total
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                torch.clear_autocast_cache()  # a region around fit would go on with the weights before the step
                detached = loss.detach()
                summed += detached * (stop - start)
                if progress is not None:
                    progress(Step(epoch, epochs, batch, len(bounds), detached))
            joint_loss.step_epoch()
            mean, seconds = float(summed) / len(rows), time.perf_counter() - begin
            if not np.isfinite(mean):
                raise FloatingPointError(
                    f"epoch {epoch}: expected a finite loss, got {mean}; a lower lr, or labels of a smaller scale, may "
                    "mend it"
                )
            value = None if score is None else score(epoch)
            results.append(EpochResult(epoch, mean, value, seconds))
            if value is not None and (best is None or value > best[0]):
                best = value, epoch, _copied(model)
            if score is not None and score.patience is not None and best and epoch - best[1] >= score.patience:
                break
        is_complete = True
    except BaseException as error:
        vars(error)["history"] = results
        raise
    finally:
        is_put_back = best is not None and not (is_complete and best[1] == len(results))
        if best is not None and is_put_back:
            _restore(model, best[2])
    if not is_put_back:
        run.keep(optimizer)
    return results


def progress_bar(progress: bool | Progress | None) -> AbstractContextManager[Progress | None]:
    """The callback itself, or a rich progress bar for ``True``.

    Raises:
        ImportError: rich is missing.
    """
    if progress is True:
        return _rich_bar()
    return nullcontext(None if progress is False else progress)


@contextmanager
def _rich_bar() -> Iterator[Progress]:
    try:
        from rich.progress import Progress as Bar
    except ImportError as error:
        raise ImportError("progress=True draws with rich: pip install rich, or pass a function") from error
    with Bar() as bar:
        line = bar.add_task("epoch 1")

        def show(step: Step) -> None:
            done = (step.epoch - 1) * step.batches + step.batch
            bar.update(
                line, total=step.epochs * step.batches, completed=done, description=f"epoch {step.epoch}/{step.epochs}"
            )

        yield show

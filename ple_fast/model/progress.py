"""What a training shows while it runs: a bar on a terminal, a line per epoch elsewhere, or what a function draws."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..scalars import shown
from .history import EpochResult, TaskScores

SECONDS = 0.1
"""Between two looks at the loss, which wait for the device."""


@dataclass(frozen=True)
class Step:
    """One batch that was trained on."""

    epoch: int
    """1 is the first."""
    epochs: int
    batch: int
    """1 is the first."""
    batches: int | None
    """Of the epoch; None where data comes in parts and none has been read to its end."""
    loss: Tensor
    """Total loss of the batch, detached; reading its value waits for the device."""
    rows: int = 0
    """Of the epoch, up to here."""
    lr: float | None = None
    """Learning rate of the step, of the optimizer's first group."""
    gradient_norm: Tensor | None = None
    """Of all gradients together, before they were clipped; None without ``clip_norm``."""
    number: int = 0
    """Of the step, in all epochs; 1 is the first."""


Progress = Callable[[Step], None]


class Reporter:
    """Is told what a training does, and says nothing."""

    wants_steps = False

    def step(self, step: Step) -> None:
        """After each batch, where ``wants_steps``."""

    def epoch(self, result: EpochResult, epochs: int, is_best: bool) -> None:
        """After each epoch and its validation."""

    def say(self, words: str) -> None:
        """That training goes on from a checkpoint, or why it ended before its last epoch."""


class _Function(Reporter):
    wants_steps = True

    def __init__(self, function: Progress) -> None:
        self.function = function

    def step(self, step: Step) -> None:
        self.function(step)


class _Lines(Reporter):
    """On standard output, where it is no terminal, or rich is not there. Nobody who reads it is no reason to stop."""

    def epoch(self, result: EpochResult, epochs: int, is_best: bool) -> None:
        self.say(line_of(result, epochs, is_best))

    def say(self, words: str) -> None:
        known = getattr(sys.stdout, "encoding", None) or "utf-8"
        with contextlib.suppress(OSError, ValueError):  # a pipe or a file that was closed
            print(words.encode(known, "backslashreplace").decode(known), flush=True)


class _Bar(Reporter):
    """The epoch that runs, with rich, below the lines of those before."""

    wants_steps = True

    def __init__(self, bar: Any) -> None:
        self.bar, self.line, self.begin, self.next = bar, None, 0.0, 0.0
        self.rows = 0  # of the epoch, at its first step here, which may be of a batch behind a checkpoint

    def step(self, step: Step) -> None:
        now = time.perf_counter()
        if self.line is None:
            self.begin, self.rows = now, step.rows
            self.line = self.bar.add_task(f"epoch {step.epoch}/{step.epochs}", total=step.batches, loss="", speed="")
        is_last = step.batch == step.batches  # and is shown, however short the epoch was
        if now < self.next and not is_last:
            return
        self.next = now + SECONDS
        # The first batch began before anything could be told of it.
        passed, since = now - self.begin, step.rows - self.rows
        speed = f"{since / passed:,.0f} samples/s" if passed and since else ""
        loss = f"loss {float(step.loss):.4g}"
        self.bar.update(self.line, completed=step.batch, loss=loss, speed=speed, refresh=is_last)

    def epoch(self, result: EpochResult, epochs: int, is_best: bool) -> None:
        if self.line is not None:
            self.bar.remove_task(self.line)
            self.line = None
        self.say(line_of(result, epochs, is_best))

    def say(self, words: str) -> None:
        self.bar.console.print(words, markup=False, highlight=False, soft_wrap=True)


class _Surviving:
    """An output whose reader may leave, and whose encoding may not have every letter: neither ends a training.

    rich would end the program at a closed pipe.
    """

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, text: str) -> int:
        """Goes nowhere where nobody reads any more."""
        with contextlib.suppress(OSError, ValueError):
            try:
                self.file.write(text)
            except UnicodeEncodeError as error:
                self.file.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        """As ``write``."""
        with contextlib.suppress(OSError, ValueError):
            self.file.flush()

    def isatty(self) -> bool:
        """Whether there is a terminal."""
        try:
            return bool(self.file.isatty())
        except (AttributeError, OSError, ValueError):
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def reporter(progress: bool | Progress | None) -> AbstractContextManager[Reporter]:
    """What ``fit(progress=)`` asks for.

    Raises:
        TypeError: neither a bool nor a function.
        ImportError: ``True``, on a terminal without rich.
    """
    if progress is False:
        return nullcontext(Reporter())
    if callable(progress):
        return nullcontext(_Function(progress))
    if progress is not None and progress is not True:
        raise TypeError(f"progress: expected a bool or a function, got {shown(progress)}")
    return _shown(must_draw=progress is True)


@contextmanager
def _shown(must_draw: bool) -> Iterator[Reporter]:
    try:
        from rich.console import Console
        from rich.errors import LiveError
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars
    except ImportError as error:
        if must_draw:
            raise ImportError("progress=True draws with rich: pip install rich, or pass a function") from error
        yield _Lines()
        return
    out = _Surviving(sys.stdout)
    console = Console(file=out)  # type: ignore[arg-type]  # it is asked for what is written and for its attributes
    # FORCE_COLOR makes a terminal of a log for rich, and a bar would be redrawn there thousands of times.
    if not (console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal and out.isatty())):
        yield _Lines()
        return
    numbers = (TextColumn("{task.fields[loss]}"), TimeElapsedColumn(), TextColumn("{task.fields[speed]}"))
    bars = Bars(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *numbers, console=console)
    try:
        bars.start()
    except LiveError:  # the caller draws, and there is one place to draw in
        yield _Lines()
        return
    try:
        yield _Bar(bars)
    finally:
        bars.stop()


def line_of(result: EpochResult, epochs: int, is_best: bool) -> str:
    """One epoch in a line; of the tasks what validation says, or, without it, what training does."""
    parts = [f"epoch {result.epoch}/{epochs}", f"loss {_number(result.loss)}"]
    found = result.validation
    if found is not None:
        parts.append(f"val loss {_number(found.loss)}")
        if result.score is not None and (found.loss is None or result.score != -found.loss):
            parts.append(f"score {_number(result.score)}")
        parts += ["(best)"] if is_best else []
    parts += [f"{result.seconds:.1f} s", f"{result.samples_per_second:,.0f} samples/s"]
    tasks = result.tasks if found is None else found.tasks
    parts += [f"{name}: {_scores(scores)}" for name, scores in tasks.items()]
    return "  ".join(parts)


def _scores(scores: TaskScores) -> str:
    named = {"loss": scores.loss, **scores.metrics}
    return ", ".join(f"{name} {_number(value)}" for name, value in named.items())


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4g}"

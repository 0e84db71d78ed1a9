"""Progress of a long run: a bar on a terminal, and a line every few seconds where standard output is anything else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS = 5.0
"""Between two lines: whoever reads a log never waits ten for the next one, also on a busy machine."""


def console_for(quiet: bool = False) -> Console:
    """Standard output; a log has no width of its own and gets one that the tables fit into."""
    console = Console(quiet=quiet)
    if not console.is_terminal:
        console.width = 120
    return console


class Work:
    """What a run is doing at the moment, and how much of it is done."""

    def __init__(self, description: str, tell: Callable[[Work], None] = lambda work: None) -> None:
        self.description, self.completed, self.total = description, 0, 0
        self._tell, self._begin = tell, time.perf_counter()
        self._first: float | None = None  # when parts were first counted: what came before says nothing about them

    def now(self, description: str, completed: int | None = None, total: int | None = None) -> None:
        """What comes next; ``completed`` out of ``total`` parts are done (default: as before)."""
        self.description = description
        self.completed = self.completed if completed is None else completed
        self.total = self.total if total is None else total
        if self._first is None and self.total:
            self._first = time.perf_counter()
        self._tell(self)

    def line(self) -> str:
        """The same in words: the time that has passed, what is being done, the share done, the time left."""
        now = time.perf_counter()
        words = f"{_minutes(now - self._begin):>6}  {self.description}"
        if self._first is None or not 0 < self.completed < self.total:
            return words
        left = (now - self._first) * (self.total - self.completed) / self.completed
        return f"{words}, {self.completed / self.total:.0%}, about {_minutes(left)} left"


@contextmanager
def progress(console: Console, description: str) -> Iterator[Work]:
    """Shows a :class:`Work` that begins with ``description``, from the first moment on; nothing on a quiet console."""
    if console.quiet:
        yield Work(description)
    elif console.is_terminal and not console.is_dumb_terminal:
        with _bar(console, description) as work:
            yield work
    else:
        with _lines(console, description) as work:
            yield work


@contextmanager
def _bar(console: Console, description: str) -> Iterator[Work]:
    parts = (TextColumn("{task.description:34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*parts, TimeRemainingColumn(), console=console) as bar:
        line = bar.add_task(description, total=None)
        yield Work(
            description,
            lambda work: bar.update(
                line, description=work.description, completed=work.completed, total=work.total or None
            ),
        )


@contextmanager
def _lines(console: Console, description: str) -> Iterator[Work]:
    """From a thread of its own, so that no call, however long, is silent."""
    work, ended = Work(description), threading.Event()

    def say() -> None:
        console.print(work.line(), markup=False, highlight=False, soft_wrap=True)

    def beat() -> None:
        while not ended.wait(SECONDS):
            say()

    say()
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield work
    finally:
        ended.set()
        thread.join()


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"

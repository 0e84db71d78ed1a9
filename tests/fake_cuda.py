"""Stand-ins for streams, events and graphs of ``torch.cuda``, so that code that times on a GPU runs without one.

A captured graph replays the calls that were made while it was captured, if the test names them; an event reads a clock
that advances by a millisecond per recorded call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


class FakeCuda:
    """What happened, in order: ``stream``, ``capture``, ``captured``, ``replay``, ``synchronize``."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.milliseconds = 0.0

    def work(self) -> None:
        """A call that takes a millisecond."""
        self.log.append("work")
        self.milliseconds += 1.0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put the stand-ins into ``torch.cuda``."""
        fake = self

        class Stream:
            def wait_stream(self, other: object) -> None:
                fake.log.append("wait")

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing
                self.at = float("nan")

            def record(self) -> None:
                self.at = fake.milliseconds

            def synchronize(self) -> None:
                fake.log.append("synchronize")

            def elapsed_time(self, other: Event) -> float:
                return other.at - self.at

        class CUDAGraph:
            def replay(self) -> None:
                fake.log.append("replay")
                fake.milliseconds += 5.0

        @contextmanager
        def stream(given: object) -> Iterator[None]:
            fake.log.append("stream")
            yield

        @contextmanager
        def graph(given: object) -> Iterator[None]:
            fake.log.append("capture")
            yield
            fake.log.append("captured")

        for name, value in (("Stream", Stream), ("Event", Event), ("CUDAGraph", CUDAGraph), ("stream", stream)):
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *arguments: fake.log.append("synchronize"))

"""A pytest plugin: several processes run one suite, each test once. ``tests/processes.py`` starts and watches them.

Every process collects all tests and claims chunks of them, by creating a file per chunk: no server, no extra package.
What happens is a line of JSON in a file of the process, as soon as it happens.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHUNK = 8
"""Tests of one file that are claimed together: they share fixtures, and kernels that are compiled."""
BROKEN = 17
"""Exit code of a process whose device answers no more."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("processes")
    group.addoption("--claims", type=Path, required=True, help="folder of the claims, shared by all processes")
    group.addoption("--worker", type=int, required=True, help="number of this process")
    group.addoption("--first", type=float, default=0.0, help="where in the suite to begin, 0 to 1")
    group.addoption("--until", type=float, required=True, help="seconds since 1970 when no test is started any more")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Claims(config), "claims of a process")


def chunks_of(items: list[pytest.Item]) -> list[list[pytest.Item]]:
    """Consecutive tests of one file, ``CHUNK`` at most."""
    chunks: list[list[pytest.Item]] = []
    for item in items:
        if not chunks or len(chunks[-1]) == CHUNK or chunks[-1][-1].path != item.path:
            chunks.append([])
        chunks[-1].append(item)
    return chunks


class _Claims:
    def __init__(self, config: pytest.Config) -> None:
        self.folder: Path = config.getoption("--claims")
        self.until: float = config.getoption("--until")
        self.first: float = config.getoption("--first")
        self.events = self.folder / f"events-{config.getoption('--worker'):03d}.jsonl"
        self.is_cuda = str(config.getoption("--device", "cpu")).startswith("cuda")
        self.failed = False

    def tell(self, **event: Any) -> None:
        """A line for the parent, on disk when this returns."""
        with self.events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.tell(id=report.nodeid, outcome="failed", seconds=0.0, text=str(report.longrepr))
        elif report.skipped:
            self.tell(id=report.nodeid, outcome="skipped", seconds=0.0, text=_reason(report.longrepr))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        chunks = chunks_of(session.items)
        ids = [item.nodeid for item in session.items]
        self.tell(collected=len(ids), digest=hashlib.sha256("\n".join(ids).encode()).hexdigest(), ids=ids)
        run = self.claimed(chunks)
        item = next(run, None)
        while item is not None:
            following = next(run, None)  # what the teardown of this one may keep
            self.tell(start=item[1].nodeid, chunk=item[0])
            self.failed = False
            session.config.hook.pytest_runtest_protocol(
                item=item[1], nextitem=None if following is None else following[1]
            )
            if self.failed and self.is_cuda and not _answers():
                self.tell(broken=item[1].nodeid, chunk=item[0])
                os._exit(BROKEN)
            item = following
        self.tell(over=True)
        return True

    def claimed(self, chunks: list[list[pytest.Item]]) -> Iterator[tuple[int, pytest.Item]]:
        """Tests to run here, each with the number of its chunk."""
        begin = int(self.first * len(chunks))
        for number in [*range(begin, len(chunks)), *range(begin)]:
            if time.time() >= self.until:
                return
            try:
                (self.folder / f"chunk-{number:05d}").touch(exist_ok=False)
            except FileExistsError:
                continue
            self.tell(claim=number)
            done = self.folder / f"done-{number:05d}"  # by a process that did not live to run all of it
            before = set(done.read_text(encoding="utf-8").splitlines()) if done.is_file() else set()
            for item in chunks[number]:
                if time.time() >= self.until:
                    return
                if item.nodeid not in before:
                    yield number, item

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed
        if report.failed:
            self.tell(id=report.nodeid, outcome="failed", seconds=report.duration, text=report.longreprtext)
        elif report.skipped:
            text = getattr(report, "wasxfail", None) or _reason(report.longrepr)
            self.tell(id=report.nodeid, outcome="skipped", seconds=report.duration, text=text)
        elif report.when == "call":
            self.tell(id=report.nodeid, outcome="passed", seconds=report.duration)
        if report.when == "teardown":
            self.tell(end=report.nodeid)


def _reason(text: Any) -> str:
    return str(text[2] if isinstance(text, tuple) else text).removeprefix("Skipped: ")


def _answers() -> bool:
    """Whether the device still does anything: after an illegal access every call fails, and no further test is one."""
    import torch  # only where a test has failed on a GPU

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True

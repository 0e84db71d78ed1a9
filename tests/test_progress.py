"""A long run is never silent: on a terminal there is a bar, elsewhere a line every few seconds."""

from __future__ import annotations

import io
import threading
import time

import pytest
from rich.console import Console

from examples import progress
from tests.programs import ROOT


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    assert progress.SECONDS < 10
    monkeypatch.setattr(progress, "SECONDS", 0.02)


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def wait_for(console: Console, words: str) -> None:
    end = time.monotonic() + 10
    while not any(words in line for line in lines(console)):
        assert time.monotonic() < end, lines(console)
        time.sleep(0.005)


@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "_environ": {"TERM": "dumb"}}], ids=["log", "dumb"])
def test_without_a_terminal_lines_come_while_nothing_is_reported(options: dict[str, object]) -> None:
    console = Console(file=io.StringIO(), width=120, **options)  # type: ignore[arg-type]
    with progress.progress(console, "loading [1]") as work:
        assert [line.strip() for line in lines(console)] == ["0:00  loading [1]"]  # at once
        work.now("PLE, epoch 1/2", 30, 120)
        wait_for(console, "PLE, epoch 1/2, 25%, about 0:0")
        before = len(lines(console))
        while len(lines(console)) < before + 2:  # one call that says nothing
            time.sleep(0.005)
        work.now("scoring", 120)
        wait_for(console, "scoring")
        assert lines(console)[-1].endswith("  scoring")  # nothing is left that could be told


def test_the_lines_end_with_the_work_also_when_it_fails() -> None:
    console = Console(file=io.StringIO())
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="of the work"), progress.progress(console, "loading"):
        raise RuntimeError("of the work")
    assert threading.active_count() == before
    count = len(lines(console))
    time.sleep(0.06)
    assert len(lines(console)) == count


def test_on_a_terminal_there_is_a_bar() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, _environ={"TERM": "xterm"})
    with progress.progress(console, "loading") as work:
        work.now("PLE, epoch 1/2", 30, 120)
    text = "\n".join(lines(console))
    assert "PLE, epoch 1/2" in text and "30/120" in text


def test_a_quiet_console_stays_quiet() -> None:
    console = Console(file=io.StringIO(), quiet=True)
    with progress.progress(console, "loading") as work:
        work.now("training", 1, 2)
    assert lines(console) == []


def test_every_example_reports_its_progress() -> None:
    """None of them draws a bar of its own, which a log does not show."""
    scripts = [file for file in (ROOT / "examples").glob("*.py") if 'if __name__ == "__main__":' in file.read_text()]
    quick = {"census_pictures"}  # draws two pictures
    assert {script.stem for script in scripts} > quick
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        assert script.stem in quick or "with progress(console, " in text, script.name
        assert "rich.progress" not in text, script.name

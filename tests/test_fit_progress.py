"""What fit shows: a line per epoch, on a terminal a bar above it, nothing when asked, or what a function draws."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import pytest
import rich.console
import torch
from rich.progress import Progress

from ple_fast.losses import TaskLoss
from ple_fast.model import EpochResult, Evaluation, Step, TaskScores, progress
from ple_fast.model.progress import line_of
from tests.fit_helpers import model, table


@pytest.mark.parametrize("progress", [None, True])
def test_a_log_has_a_line_per_epoch(progress: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    model().fit(*table(), epochs=2, batch_size=16, progress=progress)
    lines = capsys.readouterr().out.splitlines()
    number = r"\d[\d.e+-]*"
    tasks = "  ".join(f"{name}: loss {number}" for name in ("click", "watch", "rating"))
    for epoch, line in enumerate(lines, 1):
        assert re.fullmatch(rf"epoch {epoch}/2  loss {number}  \d+\.\d s  [\d,]+ samples/s  {tasks}", line), line
    assert len(lines) == 2


def test_the_line_of_an_epoch_has_what_validation_says() -> None:
    tasks = {"click": TaskScores(0.5, 10, {"auc": 0.712345}), "watch": TaskScores(None, 0, {"rmse": None})}
    result = EpochResult(3, 1.23456, -0.75, 2.0, rows=24690, validation=Evaluation(0.75, tasks))
    rest = "2.0 s  12,345 samples/s  click: loss 0.5, auc 0.7123  watch: loss undefined, rmse undefined"
    assert line_of(result, 5, True) == f"epoch 3/5  loss 1.235  val loss 0.75  (best)  {rest}"
    other = EpochResult(3, 1.23456, 0.9, 2.0, rows=24690, validation=Evaluation(0.75, tasks))
    assert line_of(other, 5, False) == f"epoch 3/5  loss 1.235  val loss 0.75  score 0.9  {rest}"


def test_the_end_by_patience_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    falling = iter([2.0, 1.0])
    model().fit(*table(), epochs=5, validation=0.5, score=lambda p, y: next(falling), patience=1)
    assert capsys.readouterr().out.splitlines()[-1].startswith("stopped after epoch 2 of 5: score <lambda> of the")


def silent(step: Step) -> None:
    pass


@pytest.mark.parametrize("progress", [False, silent])
def test_false_and_a_function_print_nothing(progress: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model().fit(*table(), epochs=3, batch_size=16, validation=0.5, patience=1, progress=progress)
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal of 100 columns; a test puts it in the place of the standard output, which pytest sets before."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


def test_a_terminal_has_a_bar_that_becomes_a_line(
    terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", terminal)
    model().fit(*table(), epochs=2, batch_size=16, validation=0.5)
    text = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", terminal.getvalue())
    assert re.search(r"epoch 1/2 \S+ 2/2 loss \d\S* 0:00:0\d", text), text
    lines = [line for line in text.replace("\r", "\n").splitlines() if "val loss" in line]
    assert [line[:9] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert "click: loss" in lines[0]
    assert capsys.readouterr().out == ""


def test_the_bar_is_gone_after_an_interruption(terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", terminal)

    def score(predictions: Any, truth: Any) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model().fit(*table(), batch_size=16, validation=0.5, score=score)
    assert terminal.getvalue().endswith("\x1b[?25h"), "the cursor is shown again"


def test_where_the_caller_draws_there_are_lines(
    terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", terminal)
    with Progress(console=rich.console.Console(), redirect_stdout=False) as bar:
        bar.add_task("theirs")
        model().fit(*table(), epochs=2)
    shown = terminal.getvalue() + capsys.readouterr().out
    assert "epoch 2/2  loss" in shown


def test_without_rich_there_are_lines_and_true_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    model().fit(*table())
    assert capsys.readouterr().out.startswith("epoch 1/1  loss")
    with pytest.raises(ImportError, match="progress=True draws with rich: pip install rich"):
        model().fit(*table(), progress=True)


def test_a_step_counts_the_rows_of_its_epoch() -> None:
    steps: list[Step] = []
    model().fit(*table(), epochs=2, batch_size=24, progress=steps.append)
    assert [(step.epoch, step.batch, step.rows) for step in steps] == [
        (1, 1, 24),
        (1, 2, 48),
        (1, 3, 64),
        (2, 1, 24),
        (2, 2, 48),
        (2, 3, 64),
    ]


class Closed(io.StringIO):
    """A pipe whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_nobody_who_reads_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Closed())
    assert len(model().fit(*table(), epochs=2)) == 2


def test_names_that_the_output_cannot_spell_do_not_stop_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    data, labels = table()
    net = model(tasks=(TaskLoss("点击"),))
    net.fit(data, {"点击": labels["click"]}, epochs=1)
    assert b"\\u70b9\\u51fb: loss" in raw.getvalue()


class Hung(Terminal):
    """A terminal that is closed after some letters."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        if self.tell() > 200:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "EIO"), ValueError("closed file")])
def test_a_terminal_that_is_closed_does_not_end_a_training(
    terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(sys, "stdout", Hung(error))
    assert len(model().fit(*table(), epochs=5, batch_size=16)) == 5


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_log_that_asks_for_colours_has_lines(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "1")
    model().fit(*table(), epochs=2, batch_size=16)
    text = capsys.readouterr().out
    assert "\x1b" not in text and [line[:9] for line in text.splitlines()] == ["epoch 1/2", "epoch 2/2"]


def test_a_terminal_that_cannot_spell_a_name_has_its_bar_and_its_lines(
    terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    out.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", out)
    data, labels = table()
    model(tasks=(TaskLoss("点击"),)).fit(data, {"点击": labels["click"]}, epochs=1)
    assert b"\\u70b9\\u51fb: loss" in raw.getvalue()


def test_without_a_standard_output_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as under pythonw
    assert len(model().fit(*table(), epochs=2)) == 2


def test_the_speed_after_a_resume_is_of_the_rows_since() -> None:
    shown: list[str] = []

    class Bar:
        def add_task(self, *_: Any, **__: Any) -> int:
            return 0

        def update(self, *_: Any, speed: str, **__: Any) -> None:
            shown.append(speed)

    bar, loss = progress._Bar(Bar()), torch.zeros(())
    bar.step(Step(1, 1, 1000, 1001, loss, rows=1_000_000))  # of which 999,000 were trained before
    bar.begin -= 10.0  # ten seconds
    bar.step(Step(1, 1, 1001, 1001, loss, rows=1_001_000))
    assert shown[0] == "" and 90 <= int(shown[1].split()[0]) <= 100

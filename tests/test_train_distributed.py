"""The example of distributed training: one loss curve on any number of ranks, and the same one after a kill."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

import pytest
import torch

from examples import census_data
from examples import train_distributed as example
from tests.programs import ROOT, torchrun
from tests.ranks import run_ranks

# 667 training rows: in the last of 7 batches there is one, and other ranks than the first have none.
SETTINGS = ("--rows", "1000", "--batch-size", "111", "--checkpoint-every", "3", "--device", "cpu")
BATCHES, SAVED, STOPPED, NEXT = 14, 9, 11, 12
RANKS = 3  # sums of two numbers round alike in any order, sums of three do not


class Stopped(Exception):
    """Ends training in mid-epoch, between two checkpoints."""


def train(out: Path, *arguments: str, stop: int | None = None) -> str | None:
    """One rank's run in this process; what it refused with, if it did. ``stop``: after so many batches."""
    backward = example.Training.backward

    def stopping(self: example.Training, batch: torch.Tensor) -> torch.Tensor:
        if len(self.losses) == stop:
            raise Stopped
        return backward(self, batch)

    options = example.arguments([*SETTINGS, "--out", str(out), *arguments])
    with mock.patch.object(example.Training, "backward", stopping):
        try:
            example.run(options, torch.device("cpu"))
        except Stopped:
            assert stop is not None
        except SystemExit as end:
            return str(end)
    return None


def torn(state: Any, handle: BinaryIO, *, save: Callable[..., None] = torch.save, **options: Any) -> None:
    """Ends in the middle of a checkpoint; the ranks that do not write stop before the next batch."""
    if isinstance(state, dict) and len(state["losses"]) == NEXT:  # what ranks send to one another is saved too
        handle.write(b"half")
        raise Stopped
    save(state, handle, **options)


OTHERS = (("--dropout", "0.2"), ("--batch-size", "64"), ("--rows", "1001"), ("--epochs", "1"))


def undropped(folder: Path, ranks: int, stop: int | None = None) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    train(folder, "--dropout", "0", stop=stop)


def one_rank(folder: Path) -> None:
    undropped(folder / "one", 1)
    undropped(folder / "more ranks", 1, stop=STOPPED)


def some_ranks(folder: Path) -> list[str | None]:
    with mock.patch.object(example, "load", functools.cache(census_data.load)):
        undropped(folder / "some", RANKS)
        undropped(folder / "more ranks", RANKS)
        train(folder / "straight")
        train(folder / "resumed", stop=STOPPED)
        refused = [train(folder / "resumed", *other) for other in OTHERS]
        train(folder / "resumed")
        with mock.patch.object(torch, "save", torn):
            train(folder / "torn", stop=NEXT)
        train(folder / "torn")
        train(folder / "longer", "--epochs", "1")
        train(folder / "longer")
    return refused


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str | None]]]:
    """The folder of all runs, and what each rank was refused with."""
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(1, one_rank, folder)
    state = torch.load(folder / "more ranks" / example.CHECKPOINT, weights_only=True)
    assert len(state["losses"]) == SAVED
    return folder, run_ranks(RANKS, some_ranks, folder)


def curve(folder: Path) -> torch.Tensor:
    numbers, losses = zip(*(line.split(",") for line in (folder / example.CURVE).read_text().split()[1:]), strict=True)
    assert [int(number) for number in numbers] == list(range(1, BATCHES + 1))
    return torch.tensor([float(loss) for loss in losses])


def contents(folder: Path) -> tuple[bytes, bytes]:
    """Losses and trained weights, to the bit."""
    return (folder / example.CURVE).read_bytes(), (folder / example.MODEL / "model.safetensors").read_bytes()


def test_one_rank_and_three_have_one_loss_curve(runs: tuple[Path, Any]) -> None:
    folder, _ = runs
    one = curve(folder / "one")
    torch.testing.assert_close(curve(folder / "some"), one, rtol=1e-5, atol=0)
    assert one[-1] < 0.95 * one[0]
    steps = (one[1:] - one[:-1]).abs()
    assert steps.median() > 100 * 1e-5  # a batch that is left out or taken twice would be seen


def test_a_stopped_run_goes_on_exactly(runs: tuple[Path, Any]) -> None:
    """With dropout, in mid-epoch, though two batches that were done are not in the checkpoint."""
    folder, _ = runs
    assert contents(folder / "resumed") == contents(folder / "straight")
    assert contents(folder / "straight")[0] != contents(folder / "some")[0]  # dropout does something


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(runs: tuple[Path, Any]) -> None:
    folder, _ = runs
    assert contents(folder / "torn") == contents(folder / "straight")


def test_a_finished_run_goes_on_with_more_epochs(runs: tuple[Path, Any]) -> None:
    folder, _ = runs
    assert contents(folder / "longer") == contents(folder / "straight")


def test_a_stopped_run_goes_on_on_more_ranks(runs: tuple[Path, Any]) -> None:
    folder, _ = runs
    torch.testing.assert_close(curve(folder / "more ranks"), curve(folder / "one"), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_a_stopped_run_goes_on_on_fewer_ranks(runs: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = runs
    run_ranks(RANKS, undropped, tmp_path, RANKS, STOPPED)
    run_ranks(1, undropped, tmp_path, 1)
    torch.testing.assert_close(curve(tmp_path), curve(folder / "one"), rtol=1e-5, atol=0)


def test_a_checkpoint_of_other_settings_is_refused(runs: tuple[Path, list[list[str | None]]]) -> None:
    folder, refused = runs
    dropout, batch_size, rows, epochs = refused[0]
    start = f"{folder / 'resumed' / example.CHECKPOINT}: expected "
    own = "its own settings, {'rows': 1000, 'batch_size': 111, 'dropout': 0.1}, got "
    end = "; use those, or another file"
    assert dropout == start + own + "{'rows': 1000, 'batch_size': 111, 'dropout': 0.2}" + end
    assert batch_size == start + own + "{'rows': 1000, 'batch_size': 64, 'dropout': 0.1}" + end
    assert rows == start + own + "{'rows': 1001, 'batch_size': 111, 'dropout': 0.1}" + end
    assert epochs == start + "--epochs 2 or more, which it has begun, got 1"
    assert refused == [refused[0]] * RANKS  # no rank goes on alone


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--rows 10", "--rows: expected 1000 or more, got 10"),
        ("--dropout 1", "--dropout: expected 0 or more and less than 1, got 1"),
        ("--device cuda", "--device cuda: expected a GPU for each of the 99 ranks of this machine, got "),
    ],
)
def test_arguments_are_refused_in_sentences(
    arguments: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "99")
    with pytest.raises(SystemExit):
        example.main(arguments.split())
    assert says in capsys.readouterr().err


def test_without_torchrun_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        example.main([])
    assert "expected torchrun around it: torchrun --standalone --nproc-per-node 2 " in capsys.readouterr().err


KILLED = f"""
import os, signal, sys
from examples import train_distributed as example

backward = example.Training.backward

def killed(self, batch):
    loss = backward(self, batch)
    if self.rank == 1 and len(self.losses) == {STOPPED}:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss

example.Training.backward = killed
example.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others_and_the_run_goes_on_exactly(tmp_path: Path) -> None:
    """SIGKILL of one rank of ``torchrun`` after a backward, while the other goes on to its optimizer."""
    program = str(ROOT / "examples" / "train_distributed.py")
    straight = torchrun(2, program, *SETTINGS, "--out", str(tmp_path / "straight"))
    assert straight.returncode == 0, straight.stderr
    assert "Resumed" not in straight.stdout
    out = ("--out", str(tmp_path / "killed"))
    killed = torchrun(2, "-c", KILLED, *SETTINGS, *out)
    assert killed.returncode != 0
    assert "Signal 9 (SIGKILL)" in killed.stderr
    assert not (tmp_path / "killed" / example.CURVE).exists()
    resumed = torchrun(2, program, *SETTINGS, *out)
    assert resumed.returncode == 0, resumed.stderr
    assert f"Resumed after {SAVED} batches." in resumed.stdout
    assert curve(tmp_path / "killed").isfinite().all(), "of all batches"
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
    scores = [line for line in straight.stdout.splitlines() if line.startswith("AUC on the test data, ")]
    assert len(scores) == 2
    assert scores == [line for line in resumed.stdout.splitlines() if line.startswith("AUC on the test data, ")]

"""A training that was stopped goes on from its checkpoint, to the bit; one of other settings is refused."""

from __future__ import annotations

import functools
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

from ple_fast.losses import TaskLoss
from ple_fast.model import Callback, Checkpoint, History, MultiTaskModel, Step, StopTraining
from ple_fast.model.checkpoint import described
from tests.fit_helpers import COLUMNS, TASKS, are_equal, model, state, table
from tests.programs import run_python

EPOCHS, BATCHES = 4, 4


class Stopped(Exception):
    pass


class StopAfter(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, model: Any, step: Step) -> None:
        if step.number == self.step:
            raise Stopped


SCHEDULES: dict[str, dict[str, Any]] = {
    "none": {},
    "epoch": {"schedule": functools.partial(ExponentialLR, gamma=0.5)},
    "batch": {
        "schedule": functools.partial(OneCycleLR, max_lr=0.1, total_steps=EPOCHS * BATCHES),
        "schedule_every": "batch",
    },
    "plateau": {"schedule": functools.partial(ReduceLROnPlateau, patience=0), "validation": 0.25},
    "validation": {"validation": 0.25, "metrics": {"auc", "rmse"}, "clip_norm": 1.0},
    "weights": {"sample_weight": {"click": torch.linspace(0, 2, 64)}},
    "standardised": {},
}


def tasks_of(kind: str) -> Any:
    if kind != "standardised":
        return TASKS
    return (TASKS[0], TaskLoss("watch", "regression", standardise=True), TASKS[2])


def train(
    kind: str, file: Path | None = None, *, stop: int | None = None, **options: Any
) -> tuple[MultiTaskModel, History]:
    """With dropout and batch norm, on rows in an order of their own."""
    net = model(tasks=tasks_of(kind))
    torch.manual_seed(3 if file is None or not file.exists() else 4)  # where a resumed run begins does not matter
    own: dict[str, Any] = {"epochs": EPOCHS, "batch_size": 16, "progress": False, **SCHEDULES[kind], **options}
    if file is not None:
        own |= {"checkpoint": file, "checkpoint_every": 3, "resume": True}
    if stop is not None:
        own["callbacks"] = [StopAfter(stop)]
    if "validation" in own:
        own["batch_size"] = 12
    return net, net.fit(*table(), **own)


def numbers(history: History) -> list[dict[str, Any]]:
    unlike = {"seconds", "samples_per_second"}
    return [{name: value for name, value in result.flat().items() if name not in unlike} for result in history]


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("stop", [4, 11])  # the step after a checkpoint of an epoch's end; in mid-epoch, one after
def test_a_stopped_training_goes_on_to_the_bit(kind: str, stop: int, tmp_path: Path) -> None:
    straight, expected = train(kind)
    file = tmp_path / "runs" / "checkpoint.pt"
    with pytest.raises(Stopped):
        train(kind, file, stop=stop)
    torch.rand(7)
    net, history = train(kind, file)
    assert numbers(history) == numbers(expected)
    assert are_equal(state(net), state(straight))
    assert net.tasks == straight.tasks
    assert sorted(path.name for path in file.parent.iterdir()) == ["checkpoint.pt"]


def test_a_checkpoint_changes_no_number(tmp_path: Path) -> None:
    straight, expected = train("validation")
    net, history = train("validation", tmp_path / "checkpoint.pt")
    assert numbers(history) == numbers(expected)
    assert are_equal(state(net), state(straight))


def test_a_finished_training_is_not_run_again_and_goes_on_with_more_epochs(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    train("epoch", file, epochs=2)
    _, history = train("epoch", file, epochs=2, stop=1)
    assert len(history) == 2
    longer, history = train("epoch", file)
    straight, expected = train("epoch")
    assert numbers(history) == numbers(expected)
    assert are_equal(state(longer), state(straight))


def test_a_training_that_patience_ended_is_not_run_on(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    options: dict[str, Any] = {"validation": 0.25, "patience": 1}

    def trained() -> tuple[MultiTaskModel, History]:
        falling = iter([3.0, 2.0])
        return train("none", file, score=lambda p, y: next(falling), **options)

    first, history = trained()
    second, again = trained()
    assert len(history) == len(again) == 2
    assert again.stopped == history.stopped is not None
    assert are_equal(state(first), state(second)), "the best epoch's weights"


def test_without_resume_a_training_begins_anew(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    train("none", file)
    history = model().fit(*table(), epochs=1, checkpoint=file, progress=False)
    assert len(history) == 1
    state = Checkpoint(file, {}).read()
    assert state is not None and state["epoch"] == 2


def test_a_resumed_model_goes_on_in_a_later_call_as_one_that_was_not_stopped(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    with pytest.raises(Stopped):
        train("none", file, stop=7)
    straight, _ = train("none")
    resumed, _ = train("none", file)
    losses = []
    for net in (straight, resumed):
        torch.manual_seed(9)
        losses.append([r.loss for r in net.fit(*table(), epochs=2, batch_size=16, progress=False)])
    assert losses[0] == losses[1]


def test_where_it_goes_on_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "checkpoint.pt"
    with pytest.raises(Stopped):
        train("none", file, stop=7)
    train("none", file, progress=None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"resumed after batch 2 of epoch 2 of 4 from {file}"
    assert [line[:9] for line in lines[1:]] == ["epoch 2/4", "epoch 3/4", "epoch 4/4"]


OTHERS: dict[str, dict[str, Any]] = {
    "batch_size": {"batch_size": 32},
    "seed": {"seed": 1},
    "lr": {"lr": 0.1},
    "optimizer": {"optimizer": functools.partial(torch.optim.Adam, eps=1e-3)},
    "schedule": {"schedule": functools.partial(ExponentialLR, gamma=0.9)},
    "clip_norm": {"clip_norm": 3.0},
    "validation": {"validation": 0.25},
    "sample_weight": {"sample_weight": [1.0] * 64},
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_other_settings_is_refused_before_anything_changes(other: str, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    train("none", file, epochs=1)
    net = model()
    before = state(net)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: expected its own settings, .*; use those, or another file"):
        net.fit(*table(), **{"batch_size": 16, "checkpoint": file, "resume": True, **OTHERS[other]})
    assert are_equal(state(net), before)


def test_a_checkpoint_of_more_epochs_of_another_model_or_damaged_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    train("none", file)
    with pytest.raises(ValueError, match="expected epochs=4 or more, which it has begun, got 2"):
        train("none", file, epochs=2)
    options: dict[str, Any] = {"epochs": EPOCHS, "batch_size": 16, "checkpoint": file, "resume": True}
    with pytest.raises(ValueError, match=r"expected the weights of this model, got trunk\S+ \(.*in the model"):
        model(options={"expert_units": ((9,), (6,)), "norm": "batch"}).fit(*table(), **options)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"expected a checkpoint of a training, got .*; remove it, or name another"):
        train("none", file)


def test_checkpoint_options_without_a_file_are_refused() -> None:
    for options in ({"resume": True}, {"checkpoint_every": 5}):
        with pytest.raises(ValueError, match=r"checkpoint_every, resume: expected checkpoint='checkpoint\.pt' with"):
            model().fit(*table(), **options)
    with pytest.raises(TypeError, match="resume: expected a bool, got 'yes'"):
        model().fit(*table(), resume="yes")  # type: ignore[arg-type]  # what is tested


def test_functions_are_settings_that_another_process_finds_equal() -> None:
    def warm(epoch: int) -> float:
        return 1.0

    again = functools.partial(LambdaLR, lr_lambda=[warm, lambda epoch: 2.0])
    text = described(again)
    assert text.startswith("LambdaLR(lr_lambda=[") and "warm" in text and "0x" not in text
    assert described(torch.optim.Adam) == "Adam"
    assert described(None) is None
    assert "0x" not in described(functools.partial(print, sep=object()))


KILLED = f"""
import os, signal, sys
from pathlib import Path
import torch
from ple_fast.model import Callback
from tests.fit_helpers import model, table

class Kill(Callback):
    def after_step(self, model, step):
        if sys.argv[2] == "kill" and (step.epoch, step.batch) == (2, 3):
            os.kill(os.getpid(), signal.SIGKILL)

net = model()
torch.manual_seed(3)
net.fit(*table(), epochs={EPOCHS}, batch_size=16, checkpoint=sys.argv[1], checkpoint_every=3, resume=True,
        callbacks=[Kill()], progress=False)
torch.save(net.state_dict(), sys.argv[1] + ".model")
"""


@pytest.mark.slow
def test_a_process_that_was_killed_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    assert run_python("-c", KILLED, str(file), "kill").returncode == -signal.SIGKILL
    assert run_python("-c", KILLED, str(file), "go on").returncode == 0
    straight, _ = train("none")
    assert are_equal(torch.load(f"{file}.model"), state(straight))


def test_a_good_checkpoint_is_not_replaced_by_one_of_weights_that_are_lost(tmp_path: Path) -> None:
    class Spoils(Callback):
        def after_step(self, model: Any, step: Step) -> None:
            if (step.epoch, step.batch) == (2, 1):
                with torch.no_grad():
                    next(model.towers.parameters()).fill_(torch.nan)

    file = tmp_path / "run.pt"
    options: dict[str, Any] = {"epochs": 2, "batch_size": 16, "checkpoint": file, "progress": False}
    with pytest.raises(FloatingPointError, match="epoch 2: expected a finite loss"):
        model().fit(*table(), checkpoint_every=3, callbacks=[Spoils()], **options)
    net = model()
    assert len(net.fit(*table(), resume=True, **options)) == 2
    assert all(bool(torch.isfinite(tensor).all()) for tensor in net.state_dict().values())


def test_another_loss_or_other_columns_are_another_training(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    options: dict[str, Any] = {"batch_size": 16, "checkpoint": file, "progress": False}
    model().fit(*table(), **options)
    changed = model()
    changed.columns = tuple(replace(column, mean=1.0) for column in COLUMNS)
    for other in (model(tasks=(TaskLoss("click", weight=10.0), *TASKS[1:])), changed):
        before = state(other)
        with pytest.raises(ValueError, match="expected its own settings"):
            other.fit(*table(), epochs=2, resume=True, **options)
        assert are_equal(state(other), before)


def test_a_schedule_that_ends_before_the_epochs_after_a_checkpoint_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    train("batch", file)
    other = model()
    before = state(other)
    options: dict[str, Any] = {"batch_size": 16, "checkpoint": file, "resume": True, **SCHEDULES["batch"]}
    with pytest.raises(ValueError, match=f"schedule: expected one with {BATCHES} more steps, .*of which 0 are left"):
        other.fit(*table(), epochs=EPOCHS + 1, progress=False, **options)
    assert are_equal(state(other), before)


class StopTrainingAt(Callback):
    """Where a place of ``HOOKS`` comes for the second or the fifth time."""

    def __init__(self, hook: str, text: str = "enough") -> None:
        self.left = 5 if hook == "after_step" else 2
        self.text = text
        setattr(self, hook, self.count)

    def count(self, model: Any, thing: Any) -> None:
        self.left -= 1
        if not self.left:
            raise StopTraining(self.text)


@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize("hook", ["before_epoch", "after_step", "after_epoch"])
def test_what_a_callback_has_stopped_is_not_gone_on_with(hook: str, validated: bool, tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    rising = iter([1.0, 0.5])
    options: dict[str, Any] = {"batch_size": 16, "checkpoint": file, "resume": True, "progress": False}
    if validated:
        options |= {"validation": table(32, seed=1), "score": lambda p, y: next(rising)}
    stopped = model()
    first = stopped.fit(*table(), epochs=EPOCHS, callbacks=[StopTrainingAt(hook)], **options)
    assert first.stopped == "enough" and len(first) == (2 if hook == "after_epoch" else 1)
    again = model()
    second = again.fit(*table(), epochs=EPOCHS + 1, callbacks=[StopAfter(1)], **options)  # no step comes
    assert second.stopped == "enough" and numbers(second) == numbers(first)
    assert are_equal(state(again), state(stopped))


def test_a_stop_at_a_loss_that_is_not_finite_leaves_the_good_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    data, labels = table()
    net = model()
    options: dict[str, Any] = {"batch_size": 16, "checkpoint": file, "resume": True, "progress": False}
    net.fit(data, labels, **options)
    good = file.read_bytes()

    class Lost(Callback):
        def before_epoch(self, model: Any, epoch: int) -> None:
            with torch.no_grad():
                next(model.towers.parameters()).fill_(torch.nan)

        def after_step(self, model: Any, step: Step) -> None:
            if not bool(step.loss.isfinite()):
                raise StopTraining

    assert net.fit(data, labels, epochs=2, callbacks=[Lost()], **options).stopped
    assert file.read_bytes() == good


@pytest.mark.parametrize("kind", ["a folder", "below a file", "no path"])
def test_a_checkpoint_that_cannot_be_written_is_found_before_anything_is_trained(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    file: Any = {"a folder": tmp_path, "below a file": tmp_path / "file" / "run.pt", "no path": 3}[kind]
    error: type[Exception] = {"a folder": ValueError, "below a file": OSError, "no path": TypeError}[kind]
    net = model()
    before = state(net)
    with pytest.raises(error):
        net.fit(*table(), checkpoint=file, progress=False)
    assert are_equal(state(net), before) and net._run is None


def test_looking_for_the_place_of_a_checkpoint_leaves_nothing_but_its_folder(tmp_path: Path) -> None:
    place = tmp_path / "of" / "runs"
    with pytest.raises(ValueError, match="labels"):
        model().fit(table()[0], {}, checkpoint=place / "run.pt", progress=False)
    assert list(place.iterdir()) == []
    model().fit(*table(), checkpoint=place / "run.pt", progress=False)
    assert [file.name for file in place.iterdir()] == ["run.pt"]


def test_numbers_of_numpy_can_be_read_back(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "batch_size": 16,
        "checkpoint": tmp_path / "run.pt",
        "progress": False,
        "optimizer": functools.partial(torch.optim.AdamW, weight_decay=np.float64(0.1)),
        "schedule": functools.partial(ExponentialLR, gamma=np.float32(0.5)),  # type: ignore[arg-type]  # a number all the same
    }
    model().fit(*table(), epochs=1, **options)
    assert len(model().fit(*table(), epochs=2, resume=True, **options)) == 2

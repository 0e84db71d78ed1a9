"""What fit does between steps: callbacks, a schedule of the learning rate, clipped gradients."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR

from ple_fast.model import Callback, EpochResult, MultiTaskModel, Step, StopTraining
from tests.fit_helpers import are_equal, model, state, table


class Recorder(Callback):
    """What was called, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def before_epoch(self, model: Any, epoch: int) -> None:
        self.calls.append(("before", epoch))

    def after_step(self, model: Any, step: Step) -> None:
        self.calls.append(("step", step.epoch, step.batch))

    def after_epoch(self, model: Any, result: EpochResult) -> None:
        self.calls.append(("after", result.epoch, result.validation is not None))


def test_callbacks_are_called_in_order_with_the_model() -> None:
    recorder = Recorder()
    seen: list[Any] = []

    class Short:
        """No subclass, and one method."""

        def after_epoch(self, model: Any, result: EpochResult) -> None:
            seen.append((model, recorder.calls[-1]))

    net = model()
    net.fit(*table(), epochs=2, batch_size=32, validation=table(), callbacks=[recorder, Short()], progress=False)
    epochs = [[("before", e), ("step", e, 1), ("step", e, 2), ("after", e, True)] for e in (1, 2)]
    assert recorder.calls == epochs[0] + epochs[1]
    assert seen == [(net, ("after", 1, True)), (net, ("after", 2, True))]


def test_callbacks_change_no_number_of_the_training() -> None:
    class Reader(Callback):
        def after_step(self, model: Any, step: Step) -> None:
            model.predict(table()[0])
            float(step.loss)

    ours, theirs = model(), model()
    torch.manual_seed(0)
    first = ours.fit(*table(), epochs=2, batch_size=16, callbacks=[Reader()], progress=False)
    torch.manual_seed(0)
    second = theirs.fit(*table(), epochs=2, batch_size=16, progress=False)
    assert [r.loss for r in first] == [r.loss for r in second]
    assert are_equal(state(ours), state(theirs))


@pytest.mark.parametrize("place", ["before_epoch", "after_step", "after_epoch"])
def test_what_a_callback_raises_ends_training_with_the_history(place: str) -> None:
    class Failing(Callback):
        pass

    calls = 0

    def fail(self: Any, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == (6 if place == "after_step" else 2):
            raise RuntimeError("mine")

    setattr(Failing, place, fail)
    with pytest.raises(RuntimeError, match="mine") as caught:
        model().fit(*table(), epochs=3, batch_size=16, callbacks=[Failing()], progress=False)
    history = caught.value.history  # type: ignore[attr-defined]  # what is tested
    assert len(history) == (2 if place == "after_epoch" else 1)


class Stop(Callback):
    """After an epoch, or after its first step."""

    def __init__(self, epoch: int, in_epoch: bool = False) -> None:
        self.epoch, self.in_epoch = epoch, in_epoch

    def after_step(self, model: Any, step: Step) -> None:
        if self.in_epoch and step.epoch == self.epoch:
            raise StopTraining("enough")

    def after_epoch(self, model: Any, result: EpochResult) -> None:
        if result.epoch == self.epoch:
            raise StopTraining


def test_a_callback_stops_training_without_an_error() -> None:
    data, labels = table()
    whole, stopped = model(), model()
    torch.manual_seed(1)
    whole.fit(data, labels, epochs=2, batch_size=16, progress=False)
    torch.manual_seed(1)
    history = stopped.fit(data, labels, epochs=9, batch_size=16, callbacks=[Stop(2)], progress=False)
    assert len(history) == 2 and history.stopped == "stopped by a callback after epoch 2 of 9"
    assert are_equal(state(stopped), state(whole))
    assert stopped._run is not None and stopped._run._kept is not None  # of these weights


@pytest.mark.parametrize("in_epoch", [False, True])
def test_after_a_callback_stopped_training_the_best_weights_are_back(in_epoch: bool) -> None:
    data, labels = table()
    falling, best = iter([3.0, 2.0, 1.0]), []
    net = model()

    def score(predictions: Any, truth: Any) -> float:
        best.append(predictions["click"])
        return next(falling)

    options: dict[str, Any] = {"validation": (data, labels), "score": score, "callbacks": [Stop(2, in_epoch)]}
    history = net.fit(data, labels, epochs=9, batch_size=16, progress=False, **options)
    assert len(history) == (1 if in_epoch else 2)
    assert history.stopped == ("enough" if in_epoch else "stopped by a callback after epoch 2 of 9")
    assert np.array_equal(net.predict(data)["click"], best[0])


@pytest.mark.parametrize(
    ("callbacks", "says"),
    [
        (Recorder(), "callbacks: expected a list of callbacks, got"),
        ([Recorder], "callbacks: expected objects with before_epoch, after_step, after_epoch, got <class"),
        ([print], "callbacks: expected objects with before_epoch, after_step, after_epoch, got <built-in"),
        ("TensorBoard", "callbacks: expected a list"),
    ],
)
def test_what_is_no_callback_is_named(callbacks: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        model().fit(*table(), callbacks=callbacks)


def rates(net: MultiTaskModel, *, calls: int = 1, **options: Any) -> tuple[list[float], list[float]]:
    """The rate of every step, and of every epoch."""
    steps: list[float] = []

    class Rates(Callback):
        def after_step(self, model: Any, step: Step) -> None:
            assert step.lr is not None
            steps.append(step.lr)

    epochs: list[float] = []
    for _ in range(calls):
        history = net.fit(*table(), batch_size=32, lr=0.1, callbacks=[Rates()], progress=False, **options)
        epochs += [result.lr for result in history if result.lr is not None]
    return steps, epochs


def test_a_schedule_is_stepped_after_each_epoch() -> None:
    schedule = functools.partial(StepLR, step_size=2, gamma=0.5)
    steps, epochs = rates(model(), epochs=4, schedule=schedule)
    assert epochs == pytest.approx([0.1, 0.1, 0.05, 0.05])
    assert steps == pytest.approx(np.repeat(epochs, 2))


def test_a_schedule_is_stepped_after_each_batch_where_asked() -> None:
    schedule = functools.partial(OneCycleLR, max_lr=1.0, total_steps=8)
    steps, epochs = rates(model(), epochs=4, schedule=schedule, schedule_every="batch")
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    by_hand, expected = OneCycleLR(optimizer, max_lr=1.0, total_steps=8), []
    for _ in range(8):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < 8:
            by_hand.step()
    assert steps == pytest.approx(expected)
    assert epochs == pytest.approx(expected[1::2])


def test_a_later_call_goes_on_with_the_schedule() -> None:
    schedule = functools.partial(ExponentialLR, gamma=0.5)
    assert rates(model(), calls=3, schedule=schedule) == rates(model(), epochs=3, schedule=schedule)
    net = model()
    rates(net, epochs=2, schedule=schedule)
    assert rates(net, schedule=functools.partial(ExponentialLR, gamma=0.1))[1] == pytest.approx([0.1])  # another run


@pytest.mark.parametrize(("every", "steps"), [("batch", 4), ("epoch", 2)])
def test_a_schedule_of_a_fixed_number_of_steps_goes_on_to_its_end_and_then_begins_anew(every: Any, steps: int) -> None:
    schedule = functools.partial(OneCycleLR, max_lr=1.0, total_steps=steps)
    options: dict[str, Any] = {"schedule": schedule, "schedule_every": every}
    net = model()
    once = rates(net, epochs=2, **options)
    assert rates(model(), calls=2, **options) == once
    assert rates(net, epochs=2, **options) == once  # another cycle, with the same optimizer
    assert rates(net, calls=2, **options) == once


@pytest.mark.parametrize(
    ("every", "steps", "left", "words"),
    [("batch", 5, 3, "6 more steps, one after each batch"), ("epoch", 2, 1, "3 more steps, one after each epoch")],
)
def test_a_schedule_that_would_end_too_soon_is_refused_before_a_step(
    every: Any, steps: int, left: int, words: str
) -> None:
    schedule = functools.partial(OneCycleLR, max_lr=1.0, total_steps=steps)
    options: dict[str, Any] = {"schedule": schedule, "schedule_every": every, "batch_size": 32, "progress": False}
    net, twin = model(), model()
    before = state(net)
    with pytest.raises(ValueError, match=f"schedule: expected one with {words}, got OneCycleLR"):
        net.fit(*table(), epochs=3, **options)
    assert are_equal(state(net), before)
    for other in (net, twin):
        torch.manual_seed(1)  # of dropout
        other.fit(*table(), **options)
    before = state(net)
    with pytest.raises(ValueError, match=f"total_steps={steps}, of which {left} are left"):
        net.fit(*table(), epochs=4, **options)
    assert are_equal(state(net), before)
    for other in (net, twin):  # the refusal has changed nothing of the run
        torch.manual_seed(2)
        other.fit(*table(), **options)
    assert are_equal(state(net), state(twin))


def test_a_schedule_is_refused_before_the_step_that_it_has_no_rate_for_where_data_comes_in_parts() -> None:
    data, labels = table()
    schedule = functools.partial(OneCycleLR, max_lr=1.0, total_steps=3)
    seen: list[Any] = []

    class Kept(Callback):
        def after_step(self, model: Any, step: Step) -> None:
            seen.append([parameter.detach().clone() for parameter in model.parameters()])

    net, options = model(), {"schedule": schedule, "schedule_every": "batch", "callbacks": [Kept()], "progress": False}
    with pytest.raises(ValueError, match="expected one with 1 more steps"):
        net.fit([(data, labels)], epochs=2, batch_size=32, **options)  # type: ignore[arg-type]
    assert len(seen) == 3 and all(map(torch.equal, net.parameters(), seen[-1]))


def test_another_schedule_every_is_another_run() -> None:
    schedule, net = functools.partial(ExponentialLR, gamma=0.5), model()
    rates(net, epochs=2, schedule=schedule)
    assert rates(net, schedule=schedule, schedule_every="batch")[0] == pytest.approx([0.1, 0.05])


def test_a_plateau_is_one_of_what_is_watched() -> None:
    schedule = functools.partial(ReduceLROnPlateau, patience=0, factor=0.5)
    falling = iter([3.0, 2.0, 2.5, 4.0])
    options: dict[str, Any] = {"epochs": 4, "schedule": schedule}
    _, epochs = rates(model(), validation=table(), score=lambda p, y: next(falling), **options)
    assert epochs == pytest.approx([0.1, 0.1, 0.05, 0.025])
    nan = iter([float("nan")] * 4)
    with pytest.warns(UserWarning, match="undefined"):
        _, epochs = rates(model(), validation=table(), score=lambda p, y: next(nan), **options)
    assert epochs == [0.1] * 4


@pytest.mark.parametrize("scores", [[0.7] * 4, [0.7, 0.69998, 0.69996, 0.69994], [-0.7] * 4, [-0.2, -0.2, -0.3, -0.4]])
def test_a_score_that_does_not_rise_is_a_plateau(scores: list[float]) -> None:
    """Also one above 0, of which the scheduler's own comparison would take a little less for better."""
    schedule, given = functools.partial(ReduceLROnPlateau, patience=0, factor=0.5), iter(scores)
    options: dict[str, Any] = {"epochs": 4, "schedule": schedule}
    _, epochs = rates(model(), validation=table(), score=lambda p, y: next(given), **options)
    assert epochs == pytest.approx([0.1, 0.1, 0.05, 0.025])


def test_a_plateau_is_by_epoch_and_of_what_falls() -> None:
    with pytest.raises(ValueError, match=r"schedule: expected ReduceLROnPlateau\(mode='min'\), got 'max'"):
        rates(model(), schedule=functools.partial(ReduceLROnPlateau, mode="max"))
    with pytest.raises(ValueError, match="schedule_every: expected 'epoch' with ReduceLROnPlateau"):
        rates(model(), schedule=ReduceLROnPlateau, schedule_every="batch")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"schedule": "cosine"}, TypeError, r"schedule: expected a function of the optimizer.*StepLR, .*got 'cosine'"),
        ({"schedule": lambda o: None}, TypeError, "schedule: expected the function to return a scheduler, got None"),
        ({"schedule_every": "batch"}, ValueError, "schedule_every: expected schedule= with it, got none"),
        (
            {"schedule": functools.partial(LambdaLR, lr_lambda=lambda e: 1.0), "schedule_every": "step"},
            ValueError,
            "schedule_every: expected 'epoch' or 'batch', got 'step'",
        ),
        ({"clip_norm": 0}, ValueError, "clip_norm: expected a norm above 0, got 0.0"),
        ({"clip_norm": float("nan")}, ValueError, "clip_norm: expected a norm above 0, got nan"),
        ({"clip_norm": "1"}, TypeError, "clip_norm: expected a number, got '1'"),
    ],
)
def test_schedules_and_norms_that_do_not_fit_are_named(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        model().fit(*table(), **options)


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_told() -> None:
    norms: list[float] = []
    moved: list[float] = []

    class Norms(Callback):
        def before_epoch(self, model: Any, epoch: int) -> None:
            self.before = [p.detach().clone() for p in model.parameters()]

        def after_step(self, model: Any, step: Step) -> None:
            assert step.gradient_norm is not None
            norms.append(float(step.gradient_norm))
            squares = [(p.detach() - b).square().sum() for p, b in zip(model.parameters(), self.before, strict=True)]
            moved.append(float(sum(squares)) ** 0.5)  # by SGD with lr 1: the norm of the clipped gradient

    options: dict[str, Any] = {"optimizer": torch.optim.SGD, "lr": 1.0, "progress": False}
    model().fit(*table(), clip_norm=1e6, callbacks=[Norms()], **options)
    model().fit(*table(), clip_norm=1e-2, callbacks=[Norms()], **options)
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert moved == pytest.approx([norms[0], 1e-2], rel=1e-3)

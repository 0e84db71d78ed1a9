"""What calls of fit leave behind: modes, what the next call goes on from, the optimizer."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ple_fast.model import MultiTaskModel, Step
from tests.fit_helpers import are_equal, model, modes, state, table


@pytest.mark.parametrize("is_validated", [False, True])
def test_modules_in_eval_mode_stay_so_and_what_is_frozen_does_not_move(is_validated: bool) -> None:
    data, labels = table()
    net = model()
    net.fit(data, labels, batch_size=16)
    net.trunk.requires_grad_(False).eval()
    tower: Any = net.towers[1]
    tower[2].eval()
    before, frozen = modes(net), state(net.trunk)
    seen: list[dict[str, bool]] = []
    validation: dict[str, Any] = {"validation": (data, labels)} if is_validated else {}
    net.fit(data, labels, epochs=2, batch_size=16, progress=lambda _: seen.append(modes(net)), **validation)
    assert are_equal(state(net.trunk), frozen)  # running statistics too
    assert seen == [before] * 8
    assert modes(net) == before


def test_a_model_wholly_in_eval_mode_trains_so_and_says_so_once(tmp_path: Path) -> None:
    data, labels = table()
    model().save(tmp_path)
    net = MultiTaskModel.load(tmp_path)
    buffers = {name: buffer.clone() for name, buffer in net.trunk.named_buffers()}
    with pytest.warns(UserWarning, match=r"whole model is in eval mode.*model\.train\(\)") as caught:
        first = net.fit(data, labels, epochs=2, batch_size=64)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert not any(modes(net).values())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in net.trunk.named_buffers())
    again = MultiTaskModel.load(tmp_path)
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="eval mode"):
        assert [r.loss for r in again.fit(data, labels, epochs=2, batch_size=64)] == [
            r.loss for r in first
        ]  # no dropout
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.train().fit(data, labels)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fit_trains_in_a_region_without_gradients_and_warns_at_its_caller(mode: Any) -> None:
    data, labels = table()
    expected = model().eval()
    net = copy.deepcopy(expected)
    with pytest.warns(UserWarning, match="eval mode"):
        expected.fit(data, labels, batch_size=16)
    with mode(), pytest.warns(UserWarning, match="eval mode") as caught:
        net.fit(data, labels, batch_size=16)
    assert caught[0].filename == __file__
    assert are_equal(state(net), state(expected))


def test_calls_of_fit_go_on_as_one_call_would() -> None:
    data, labels = table()
    whole, parts = model(), model()
    torch.manual_seed(1)
    expected = whole.fit(data, labels, epochs=3, batch_size=16)
    torch.manual_seed(1)
    found = [parts.fit(data, labels, batch_size=16)[0] for _ in range(3)]
    assert [result.loss for result in found] == [result.loss for result in expected]
    assert are_equal(state(parts), state(whole))


def test_calls_of_fit_with_validation_go_on_where_nothing_was_put_back() -> None:
    data, labels = table()
    whole, parts = model(), model()
    torch.manual_seed(1)
    rising = iter(range(6))
    whole.fit(data, labels, epochs=3, batch_size=16, validation=(data, labels), score=lambda p, y: next(rising))
    torch.manual_seed(1)
    for _ in range(3):
        parts.fit(data, labels, batch_size=16, validation=(data, labels), score=lambda p, y: next(rising))
    assert are_equal(state(parts), state(whole))


class Recorded(torch.optim.SGD):
    """Counts the steps of each optimizer, and the optimizers."""

    made: int = 0

    def __init__(self, parameters: Any, lr: float, momentum: float = 0.9, scale: Any = None) -> None:
        super().__init__(parameters, lr=lr, momentum=momentum)
        Recorded.made += 1


def _again(**kwargs: Any) -> Callable[[MultiTaskModel], MultiTaskModel]:
    def call(net: MultiTaskModel) -> MultiTaskModel:
        net.fit(*table(), **{"batch_size": 16, "optimizer": Recorded, **kwargs})
        return net

    return call


def _change(change: Callable[[MultiTaskModel], Any]) -> Callable[[MultiTaskModel], MultiTaskModel]:
    def call(net: MultiTaskModel) -> MultiTaskModel:
        change(net)
        return _again()(net)

    return call


PARTIAL = functools.partial(Recorded, momentum=0.5)


@pytest.mark.parametrize(
    ("second", "optimizers", "generator_goes_on"),
    [
        (_again(), 1, True),
        (_again(batch_size=32, epochs=2), 1, True),
        (_again(lr=np.float64(1e-3), seed=np.int64(0)), 1, True),
        (_again(lr=1e-2), 2, False),
        (_again(seed=1), 2, False),
        (_again(optimizer=PARTIAL), 2, False),
        (_change(lambda net: net.trunk.requires_grad_(False)), 2, False),
        (_change(lambda net: net.to(torch.float64)), 2, False),
        (_change(lambda net: net.load_state_dict(net.state_dict())), 2, False),
        (_change(lambda net: nn.ModuleList([net]).load_state_dict(nn.ModuleList([net]).state_dict())), 2, False),
        (lambda net: _again()(copy.deepcopy(net)), 2, False),
        (lambda net: _again()(pickle.loads(pickle.dumps(net))), 2, False),
    ],
    ids=[
        "same",
        "other batches",
        "numpy scalars",
        "lr",
        "seed",
        "optimizer",
        "frozen",
        "dtype",
        "load_state_dict",
        "load_state_dict of the whole",
        "deepcopy",
        "pickle",
    ],
)
def test_a_later_call_goes_on_or_begins_anew(second: Any, optimizers: int, generator_goes_on: bool) -> None:
    Recorded.made = 0
    net = _again()(model())
    assert net._run is not None
    generator = net._run.generator
    net = second(net)
    assert Recorded.made == optimizers
    assert net._run is not None
    assert (net._run.generator is generator) == generator_goes_on


def test_partials_of_equal_parts_are_one_optimizer_and_functions_made_anew_are_not() -> None:
    Recorded.made = 0
    net = model()
    for _ in range(2):
        _again(optimizer=functools.partial(Recorded, momentum=0.5))(net)
    assert Recorded.made == 1
    for _ in range(2):
        _again(optimizer=lambda parameters, lr: Recorded(parameters, lr))(net)
    assert Recorded.made == 3
    for _ in range(2):  # whether arrays are equal has no one answer
        _again(optimizer=functools.partial(Recorded, scale=np.ones(2)))(net)
    assert Recorded.made == 5


def test_a_copy_and_a_file_have_no_optimizer_and_the_model_keeps_its_own(tmp_path: Path) -> None:
    net = _again()(model())
    for other in (copy.deepcopy(net), copy.copy(net), pickle.loads(pickle.dumps(net))):
        assert other._run is None
    net.save(tmp_path)
    assert MultiTaskModel.load(tmp_path)._run is None
    assert net._run is not None


def test_after_weights_were_put_back_the_order_goes_on_with_a_new_optimizer() -> None:
    Recorded.made = 0
    net, falling = model(), iter([3.0, 2.0])
    _again(epochs=2, validation=table(), score=lambda p, y: next(falling))(net)
    assert net._run is not None
    generator, position = net._run.generator, net._run.generator.get_state()
    _again()(net)
    assert Recorded.made == 2
    assert net._run.generator is generator
    assert not torch.equal(generator.get_state(), position)


def test_after_an_exception_in_mid_epoch_the_order_goes_on_with_a_new_optimizer() -> None:
    Recorded.made = 0
    net = model()

    def interrupt(step: Step) -> None:
        if step.batch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _again(progress=interrupt)(net)
    assert net._run is not None
    generator = net._run.generator
    _again()(net)
    assert Recorded.made == 2
    assert net._run.generator is generator


class Slotted(Exception):
    """Of the kind that has no room for attributes of its class's own."""

    __slots__ = ()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, FloatingPointError, SystemExit, Slotted])
@pytest.mark.parametrize(("place", "has_validation"), [("step", False), ("step", True), ("score", True)])
def test_what_ends_a_training_brings_the_history_of_the_epochs_that_ran(
    place: str, has_validation: bool, kind: type[BaseException]
) -> None:
    data, labels = table()
    epochs = 0

    def interrupt(step: Step) -> None:
        if place == "step" and (step.epoch, step.batch) == (3, 2):
            raise kind

    def score(predictions: Any, truth: Any) -> float:
        nonlocal epochs
        epochs += 1
        if place == "score" and epochs == 3:
            raise kind
        return -float(np.square(predictions["watch"] - truth["watch"]).mean())

    options: dict[str, Any] = {"validation": (data, labels), "score": score} if has_validation else {}
    expected = model().fit(data, labels, epochs=2, batch_size=16, **options)
    epochs = 0
    with pytest.raises(kind) as caught:
        model().fit(data, labels, epochs=5, batch_size=16, progress=interrupt, **options)
    history = caught.value.history  # type: ignore[attr-defined]
    assert [(result.epoch, result.loss, result.score) for result in history] == [
        (result.epoch, result.loss, result.score) for result in expected
    ]


def test_an_optimizer_that_is_not_kept_is_freed() -> None:
    net = model()
    _again()(net)
    assert net._run is not None
    optimizer = weakref.ref(net._run.take_optimizer())
    for lr in (1e-2, 1e-3):
        _again(lr=lr)(net)
    gc.collect()
    assert optimizer() is None

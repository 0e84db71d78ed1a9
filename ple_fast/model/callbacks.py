"""What a user's code may do while a model is trained: before and after an epoch, and after each step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..scalars import shown
from .history import EpochResult
from .progress import Step

HOOKS = ("before_epoch", "after_step", "after_epoch")


class StopTraining(Exception):
    """Raised in a callback, ends training as ``patience`` does: ``fit`` returns, and the best epoch's weights are back.

    Its text is what ``history.stopped`` says. A checkpoint holds it: ``fit(resume=True)`` does not go on with what was
    stopped, and returns the same. Raise another exception where a later call is to go on.
    """


class Callback:
    """What ``fit(callbacks=)`` calls; overwrite what you need. Any object with some of these methods is one.

    They are called in the thread that trains, in the order of the list, and may read the model (``predict``,
    ``evaluate``), save it or write to a log. What they raise ends training, with the history as ``error.history``;
    :class:`StopTraining` ends it without an error.
    """

    def before_epoch(self, model: nn.Module, epoch: int) -> None:
        """Before the first step of an epoch; 1 is the first."""

    def after_step(self, model: nn.Module, step: Step) -> None:
        """After the optimizer's step on a batch. Reading ``step.loss`` waits for the device."""

    def after_epoch(self, model: nn.Module, result: EpochResult) -> None:
        """After an epoch and its validation; the result is in the history already."""


class Callbacks:
    """The methods of all callbacks, one list for each of ``HOOKS``.

    Raises:
        TypeError: not a list of objects with one of the methods.
    """

    def __init__(self, callbacks: Any) -> None:
        if not isinstance(callbacks, Iterable) or isinstance(callbacks, (str, bytes)):
            raise TypeError(f"callbacks: expected a list of callbacks, got {shown(callbacks)}; [callback] is one")
        given = list(callbacks)
        for callback in given:
            if isinstance(callback, type) or not any(callable(getattr(callback, name, None)) for name in HOOKS):
                raise TypeError(f"callbacks: expected objects with {', '.join(HOOKS)}, got {shown(callback)}")
        self.before_epoch = _methods(given, "before_epoch")
        self.after_step = _methods(given, "after_step")
        self.after_epoch = _methods(given, "after_epoch")


def _methods(callbacks: list[Any], name: str) -> list[Callable[..., Any]]:
    """Those that do something, also where a single object has a function of its own."""
    found = [getattr(callback, name) for callback in callbacks if callable(getattr(callback, name, None))]
    empty = getattr(Callback, name)
    return [method for method in found if getattr(method, "__func__", None) is not empty]

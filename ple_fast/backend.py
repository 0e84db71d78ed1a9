"""Choice of the backend: for the process, for a block of code in one thread, or for one call."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch

BackendName = Literal["auto", "triton", "torch"]
NAMES = ("auto", "triton", "torch")
ENVIRONMENT = "PLE_FAST_BACKEND"


class Choice(NamedTuple):
    """A backend, and why it was chosen."""

    name: str
    reason: str


def _check(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where}: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


_process: str = _check(os.environ.get(ENVIRONMENT, "auto"), f"environment variable {ENVIRONMENT}")
# threading.local and no ContextVar, which torch.compile(fullgraph=True) cannot trace.
_thread = threading.local()


def set_backend(name: BackendName) -> None:
    """Set the backend of the process: ``"auto"``, ``"triton"`` or ``"torch"``.

    The environment variable ``PLE_FAST_BACKEND`` sets the first one.

    Raises:
        ValueError: another name.
    """
    global _process
    _process = _check(name, "set_backend")


@contextmanager
def use_backend(name: BackendName) -> Iterator[None]:
    """Set the backend of this thread within a ``with`` block; it wins over ``set_backend``.

    Raises:
        ValueError: another name than ``"auto"``, ``"triton"`` or ``"torch"``.
    """
    _check(name, "use_backend")
    before = getattr(_thread, "name", None)
    _thread.name = name
    try:
        yield
    finally:
        _thread.name = before


def last_backend() -> Choice | None:
    """The backend of this thread's last call with its reason, as ``(name, reason)``; None before the first one."""
    choice: Choice | None = getattr(_thread, "last", None)
    return choice


def resolve(device: torch.device, backend: str | None = None) -> Choice:
    """The backend of a call on ``device``: ``backend`` if given, else the thread's, else the process's.

    Raises:
        ValueError: unknown name.
        RuntimeError: ``"triton"`` was asked for and cannot run.
    """
    wanted: Any = backend if backend is not None else getattr(_thread, "name", None) or _process
    if wanted not in NAMES:
        _check(wanted, "backend")
    if wanted == "triton":
        raise RuntimeError(
            f"backend 'triton' cannot run on {device.type} tensors: this version has no Triton kernels yet, and Triton "
            "does not compile for a CPU; use 'auto' or 'torch'"
        )
    reason = "asked for" if wanted == "torch" else f"{device.type} tensors"
    return Choice("torch", reason)


def note(choice: Choice) -> None:
    """Remember what ``last_backend`` tells."""
    _thread.last = choice

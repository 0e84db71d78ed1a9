"""Choice of the backend: for the process, for a block of code in one thread, or for one call."""

from __future__ import annotations

import importlib.util
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
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


def is_exporting() -> bool:
    """Whether ``torch.export`` traces. Its own function is True in every trace of torch 2.11."""
    flag: bool = torch.compiler._is_exporting_flag
    return flag


def require_triton(device: torch.device) -> None:
    """Check that the kernels can run on a device.

    Raises:
        RuntimeError: they cannot; the message says why.
    """
    missing = _why_no_triton(device)
    if missing is not None:
        raise RuntimeError(f"backend 'triton' cannot run on {device.type} tensors: {missing}; use auto or torch")


def resolve(device: torch.device, backend: str | None = None) -> Choice:
    """The backend of a call on ``device``: ``backend`` if given, else the thread's, else the process's.

    Raises:
        ValueError: unknown name.
        RuntimeError: ``"triton"`` was asked for and cannot run.
    """
    wanted: Any = backend if backend is not None else getattr(_thread, "name", None) or _process
    if wanted not in NAMES:
        _check(wanted, "backend")
    return _choose(wanted, device)


def _choose(wanted: str, device: torch.device) -> Choice:
    if wanted == "triton":
        require_triton(device)
        return _TRITON
    if wanted == "torch":
        return Choice("torch", "asked for")
    if device.type == "cpu":
        return _CPU
    if device.type != "cuda":
        return Choice("torch", f"{device.type} tensors")
    missing = _why_no_triton(device)
    if missing is None:
        return Choice("triton", "cuda tensors")
    _warn_once(missing)
    return Choice("torch", missing)


# What torch.compiler.assume_constant_result does, without importing the compiler and, with it, triton.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]  # read by the tracer

_TRITON = Choice("triton", "asked for")
_CPU = Choice("torch", "cpu tensors")
OLDEST_CAPABILITY = (8, 0)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _why_too_old(device: torch.device) -> str | None:
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY:
        return None
    return f"the kernels need compute capability 8.0, {torch.cuda.get_device_name(device)} is older"


def _why_no_triton(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, as half a sentence; None if they can."""
    if device.type not in ("cuda", "cpu"):
        return "the kernels run on CUDA and ROCm devices"
    if not _has_triton():
        return "triton is not installed (pip install triton)"
    if device.type == "cpu":
        # Triton's interpreter runs kernels on CPU tensors, very slowly: for tests.
        interprets = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interprets else "Triton does not compile for a CPU (TRITON_INTERPRET=1 interprets, for tests)"
    return _why_too_old(device)


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"ple_fast runs PyTorch's operators on this GPU: {reason}", RuntimeWarning, stacklevel=2)


def note(choice: Choice) -> None:
    """Remember what ``last_backend`` tells."""
    _thread.last = choice

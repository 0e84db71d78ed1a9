"""Repeated calls as a test sees them: how many there were, and launches by address without a GPU."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

replay: Any = importlib.import_module("ple_fast_kernels._replay")
launching: Any = importlib.import_module("ple_fast_kernels._launch")
KINDS = ("tensors", "addresses")
"""What a repeated launch is given: tensors, as the interpreter needs them, or addresses, as on a GPU."""


def count_repeats(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets an entry for each call that is repeated. Forms are recorded as soon as they come."""
    monkeypatch.setattr(replay, "TIMES", 1)
    found: list[int] = []
    run = replay._Program.run

    def counted(program: Any, *given: Any) -> Any:
        found.append(program.by_kernels + program.by_library)
        return run(program, *given)

    monkeypatch.setattr(replay._Program, "run", counted)
    return found


def launch_by(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat launches in one of ``KINDS``."""
    if kind == "tensors":
        return
    launch = launching.Prepared._launch

    def addressed(prepared: Any, grid: Any, given: Any) -> Any:
        launch(prepared, grid, given)
        return Addressed(prepared, given)

    monkeypatch.setattr(launching.Prepared, "_launch", addressed)
    monkeypatch.setattr(launching, "TAKES_ADDRESSES", True)
    monkeypatch.setattr(launching, "current", lambda: (0, 7))


class Addressed:
    """Stands for a compiled kernel: takes addresses, as a GPU's launcher does, and lets the interpreter run them."""

    function = metadata = None

    def __init__(self, prepared: Any, given: Sequence[Any]) -> None:
        self.prepared = prepared
        self.forms = [(t.dtype, t.shape, t.stride()) if isinstance(t, Tensor) else None for t in given]

    def run(self, *given: Any) -> None:
        last = 9 + len(self.forms)
        grid, how, arguments, constants = given[:2], given[2:9], list(given[9:last]), given[last:]
        assert how == (1, 7, None, None, None, None, None) and constants == self.prepared.constants
        for i, form in enumerate(self.forms):
            if form is not None:
                assert isinstance(arguments[i], int)
                arguments[i] = self._tensor(arguments[i], *form)
        self.prepared._by_triton(grid, tuple(arguments))

    def _tensor(self, address: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        count = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
        return torch.frombuffer(memory, dtype=dtype).as_strided(shape, stride)


@pytest.fixture
def repeats(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per call that was repeated."""
    return count_repeats(monkeypatch)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What launches are given."""
    launch_by(request.param, monkeypatch)
    return str(request.param)

"""Fresh memory of the library reads as NaN until it is written."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

OURS = ("ple_fast", "ple_fast_kernels")


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``allocate``, but what our own modules get from it is filled with NaN (floating and complex dtypes)."""

    @functools.wraps(allocate)
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():  # a traced program has no caller, and keeps no fill of ours
            return tensor
        caller = str(sys._getframe(1).f_globals.get("__name__", "")).partition(".")[0]
        if caller in OURS and (tensor.is_floating_point() or tensor.is_complex()):
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return poisoned


def poison_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An element that a backend forgets to write then shows as NaN, and not as whatever lay in memory before."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))

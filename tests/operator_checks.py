"""PyTorch's own checks of the operators that a level is in a compiled program."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from ple_fast import ExtractionNetwork
from ple_fast.ops.arguments import Arguments, arguments_of, for_backward, numbers_of, statistics_of
from ple_fast.ops.operators import level_backward, level_forward
from ple_fast.tensors import flatten


class _Recorded(Exception):
    pass


def arguments_of_call(module: ExtractionNetwork, x: Any) -> Arguments:
    """The operators' arguments for a call of ``module``."""
    found: list[Any] = []

    def record(call: Any, given: Any, layers: Any, gate: Any, way: str) -> Any:
        found.append((call, tuple(None if t is None else t.detach() for t in (*given, *flatten(layers, gate)))))
        raise _Recorded

    with mock.patch("ple_fast.functional._run", record), pytest.raises(_Recorded):
        module(x, return_gates=True)
    call, flat = found[0]
    seed = None if call.state.seed is None else torch.tensor(call.state.seed)
    return arguments_of(call, flat, numbers_of(call.state), statistics_of(call.state), seed)


def check_operators(module: ExtractionNetwork, x: Any, *, listed: bool) -> None:
    """Schemas, memory shared between results and arguments, shapes and strides told to tracers, dynamic shapes."""
    forward = arguments_of_call(module, x)
    needed = [t is not None for t in forward.all_tensors]
    nothing = [False] * len(needed)
    torch.library.opcheck(level_forward, (*forward, needed, listed))
    torch.library.opcheck(level_forward, (*forward, nothing, listed))
    y, weights, kept, _ = level_forward(*forward, needed, listed)
    state, statistics = for_backward(forward.state, forward.statistics)
    backward = forward._replace(state=state, statistics=statistics)
    dlisted: Tensor | None = torch.ones_like(weights) if listed else None
    nothing_kept: list[Tensor] = []  # forward shall run again
    for saved in (kept, nothing_kept):
        torch.library.opcheck(level_backward, (*backward, needed, saved, torch.ones_like(y), dlisted))

"""A level's call, repeated without deciding anew what to launch, where nothing has changed but the values."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ple_fast_kernels import replayed

from ..state import LevelState
from .inputs import matmul_precision

Results = Sequence[Tensor | None]


def repeated(
    what: Hashable, state: LevelState, tensors: Sequence[Tensor | None], arithmetic: Callable[[], Results]
) -> Results:
    """The results of ``arithmetic``, which reads ``tensors``, the tensors of ``state``, and what ``what`` tells."""
    first = tensors[0]
    assert first is not None
    settings, own = state.form()
    # The settings of PyTorch that decide what is launched.
    precision = matmul_precision() if first.dtype == torch.float32 else None
    deterministic = torch.are_deterministic_algorithms_enabled()
    return replayed((what, settings, precision, deterministic), (*tensors, *own), arithmetic)

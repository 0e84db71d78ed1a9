"""A whole extraction network in Triton kernels, forward and backward: the twin of ``torch_backend/level.py``.

One layer is one launch for all experts of a block, activation and dropout included; ``norms.py`` says what a norm adds.
A layer whose activation has learned parameters runs what follows its product in PyTorch's operators.
"""

from __future__ import annotations

from torch import Tensor

from ..torch_backend.level import BlockKept, LevelInput, LevelNeeds, tables
from .backward import BackwardRun
from .forward import ForwardRun
from .repeat import repeated as repeated
from .wiring import source_grads


def level_forward(
    inputs: LevelInput, needs: LevelNeeds | None, *, listed: bool
) -> tuple[Tensor, Tensor | None, list[BlockKept]]:
    """``y (B, O, H)``, the listed weights ``(B, num_weights)`` if asked for, and what backward needs.

    Without ``needs`` nothing is kept.
    """
    run = ForwardRun(inputs, tables(inputs.plan).no_needs if needs is None else needs)
    y, p, kept = run.forward(keeps=needs is not None, listed=listed)
    weights = None
    if listed:
        assert p is not None
        weights = run.listed(p)
    return y, weights, [] if needs is None else [kept]


def level_backward(
    inputs: LevelInput, needs: LevelNeeds, kept: list[BlockKept], dy: Tensor | None, dlisted: Tensor | None
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Gradients of the inputs, the gate inputs and the flat tuple. Without ``kept`` the forward is run again."""
    keep = kept[0] if kept else ForwardRun(inputs, needs).forward(keeps=True, listed=False, again=True)[2]
    run = BackwardRun(inputs, needs)
    dx, dgate_x, flat = run.backward(keep, dy, dlisted)
    nothing: list[Tensor | None] = [None] * len(inputs.x.tensors)
    dxs = nothing if dx is None else source_grads(inputs.x, run.x, dx)
    if run.gate_x is run.x:
        return dxs, [], flat
    empty: list[Tensor | None] = [None] * len(inputs.gate_x.tensors)
    return dxs, empty if dgate_x is None else source_grads(inputs.gate_x, run.gate_x, dgate_x), flat

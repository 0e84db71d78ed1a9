"""A whole extraction network in Triton kernels, forward and backward: the twin of ``torch_backend/level.py``.

One layer is one launch for all experts of a block, activation and dropout included; ``ends.py`` says what a norm adds.
A layer whose activation has learned parameters runs what follows its product in PyTorch's operators.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..call import LevelInput, Wants, nothing_wanted
from .backward import BackwardRun
from .forward import ForwardRun
from .fused import choose_fusion, fused_forward
from .inputs import source_grads
from .repeat import repeated as repeated


def level_forward(
    inputs: LevelInput, wants: Wants | None, *, listed: bool
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """``y (B, O, H)``, the listed weights ``(B, num_weights)`` if asked for, and what backward reads.

    That is in the order of ``saved_by_kernels``. Without ``wants`` nothing is kept.
    """
    run = ForwardRun(inputs, nothing_wanted(inputs.plan) if wants is None else wants)
    y, p = _forward(run, keeps=wants is not None, listed=listed)
    weights = None
    if listed:
        assert p is not None
        weights = run.listed(p)
    return y, weights, run.kept


def _forward(run: ForwardRun, *, keeps: bool, listed: bool) -> tuple[Tensor, Tensor | None]:
    """``y (B, O, H)``, and the softmax weights ``(B, W)`` if anybody reads them."""
    weights_wanted = listed or ((run.wants.experts or run.wants.logits) and not run.plan.passes)
    fusion = choose_fusion(run.inputs, run.x, run.gates_beside_experts, keeps=keeps)
    y, p = run.forward(weights_wanted) if fusion is None else fused_forward(run, fusion, weights_wanted)
    run.keep(run.saved.mix.p, p)
    return y, p


def level_backward(
    inputs: LevelInput, wants: Wants, kept: Sequence[Tensor | None], dy: Tensor | None, dlisted: Tensor | None
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Gradients of the inputs, the gate inputs and the flat tuple. Without ``kept`` the forward is run again."""
    run = BackwardRun(inputs, wants, kept)
    if not kept and run.saved.values:
        again = ForwardRun(inputs, wants, again=True)
        _forward(again, keeps=True, listed=False)
        run.kept = again.kept
    dx, dgate_x, flat = run.backward(dy, dlisted)
    nothing: list[Tensor | None] = [None] * len(inputs.x.tensors)
    dxs = nothing if dx is None else source_grads(inputs.x, run.x, dx)
    if run.gate_x is run.x:
        return dxs, [], flat
    empty: list[Tensor | None] = [None] * len(inputs.gate_x.tensors)
    return dxs, empty if dgate_x is None else source_grads(inputs.gate_x, run.gate_x, dgate_x), flat

"""ONE autograd Function per level: forward and backward of a whole extraction network."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .autocast import end_step, without_autocast
from .plan import LevelPlan, LevelState, unflatten
from .torch_backend import composed
from .torch_backend import level as by_hand
from .torch_backend.few_rows import few_rows_train_backward, few_rows_train_forward
from .torch_backend.slots import Place, Slots

Gradients = tuple[Tensor | None, ...]
Backward = Callable[[Tensor | None, Tensor | None], Gradients]


@cache
def _in_kernels() -> Any:
    from .triton_backend import level  # triton is optional

    return level


class LevelCall(NamedTuple):
    """What one call of a level consists of besides its tensors."""

    plan: LevelPlan
    state: LevelState
    places: tuple[Place, ...]
    """Of the slots, among the first tensors."""
    num_x: int
    gate_places: tuple[Place, ...] | None
    """Of the gates' slots, among the tensors that follow; None where the gates read what the experts read."""
    num_gate_x: int
    listed: bool
    """Whether the weights are an output."""
    recompute: bool
    backend: str = "torch"
    """``"torch"`` or ``"triton"``; backward runs where forward ran."""
    few_rows: bool = False
    """The short path: one input tensor, weights not listed, and every tensor of the level requires a gradient."""

    def arithmetic(self) -> Any:
        """The module with ``level_forward`` and ``level_backward``."""
        return by_hand if self.backend == "torch" else _in_kernels()

    def inputs(self, tensors: Sequence[Tensor | None]) -> by_hand.LevelInput:
        """The call with its tensors: those of ``x``, those of the gates' input, the flat tuple of the level."""
        x = Slots(tensors[: self.num_x], self.places)  # type: ignore[arg-type]  # inputs are never None
        gate_x, start = x, self.num_x + self.num_gate_x
        if self.gate_places is not None:
            gate_x = Slots(tensors[self.num_x : start], self.gate_places)  # type: ignore[arg-type]
        layers, gate = unflatten(tensors[start:])
        return by_hand.LevelInput(self.plan, layers, gate, self.state, x, gate_x)

    def repeated(
        self,
        arithmetic: Callable[[], Gradients],
        what: str,
        tensors: Sequence[Tensor | None],
        needed: tuple[bool, ...] | None = None,
    ) -> Gradients:
        """The results of ``arithmetic``, the pass ``what`` of this call, which reads ``tensors`` and the call's state.

        On Triton what it launches is not decided anew at every call of one form.
        """
        if self.backend == "torch" or self.num_x > 1 or self.num_gate_x > 1:  # how slots lie in memory decides, too
            return arithmetic()
        decided_by = (
            what, needed, self.plan, self.places, self.gate_places, self.num_gate_x, self.listed, self.recompute
        )  # fmt: skip
        repeated: Callable[..., Gradients] = self.arithmetic().repeated
        return repeated(decided_by, self.state, tensors, arithmetic)

    def needs(self, needed: tuple[bool, ...]) -> by_hand.LevelNeeds:
        """Needs of backward, from one bool per tensor."""
        start = self.num_x + self.num_gate_x
        x = needed[: self.num_x]
        gate_x = x if self.gate_places is None else needed[self.num_x : start]
        return by_hand.level_needs(self.plan, self.places, self.gate_places or self.places, x, gate_x, needed[start:])


def run_composed(call: LevelCall, tensors: Sequence[Tensor | None], *, again: bool = False) -> tuple[Tensor, Tensor]:
    """The level in differentiable operators; ``again``: a repeated forward, which moves no statistics."""
    i = call.inputs(tensors)
    return composed.level(i.plan, i.layers, i.gate, i.state, i.x, i.gate_x, moves_statistics=not again)


def run_without_grad(call: LevelCall, tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """The level where no backward follows."""

    def run() -> Gradients:
        y, listed, _ = call.arithmetic().level_forward(call.inputs(tensors), None, listed=call.listed)
        return y, listed

    y, listed = call.repeated(run, "inference", tensors)
    return cast(Tensor, y), listed


class ExtractionLevelFunction(torch.autograd.Function):
    """``(call, *tensors)`` to ``y (B, O, H)`` and, if the call lists them, the weights ``(B, num_weights)``."""

    @staticmethod
    def forward(ctx: Any, call: LevelCall, *tensors: Tensor | None) -> Any:
        ctx.call = call
        ctx.num_tensors, ctx.num_state = len(tensors), 0
        ctx.set_materialize_grads(False)
        if call.few_rows:
            layers, gate = unflatten(tensors[1:])
            y, saved = few_rows_train_forward(call.plan, layers, gate, cast(Tensor, tensors[0]))
            ctx.save_for_backward(*tensors, *saved)
            return y
        needed = ctx.needs_input_grad[1:]

        def run() -> Gradients:
            needs = None if call.recompute else call.needs(needed)
            y, listed, kept = call.arithmetic().level_forward(call.inputs(tensors), needs, listed=call.listed)
            return y, listed, *by_hand.flatten_kept(kept)

        done = call.repeated(run, "forward", tensors, needed)
        state: Sequence[Tensor] = ()
        if call.plan.has_state:
            state = call.state.read_by_backward()
            ctx.num_state = len(state)
        ctx.save_for_backward(*tensors, *state, *done[2:])
        return (done[0], done[1]) if call.listed else done[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dlisted: Tensor | None = None) -> Any:
        some = dlisted if dy is None else dy
        if some is None:
            return (None,) * len(ctx.needs_input_grad)
        end_step()
        with without_autocast(some):  # backward() may be called within the region
            return _backward(ctx, dy, dlisted)


def _backward(ctx: Any, dy: Tensor | None, dlisted: Tensor | None) -> tuple[Tensor | None, ...]:
    call: LevelCall = ctx.call
    needed = ctx.needs_input_grad[1:]
    saved = ctx.saved_tensors  # once: checkpointing refuses a second unpacking
    tensors, flat = saved[: ctx.num_tensors], saved[ctx.num_tensors :]
    if ctx.num_state:
        state, flat = flat[: ctx.num_state], flat[ctx.num_state :]
        if not all(map(operator.is_, state, call.state.read_by_backward())):  # hooks of saved tensors give others
            call = call._replace(state=call.state.with_saved(state))
    functorch = torch._C._functorch
    given = [d for d in (dy, dlisted) if d is not None]
    if torch.is_grad_enabled() or any(map(functorch.is_legacy_batchedtensor, given)):  # grad(is_grads_batched=True)
        return None, *_composed_backward(call, tensors, needed, dy, dlisted)

    backward = partial(_by_hand_backward, call, tensors, flat, needed)
    if any(map(functorch.is_batchedtensor, given)):
        return None, *_OneByOne.apply(backward, dy, dlisted)  # type: ignore[no-untyped-call]  # untyped in torch
    return None, *backward(dy, dlisted)


def _by_hand_backward(
    call: LevelCall,
    tensors: tuple[Any, ...],
    flat: tuple[Any, ...],
    needed: tuple[bool, ...],
    dy: Tensor | None,
    dlisted: Tensor | None,
) -> Gradients:
    """Gradients that are not differentiable, from the tensors of the level and what forward saved besides: ``flat``."""
    if call.few_rows:
        assert dy is not None
        layers, gate = unflatten(tensors[1:])
        dfirst, dflat = few_rows_train_backward(
            call.plan, layers, gate, tensors[0], flat, dy, want_x=needed[0], want_tensors=any(needed[1:])
        )
        return dfirst, *(grad if wanted else None for grad, wanted in zip(dflat, needed[1:], strict=True))

    def run() -> Gradients:
        inputs, kept = call.inputs(tensors), by_hand.unflatten_kept(call.plan, flat)
        dx, dgate_x, dtensors = call.arithmetic().level_backward(inputs, call.needs(needed), kept, dy, dlisted)
        grads = (*dx, *dgate_x, *dtensors)
        return tuple(grad if wanted else None for grad, wanted in zip(grads, needed, strict=True))

    return call.repeated(run, "backward", (*tensors, *flat, dy, dlisted), needed)


class _OneByOne(torch.autograd.Function):
    """``(backward, dy, dlisted)`` to gradients; under ``torch.vmap`` a backward by hand for each row of its batch.

    Jacobians have one row per task. A batched backward would need all that forward did not save, for every row.
    """

    @staticmethod
    def forward(backward: Backward, dy: Tensor | None, dlisted: Tensor | None) -> Gradients:
        return backward(dy, dlisted)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """It is called where nothing records."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], backward: Backward, *given: Tensor | None
    ) -> tuple[Gradients, tuple[int | None, ...]]:
        rows = []
        for i in range(info.batch_size):
            row = (
                d if d is None or dim is None else d.select(dim, i) for d, dim in zip(given, in_dims[1:], strict=True)
            )
            rows.append(_OneByOne.apply(backward, *row))  # type: ignore[no-untyped-call]  # untyped in torch
        grads = [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]
        return tuple(grads), tuple(None if grad is None else 0 for grad in grads)


def _composed_backward(
    call: LevelCall,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    dy: Tensor | None,
    dlisted: Tensor | None,
) -> list[Tensor | None]:
    """Gradients that are themselves differentiable (or batched): through the composed level, computed again."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: a tensor may also reach another one (a weight used in two levels), and that path is not this node's.
        own = [
            None if t is None else (t.view_as(t) if create_graph else t.detach().requires_grad_()) if wanted else t
            for t, wanted in zip(tensors, needed, strict=True)
        ]
        y, listed = run_composed(call, own, again=True)
        pairs = [(out, d) for out, d in ((y, dy), (listed, dlisted)) if d is not None and out.requires_grad]
        wanted = [t for t, flag in zip(own, needed, strict=True) if flag and t is not None]
        grads = torch.autograd.grad(
            [out for out, _ in pairs], wanted, [d for _, d in pairs], create_graph=create_graph, allow_unused=True
        )
    found = iter(grads)
    return [next(found) if flag else None for flag in needed]

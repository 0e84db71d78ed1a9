"""ONE autograd Function per level: forward and backward of a whole extraction network."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor

from .autocast import end_step, without_autocast
from .call import LevelCall
from .slots import Slots, with_shared
from .tensors import GateTensors, LayerTensors, flatten, unflatten
from .torch_backend import differentiable
from .torch_backend import level as by_hand
from .torch_backend.few_rows import few_rows_train_backward, few_rows_train_forward

Gradients = tuple[Tensor | None, ...]
Backward = Callable[[Tensor | None, Tensor | None], Gradients]


@cache
def _in_kernels() -> Any:
    from .triton_backend import level  # triton is optional

    return level


def arithmetic_of(call: LevelCall) -> Any:
    """The module with ``level_forward`` and ``level_backward``."""
    return by_hand if call.backend == "torch" else _in_kernels()


def _repeated(
    call: LevelCall,
    arithmetic: Callable[[], Gradients],
    what: str,
    tensors: Sequence[Tensor | None],
    needed: tuple[bool, ...] | None = None,
) -> Gradients:
    """The results of ``arithmetic``, the pass ``what`` of the call, which reads ``tensors`` and the call's state.

    On Triton what it launches is not decided anew at every call of one form.
    """
    if call.backend == "torch" or call.num_x > 1 or call.num_gate_x > 1:  # how slots lie in memory decides, too
        return arithmetic()
    decided_by = (
        what, needed, call.plan, call.places, call.gate_places, call.num_gate_x, call.listed, call.recompute
    )  # fmt: skip
    repeated: Callable[..., Gradients] = _in_kernels().repeated
    return repeated(decided_by, call.state, tensors, arithmetic)


def run_differentiable(
    call: LevelCall, tensors: Sequence[Tensor | None], *, again: bool = False
) -> tuple[Tensor, Tensor]:
    """The level in differentiable operators; ``again``: a repeated forward, which moves no statistics."""
    i = call.inputs(tensors)
    gate_x = i.gate_x
    if call.few_rows and i.plan.gate_spec.input == "with_shared":  # which that path adds itself
        added = with_shared(i.x.tensors[0], len(i.x.places))
        assert isinstance(added, Tensor)
        gate_x = Slots((added,), i.x.places)
    return differentiable.level(i.plan, i.layers, i.gate, i.state, i.x, gate_x, moves_statistics=not again)


def run_without_grad(
    call: LevelCall, given: tuple[Tensor, ...], layers: Sequence[LayerTensors], gate: GateTensors
) -> tuple[Tensor, Tensor | None]:
    """The level where no backward follows; ``given``: the tensors of ``x`` and those of the gates' input."""

    def run() -> Gradients:
        y, listed, _ = arithmetic_of(call).level_forward(call.inputs_of(given, layers, gate), None, listed=call.listed)
        return y, listed

    if call.backend == "torch":  # a small batch waits for the tuple that is not made here
        y, listed = run()
    else:
        y, listed = _repeated(call, run, "inference", (*given, *flatten(layers, gate)))
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
            ctx.save_for_backward(*tensors, *(() if call.recompute else saved))
            return y
        needed = ctx.needs_input_grad[1:]

        def run() -> Gradients:
            wants = None if call.recompute else call.wants(needed)
            y, listed, kept = arithmetic_of(call).level_forward(call.inputs(tensors), wants, listed=call.listed)
            return y, listed, *kept

        done = _repeated(call, run, "forward", tensors, needed)
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
        return None, *_differentiable_backward(call, tensors, needed, dy, dlisted)

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
        if call.recompute:
            flat = tuple(few_rows_train_forward(call.plan, layers, gate, tensors[0])[1])
        dfirst, dflat = few_rows_train_backward(
            call.plan, layers, gate, tensors[0], flat, dy, want_x=needed[0], want_tensors=any(needed[1:])
        )
        return dfirst, *dflat  # of all tensors that there are

    def run() -> Gradients:
        inputs, wants = call.inputs(tensors), call.wants(needed)
        dx, dgate_x, dtensors = arithmetic_of(call).level_backward(inputs, wants, flat, dy, dlisted)
        grads = (*dx, *dgate_x, *dtensors)
        return tuple([grad if wanted else None for grad, wanted in zip(grads, needed, strict=True)])

    return _repeated(call, run, "backward", (*tensors, *flat, dy, dlisted), needed)


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


def _differentiable_backward(
    call: LevelCall,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    dy: Tensor | None,
    dlisted: Tensor | None,
) -> list[Tensor | None]:
    """Gradients that are themselves differentiable (or batched): through the differentiable level, computed again."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: a tensor may also reach another one (a weight used in two levels), and that path is not this node's.
        own = [
            None if t is None else (t.view_as(t) if create_graph else t.detach().requires_grad_()) if wanted else t
            for t, wanted in zip(tensors, needed, strict=True)
        ]
        y, listed = run_differentiable(call, own, again=True)
        pairs = [(out, d) for out, d in ((y, dy), (listed, dlisted)) if d is not None and out.requires_grad]
        wanted = [t for t, flag in zip(own, needed, strict=True) if flag and t is not None]
        grads = torch.autograd.grad(
            [out for out, _ in pairs], wanted, [d for _, d in pairs], create_graph=create_graph, allow_unused=True
        )
    found = iter(grads)
    return [next(found) if flag else None for flag in needed]

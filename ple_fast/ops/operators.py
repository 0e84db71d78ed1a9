"""``torch.ops.ple_fast.level_forward`` and ``level_backward``: a level as one operator, for compiled programs.

A tracer sees an operator with a known result instead of launches, or of row blocks. Eager calls do not come here: the
dispatcher costs more than it brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..autograd import arithmetic_of
from ..backend import require_triton
from ..call import LevelCall, LevelInput, Wants
from ..saved import Saved, saved_by_kernels, saved_by_rows
from ..slots import rows_of
from ..state import LevelState
from ..torch_backend import level as by_hand
from ..torch_backend.dropout import draw_seed
from ..torch_backend.few_rows import few_rows_forward, serves_state, takes
from ..torch_backend.layer import RowBlock
from ..torch_backend.norms import take_up
from ..torch_backend.prepared import prepared
from .arguments import Arguments, arguments_of, for_backward, numbers_of, statistics_of

_INPUTS = (
    "Tensor[] x, int[] places, Tensor[] gate_x, int[] gate_places, Tensor?[] tensors, Tensor[] statistics,"
    " Tensor? seed, str plan, str backend, float[] state"
)
_WIDTH = len(Arguments._fields)
_LIBRARY = torch.library.Library("ple_fast", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define(
    f"level_forward({_INPUTS}, bool[] needed, bool listed) -> (Tensor, Tensor, Tensor[], Tensor[])", tags=_TAGS
)
_LIBRARY.define(
    f"level_backward({_INPUTS}, bool[] needed, Tensor[] kept, Tensor? dy, Tensor? dlisted) -> (Tensor[], Tensor)",
    tags=_TAGS,
)

Forward = tuple[Tensor, Tensor, list[Tensor], list[Tensor]]
"""Output, listed weights, what backward reads, and mean and variance of the batch for norms that take them up."""


def _forward(*arguments: Any) -> Forward:
    given = Arguments(*arguments[:_WIDTH])
    needed, listed = arguments[_WIDTH:]
    if given.batch == 0:
        # Running statistics take up what is returned: of no rows themselves, so that they stay where they are.
        return *_fake_forward(*arguments)[:3], [t.clone() for t in given.moving()]
    if given.backend == "triton":
        return _forward_in_kernels(given, needed, listed)
    moments = [torch.zeros_like(t) for t in given.moving()]
    call = _with_seed_read(given.call(moments=moments, listed=listed))
    inputs = call.inputs(given.all_tensors)
    if not any(needed):
        if _has_few_rows(given, call):
            y, weights = few_rows_forward(call.plan, inputs.layers, inputs.gate, given.x[0], call.state), None
        else:
            y, weights, _ = by_hand.level_forward(inputs, None, listed=listed)
        return y, y.new_empty(0) if weights is None else weights, [], moments
    wants = call.wants(tuple(needed))
    keeper = _Keeper(saved_by_rows(call.plan, wants, call.state.kind()), inputs)
    y, weights, _ = by_hand.level_forward(inputs, wants, listed=listed, take=keeper.take)
    return y, y.new_empty(0) if weights is None else weights, keeper.kept, moments


class _Keeper:
    """Takes what each row block keeps, while it is in cache, and has it as whole tensors in the end."""

    def __init__(self, saved: Saved, inputs: LevelInput) -> None:
        self._saved, self._inputs = saved, inputs
        self.kept: list[Tensor] = []

    def take(self, block: RowBlock) -> None:
        parts = [part for part in block.kept if part is not None]
        assert len(parts) == len(self._saved.values)
        batch = self._inputs.x.batch
        if block.rows == slice(0, batch):
            # Results of an operator are contiguous, as tracers are told, and share no memory.
            self.kept = [part.contiguous() for part in parts]
            assert len({part.untyped_storage().data_ptr() for part in self.kept}) == len(parts)
            return
        if not self.kept:
            self.kept = self._saved.empty(self._inputs, batch)
        for value, target, part in zip(self._saved.values, self.kept, parts, strict=True):
            (rows_of(target, block.rows) if value.by_row else target).copy_(part)


def _with_seed_read(call: LevelCall) -> LevelCall:
    """The call with its seed as a number, which costs the masks less."""
    seed = call.state.seed
    return call if seed is None else call._replace(state=call.state._replace(seed=int(seed)))


def _has_few_rows(given: Arguments, call: LevelCall) -> bool:
    """Whether the short path serves: ``routes.py`` asks the same of an eager call."""
    return (
        len(given.x) == 1
        and not given.gate_places
        and not call.listed
        and takes(call.plan, given.x[0], trains=False)
        and serves_state(call.state)
    )


def _forward_in_kernels(given: Arguments, needed: Sequence[bool], listed: bool) -> Forward:
    require_triton(given.x[0].device)
    call = given.call(listed=listed)
    wants = call.wants(tuple(needed)) if any(needed) else None
    y, weights, kept = arithmetic_of(call).level_forward(call.inputs(given.all_tensors), wants, listed=listed)
    if weights is None:
        weights = y.new_empty(0)
    elif any(weights is tensor for tensor in kept):
        weights = weights.clone()  # results of an operator must not share memory
    return y, weights, [] if wants is None else kept, []


def _saved_of(call: LevelCall, wants: Wants) -> Saved:
    saved = saved_by_kernels if call.backend == "triton" else saved_by_rows
    return saved(call.plan, wants, call.state.kind())


def _fake_forward(*arguments: Any) -> Forward:
    given = Arguments(*arguments[:_WIDTH])
    needed, listed = arguments[_WIDTH:]
    call = given.call(moments=given.moving(), listed=listed)  # it does not run
    t, like, batch = call.plan.topology, given.x[0], given.batch
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    y = like.new_empty((batch, t.num_outputs, call.plan.blocks[0].layers[-1].units))
    weights = like.new_empty((batch, t.num_weights), dtype=wide) if listed else like.new_empty(0)
    kept: list[Tensor] = []
    if any(needed):
        kept = _saved_of(call, call.wants(tuple(needed))).empty(call.inputs(given.all_tensors), batch)
    return y, weights, kept, [torch.empty_like(t) for t in given.moving()]


def _backward(*arguments: Any) -> tuple[list[Tensor], Tensor]:
    given = Arguments(*arguments[:_WIDTH])
    needed, kept, dy, dlisted = arguments[_WIDTH:]
    if given.batch == 0:
        inputs_grads, flat = _fake_backward(*arguments)
        return inputs_grads, flat.zero_()
    call = _with_seed_read(given.call())
    inputs, wants = call.inputs(given.all_tensors), call.wants(tuple(needed))
    if given.backend == "triton":
        require_triton(given.x[0].device)
    elif kept:
        kept = _by_block(inputs, wants, kept)
    dx, dgate_x, dtensors = arithmetic_of(call).level_backward(inputs, wants, kept, dy, dlisted)
    if len(dx) > 1:  # views of one tensor
        dx = [None if grad is None else grad.clone(memory_format=torch.contiguous_format) for grad in dx]
    if len(dgate_x) > 1:
        dgate_x = [None if grad is None else grad.clone(memory_format=torch.contiguous_format) for grad in dgate_x]
    found = zip(given.all_tensors, [*dx, *dgate_x, *dtensors], needed, strict=True)
    grads = [
        torch.zeros_like(tensor, memory_format=torch.contiguous_format) if grad is None else grad
        for tensor, grad, wanted in found
        if wanted and tensor is not None
    ]
    count = sum(needed[: len(given.x) + len(given.gate_x)])
    parts = [grad.reshape(-1) for grad in grads[count:]]
    # Results must not share memory, and the kernels' are views of one buffer in the order of the launches.
    return grads[:count], torch.cat(parts) if parts else given.x[0].new_empty(0)


def _by_block(inputs: LevelInput, wants: Wants, kept: Sequence[Tensor]) -> list[Tensor | None]:
    """What each row block kept, block after block, out of whole tensors."""
    level = prepared(inputs, wants)
    return [
        rows_of(tensor, block.rows) if value.by_row else tensor
        for block in level.blocks(inputs)
        for value, tensor in zip(level.saved.values, kept, strict=True)
    ]


def _fake_backward(*arguments: Any) -> tuple[list[Tensor], Tensor]:
    given, needed = Arguments(*arguments[:_WIDTH]), arguments[_WIDTH]
    inputs = [*given.x, *given.gate_x]
    grads = [t.new_empty(t.shape) for t, wanted in zip(inputs, needed, strict=False) if wanted]
    return grads, given.x[0].new_empty(sum(_sizes(given.tensors, needed[len(inputs) :])))


def _sizes(tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> list[int]:
    """Numbers of elements of the tensors that need a gradient."""
    return [t.numel() for t, wanted in zip(tensors, needed, strict=True) if wanted and t is not None]


def _run_forward(*arguments: Any) -> Forward:
    with without_autocast(arguments[0][0]):
        return _forward(*arguments)


def _run_backward(*arguments: Any) -> tuple[list[Tensor], Tensor]:
    with without_autocast(arguments[0][0]):  # the program's backward may be called within the region
        return _backward(*arguments)


_LIBRARY.impl("level_forward", _run_forward, "CompositeExplicitAutograd")
_LIBRARY.impl("level_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("ple_fast::level_forward", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("ple_fast::level_backward", _fake_backward, lib=_LIBRARY)

level_forward: Any = torch.ops.ple_fast.level_forward.default
level_backward: Any = torch.ops.ple_fast.level_backward.default


class CompiledLevelFunction(torch.autograd.Function):
    """The two operators joined for autograd, for tracers.

    ``(call, needed, state, statistics, seed, *tensors)``, the call without its state, the number of statistics, which
    come before the level's tensors, to y, the weights if listed, and the moments.
    """

    @staticmethod
    def forward(
        ctx: Any, call: LevelCall, needed: tuple[bool, ...], state: tuple[float, ...], count: int, seed: Tensor | None,
        *tensors: Tensor | None,
    ) -> Any:  # fmt: skip
        statistics: Any = tensors[:count]
        given = arguments_of(call, tensors[count:], state, statistics, seed)
        keeps = list(needed) if not call.recompute else [False] * len(needed)
        y, weights, kept, moments = level_forward(*given, keeps, call.listed)
        ctx.call, ctx.needed, ctx.num_statistics = call, needed, count
        ctx.state, running = for_backward(state, statistics)
        ctx.counts = (len(running), len(tensors) - count)
        ctx.save_for_backward(seed, *running, *tensors[count:], *kept)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*moments)
        return (y, *((weights,) if call.listed else ()), *moments)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *others: Tensor | None) -> Any:
        call: LevelCall = ctx.call
        count, width = ctx.counts
        seed, *saved = ctx.saved_tensors
        running, tensors, kept = saved[:count], saved[count : count + width], saved[count + width :]
        given = arguments_of(call, tensors, ctx.state, running, seed)
        dlisted = others[0] if call.listed else None
        found, flat = level_backward(*given, list(ctx.needed), list(kept), dy, dlisted)
        start = call.num_x + call.num_gate_x
        parts = [*found, *flat.split(_sizes(tensors[start:], ctx.needed[start:]))]
        grads: list[Tensor | None] = []
        at = 0
        for tensor, wanted in zip(tensors, ctx.needed, strict=True):
            grads.append(parts[at].view(tensor.shape) if wanted and tensor is not None else None)
            at += 1 if wanted and tensor is not None else 0
        return (None,) * (5 + ctx.num_statistics) + tuple(grads)


_NO_STATE = LevelState((), None, None)


def run_op(call: LevelCall, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor | None]:
    """Output and, where the call lists them, the weights, by the operators; running statistics move."""
    state = call.state
    numbers, statistics = numbers_of(state), statistics_of(state)
    seed = draw_seed(torch.device("cpu")) if any(layer.dropout for layer in state.layers) else None
    call = call._replace(state=_NO_STATE)
    needed = tuple(t is not None and t.requires_grad for t in tensors)
    if torch.is_grad_enabled() and any(needed):
        out: Any = CompiledLevelFunction.apply(  # type: ignore[no-untyped-call]  # untyped in torch
            call, needed, numbers, len(statistics), seed, *statistics, *tensors
        )
        y, weights, moments = out[0], out[1] if call.listed else None, out[1 + call.listed :]
    else:
        given = arguments_of(call, tensors, numbers, statistics, seed)
        y, weights, _, moments = level_forward(*given, [False] * len(tensors), call.listed)
    _take_up(state, moments)
    return y, weights if call.listed else None


def _take_up(state: LevelState, moments: Sequence[Tensor]) -> None:
    """Running statistics take up the batch's."""
    at = 0
    with torch.no_grad():
        for norm in state.norms():
            if norm is not None and norm.moves:
                take_up(norm, moments[at], moments[at + 1])
                at += 2

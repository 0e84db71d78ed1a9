"""``torch.ops.ple_fast.level_forward`` and ``level_backward``: a level as one operator, for compiled programs.

A tracer sees an operator with a known result instead of launches. Eager calls do not come here: the dispatcher costs
more than it brings. The operators run Triton kernels; levels with norms or dropout, and CPU tensors, are traced as
PyTorch's own operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import LevelCall
from .backend import require_triton
from .plan import LayerState, LevelPlan, LevelState, MLPPlan
from .torch_backend.activations import from_output
from .torch_backend.level import BlockKept, LevelNeeds
from .torch_backend.mlp import NOTHING_KEPT, LayerKept, LayerNeeds
from .torch_backend.slots import Place

_INPUTS = "Tensor[] x, int[] places, Tensor[] gate_x, int[] gate_places, Tensor?[] tensors"
_LIBRARY = torch.library.Library("ple_fast", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define(
    f"level_forward({_INPUTS}, str plan, bool[] needed, bool listed) -> (Tensor, Tensor, Tensor[])", tags=_TAGS
)
_LIBRARY.define(
    f"level_backward({_INPUTS}, Tensor[] kept, Tensor? dy, Tensor? dlisted, str plan, bool[] needed)"
    " -> (Tensor[], Tensor)",
    tags=_TAGS,
)


def is_plain(state: LevelState) -> bool:
    """Whether a level can be one operator: no norms, no dropout, nothing that a call changes."""
    return state.gate_norm is None and all(
        layer.norm is None and layer.dice is None and not layer.dropout for layer in state.layers
    )


class _Entry(NamedTuple):
    """A tensor that backward reads: ``(B, *shape)``, its dtype the parameters', or float32 (float64) if ``wide``."""

    shape: tuple[int, ...]
    wide: bool = False


class _Layout(NamedTuple):
    """What forward keeps, in order, each tensor once; per MLP and layer the number of its output and its input."""

    entries: tuple[_Entry, ...]
    weights: int
    experts: int
    outputs: tuple[tuple[int, ...], ...]
    inputs: tuple[tuple[int, ...], ...]
    """Of the activation. -1 stands for what is not kept."""


def _reads_output(mlp: MLPPlan, needs: Sequence[LayerNeeds], i: int) -> bool:
    """Whether backward reads the output of layer ``i``: for its own activation, or as the next one's input."""
    activation = mlp.layers[i].activation
    own = needs[i].output and from_output(activation) and activation.name != "identity"
    if i + 1 == len(mlp.layers):
        return own
    return own or (needs[i + 1].output and bool(needs[i + 1].tensors.weight))


@lru_cache(maxsize=1024)
def _layout(call: LevelCall, needed: tuple[bool, ...]) -> _Layout:
    plan, needs = call.plan, call.needs(needed)
    t = plan.topology
    entries: list[_Entry] = []

    def keep(wanted: bool, *shape: int, wide: bool = False) -> int:
        if wanted:
            entries.append(_Entry(shape, wide))
        return len(entries) - 1 if wanted else -1

    weights = keep(needs.experts or needs.logits, t.num_weights, wide=True)
    last = len(plan.blocks[0].layers) - 1
    reads_experts = needs.weights or any(
        _reads_output(block, own, len(block.layers) - 1) for block, own in zip(plan.blocks, needs.mlps, strict=False)
    )
    experts = keep(reads_experts, t.num_experts, plan.blocks[0].layers[last].units)
    outputs, inputs = [], []
    for mlp, own in zip(plan.mlps(), needs.mlps, strict=True):
        rows: tuple[list[int], list[int]] = ([], [])
        for i, spec in enumerate(mlp.layers):
            is_last = i + 1 == len(mlp.layers)
            wanted = _reads_output(mlp, own, i)
            if is_last and mlp is plan.gate:
                wanted = wanted or bool(needs.logits and needs.gate.weight)
            rows[0].append(keep(wanted and not (is_last and mlp is not plan.gate), len(mlp.slots), spec.units))
            rows[1].append(keep(own[i].output and not from_output(spec.activation), len(mlp.slots), spec.units))
        outputs.append(tuple(rows[0]))
        inputs.append(tuple(rows[1]))
    return _Layout(tuple(entries), weights, experts, tuple(outputs), tuple(inputs))


def _pack(layout: _Layout, plan: LevelPlan, kept: BlockKept) -> list[Tensor]:
    """The kept tensors in the order of the layout."""
    found: dict[int, Tensor | None] = {layout.weights: kept.gated, layout.experts: kept.h}
    for mlp, layers, outputs, inputs in zip(plan.mlps(), kept.mlps, layout.outputs, layout.inputs, strict=True):
        for i, layer in enumerate(layers):
            above = layers[i + 1].a if i + 1 < len(layers) else kept.hidden if mlp is plan.gate else None
            by_output = from_output(mlp.layers[i].activation)
            found[outputs[i]] = layer.act if by_output and layer.act is not None else above
            found[inputs[i]] = layer.act
            if i + 1 == len(layers) and mlp is not plan.gate and found.get(layout.experts) is None:
                # Nobody reads the experts' outputs but their own activations: of one block they are all outputs.
                found[layout.experts] = layer.act if len(plan.blocks) == 1 else _base(layer.act)
    tensors = []
    for number in range(len(layout.entries)):
        tensor = found[number]
        assert tensor is not None
        tensors.append(tensor)
    return tensors


def _base(view: Tensor | None) -> Tensor | None:
    """The tensor of all experts that a block's output is a part of."""
    return None if view is None else view._base


def _unpack(layout: _Layout, plan: LevelPlan, needs: LevelNeeds, kept: Sequence[Tensor]) -> BlockKept:
    """The inverse of ``_pack``."""

    def at(number: int) -> Tensor | None:
        return None if number < 0 else kept[number]

    mlps = []
    experts = at(layout.experts)
    for mlp, own, outputs, inputs in zip(plan.mlps(), needs.mlps, layout.outputs, layout.inputs, strict=True):
        layers: list[LayerKept] = []
        for i, spec in enumerate(mlp.layers):
            keep = NOTHING_KEPT
            if own[i].output and spec.activation.name != "identity":
                output = at(outputs[i])
                if i + 1 == len(mlp.layers) and mlp is not plan.gate and experts is not None:
                    output = experts[:, mlp.start : mlp.start + len(mlp.slots)] if len(plan.blocks) > 1 else experts
                keep = keep._replace(act=output if from_output(spec.activation) else at(inputs[i]))
            if i > 0 and own[i].output and own[i].tensors.weight:
                keep = keep._replace(a=at(outputs[i - 1]))
            layers.append(keep)
        mlps.append(layers)
    hidden = at(layout.outputs[-1][-1]) if plan.gate.layers and needs.logits and needs.gate.weight else None
    return BlockKept(mlps, experts if needs.weights else None, at(layout.weights), None, hidden, None, None, None)


def _places(flat: Sequence[int]) -> tuple[Place, ...]:
    return tuple(Place(flat[i], flat[i + 1]) for i in range(0, len(flat), 2))


def _call(plan: str, x: Sequence[Tensor], places: Sequence[int], gate_x: Sequence[Tensor],
          gate_places: Sequence[int], listed: bool) -> LevelCall:  # fmt: skip
    level = LevelPlan.from_text(plan)
    state = LevelState((LayerState(None, None, 0.0),) * level.num_layers, None, None)
    other = _places(gate_places) if gate_places else None
    return LevelCall(level, state, _places(places), len(x), other, len(gate_x), listed, False, "triton")


def _forward(
    x: Sequence[Tensor],
    places: Sequence[int],
    gate_x: Sequence[Tensor],
    gate_places: Sequence[int],
    tensors: Sequence[Tensor | None],
    plan: str,
    needed: Sequence[bool],
    listed: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    require_triton(x[0].device)
    call = _call(plan, x, places, gate_x, gate_places, listed)
    if x[0].shape[0] == 0:
        return _fake_forward(x, places, gate_x, gate_places, tensors, plan, needed, listed)
    inputs = call.inputs([*x, *gate_x, *tensors])
    needs = call.needs(tuple(needed)) if any(needed) else None
    y, weights, kept = call.arithmetic().level_forward(inputs, needs, listed=listed)
    if weights is None:
        weights = y.new_empty(0)
    elif kept and weights is kept[0].gated:
        weights = weights.clone()  # results of an operator must not share memory
    return y, weights, [] if needs is None else _pack(_layout(call, tuple(needed)), call.plan, kept[0])


def _fake_forward(
    x: Sequence[Tensor],
    places: Sequence[int],
    gate_x: Sequence[Tensor],
    gate_places: Sequence[int],
    tensors: Sequence[Tensor | None],
    plan: str,
    needed: Sequence[bool],
    listed: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    call = _call(plan, x, places, gate_x, gate_places, listed)
    t, like, batch = call.plan.topology, x[0], x[0].shape[0]
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    y = like.new_empty((batch, t.num_mixtures, call.plan.blocks[0].layers[-1].units))
    weights = like.new_empty((batch, t.num_weights), dtype=wide) if listed else like.new_empty(0)
    if not any(needed):
        return y, weights, []
    entries = _layout(call, tuple(needed)).entries
    kept = [like.new_empty((batch, *e.shape), dtype=wide if e.wide else like.dtype) for e in entries]
    return y, weights, kept


def _backward(
    x: Sequence[Tensor],
    places: Sequence[int],
    gate_x: Sequence[Tensor],
    gate_places: Sequence[int],
    tensors: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    dy: Tensor | None,
    dlisted: Tensor | None,
    plan: str,
    needed: Sequence[bool],
) -> tuple[list[Tensor], Tensor]:
    require_triton(x[0].device)
    call = _call(plan, x, places, gate_x, gate_places, False)
    if x[0].shape[0] == 0:
        inputs_grads, flat = _fake_backward(x, places, gate_x, gate_places, tensors, kept, dy, dlisted, plan, needed)
        return inputs_grads, flat.zero_()
    inputs = call.inputs([*x, *gate_x, *tensors])
    needs = call.needs(tuple(needed))
    blocks = [_unpack(_layout(call, tuple(needed)), call.plan, needs, kept)] if kept else []
    dx, dgate_x, dtensors = call.arithmetic().level_backward(inputs, needs, blocks, dy, dlisted)
    if len(dx) > 1:  # views of one tensor
        dx = [None if grad is None else grad.clone(memory_format=torch.contiguous_format) for grad in dx]
    if len(dgate_x) > 1:
        dgate_x = [None if grad is None else grad.clone(memory_format=torch.contiguous_format) for grad in dgate_x]
    found = zip([*x, *gate_x, *tensors], [*dx, *dgate_x, *dtensors], needed, strict=True)
    grads = [
        torch.zeros_like(given, memory_format=torch.contiguous_format) if grad is None else grad
        for given, grad, wanted in found
        if wanted and given is not None
    ]
    count = sum(needed[: len(x) + len(gate_x)])
    parts = [grad.reshape(-1) for grad in grads[count:]]
    # Results must not share memory, and these are views of one buffer in the order of the launches.
    return grads[:count], torch.cat(parts) if parts else x[0].new_empty(0)


def _fake_backward(
    x: Sequence[Tensor],
    places: Sequence[int],
    gate_x: Sequence[Tensor],
    gate_places: Sequence[int],
    tensors: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    dy: Tensor | None,
    dlisted: Tensor | None,
    plan: str,
    needed: Sequence[bool],
) -> tuple[list[Tensor], Tensor]:
    given = [*x, *gate_x]
    grads = [t.new_empty(t.shape) for t, wanted in zip(given, needed, strict=False) if wanted]
    return grads, x[0].new_empty(sum(_sizes(tensors, needed[len(given) :])))


def _sizes(tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> list[int]:
    """Numbers of elements of the tensors that need a gradient."""
    return [t.numel() for t, wanted in zip(tensors, needed, strict=True) if wanted and t is not None]


_LIBRARY.impl("level_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("level_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("ple_fast::level_forward", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("ple_fast::level_backward", _fake_backward, lib=_LIBRARY)

level_forward: Any = torch.ops.ple_fast.level_forward.default
level_backward: Any = torch.ops.ple_fast.level_backward.default


class CompiledLevelFunction(torch.autograd.Function):
    """The two operators joined for autograd, for tracers: ``(call, plan, needed, *tensors)`` to y and the weights."""

    @staticmethod
    def forward(ctx: Any, call: LevelCall, needed: tuple[bool, ...], *tensors: Tensor | None) -> Any:
        arguments = _arguments(call, tensors)
        keeps = list(needed) if not call.recompute else [False] * len(needed)
        y, weights, kept = level_forward(*arguments, call.plan.text, keeps, call.listed)
        ctx.call, ctx.needed, ctx.num_tensors = call, needed, len(tensors)
        ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(False)
        return (y, weights) if call.listed else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dlisted: Tensor | None = None) -> Any:
        call: LevelCall = ctx.call
        saved = ctx.saved_tensors
        tensors, kept = saved[: ctx.num_tensors], saved[ctx.num_tensors :]
        found, flat = level_backward(
            *_arguments(call, tensors), list(kept), dy, dlisted, call.plan.text, list(ctx.needed)
        )
        start = call.num_x + call.num_gate_x
        parts = [*found, *flat.split(_sizes(tensors[start:], ctx.needed[start:]))]
        grads: list[Tensor | None] = []
        at = 0
        for given, wanted in zip(tensors, ctx.needed, strict=True):
            grads.append(parts[at].view(given.shape) if wanted and given is not None else None)
            at += 1 if wanted and given is not None else 0
        return None, None, *grads


def _arguments(
    call: LevelCall, tensors: Sequence[Tensor | None]
) -> tuple[list[Any], list[int], list[Any], list[int], list[Tensor | None]]:
    start = call.num_x + call.num_gate_x
    places = [number for place in call.places for number in place]
    gate_places = [] if call.gate_places is None else [number for place in call.gate_places for number in place]
    return list(tensors[: call.num_x]), places, list(tensors[call.num_x : start]), gate_places, list(tensors[start:])


def run_op(call: LevelCall, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor | None]:
    """Output and, where the call lists them, the weights, by the operators."""
    needed = tuple(t is not None and t.requires_grad for t in tensors)
    if torch.is_grad_enabled() and any(needed):
        out: Any = CompiledLevelFunction.apply(call, needed, *tensors)  # type: ignore[no-untyped-call]  # untyped in torch
        return out if call.listed else (out, None)
    y, weights, _ = level_forward(*_arguments(call, tensors), call.plan.text, [False] * len(tensors), call.listed)
    return y, weights if call.listed else None

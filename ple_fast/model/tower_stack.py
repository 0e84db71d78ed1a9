"""Towers that are alike as one level: a launch per layer for all of them, forward and backward.

Each tower keeps its own modules and parameters, which a user may change: every call looks at them, and stacks what the
towers hold then. What is not as ``build_tower`` made it runs one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..autocast import autocast_dtype
from ..backend import resolve
from ..functional import extraction_level, scaled
from ..plan import LevelPlan
from ..routes import must_see_operators
from ..specs import Activation, GateSpec, MLPSpec
from ..state import NO_STATE, LayerState, LevelState
from ..tensors import GateTensors, LayerTensors
from ..topology import Topology
from ..torch_backend.dropout import draw_seed
from .tower_forms import Form, Tower, read_tower
from .towers import run_one_by_one, scaled_tower

STACKED_PRODUCTS = 100_000_000
"""Multiply-adds of all towers at a call on a CPU from which on one level for all takes less than one tower after the
other: before, it is the host's time that counts, and there a tower is a few quick operators."""

_NO_GATE = GateTensors(None, None, None, None, None)


def run_towers(
    towers: nn.ModuleList, mixtures: Tensor, scales: Sequence[Tensor] = (), factor: float = 2.0
) -> Sequence[Tensor]:
    """Outputs ``(B, outputs)`` of each tower, of its own ``(B, H)`` in ``(B, T, H)``.

    ``scales``: ``(B, T, D)`` for each linear layer, which times ``factor`` scale what the layer reads.

    Raises:
        ValueError: scales for other layers than a tower has, or for a tower that is called as a whole.
    """
    if _may_stack(towers, mixtures):
        read = [read_tower(tower) for tower in towers]
        groups: dict[Any, list[int]] = {}
        for k, own in enumerate(read):
            groups.setdefault(("alone", k) if own is None else own.form, []).append(k)
        if len(groups) < len(read) and all(_fits(own, mixtures, scales) for own in read):
            return _run_groups(towers, read, list(groups.values()), mixtures, scales, factor)
    return run_one_by_one(towers, mixtures, scales, factor)


def _may_stack(towers: nn.ModuleList, mixtures: Tensor) -> bool:
    """Whether stacking takes less at this call, if the towers are alike, and no tracer wants to see operators."""
    count = len(towers)
    if mixtures.dim() != 3 or mixtures.shape[1] != count or must_see_operators(mixtures):
        return False
    if count < 2 or mixtures.shape[0] == 0 or _has_any_global_hook():
        return False
    if mixtures.is_cpu and mixtures.shape[0] * count * _products(towers) >= STACKED_PRODUCTS:
        return True
    return _in_kernels(mixtures.device)


def _products(towers: nn.ModuleList) -> int:
    """Multiply-adds of a row in the first tower; a small batch waits for this."""
    layers = [layer for layer in towers[0]._modules.values() if type(layer) is nn.Linear]
    return sum(layer.in_features * layer.out_features for layer in layers)


def _in_kernels(device: torch.device) -> bool:
    try:
        return resolve(device).name == "triton"
    except RuntimeError:  # kernels are asked for that cannot run, which a trunk of ours has said
        return False


def _fits(tower: Tower | None, mixtures: Tensor, scales: Sequence[Tensor]) -> bool:
    """Whether a level takes the input as it is; else what is called one by one says what is wrong."""
    if tower is None:
        return True
    form = tower.form
    if scales and len(scales) != len(form.units):
        return False
    same = form.dtype == mixtures.dtype or autocast_dtype(tower.weights[0]) is not None
    return same and form.device == mixtures.device and form.in_features == mixtures.shape[2]


def _run_groups(
    towers: nn.ModuleList,
    read: Sequence[Tower | None],
    groups: Sequence[Sequence[int]],
    mixtures: Tensor,
    scales: Sequence[Tensor],
    factor: float,
) -> list[Tensor]:
    if len(groups) == 1:
        return list(_run_level([own for own in read if own is not None], mixtures, scales, factor))
    outputs: dict[int, Tensor] = {}
    for group, x, *own_scales in zip(groups, *(_parted(tensor, groups) for tensor in (mixtures, *scales)), strict=True):
        if len(group) == 1:
            tower, first = towers[group[0]], x.squeeze(1)
            own = [factor * scale.squeeze(1) for scale in own_scales]
            outputs[group[0]] = scaled_tower(tower, first, own) if scales else tower(first)
        else:
            members = [own for k in group if (own := read[k]) is not None]
            outputs |= zip(group, _run_level(members, x, own_scales, factor), strict=True)
    return [outputs[k] for k in range(len(read))]


def _parted(tensor: Tensor, groups: Sequence[Sequence[int]]) -> Sequence[Tensor]:
    """The part of each group of towers."""
    order = [k for group in groups for k in group]
    if order == sorted(order):
        runs: tuple[Tensor, ...] = tensor.split([len(group) for group in groups], 1)
        return runs
    parts = tensor.unbind(1)
    return [torch.stack([parts[k] for k in group], 1) for group in groups]


def _kinds(count: int) -> tuple[Literal["static"], ...]:
    return tuple("static" for _ in range(count))


@lru_cache(maxsize=1024)
def _plan(count: int, form: Form, layer: int | None = None) -> LevelPlan:
    """Of all layers, or of one alone."""
    slots = tuple(range(count))
    wiring = Topology(slots, slots, tuple((k,) for k in slots), mixture_kind=_kinds(count))
    part = slice(None) if layer is None else slice(layer, layer + 1)
    activations, rates = (*form.activations, Activation("identity")), (*form.rates, 0.0)
    spec = MLPSpec(form.units[part], activations[part], dropout=rates[part])
    return LevelPlan.build(wiring, [(0, count, spec)], GateSpec())


def _state(plan: LevelPlan, device: torch.device, rows: int, backend: str) -> LevelState:
    """What one call reads besides tensors; draws the seed of dropout as an ``ExtractionNetwork`` does."""
    rates = [spec.dropout for spec in plan.blocks[0].layers]
    layers = tuple(LayerState(None, None, rate) if rate else NO_STATE for rate in rates)
    seed: int | Tensor | None = None
    if any(rates):
        seed = draw_seed(device) if backend == "triton" else int(draw_seed(torch.device("cpu")))
    return LevelState(layers, None, seed)


def _run_level(towers: Sequence[Tower], x: Tensor, scales: Sequence[Tensor], factor: float) -> Sequence[Tensor]:
    """Outputs of towers of one form, of ``(B, T, H)``; with scales a level for each layer."""
    form = towers[0].form
    rows: list[list[nn.Parameter]] = []  # of each tensor of the level, those of the towers
    for i in range(len(form.units)):
        rows += [[own.weights[i] for own in towers], [own.biases[i] for own in towers]]
        if i < len(form.activations) and form.activations[i].name == "prelu":
            rows.append([slope for own in towers if (slope := own.slopes[i]) is not None])
    parameters = [parameter for row in rows for parameter in row]
    records = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters))
    shapes = [(len(towers), *row[0].shape) for row in rows]
    used = _Used()
    stacked = _Stack.apply(used, shapes, *parameters) if records else _stacked(shapes, parameters)  # type: ignore[no-untyped-call]
    given = iter(stacked)
    layers = []
    for i in range(len(form.units)):
        is_learned = i < len(form.activations) and form.activations[i].name == "prelu"
        weight, bias = next(given), next(given)
        layers.append(LayerTensors(weight, bias, None, None, next(given).flatten() if is_learned else None))
    y = x
    if not scales:
        y = _call(_plan(len(towers), form), layers, y)
    for place, scale in enumerate(scales):
        y = _call(_plan(len(towers), form, place), layers[place : place + 1], scaled(y, scale, factor=factor))
    outputs: Sequence[Tensor] = _Apart.apply(used, y) if records else _by_tower(y).unbind(0)  # type: ignore[no-untyped-call]
    return outputs


def _call(plan: LevelPlan, layers: Sequence[LayerTensors], x: Tensor) -> Tensor:
    width = x.shape[2]
    state = partial(_state, plan, layers[0].weight.device)
    y, _ = extraction_level(x, None, plan, layers, _NO_GATE, state, in_features=width, gate_features=width)
    return y


def _by_tower(y: Tensor) -> Tensor:
    """``(T, B, O)``, in which each output is contiguous."""
    return y.transpose(0, 1).contiguous()


class _Used:
    """Which towers take part in a backward: what a loss does not read has no gradient, and not one of zeros."""

    def __init__(self) -> None:
        self.towers: tuple[bool, ...] = ()


@torch.no_grad()
def _stacked(shapes: Sequence[tuple[int, ...]], parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies of the parameters, tower after tower in each tensor; copied at once."""
    made = [torch.empty(shape, dtype=parameters[0].dtype, device=parameters[0].device) for shape in shapes]
    torch._foreach_copy_([part for tensor in made for part in tensor.unbind(0)], [p.detach() for p in parameters])
    return tuple(made)


class _Stack(torch.autograd.Function):
    """``(used, shapes, *parameters)``, tensor after tensor and tower after tower, to the stacked tensors."""

    @staticmethod
    def forward(ctx: Any, used: _Used, shapes: Sequence[tuple[int, ...]], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.used, ctx.counts = used, [shape[0] for shape in shapes]
        ctx.set_materialize_grads(False)
        stacked = _stacked(shapes, parameters)
        needed, at, fixed = ctx.needs_input_grad[2:], 0, []
        for tensor, count in zip(stacked, ctx.counts, strict=True):
            if not any(needed[at : at + count]):
                fixed.append(tensor)
            at += count
        ctx.mark_non_differentiable(*fixed)
        return stacked

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        found: list[Tensor | None] = []
        for grad, count in zip(grads, ctx.counts, strict=True):
            parts = [None] * count if grad is None else grad.unbind(0)
            found += [part if is_used else None for part, is_used in zip(parts, ctx.used.towers, strict=True)]
        return None, None, *found


class _Apart(torch.autograd.Function):
    """``(used, y (B, T, O))`` to an output ``(B, O)`` for each tower."""

    @staticmethod
    def forward(ctx: Any, used: _Used, y: Tensor) -> tuple[Tensor, ...]:
        ctx.used = used
        ctx.set_materialize_grads(False)
        # Of the same memory, but no views: a user may write to an output.
        parts: Any = _by_tower(y.detach()).unbind(0)
        return tuple(y.new_empty(0).set_(part) for part in parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ctx.used.towers = tuple(grad is not None for grad in grads)
        like = next((grad for grad in grads if grad is not None), None)
        if like is None:
            return None, None
        return None, torch.stack([torch.zeros_like(like) if grad is None else grad for grad in grads], 1)

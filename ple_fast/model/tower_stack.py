"""Towers that are alike as one level: a launch per layer for all of them, forward and backward.

Each tower keeps its own modules and parameters, which a user may change: every call looks at them, and stacks what the
towers hold then. What is not as ``build_tower`` made it runs one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..autocast import autocast_dtype
from ..backend import resolve
from ..functional import extraction_level
from ..plan import LevelPlan
from ..routes import must_see_operators
from ..specs import Activation, GateSpec, MLPSpec, parse_activation
from ..state import NO_STATE, LayerState, LevelState
from ..tensors import GateTensors, LayerTensors
from ..topology import Topology
from ..torch_backend.dropout import draw_seed
from .towers import TOWER_ACTIVATIONS

STACKED_PRODUCTS, STACKED_ROWS = 100_000_000, 256
"""Multiply-adds of all towers at a call on a CPU, and rows, from which on one level for all takes less than one tower
after the other: before, it is the host's time that counts, and there a tower is a few quick operators."""

_ACTIVATIONS = frozenset(TOWER_ACTIVATIONS.values())
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NO_GATE = GateTensors(None, None, None, None, None)


class _Form(NamedTuple):
    """What towers of one level have in common."""

    in_features: int
    units: tuple[int, ...]
    activations: tuple[Activation, ...]
    """Of the hidden layers,"""
    rates: tuple[float, ...]
    """and how much is dropped behind them at this call."""
    dtype: torch.dtype
    device: torch.device


class _Tower(NamedTuple):
    """What one tower holds at a call."""

    form: _Form
    weights: list[nn.Parameter]
    biases: list[nn.Parameter]
    slopes: list[nn.Parameter | None]
    """Of prelu, one per hidden layer."""


def run_towers(towers: nn.ModuleList, mixtures: Tensor) -> Sequence[Tensor]:
    """Outputs ``(B, outputs)`` of each tower, of its own ``(B, H)`` in ``(B, T, H)``."""
    if _may_stack(mixtures, len(towers)):
        read = [_read(tower) for tower in towers]
        groups: dict[Any, list[int]] = {}
        for k, own in enumerate(read):
            groups.setdefault(("alone", k) if own is None else own.form, []).append(k)
        if len(groups) < len(read) and _is_worth(read, mixtures) and all(_fits(own, mixtures) for own in read):
            return _run_groups(towers, read, list(groups.values()), mixtures)
    # unbind, not y[:, k]: the backward of each index would fill a tensor as large as y with zeros.
    return [tower(mixture) for tower, mixture in zip(towers, mixtures.unbind(1), strict=True)]


def _may_stack(mixtures: Tensor, count: int) -> bool:
    """Whether stacking may take less at this call, and no tracer wants to see operators."""
    if mixtures.dim() != 3 or mixtures.shape[1] != count or must_see_operators(mixtures):
        return False
    rows = mixtures.shape[0]
    if count < 2 or rows == 0 or _has_any_global_hook():
        return False
    return (mixtures.is_cpu and rows >= STACKED_ROWS) or _in_kernels(mixtures.device)


def _is_worth(read: Sequence[_Tower | None], mixtures: Tensor) -> bool:
    """Whether it does, of towers that have been read."""
    if not mixtures.is_cpu or _in_kernels(mixtures.device):
        return True
    products = sum(weight.numel() for own in read if own is not None for weight in own.weights)
    return mixtures.shape[0] * products >= STACKED_PRODUCTS


def _in_kernels(device: torch.device) -> bool:
    try:
        return resolve(device).name == "triton"
    except RuntimeError:  # kernels are asked for that cannot run, which a trunk of ours has said
        return False


def _is_bare(module: nn.Module) -> bool:
    """Whether a call of the module is its class's forward, and nothing else."""
    own = module.__dict__
    return "forward" not in own and not any(own[name] for name in _HOOKS)


def _read(tower: nn.Module) -> _Tower | None:
    """What a tower holds, if it is as ``build_tower`` made it."""
    if type(tower) is not nn.Sequential or not _is_bare(tower):
        return None
    weights: list[nn.Parameter] = []
    biases: list[nn.Parameter] = []
    slopes: list[nn.Parameter | None] = []
    activations: list[Activation] = []
    rates: list[float] = []
    expects = nn.Linear
    for layer in tower._modules.values():
        if layer is None or not _is_bare(layer):
            return None
        kind = type(layer)
        if expects is nn.Linear and kind is nn.Linear:
            weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
            if type(weight) is not nn.Parameter or type(bias) is not nn.Parameter:
                return None
            weights.append(weight)
            biases.append(bias)
            expects = nn.Module
        elif expects is nn.Module and kind in _ACTIVATIONS:
            slope = layer._parameters.get("weight")
            if kind is nn.PReLU and (type(slope) is not nn.Parameter or slope.numel() != 1):
                return None
            slopes.append(slope)
            activations.append(_activation(layer))
            rates.append(0.0)
            expects = nn.Linear
        elif kind is nn.Dropout and rates and len(rates) == len(weights):
            if layer.training and layer.p:
                if rates[-1] or layer.p >= 1.0:
                    return None
                rates[-1] = float(layer.p)
        else:
            return None
    if len(weights) != len(rates) + 1:
        return None
    return _checked(weights, biases, slopes, tuple(activations), tuple(rates))


def _activation(layer: nn.Module) -> Activation:
    parsed = parse_activation(layer)
    return Activation("prelu") if parsed.name == "prelu" else parsed  # which begins as it is


def _checked(
    weights: list[nn.Parameter],
    biases: list[nn.Parameter],
    slopes: list[nn.Parameter | None],
    activations: tuple[Activation, ...],
    rates: tuple[float, ...],
) -> _Tower | None:
    """The tower, if its tensors are of one dtype and device and fit each other."""
    first = weights[0]
    if first.dim() != 2:
        return None
    width = in_features = first.shape[1]
    dtype, device = first.dtype, first.device
    for weight, bias in zip(weights, biases, strict=True):
        if weight.dim() != 2 or weight.shape[1] != width or bias.shape != (weight.shape[0],):
            return None
        width = weight.shape[0]
    for tensor in (*weights, *biases, *slopes):
        if tensor is not None and (tensor.dtype != dtype or tensor.device != device or tensor.is_meta):
            return None
    form = _Form(in_features, tuple(weight.shape[0] for weight in weights), activations, rates, dtype, device)
    return _Tower(form, weights, biases, slopes)


def _fits(tower: _Tower | None, mixtures: Tensor) -> bool:
    """Whether a level takes the input as it is; else PyTorch says what it says."""
    if tower is None:
        return True
    form = tower.form
    same = form.dtype == mixtures.dtype or autocast_dtype(tower.weights[0]) is not None
    return same and form.device == mixtures.device and form.in_features == mixtures.shape[2]


def _run_groups(
    towers: nn.ModuleList, read: Sequence[_Tower | None], groups: Sequence[Sequence[int]], mixtures: Tensor
) -> list[Tensor]:
    if len(groups) == 1:
        return list(_run_level([own for own in read if own is not None], mixtures))
    order = [k for group in groups for k in group]
    if order == sorted(order):
        inputs: Sequence[Tensor] = mixtures.split([len(group) for group in groups], 1)
    else:
        parts = mixtures.unbind(1)
        inputs = [torch.stack([parts[k] for k in group], 1) for group in groups]
    outputs: dict[int, Tensor] = {}
    for group, x in zip(groups, inputs, strict=True):
        if len(group) == 1:
            outputs[group[0]] = towers[group[0]](x.squeeze(1))
        else:
            members = [own for k in group if (own := read[k]) is not None]
            outputs |= zip(group, _run_level(members, x), strict=True)
    return [outputs[k] for k in range(len(read))]


@lru_cache(maxsize=256)
def _plan(count: int, form: _Form) -> LevelPlan:
    slots = tuple(range(count))
    wiring = Topology(slots, slots, tuple((k,) for k in slots), mixture_kind=("static",) * count)
    spec = MLPSpec(
        form.units, (*form.activations, Activation("identity")), dropout=(*form.rates, 0.0)
    )  # fmt: skip
    return LevelPlan.build(wiring, [(0, count, spec)], GateSpec())


def _state(plan: LevelPlan, device: torch.device, rows: int, backend: str) -> LevelState:
    """What one call reads besides tensors; draws the seed of dropout as an ``ExtractionNetwork`` does."""
    rates = [spec.dropout for spec in plan.blocks[0].layers]
    layers = tuple(LayerState(None, None, rate) if rate else NO_STATE for rate in rates)
    seed: int | Tensor | None = None
    if any(rates):
        seed = draw_seed(device) if backend == "triton" else int(draw_seed(torch.device("cpu")))
    return LevelState(layers, None, seed)


def _run_level(towers: Sequence[_Tower], x: Tensor) -> Sequence[Tensor]:
    """Outputs of towers of one form, of ``(B, T, H)``."""
    form, plan = towers[0].form, _plan(len(towers), towers[0].form)
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
    y, _ = extraction_level(
        x, None, plan, layers, _NO_GATE, partial(_state, plan, form.device),
        in_features=form.in_features, gate_features=form.in_features,
    )  # fmt: skip
    outputs: Sequence[Tensor] = _Apart.apply(used, y) if records else y.unbind(1)  # type: ignore[no-untyped-call]
    return outputs


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
        return tuple(y.new_empty(0).set_(part.detach()) for part in y.unbind(1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ctx.used.towers = tuple(grad is not None for grad in grads)
        like = next((grad for grad in grads if grad is not None), None)
        if like is None:
            return None, None
        return None, torch.stack([torch.zeros_like(like) if grad is None else grad for grad in grads], 1)

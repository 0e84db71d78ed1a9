"""What a tower holds at a call, and whether it is as ``build_tower`` made it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..specs import Activation, parse_activation
from .towers import TOWER_ACTIVATIONS, is_bare

_ACTIVATIONS = frozenset(TOWER_ACTIVATIONS.values())


class Form(NamedTuple):
    """What towers of one level have in common."""

    in_features: int
    units: tuple[int, ...]
    activations: tuple[Activation, ...]
    """Of the hidden layers,"""
    rates: tuple[float, ...]
    """and how much is dropped behind them at this call."""
    dtype: torch.dtype
    device: torch.device


class Tower(NamedTuple):
    """What one tower holds at a call."""

    form: Form
    weights: list[nn.Parameter]
    biases: list[nn.Parameter]
    slopes: list[nn.Parameter | None]
    """Of prelu, one per hidden layer."""


def read_tower(tower: nn.Module) -> Tower | None:
    """What a tower holds, if it is as ``build_tower`` made it."""
    if type(tower) is not nn.Sequential or not is_bare(tower):
        return None
    weights: list[nn.Parameter] = []
    biases: list[nn.Parameter] = []
    slopes: list[nn.Parameter | None] = []
    activations: list[Activation] = []
    rates: list[float] = []
    expects: type[nn.Module] = nn.Linear
    for layer in tower._modules.values():
        if not is_bare(layer):
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
        elif isinstance(layer, nn.Dropout) and kind is nn.Dropout and rates and len(rates) == len(weights):
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
) -> Tower | None:
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
    form = Form(in_features, tuple(weight.shape[0] for weight in weights), activations, rates, dtype, device)
    return Tower(form, weights, biases, slopes)

"""The towers of a model for deployment: one batched product per layer of all tasks, where they are alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .towers import TOWER_ACTIVATIONS, run_one_by_one

FUSED = tuple(kind for kind in TOWER_ACTIVATIONS.values() if kind is not nn.PReLU)
"""Activations that learn nothing: one module serves all tasks."""


def served_towers(towers: nn.ModuleList, factor: float = 2.0) -> FusedTowers | SingleTowers:
    """What computes towers in eval mode: ``(B, T, H)`` and the scales of their layers, if there are any, to a tensor
    ``(B, outputs)`` per task.

    Args:
        towers: copies, whose modules and tensors are taken over.
        factor: of the scales.
    """
    layers = [_layers(tower) for tower in towers]
    known = [found for found in layers if found is not None]
    if len(known) == len(layers) > 1 and len({_make_up(found) for found in known}) == 1:
        return FusedTowers(known, factor)
    return SingleTowers(towers, factor)


def _layers(tower: nn.Module) -> list[nn.Module] | None:
    """Linear layers with biases and activations, as ``build_tower`` makes them; None of anything else."""
    if type(tower) is not nn.Sequential or _has_hooks(tower):
        return None
    layers = [layer for layer in tower if type(layer) is not nn.Dropout]
    for place, layer in enumerate(layers):
        is_linear = type(layer) is nn.Linear and layer.bias is not None
        if _has_hooks(layer) or not (type(layer) in FUSED if place % 2 else is_linear):
            return None
    return layers if len(layers) % 2 else None


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _make_up(layers: Sequence[nn.Module]) -> tuple[Any, ...]:
    """What fused layers have in common; the outputs of the last one may differ."""
    *hidden, last = layers
    shapes = tuple(
        (layer.weight.shape, layer.weight.dtype) if isinstance(layer, nn.Linear) else repr(layer) for layer in hidden
    )
    assert isinstance(last, nn.Linear)
    return *shapes, last.in_features, last.weight.dtype


class SingleTowers(nn.Module):
    """Towers one after the other."""

    def __init__(self, towers: nn.ModuleList, factor: float) -> None:
        super().__init__()
        for tower in towers:
            if isinstance(tower, nn.Sequential):
                for place in reversed(range(len(tower))):
                    if isinstance(tower[place], nn.Dropout):
                        del tower[place]
        self.towers, self.factor = towers, factor

    def forward(self, mixtures: Tensor, scales: Sequence[Tensor]) -> list[Tensor]:
        return run_one_by_one(self.towers, mixtures, scales, self.factor)


class FusedTowers(nn.Module):
    """Towers of equal hidden layers: a batched product for each. Where the numbers of outputs differ, the last layers
    are one by one."""

    def __init__(self, towers: Sequence[Sequence[nn.Module]], factor: float) -> None:
        super().__init__()
        self.factor = factor
        lasts = [layers[-1] for layers in towers]
        depth = len(towers[0])
        shapes = {layer.weight.shape for layer in lasts if isinstance(layer, nn.Linear)}
        fused = depth if len(shapes) == 1 else depth - 1
        self.activations = nn.ModuleList(towers[0][1::2])
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for layers in zip(*(layers[:fused:2] for layers in towers), strict=True):
            linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
            self.weights.append(_stacked([layer.weight.t() for layer in linear]))
            self.biases.append(_stacked([layer.bias.unsqueeze(0) for layer in linear]))
        self.lasts = nn.ModuleList() if fused == depth else nn.ModuleList(lasts)

    def forward(self, mixtures: Tensor, scales: Sequence[Tensor]) -> list[Tensor]:
        x = mixtures.transpose(0, 1)
        for place, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if scales:
                x = x * (self.factor * scales[place].transpose(0, 1))
            x = torch.baddbmm(bias, x, weight)
            if place < len(self.activations):
                x = self.activations[place](x)
        if len(self.lasts):
            if scales:
                x = x * (self.factor * scales[-1].transpose(0, 1))
            return [last(part) for last, part in zip(self.lasts, x.unbind(0), strict=True)]
        return list(x.unbind(0))


def _stacked(tensors: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([tensor.detach() for tensor in tensors]).contiguous(), requires_grad=False)

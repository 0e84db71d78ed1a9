"""A level for deployment: batch norm in the linear layers where it can be, and nothing that only training needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..specs import GateSpec, LayerSpec, MLPSpec
from ..state import NormState
from ..torch_backend.folding import fold_input, fold_output, scale_and_shift
from .activations import StackedDice, StackedPReLU, StackedRowDice
from .layers import ExpertBlock, Gate, LevelParts, StackedLayer
from .norms import StackedBatchNorm, StackedLayerNorm


@dataclass
class _Norm:
    """A norm that stays: its settings and tensors by their names in the module."""

    eps: float
    tensors: dict[str, Tensor]

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Of a batch norm."""
        own = self.tensors
        state = NormState("batch", self.eps, running_mean=own["running_mean"], running_var=own["running_var"])
        return scale_and_shift(own["weight"], own["bias"], state)


@dataclass
class _Layer:
    """One layer of stacked MLPs while batch norms are moved out of it."""

    units: int
    activation: str
    weight: Tensor
    bias: Tensor | None
    norm: _Norm | None
    is_batch: bool
    is_after: bool
    """The norm stands after the activation."""
    slope: Tensor | None
    dice: _Norm | None

    def fold_norm(self, following: _Layer | None) -> None:
        """Move the batch norm into this linear layer or, where an activation is between, into the following one."""
        if self.norm is None or not self.is_batch:
            return
        scale, shift = (part.view(-1, self.units) for part in self.norm.scale_and_shift())
        if not self.is_after or self.activation == "identity":
            self.weight, self.bias = fold_output(self.weight, self.bias, scale, shift)
        elif following is not None:
            following.weight, following.bias = fold_input(following.weight, following.bias, scale, shift)
        else:
            return  # a mixture adds up outputs of experts, and has no weight per feature that could take it
        self.norm = None

    def settings(self) -> tuple[float | None, float | None]:
        """What the experts of one block have in common besides their spec."""
        return None if self.norm is None else self.norm.eps, None if self.dice is None else self.dice.eps


def for_inference(level: LevelParts) -> tuple[dict[str, Any], Callable[[LevelParts], None]]:
    """Arguments and content of the level that computes what ``level`` computes in eval mode.

    Returns:
        ``experts``, ``gate`` and ``_splits`` for ``ExtractionNetwork``, and a function that writes its tensors.
    """
    with torch.no_grad():
        ranges, blocks = [], []
        for j, block in enumerate(level.blocks):
            assert isinstance(block, ExpertBlock)
            ranges.append(block.experts)
            blocks.append(_layers(f"blocks.{j}", block.layers))
        for layers in blocks:
            _fold(layers)
        hidden = _layers("gate", level.gate.layers)
        _fold(hidden)
        weight, bias = _gate_end(level.gate)
    experts: list[MLPSpec] = []
    for (start, stop), layers in zip(ranges, blocks, strict=True):
        experts += [_expert_spec(level.expert_specs[start], layers)] * (stop - start)
    settings = [[layer.settings() for layer in layers] for layers in blocks]
    splits = {start for j, (start, _) in enumerate(ranges) if j and settings[j] != settings[j - 1]}

    def fill(new: LevelParts) -> None:
        with torch.no_grad():
            for block in new.blocks:
                assert isinstance(block, ExpertBlock)
                own = [layers for at, layers in zip(ranges, blocks, strict=True) if at[0] in range(*block.experts)]
                for i, layer in enumerate(block.layers):
                    _fill(layer, [layers[i] for layers in own])
            for layer, source in zip(new.gate.layers, hidden, strict=True):
                _fill(layer, [source])
            for name, tensor in (("weight", weight), ("bias", bias), ("offset", level.gate.tensors().offset)):
                if tensor is not None:
                    getattr(new.gate, name).copy_(tensor)

    return {"experts": experts, "gate": _gate_spec(level.gate_spec, bias is not None), "_splits": splits}, fill


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _optional(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _wide(tensor)


def _norm_of(where: str, norm: nn.Module | None, weight: Tensor | None, bias: Tensor | None) -> _Norm | None:
    """Settings and tensors of a norm; None where there is none.

    Raises:
        TypeError: a norm of a class that has no known formula.
        ValueError: a batch norm without running statistics.
    """
    if norm is None or isinstance(norm, nn.Identity):
        return None
    tensors: dict[str, Tensor | None] = {"weight": weight, "bias": bias}
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError(
                f"for_inference: {where} keeps no running statistics, so its output depends on the batch also in eval "
                "mode; set track_running_stats=True and train on"
            )
        tensors |= {"running_mean": norm.running_mean, "running_var": norm.running_var}
        return _Norm(norm.eps, {name: _wide(t) for name, t in _with_affine(tensors, norm.running_var).items()})
    if not isinstance(norm, StackedLayerNorm):
        raise TypeError(
            f"for_inference: expected {where} to be a batch norm of torch.nn or ours, got {type(norm).__name__}, whose "
            "formula is not known"
        )
    return _Norm(norm.eps, {name: _wide(t) for name, t in tensors.items() if t is not None})


def _with_affine(tensors: dict[str, Tensor | None], like: Tensor) -> dict[str, Tensor]:
    """Weight 1 and bias 0 where a batch norm has none."""
    ones = {"weight": torch.ones_like(like), "bias": torch.zeros_like(like)}
    return {name: ones[name] if tensor is None else tensor for name, tensor in tensors.items()}


def _layers(path: str, stacked: nn.ModuleList) -> list[_Layer]:
    found = []
    for i, layer in enumerate(stacked):
        assert isinstance(layer, StackedLayer)
        tensors, spec, where = layer.tensors(), layer.spec, f"{path}.layers.{i}"
        norm = _norm_of(f"{where}.norm", layer.norm, tensors.norm_weight, tensors.norm_bias)
        dice = None
        if isinstance(layer.activation, StackedDice):
            dice = _norm_of(f"{where}.activation.norm", layer.activation.norm, None, None)
        found.append(
            _Layer(
                spec.units,
                spec.activation.name,
                _wide(tensors.weight),
                _optional(tensors.bias),
                norm,
                spec.norm == "batch",
                spec.norm_position == "after",
                _optional(tensors.slope),
                dice,
            )
        )
    return found


def _fold(layers: list[_Layer]) -> None:
    for i, layer in enumerate(layers):
        layer.fold_norm(layers[i + 1] if i + 1 < len(layers) else None)


def _gate_end(gate: Gate) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of the gates' last layer, with the norm of the logits in them."""
    tensors = gate.tensors()
    norm = _norm_of("gate.norm", gate.norm, tensors.norm_weight, tensors.norm_bias)
    if norm is None or tensors.weight is None:
        return tensors.weight, tensors.bias
    return fold_output(_wide(tensors.weight), _optional(tensors.bias), *norm.scale_and_shift())


def _expert_spec(spec: MLPSpec, layers: Sequence[_Layer]) -> MLPSpec:
    kept: tuple[Any, ...] = tuple(
        None if layer.norm is None else row.norm for row, layer in zip(spec.layers, layers, strict=True)
    )
    return replace(spec, norm=kept, bias=tuple(layer.bias is not None for layer in layers), dropout=0.0)


def _gate_spec(spec: GateSpec, bias: bool) -> GateSpec:
    def kept(layer: LayerSpec) -> Any:
        return None if layer.norm == "batch" else layer.norm

    return replace(spec, norm=tuple(map(kept, spec.layers)), dropout=0.0, bias=bias, logits_norm=None)


def _fill(layer: Any, parts: Sequence[_Layer]) -> None:
    """Write a layer of stacked MLPs out of those of several blocks."""
    assert isinstance(layer, StackedLayer)

    def join(tensors: Sequence[Tensor | None]) -> Tensor:
        return torch.cat([tensor for tensor in tensors if tensor is not None])

    layer.weight.copy_(join([part.weight for part in parts]))
    if layer.bias is not None:
        layer.bias.copy_(join([part.bias for part in parts]))
    _fill_norm(layer.norm, [part.norm for part in parts])
    if isinstance(layer.activation, (StackedDice, StackedRowDice)):
        layer.activation.alpha.copy_(join([part.slope for part in parts]))
    if isinstance(layer.activation, StackedDice):
        _fill_norm(layer.activation.norm, [part.dice for part in parts])
    elif isinstance(layer.activation, StackedPReLU):
        layer.activation.weight.copy_(join([part.slope for part in parts]))


def _fill_norm(norm: nn.Module | None, sources: Sequence[_Norm | None]) -> None:
    if norm is None:
        return
    assert isinstance(norm, (StackedBatchNorm, StackedLayerNorm))
    given = [source for source in sources if source is not None]
    norm.eps = given[0].eps
    for name, tensor in [*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)]:
        if name == "num_batches_tracked":
            tensor.zero_()
        else:
            tensor.copy_(torch.cat([source.tensors[name] for source in given]))

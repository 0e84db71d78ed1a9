"""Between stacked parameters and ordinary modules: which part of which tensor is whose, and the way back to modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..specs import Activation
from .activations import StackedDice
from .layers import ExpertBlock, Gate, LevelParts, StackedLayer
from .norms import StackedBatchNorm, StackedLayerNorm
from .plain import Dice, RowDice, Temperature, TopK, WeightOffset

T = TypeVar("T")
Index = int | slice | EllipsisType


@dataclass(frozen=True)
class Move(Generic[T]):
    """A part of an old tensor becomes a part of a new one; the two are parameters, or names of tensors.

    Of an ordinary layer and a stacked one the ordinary one is old: its tensors are named by role, as ``"norm.bias"``.
    Roles are ``"linear"``, ``"norm"``, ``"activation"``, ``"dice_norm"`` and ``"offset"``.
    """

    old: T
    old_place: Index
    new: T
    new_place: Index

    @property
    def back(self) -> Move[T]:
        """The way back."""
        return Move(self.new, self.new_place, self.old, self.old_place)


def tensor_named(module: nn.Module, name: str) -> Any:
    """A parameter or buffer."""
    owner, _, last = name.rpartition(".")
    return getattr(module.get_submodule(owner), last)


def layer_moves(layer: StackedLayer, row: int) -> Iterator[Move[str]]:
    """Every tensor of MLP ``row`` in a stacked layer, in the order of an ordinary stack."""
    units = layer.spec.units
    columns = slice(row * units, (row + 1) * units)
    yield Move("linear.weight", ..., "weight", row)
    if layer.bias is not None:
        yield Move("linear.bias", ..., "bias", row)
    if layer.norm is not None:
        yield from _norm_moves("norm", layer, "norm", row if isinstance(layer.norm, StackedLayerNorm) else columns)
    if isinstance(layer.activation, StackedDice):
        yield from _norm_moves("dice_norm", layer, "activation.norm", columns)
        yield Move("activation.alpha", ..., "activation.alpha", row)
    elif layer.activation is not None:
        yield from _norm_moves("activation", layer, "activation", slice(row, row + 1))


def gate_moves(gate: Gate, rows: slice) -> Iterator[Move[str]]:
    """Every tensor that ends the gate whose logits are ``rows``."""
    if gate.weight is not None:
        yield Move("linear.weight", ..., "weight", rows)
    if gate.bias is not None:
        yield Move("linear.bias", ..., "bias", rows)
    if gate.norm is not None:
        yield from _norm_moves("norm", gate, "norm", rows)


def offset_move(level: LevelParts, o: int) -> Move[str] | None:
    """The learned scalars of mixture ``o``, whose new name is from the gate on, or None."""
    marks = level.topology.mixture_offset
    assert marks is not None
    if level.gate.offset is None or not any(marks[o]):
        return None
    start = sum(map(sum, marks[:o]))
    return Move("offset.weight", ..., "offset", slice(start, start + sum(marks[o])))


def _norm_moves(role: str, layer: nn.Module, path: str, index: int | slice) -> Iterator[Move[str]]:
    norm = layer.get_submodule(path)
    for name, tensor in [*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)]:
        yield Move(f"{role}.{name}", ..., f"{path}.{name}", index if tensor.dim() else ...)


@torch.inference_mode(False)
def unpack(level: LevelParts) -> tuple[list[nn.Sequential], list[nn.Sequential | None]]:
    """Ordinary modules with copies of a level's weights and buffers; see ``ExtractionNetwork.unpack``."""
    _check_ours(level)
    if level.gate_spec.joint_k:
        raise ValueError(
            f"unpack: the gates choose {level.gate_spec.joint_k} experts together (joint_k), which modules of one "
            "gate each cannot"
        )
    experts = []
    for block in level.blocks:
        assert isinstance(block, ExpertBlock)
        for row in range(block.experts[1] - block.experts[0]):
            stack = nn.Sequential(*_mlp(block.layers, row))
            stack.training = block.training
            experts.append(stack)
    return experts, [_gate(level, o) for o in range(level.topology.num_mixtures)]


def _check_ours(level: LevelParts) -> None:
    for name, module in level.named_modules():
        if is_parametrized(module):
            raise ValueError(
                f"unpack: {name} is parametrised, and a stack of torch.nn modules cannot keep that; call "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) not in (
            StackedBatchNorm,
            nn.BatchNorm1d,
        ):
            raise TypeError(
                f"unpack: expected {name} to be a StackedBatchNorm, got {type(module).__name__}; put one in its place, "
                "and convert what unpack returns instead"
            )


def _mlp(layers: nn.ModuleList, row: int) -> list[nn.Module]:
    modules = []
    for layer in layers:
        assert isinstance(layer, StackedLayer)
        modules += _layer(layer, row)
    return modules


def _layer(layer: StackedLayer, row: int) -> list[nn.Module]:
    """``linear -> [norm] -> activation -> [norm] -> dropout``, and nothing for what the layer does not have."""
    spec, weight = layer.spec, layer.weight
    where: dict[str, Any] = {"device": "meta", "dtype": weight.dtype}
    parts: dict[str, nn.Module] = {
        "linear": nn.Linear(weight.shape[2], spec.units, bias=layer.bias is not None, **where)
    }
    if isinstance(layer.norm, StackedLayerNorm):
        parts["norm"] = nn.LayerNorm(spec.units, eps=layer.norm.eps, **where)
    elif layer.norm is not None:
        parts["norm"] = _batch_norm(layer.norm, spec.units, where)
    activation = _activation(layer, spec.activation, where)
    if activation is not None:
        parts["activation"] = activation
        if isinstance(activation, Dice):
            parts["dice_norm"] = activation.bn
    for role, source in (("linear", layer), ("norm", layer.norm), ("activation", layer.activation or layer)):
        if role in parts and source is not None:
            parts[role].training = source.training
    if isinstance(layer.activation, StackedDice):
        norm, dice_norm = layer.activation.norm, parts["dice_norm"]
        assert isinstance(dice_norm, nn.BatchNorm1d)
        dice_norm.training, dice_norm.track_running_stats = norm.training, norm.track_running_stats
    for move in layer_moves(layer, row):
        _set(parts, layer, move)
    order = ["linear", "norm", "activation"] if spec.norm_position == "before" else ["linear", "activation", "norm"]
    modules = [parts[role] for role in order if role in parts]
    if spec.dropout:
        modules.append(nn.Dropout(spec.dropout).train(layer.training))
    return modules


def _activation(layer: StackedLayer, activation: Activation, where: dict[str, Any]) -> nn.Module | None:
    name, value = activation
    simple: dict[str, type[nn.Module]] = {
        "relu": nn.ReLU,
        "gelu": nn.GELU,
        "silu": nn.SiLU,
        "tanh": nn.Tanh,
        "sigmoid": nn.Sigmoid,
    }
    if name in simple:
        return simple[name]()
    if name == "leaky_relu":
        return nn.LeakyReLU(value)
    if name == "gelu_tanh":
        return nn.GELU(approximate="tanh")
    if name == "prelu":
        return nn.PReLU(init=value, **where)
    if name == "dice":
        assert isinstance(layer.activation, StackedDice)
        norm = layer.activation.norm
        return Dice(layer.spec.units, eps=norm.eps, momentum=norm.momentum, **where)
    if name == "row_dice":
        return RowDice(eps=value, **where)
    # An identity is left out, except where only it tells that the norm stands after the activation.
    return nn.Identity() if layer.norm is not None and layer.spec.norm_position == "after" else None


def _batch_norm(norm: nn.Module, units: int, where: dict[str, Any]) -> nn.BatchNorm1d:
    assert isinstance(norm, nn.BatchNorm1d)
    plain = nn.BatchNorm1d(units, eps=norm.eps, momentum=norm.momentum, **where)
    plain.training, plain.track_running_stats = norm.training, norm.track_running_stats
    return plain


def _gate(level: LevelParts, o: int) -> nn.Sequential | None:
    """The gate of mixture ``o``, ending in its logits; with learned scalars, in its weights."""
    topology, gate = level.topology, level.gate
    modules: list[nn.Module] = []
    assert topology.mixture_offset is not None
    offset = offset_move(level, o)
    if o in topology.gated_mixtures:
        assert gate.weight is not None
        where: dict[str, Any] = {"device": "meta", "dtype": gate.weight.dtype}
        count, first = len(topology.mixture_experts[o]), topology.logit_offset[o]
        parts: dict[str, nn.Module] = {
            "linear": nn.Linear(gate.weight.shape[1], count, bias=gate.bias is not None, **where)
        }
        parts["linear"].training = gate.training
        if gate.norm is not None:
            parts["norm"] = _batch_norm(gate.norm, count, where)
        for move in gate_moves(gate, slice(first, first + count)):
            _set(parts, gate, move)
        modules = [*_mlp(gate.layers, topology.gated_mixtures.index(o)), *parts.values()]
        if level.gate_spec.temperature != 1.0:
            modules.append(Temperature(level.gate_spec.temperature).train(gate.training))
        if level.gate_spec.top_k is not None:
            modules.append(TopK(level.gate_spec.top_k).train(gate.training))
        if offset is not None:
            is_sigmoid = topology.mixture_kind is not None and topology.mixture_kind[o] == "sigmoid"
            modules.append((nn.Sigmoid() if is_sigmoid else nn.Softmax(dim=1)).train(gate.training))
    if offset is not None:
        assert gate.offset is not None
        last = WeightOffset(topology.mixture_offset[o], device="meta", dtype=gate.offset.dtype)
        _set({"offset": last}, gate, offset)
        modules.append(last.train(gate.training))
    if not modules:
        return None
    stack = nn.Sequential(*modules)
    stack.training = gate.training
    return stack


def _set(parts: dict[str, nn.Module], stacked: nn.Module, move: Move[str]) -> None:
    """Put a contiguous copy in the place of a parameter or buffer of one of the modules, which are by role."""
    role, _, name = move.old.partition(".")
    whole = tensor_named(stacked, move.new)
    copy = whole.detach()[move.new_place].clone(memory_format=torch.contiguous_format)
    is_buffer = name in parts[role]._buffers
    setattr(parts[role], name, copy if is_buffer else nn.Parameter(copy, requires_grad=whole.requires_grad))

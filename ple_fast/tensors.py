"""The differentiable tensors of a level: by name, as one flat tuple, and the shapes that they must have.

The flat tuple has five entries per layer of every block, then five per hidden layer of the gates, then the five of the
gates' end. An absent tensor is None and keeps its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from .plan import LevelPlan


class LayerTensors(NamedTuple):
    """Differentiable tensors of one layer of ``n`` stacked MLPs."""

    weight: Tensor
    """``(n, H_out, H_in)``."""
    bias: Tensor | None
    """``(n, H_out)``."""
    norm_weight: Tensor | None
    """``(n * H_out,)`` for batch norm, ``(n, H_out)`` for layer norm."""
    norm_bias: Tensor | None
    slope: Tensor | None
    """prelu and row_dice: ``(n,)``; dice: ``(n, H_out)``."""


class GateTensors(NamedTuple):
    """Differentiable tensors that end the gates of a level."""

    weight: Tensor | None
    """``(G, K)``; None where every mixture is static."""
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    offset: Tensor | None
    """One learned scalar per marked weight, in the order of the mixtures."""


WIDTH = len(LayerTensors._fields)


def flatten(layers: Sequence[LayerTensors], gate: GateTensors) -> tuple[Tensor | None, ...]:
    """The flat tuple of a level's differentiable tensors."""
    flat: list[Tensor | None] = []
    for row in layers:
        flat.extend(row)  # += is not traced by torch 2.11
    return *flat, *gate


def unflatten(flat: Sequence[Tensor | None]) -> tuple[list[LayerTensors], GateTensors]:
    """Layers and gate ends of what ``flatten`` made."""
    rows = [flat[i : i + WIDTH] for i in range(0, len(flat), WIDTH)]
    return [LayerTensors(*row) for row in rows[:-1]], GateTensors(*rows[-1])  # type: ignore[arg-type]  # None only where allowed


class RowShapes(NamedTuple):
    """The shapes of the tensors of a layer, or of those that end the gates; None where there is none."""

    weight: tuple[int, ...]
    bias: tuple[int, ...]
    norm: tuple[int, ...] | None
    last: tuple[int, ...] | None
    """Of the slope, or the offset."""


@lru_cache(maxsize=1024)
def shapes_of(plan: LevelPlan, in_features: int, gate_features: int) -> tuple[RowShapes, ...]:
    """The shapes of what ``flatten`` takes, row by row."""
    rows = []
    width = gate_features
    for mlp in plan.mlps():
        width, count = gate_features if mlp is plan.gate else in_features, len(mlp.slots)
        for spec in mlp.layers:
            units = (count, spec.units)
            norm = (count * spec.units,) if spec.norm == "batch" else units if spec.norm else None
            slope = {"prelu": (count,), "row_dice": (count,), "dice": units}.get(spec.activation.name)
            rows.append(RowShapes((*units, width), units, norm, slope))
            width = spec.units
    logits = (plan.topology.num_logits,)
    return (*rows, RowShapes((*logits, width), logits, logits, (len(plan.offset_entry),)))


def check_shapes(
    plan: LevelPlan, layers: Sequence[LayerTensors], gate: GateTensors, in_features: int, gate_features: int
) -> None:
    """Looks at the shapes of all tensors of a level: what reads them by their sizes alone would not.

    Raises:
        ValueError: somebody put a tensor of another shape in the place of one.
    """
    expected = shapes_of(plan, in_features, gate_features)
    # Written out, because a small batch waits for this.
    for (weight, bias, norm_weight, norm_bias, last), shapes in zip((*layers, gate), expected, strict=True):
        if (
            (weight is not None and weight.shape != shapes[0])
            or (bias is not None and bias.shape != shapes[1])
            or (norm_weight is not None and norm_weight.shape != shapes[2])
            or (norm_bias is not None and norm_bias.shape != shapes[2])
            or (last is not None and last.shape != shapes[3])
        ):
            _refuse_shapes(plan, layers, gate, expected)


def _refuse_shapes(
    plan: LevelPlan, layers: Sequence[LayerTensors], gate: GateTensors, expected: Sequence[RowShapes]
) -> None:
    """Finds the tensor again, and its name."""
    rows = zip((*layers, gate), expected, strict=True)
    for number, (row, (weight, bias, norm, last)) in enumerate(rows):
        for place, (tensor, shape) in enumerate(zip(row, (weight, bias, norm, norm, last), strict=True)):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"{_name(plan, number, place)}: size mismatch, expected shape {shape}, which the level was built "
                    f"with, got {tuple(tensor.shape)}"
                )


def _name(plan: LevelPlan, number: int, place: int) -> str:
    """The name of an entry of ``flatten`` in the level's state dict."""
    rows = [f"blocks.{block}.layers.{i}" for block, mlp in enumerate(plan.blocks) for i in range(len(mlp.layers))]
    rows += [*(f"gate.layers.{i}" for i in range(len(plan.gate.layers))), "gate"]
    last = "offset" if number == len(rows) - 1 else "activation"
    return f"{rows[number]}.{('weight', 'bias', 'norm.weight', 'norm.bias', last)[place]}"

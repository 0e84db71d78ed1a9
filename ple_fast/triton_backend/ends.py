"""Norms and dropout of a layer in kernels: what its product's launch does of them, what follows, and backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ple_fast_kernels import (
    NO_END,
    Dropout,
    LayerEnd,
    Norm,
    Tile,
    batch_norm_merge,
    batch_norm_sums,
    has_whole_rows,
    layer_end_fwd,
    layer_end_grad,
    layer_norm_grad,
    norm_sums_merge,
)

from ..grads import RowGrads, plus
from ..specs import LayerSpec
from ..state import LayerState, NormState
from ..tensors import GateTensors, LayerTensors
from .inputs import IDENTITY, dense


class NormOf(NamedTuple):
    """A norm at one call with its parameters; ``members`` of ``units`` each."""

    state: NormState
    weight: Tensor | None
    bias: Tensor | None
    after: bool
    members: int
    units: int


class Ended(NamedTuple):
    """A layer that is done, or all but its end."""

    y: Tensor
    z: Tensor | None
    """The product, which backward reads."""
    mean: Tensor | None
    spread: Tensor | None
    end: LayerEnd
    """What is left to be done to ``y``."""


def norm_of(spec: LayerSpec, tensor: LayerTensors, state: LayerState) -> NormOf | None:
    """The norm of a layer."""
    if state.norm is None:
        return None
    members, units, _ = tensor.weight.shape
    return NormOf(state.norm, tensor.norm_weight, tensor.norm_bias, spec.norm_position == "after", members, units)


def logits_norm_of(gate: GateTensors, state: NormState | None) -> NormOf | None:
    """The norm of the logits: one member of G units."""
    if state is None:
        return None
    assert gate.weight is not None
    return NormOf(state, gate.norm_weight, gate.norm_bias, False, 1, gate.weight.shape[0])


def dropout_of(state: LayerState, seed: int | Tensor | None, position: int) -> Dropout | None:
    """What the kernels read of the dropout of the level's layer ``position``."""
    if not state.dropout:
        return None
    assert isinstance(seed, Tensor), "seeds of this backend are tensors"
    return Dropout(seed, position, state.dropout)


def folded(norm: NormOf | None) -> Norm | None:
    """Batch norm by running statistics, which any kernel does beside a product; None stays None."""
    return None if norm is None else _folded(norm)


def _folded(norm: NormOf) -> Norm:
    state = norm.state
    assert state.kind == "batch" and not state.batch
    running = (dense(state.running_mean), dense(state.running_var))
    return Norm("batch", *running, dense(norm.weight), dense(norm.bias), state.eps, norm.after)


def in_product(norm: NormOf, rows: int, tile: Tile, wide: torch.dtype, device: torch.device, *, keeps: bool) -> Norm:
    """What the product's launch does: all of it, or only the moments of its tiles. ``keeps``: a backward follows."""
    state, members, units = norm.state, norm.members, norm.units
    if state.kind == "batch" and not state.batch:
        return _folded(norm)
    first: Tensor | None = None
    second: Tensor | None = None
    if state.kind == "layer" and has_whole_rows(tile, units):
        kind = "row"
        if keeps:
            first, second = torch.empty((2, rows, members), dtype=wide, device=device).unbind(0)
    elif state.kind == "layer":
        kind = "row_moments"
        first = torch.empty((rows, members, -(-units // tile.columns), 2), dtype=wide, device=device)
    else:
        kind = "moments"
        first = torch.empty((-(-rows // tile.rows), 2, members * units), dtype=wide, device=device)
    return Norm(kind, first, second, dense(norm.weight), dense(norm.bias), state.eps, norm.after)


def merged(moments: Tensor, norm: NormState, rows: int, tile: Tile) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation of the batch; running statistics move where the norm says so."""
    running = (norm.running_mean, norm.running_var)
    own = tuple(dense(t) for t in running)
    found = batch_norm_merge(
        moments, rows, tile.rows, norm.eps, running_mean=own[0], running_var=own[1], factor=norm.factor
    )
    for buffer, moved in zip(running, own, strict=True):
        if buffer is not moved and buffer is not None and moved is not None and norm.factor > 0.0:
            buffer.copy_(moved)
    return found


def after_product(
    y: Tensor,
    z: Tensor | None,
    met: Norm,
    norm: NormOf,
    end: LayerEnd,
    tile: Tile,
    out: Tensor | None,
    *,
    defers: bool,
) -> Ended:
    """What is left of a layer after its product's launch, which returned ``y`` and ``z``; ``end``: without the norm."""
    if met.kind in ("batch", "row"):
        return Ended(y, z, met.first, met.second, NO_END)
    assert met.first is not None
    end = end._replace(weight=met.weight, bias=met.bias, eps=met.eps, after=met.after)
    if met.kind == "moments":
        mean, rstd = merged(met.first, norm.state, y.shape[0], tile)
        end = end._replace(mean=mean, spread=rstd)
        if defers:
            return Ended(y, y, mean, rstd, end)
        done, end = layer_end_fwd(y, end, out=out)
    else:
        done, end = layer_end_fwd(y, end, moments=met.first, part_units=tile.columns, out=out)
    return Ended(done, y, end.mean, end.spread, NO_END)


def end_of(
    norm: NormOf | None,
    activation: tuple[str, float],
    dropout: Dropout | None,
    mean: Tensor | None,
    spread: Tensor | None,
) -> LayerEnd:
    """What a layer ends in, for backward."""
    if norm is None:
        return LayerEnd(activation, dropout)
    uses_running = norm.state.kind == "batch" and not norm.state.batch
    return LayerEnd(
        activation, dropout, dense(norm.weight), dense(norm.bias), dense(mean), dense(spread), uses_running,
        norm.state.eps, norm.after,
    )  # fmt: skip


def end_backward(
    d: Tensor, read: Tensor | None, norm: NormOf | None, end: LayerEnd, own: RowGrads, *, affine: bool
) -> Tensor:
    """Gradient of a layer's product, of ``d``, that of its output.

    ``read``: the product; without a norm what the activation's derivative reads. ``affine``: also the gradients of the
    norm's weight and bias, into ``own``.
    """
    if norm is None:
        is_nothing = end.activation[0] == IDENTITY[0] and end.dropout is None
        return d.contiguous() if is_nothing else layer_end_grad(d, read, end)
    assert read is not None
    if norm.state.kind == "layer":
        d, dweight, dbias = layer_norm_grad(d, read, end, affine_grad=affine)
        own.norm_weight = plus(own.norm_weight, dweight)
        own.norm_bias = plus(own.norm_bias, dbias)
        return d
    parts = batch_norm_sums(d, read, end) if affine or norm.state.batch else None
    return from_sums(d, read, parts, norm, end, own, affine=affine)


def at_norm(end: LayerEnd) -> LayerEnd:
    """``end`` as seen by the gradient of the norm's output: what comes after the norm has been undone."""
    return end._replace(dropout=None, activation=end.activation if end.after else IDENTITY)


def from_sums(
    d: Tensor,
    z: Tensor,
    parts: Tensor | None,
    norm: NormOf,
    end: LayerEnd,
    own: RowGrads,
    *,
    affine: bool,
) -> Tensor:
    """``end_backward`` of batch norm, with the sums of ``batch_norm_sums``; None: nobody wants them."""
    means = None
    if parts is not None and (affine or norm.state.batch):
        like = end.weight if affine else None
        dweight, dbias, means = norm_sums_merge(parts, z.shape[0], like, means=norm.state.batch)
        own.norm_weight = plus(own.norm_weight, dweight)
        own.norm_bias = plus(own.norm_bias, dbias)
    return layer_end_grad(d, z, end, means)

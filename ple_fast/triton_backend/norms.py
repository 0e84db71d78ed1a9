"""Norms and dropout of a layer in kernels: what its product's launch does of them, what follows, and backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ple_fast_kernels import (
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

from ..plan import GateTensors, LayerState, LayerTensors, NormState
from ..specs import LayerSpec
from ..torch_backend.mlp import LayerKept, accumulate
from .run import IDENTITY, dense


class NormOf(NamedTuple):
    """A norm at one call with its parameters; ``members`` of ``units`` each."""

    state: NormState
    weight: Tensor | None
    bias: Tensor | None
    after: bool
    members: int
    units: int


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
    activation: tuple[str, float],
    dropout: Dropout | None,
    tile: Tile,
    out: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The layer's output, and for backward the product, mean and spread; ``y``, ``z``: what the launch returned."""
    if met.kind in ("batch", "row"):
        return y, z, met.first, met.second
    assert met.first is not None
    end = LayerEnd(activation, dropout, met.weight, met.bias, eps=met.eps, after=met.after)
    if met.kind == "moments":
        mean, rstd = merged(met.first, norm.state, y.shape[0], tile)
        done, end = layer_end_fwd(y, end._replace(mean=mean, spread=rstd), out=out)
    else:
        done, end = layer_end_fwd(y, end, moments=met.first, part_units=tile.columns, out=out)
    return done, y, end.mean, end.spread


def norm_backward(
    d: Tensor,
    z: Tensor,
    norm: NormOf,
    mean: Tensor | None,
    spread: Tensor | None,
    activation: tuple[str, float],
    dropout: Dropout | None,
    own: list[Tensor | None],
    *,
    affine: bool,
) -> Tensor:
    """Gradient of the product ``z`` of a layer with a norm, of ``d``, that of its output.

    ``affine``: those of the norm's weight and bias too, into ``own``.
    """
    state = norm.state
    uses_running = state.kind == "batch" and not state.batch
    end = LayerEnd(
        activation, dropout, dense(norm.weight), dense(norm.bias), dense(mean), dense(spread), uses_running, state.eps,
        norm.after,
    )  # fmt: skip
    if state.kind == "layer":
        d, dweight, dbias = layer_norm_grad(d, z, end, affine_grad=affine)
    else:
        dweight = dbias = means = None
        if affine or state.batch:
            like = end.weight if affine else None
            dweight, dbias, means = norm_sums_merge(batch_norm_sums(d, z, end), z.shape[0], like, means=state.batch)
        d = layer_end_grad(d, z, end, means)
    accumulate(own, 2, dweight)
    accumulate(own, 3, dbias)
    return d


def end_backward(
    d: Tensor,
    spec: LayerSpec,
    norm: NormOf | None,
    keep: LayerKept,
    dropout: Dropout | None,
    own: list[Tensor | None],
    *,
    affine: bool,
) -> Tensor:
    """Gradient of a layer's product, of ``d``, that of its output."""
    activation = (spec.activation[0], spec.activation[1])
    if norm is not None:
        assert keep.normed is not None
        return norm_backward(
            d, keep.normed, norm, keep.mean, keep.var, activation, dropout, own, affine=affine
        )  # fmt: skip
    if activation[0] == IDENTITY[0] and dropout is None:
        return d.contiguous()
    return layer_end_grad(d, keep.act, LayerEnd(activation, dropout))

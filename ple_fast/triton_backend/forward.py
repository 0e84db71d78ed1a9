"""A level forward: a launch per layer and one that mixes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ple_fast_kernels import (
    NO_END,
    NO_GATES,
    Dropout,
    LayerEnd,
    Norm,
    Tile,
    gate_combine_fwd,
    grouped_linear_fwd,
    keep_joint,
    keep_top_k,
    layer_end_fwd,
    linear_tile,
    wide_of,
)

from ..call import LevelInput, Wants
from ..plan import MLPPlan
from ..saved import in_kernels
from ..state import LevelState
from ..tensors import LayerTensors
from ..torch_backend.mix import index_of
from .ends import NormOf, after_product, dropout_of, in_product, logits_norm_of, merged, norm_of
from .inputs import IDENTITY, Run, Source, columns_of, dense, offset_columns


class _Product(NamedTuple):
    """Logits as their product left them, and what it did of their norm."""

    logits: Tensor
    met: Norm | None
    tile: Tile


class _Asked(NamedTuple):
    """What the launch of a layer's product does besides it."""

    tensor: LayerTensors
    columns: tuple[int, ...]
    """Of ``a``, that each member reads."""
    activation: tuple[str, float] = IDENTITY
    dropout: Dropout | None = None
    norm: Norm | None = None
    keep_input: bool = False
    """Of the activation, or of the norm."""


class ForwardRun(Run):
    """The forward of one call."""

    def __init__(self, inputs: LevelInput, wants: Wants, *, again: bool = False) -> None:
        super().__init__(inputs, wants)
        self.state: LevelState = inputs.state.still() if again else inputs.state
        """As this pass reads it: one that is repeated moves no statistics."""
        self.end: LayerEnd = NO_END
        """Of the experts' last layer, where the mixtures do it."""
        self.kept: list[Tensor | None] = [None] * len(self.saved.values)

    def keep(self, number: int, tensor: Tensor | None) -> None:
        if number >= 0:
            self.kept[number] = tensor

    def _product(
        self, a: Tensor, asked: _Asked | None, tile: Tile | None, out: Tensor | None = None, *, with_gates: bool
    ) -> tuple[Tensor | None, Tensor | None, _Product | None]:
        """A layer's product and what its launch does besides; with nothing asked the logits alone."""
        if tile is None:
            members, units = (0, 0) if asked is None else asked.tensor.weight.shape[:2]
            tile = linear_tile(a, members, units, self.precision, activation=IDENTITY[0])
        gate = self.inputs.gate if with_gates else None
        logits_norm = None if gate is None else self._norm_beside(a, tile)
        tensor, norm = (None, None) if asked is None else (asked.tensor, asked.norm)
        y, z, logits = grouped_linear_fwd(
            a,
            None if tensor is None else tensor.weight.contiguous(),
            None if tensor is None else dense(tensor.bias),
            () if asked is None else asked.columns,
            activation=IDENTITY if asked is None else asked.activation,
            keep_input=asked is not None and asked.keep_input,
            out=out,
            norm=norm,
            dropout=None if asked is None else asked.dropout,
            gate_weight=None if gate is None else dense(gate.weight),
            gate_bias=None if gate is None else dense(gate.bias),
            gates=NO_GATES if gate is None else self.runs,
            logits_norm=logits_norm,
            precision=self.precision,
            tile=None if norm is None and logits_norm is None else tile,  # what they write into was cut for it
        )
        return y, z, None if logits is None else _Product(logits, logits_norm, tile)

    def logits_norm(self) -> NormOf | None:
        return logits_norm_of(self.inputs.gate, self.state.gate_norm)

    def _norm_beside(self, a: Tensor, tile: Tile) -> Norm | None:
        """What the launch that computes the logits does of their norm."""
        norm = self.logits_norm()
        if norm is None or (self.wants.logits and not norm.state.batch):
            return None  # backward reads the logits as they were
        return in_product(norm, a.shape[0], tile, wide_of(a.dtype), a.device, keeps=False)

    def mlp_forward(
        self, mlp: MLPPlan, source: Source, out: Tensor | None, *, with_gates: bool, layers: int | None = None
    ) -> tuple[Tensor, _Product | None]:
        """The first ``layers`` of stacked MLPs (default all), into ``out`` if given: output, logits."""
        count = len(mlp.layers) if layers is None else layers
        a, columns = source.tensor, columns_of(mlp.slots, source.columns)
        logits: _Product | None = None
        for i in range(count):
            number = mlp.position + i
            spec, state, tensor = mlp.layers[i], self.state.layers[number], self.inputs.layers[number]
            own_out = out if i == len(mlp.layers) - 1 else None
            with_gate = with_gates and i == 0
            if in_kernels(spec, state):
                y, found = self._layer_forward(mlp, i, a, columns, own_out, with_gates=with_gate)
            else:
                product, _, found = self._product(a, _Asked(tensor, columns), None, with_gates=with_gate)
                assert product is not None
                inputs = self.inputs._replace(state=self.state)
                y = self.in_operators(mlp, i).after_product(inputs, self.all_rows(self.kept), product).contiguous()
                self.keep(self.saved.layers[number].h, y)
            logits = found if logits is None else logits
            a, columns = y, tuple(range(len(mlp.slots)))
        if out is not None and count == len(mlp.layers) and a is not out:
            out.copy_(a)
            a = out
        return a, logits

    def _layer_forward(
        self, mlp: MLPPlan, i: int, a: Tensor, columns: tuple[int, ...], out: Tensor | None, *, with_gates: bool
    ) -> tuple[Tensor, _Product | None]:
        """Layer ``i`` in kernels: output, logits."""
        number = mlp.position + i
        spec, tensor, state = mlp.layers[i], self.inputs.layers[number], self.state.layers[number]
        want, at = self.wants.layers[number], self.saved.layers[number]
        activation = (spec.activation[0], spec.activation[1])
        dropout = dropout_of(state, self.inputs.state.seed, number)
        norm = norm_of(spec, tensor, state)
        members, units, _ = tensor.weight.shape
        tile = linear_tile(
            a, members, units, self.precision, activation=activation[0], has_norm=norm is not None,
            has_dropout=dropout is not None, by_row=norm is not None and norm.state.kind == "layer",
        )  # fmt: skip
        asked = _Asked(tensor, columns, activation, dropout)
        if norm is None:
            keeps_input = at.act >= 0 and at.act != at.h
            asked = asked._replace(keep_input=keeps_input)
            y, z, found = self._product(a, asked, tile, out, with_gates=with_gates)
            assert y is not None
            if keeps_input:
                self.keep(at.act, z)
        else:
            met = in_product(norm, a.shape[0], tile, wide_of(a.dtype), a.device, keeps=want.output)
            asked = asked._replace(norm=met, keep_input=want.output)
            y, z, found = self._product(a, asked, tile, out, with_gates=with_gates)
            assert y is not None
            defers = i == len(mlp.layers) - 1 and self.defers_end(mlp)
            done = after_product(y, z, met, norm, LayerEnd(activation, dropout), tile, out, defers=defers)
            if defers:
                self.end = done.end
            y = done.y
            self.keep(at.z, done.z)
            self.keep(at.mean, done.mean)
            self.keep(at.rstd, done.spread)
        self.keep(at.h, y)  # of several blocks of experts a part: ``experts_forward`` keeps all of them
        return y, found

    def experts_forward(self) -> tuple[Tensor, _Product | None]:
        """Outputs of all experts ``(B, E, H)``, and the logits if they were computed beside."""
        plan, blocks = self.plan, self.plan.blocks
        h: Tensor | None = None
        logits: _Product | None = None
        if len(blocks) > 1:
            like, units = self.inputs.layers[0].weight, blocks[0].layers[-1].units
            shape = (self.inputs.x.batch, plan.topology.num_experts, units)
            h = torch.empty(shape, dtype=like.dtype, device=like.device)
        for j, block in enumerate(blocks):
            out = None if h is None else h[:, self.block_rows(block)]
            done, found = self.mlp_forward(block, self.x, out, with_gates=self.gates_beside_experts and j == 0)
            logits = found if j == 0 else logits
            if len(blocks) == 1:
                h = done
        assert h is not None
        if len(blocks) > 1:
            self.keep(self.saved.layers[blocks[-1].position + len(blocks[-1].layers) - 1].h, h)
        return h, logits

    def logits_forward(self, found: _Product | None) -> Tensor | None:
        """Logits ``(B, G)`` in float32 (float64), computed here unless ``found`` beside the experts; normed."""
        plan, gate, at = self.plan, self.inputs.gate, self.saved.mix
        if gate.weight is None:
            return None
        if found is None:
            a = self.gate_x.tensor
            if plan.gate.layers:
                a, _ = self.mlp_forward(plan.gate, self.gate_x, None, with_gates=False)
            _, _, found = self._product(a, None, None, with_gates=True)
        assert found is not None
        norm, logits = self.logits_norm(), found.logits
        if norm is None or (found.met is not None and found.met.kind == "batch"):
            return logits
        state = norm.state
        end = LayerEnd(
            weight=dense(norm.weight), bias=dense(norm.bias), mean=dense(state.running_mean),
            spread=dense(state.running_var), is_variance=True, eps=state.eps,
        )  # fmt: skip
        if found.met is not None:
            assert found.met.first is not None
            mean, rstd = merged(found.met.first, state, logits.shape[0], found.tile)
            end = end._replace(mean=mean, spread=rstd, is_variance=False)
        normed, _ = layer_end_fwd(logits.unsqueeze(1), end)
        self.keep(at.z, logits)
        self.keep(at.mean, end.mean)
        self.keep(at.rstd, end.spread)
        return normed.squeeze(1)

    def _chosen(self, logits: Tensor) -> Tensor:
        """Minus infinity in the place of what gates do not choose."""
        plan, spec = self.plan, self.plan.gate_spec
        if plan.joint:
            return keep_joint(logits, self.mixtures, plan.top_k, spec.joint_k, plan.joint, temperature=spec.temperature)
        return keep_top_k(logits, self.mixtures, plan.top_k)

    def forward(self, weights_wanted: bool) -> tuple[Tensor, Tensor | None]:
        """``y (B, O, H)`` and, if they are wanted, the softmax weights ``(B, W)``."""
        h, found = self.experts_forward()
        if self.plan.passes:
            wide = wide_of(h.dtype)
            return h, h.new_ones((h.shape[0], h.shape[1]), dtype=wide) if weights_wanted else None
        logits = self.logits_forward(found)
        if logits is not None and self.plan.top_k:
            logits = self._chosen(logits)
        return gate_combine_fwd(
            h,
            logits,
            self.mixtures,
            end=self.end,
            offset=self.offset,
            temperature=self.plan.gate_spec.temperature,
            keep_weights=weights_wanted,
        )

    def listed(self, p: Tensor) -> Tensor:
        """The weights as users see them: with the learned scalars."""
        if self.offset is None:
            return p
        index = index_of(offset_columns(self.plan), p.device)
        return p.index_add(1, index, self.offset.to(p.dtype).expand(p.shape[0], -1))

"""A level forward: a launch per layer and one that mixes, or a fused launch."""

from __future__ import annotations

from collections.abc import Sequence
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
    fused_level_fwd,
    fused_two_layers_fwd,
    gate_combine_fwd,
    grouped_linear_fwd,
    layer_end_fwd,
    linear_tile,
    wide_of,
)

from ..plan import LayerState, LayerTensors, LevelState, MLPPlan
from ..torch_backend.activations import from_output
from ..torch_backend.barriers import run_steps
from ..torch_backend.gate_combine import index_of
from ..torch_backend.level import BlockKept, layers_of, still
from ..torch_backend.mlp import NOTHING_KEPT, LayerKept, LayerNeeds, after_linear
from .fusion import Fusion, choose_fusion
from .norms import NormOf, after_product, dropout_of, folded, in_product, logits_norm_of, merged, norm_of
from .run import IDENTITY, Run, dense, in_kernels
from .wiring import Source, columns_of, offset_columns


class _Product(NamedTuple):
    """Logits as their product left them, and what it did of their norm."""

    logits: Tensor
    met: Norm | None
    tile: Tile


class _Logits(NamedTuple):
    """Gates' logits on the way, and what backward needs of them."""

    value: Tensor | None
    hidden: Tensor | None = None
    raw: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    kept: Sequence[LayerKept] = ()


class ForwardRun(Run):
    """The forward of one call."""

    state: LevelState
    """As this pass reads it: one that is repeated moves no statistics."""
    end: LayerEnd = NO_END
    """Of the experts' last layer, where the mixtures do it."""

    def _product(
        self,
        a: Tensor,
        tensor: LayerTensors | None,
        columns: tuple[int, ...],
        activation: tuple[str, float] = IDENTITY,
        dropout: Dropout | None = None,
        norm: Norm | None = None,
        tile: Tile | None = None,
        out: Tensor | None = None,
        *,
        keep_input: bool = False,
        with_gates: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, _Product | None]:
        """A layer's product and what its launch does besides; without ``tensor`` the logits alone."""
        members, units = (0, 0) if tensor is None else tensor.weight.shape[:2]
        tile = linear_tile(a, members, units, self.precision, activation=activation[0]) if tile is None else tile
        gate = self.inputs.gate if with_gates else None
        logits_norm = None if gate is None else self._norm_beside(a, tile)
        y, z, logits = grouped_linear_fwd(
            a,
            None if tensor is None else tensor.weight.contiguous(),
            None if tensor is None else dense(tensor.bias),
            columns,
            activation=activation,
            keep_input=keep_input,
            out=out,
            norm=norm,
            dropout=dropout,
            gate_weight=None if gate is None else dense(gate.weight),
            gate_bias=None if gate is None else dense(gate.bias),
            gates=NO_GATES if gate is None else self.runs,
            logits_norm=logits_norm,
            precision=self.precision,
            tile=None if norm is None and logits_norm is None else tile,  # what they write into was cut for it
        )
        return y, z, None if logits is None else _Product(logits, logits_norm, tile)

    def _logits_norm(self) -> NormOf | None:
        return logits_norm_of(self.inputs.gate, self.state.gate_norm)

    def _norm_beside(self, a: Tensor, tile: Tile) -> Norm | None:
        """What the launch that computes the logits does of their norm."""
        norm = self._logits_norm()
        if norm is None or (self.needs.logits and not norm.state.batch):
            return None  # backward reads the logits as they were
        return in_product(norm, a.shape[0], tile, wide_of(a.dtype), a.device, keeps=False)

    def mlp_forward(
        self,
        mlp: MLPPlan,
        source: Source,
        needs: Sequence[LayerNeeds],
        out: Tensor | None,
        *,
        with_gates: bool,
        layers: int | None = None,
    ) -> tuple[Tensor, list[LayerKept], _Product | None]:
        """The first ``layers`` of stacked MLPs (default all), into ``out`` if given: output, kept, logits."""
        part = layers_of(self.inputs, mlp)
        tensors, states = self.inputs.layers[part], self.state.layers[part]
        count = len(mlp.layers) if layers is None else layers
        a, columns = source.tensor, columns_of(mlp.slots, source.columns)
        logits: _Product | None = None
        kept: list[LayerKept] = []
        for i in range(count):
            spec, tensor, state, need = mlp.layers[i], tensors[i], states[i], needs[i]
            own_out = out if i == len(mlp.layers) - 1 else None
            with_gate = with_gates and i == 0
            if in_kernels(spec, state):
                y, keep, found = self._layer_forward(mlp, i, a, columns, state, need, own_out, with_gates=with_gate)
            else:
                product, _, found = self._product(a, tensor, columns, with_gates=with_gate)
                assert product is not None
                y, keep = run_steps(
                    after_linear(product, spec, tensor, state, need, self.inputs.state.seed, mlp.position + i, 0)
                )
                y = y.contiguous()
            logits = found if logits is None else logits
            if need.output and need.tensors.weight and i > 0:
                keep = keep._replace(a=a)
            kept.append(keep)
            a, columns = y, tuple(range(len(mlp.slots)))
        if out is not None and count == len(mlp.layers) and a is not out:
            out.copy_(a)
            a = out
        return a, kept, logits

    def _layer_forward(
        self,
        mlp: MLPPlan,
        i: int,
        a: Tensor,
        columns: tuple[int, ...],
        state: LayerState,
        need: LayerNeeds,
        out: Tensor | None,
        *,
        with_gates: bool,
    ) -> tuple[Tensor, LayerKept, _Product | None]:
        """Layer ``i`` in kernels: output, kept, logits."""
        spec, tensor = mlp.layers[i], self.inputs.layers[mlp.position + i]
        activation = (spec.activation[0], spec.activation[1])
        dropout = dropout_of(state, self.inputs.state.seed, mlp.position + i)
        norm = norm_of(spec, tensor, state)
        by_output = from_output(spec.activation)
        members, units, _ = tensor.weight.shape
        tile = linear_tile(
            a, members, units, self.precision, activation=activation[0], has_norm=norm is not None,
            has_dropout=dropout is not None, by_row=norm is not None and norm.state.kind == "layer",
        )  # fmt: skip
        if norm is None:
            y, z, found = self._product(
                a, tensor, columns, activation, dropout, None, tile, out, keep_input=need.output and not by_output,
                with_gates=with_gates,
            )  # fmt: skip
            assert y is not None
            keep = NOTHING_KEPT
            if need.output and spec.activation.name != "identity":
                keep = keep._replace(act=y if by_output else z)
            return y, keep, found
        met = in_product(norm, a.shape[0], tile, wide_of(a.dtype), a.device, keeps=need.output)
        y, z, found = self._product(
            a, tensor, columns, activation, dropout, met, tile, out, keep_input=need.output, with_gates=with_gates
        )
        assert y is not None
        defers = i == len(mlp.layers) - 1 and self.defers_end(mlp)
        done = after_product(y, z, met, norm, activation, dropout, tile, out, defers=defers)
        if defers:
            self.end = done.end
        keep = NOTHING_KEPT._replace(normed=done.z, mean=done.mean, var=done.spread) if need.output else NOTHING_KEPT
        return done.y, keep, found

    def experts_forward(self) -> tuple[Tensor, list[list[LayerKept]], _Product | None]:
        """Outputs of all experts ``(B, E, H)``, what is kept per block, the logits if they were computed beside."""
        plan, blocks = self.plan, self.plan.blocks
        h: Tensor | None = None
        logits: _Product | None = None
        if len(blocks) > 1:
            like, units = self.inputs.layers[0].weight, blocks[0].layers[-1].units
            shape = (self.inputs.x.batch, plan.topology.num_experts, units)
            h = torch.empty(shape, dtype=like.dtype, device=like.device)
        kept = []
        for j, block in enumerate(blocks):
            done, keep, found = self.mlp_forward(
                block,
                self.x,
                self.needs.mlps[j],
                None if h is None else h[:, self.block_rows(block)],
                with_gates=self.gates_beside_experts and j == 0,
            )
            kept.append(keep)
            logits = found if j == 0 else logits
            if len(blocks) == 1:
                h = done
        assert h is not None
        return h, kept, logits

    def logits_forward(self, found: _Product | None) -> _Logits:
        """Logits ``(B, G)`` in float32 (float64), computed here unless ``found`` beside the experts; normed."""
        plan, gate = self.plan, self.inputs.gate
        if gate.weight is None:
            return _Logits(None)
        hidden: Tensor | None = None
        kept: list[LayerKept] = []
        if found is None:
            a = self.gate_x.tensor
            if plan.gate.layers:
                hidden, kept, _ = self.mlp_forward(
                    plan.gate, self.gate_x, self.needs.mlps[-1], None, with_gates=False
                )  # fmt: skip
                a = hidden
            _, _, found = self._product(a, None, (), with_gates=True)
        assert found is not None
        norm, logits = self._logits_norm(), found.logits
        if norm is None or (found.met is not None and found.met.kind == "batch"):
            return _Logits(logits, hidden, kept=kept)
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
        return _Logits(normed.squeeze(1), hidden, logits, end.mean, end.spread, kept)

    def forward(self, *, keeps: bool, listed: bool, again: bool = False) -> tuple[Tensor, Tensor | None, BlockKept]:
        """``y (B, O, H)``, the softmax weights ``(B, W)`` if anybody reads them, what backward needs."""
        inputs, needs, plan = self.inputs, self.needs, self.plan
        self.state = still(inputs.state) if again else inputs.state
        weights_wanted = listed or needs.experts or needs.logits
        fusion = choose_fusion(inputs, self.x, self.gates_beside_experts, keeps=keeps)
        if fusion is not None:
            return self.fused_forward(fusion, weights_wanted)
        h, mlps, found = self.experts_forward()
        logits = self.logits_forward(found)
        y, p = gate_combine_fwd(
            h,
            logits.value,
            self.mixtures,
            end=self.end,
            offset=self.offset,
            temperature=plan.gate_spec.temperature,
            keep_weights=weights_wanted,
        )
        mlps.append(list(logits.kept))
        kept = BlockKept(
            mlps,
            h if needs.weights else None,
            p if needs.experts or needs.logits else None,
            None,
            logits.hidden if needs.logits and needs.gate.weight else None,
            logits.raw if needs.logits else None,
            logits.mean if needs.logits else None,
            logits.var if needs.logits else None,
        )
        return y, p, kept

    def fused_forward(self, fusion: Fusion, weights_wanted: bool) -> tuple[Tensor, Tensor | None, BlockKept]:
        """The level in one launch, or its last layer with gates and mixtures."""
        inputs, needs, plan, gate = self.inputs, self.needs, self.plan, self.inputs.gate
        block = plan.blocks[0]
        tensors = inputs.layers[layers_of(inputs, block)]
        need, spec = needs.mlps[0][-1], block.layers[-1]
        topology = plan.topology
        slots = tuple(self.x.columns[s] for s in topology.mixture_slot)
        weight, bias = dense(gate.weight), dense(gate.bias)
        norms = [
            folded(norm_of(*layer))
            for layer in zip(block.layers, tensors, self.state.layers[layers_of(inputs, block)], strict=True)
        ]
        logits_norm = folded(self._logits_norm())
        if fusion is Fusion.TWO_LAYERS:
            first, second = tensors
            y, p = fused_two_layers_fwd(
                self.x.tensor,
                (first.weight.contiguous(), second.weight.contiguous()),
                (dense(first.bias), dense(second.bias)),
                columns_of(block.slots, self.x.columns),
                self.mixtures,
                activations=(tuple(block.layers[0].activation), tuple(spec.activation)),  # type: ignore[arg-type]
                norms=(norms[0], norms[1]),
                x=self.x.tensor,
                gate_weight=weight,
                gate_bias=bias,
                logits_norm=logits_norm,
                mixture_slots=slots,
                offset=self.offset,
                temperature=plan.gate_spec.temperature,
                keep_weights=weights_wanted,
                precision=self.precision,
            )
            return y, p, BlockKept([[], []], None, None, None, None, None, None, None)
        a, columns = self.x.tensor, columns_of(block.slots, self.x.columns)
        logits: Tensor | None = None
        if fusion is Fusion.LAST_LAYER:
            a, _, found = self.mlp_forward(
                block, self.x, needs.mlps[0], None, with_gates=True, layers=len(block.layers) - 1
            )
            logits = None if found is None else found.logits
            columns = tuple(range(len(block.slots)))
        by_output = from_output(spec.activation)
        y, h, z, p = fused_level_fwd(
            a,
            tensors[-1].weight.contiguous(),
            dense(tensors[-1].bias),
            columns,
            self.mixtures,
            activation=(spec.activation[0], spec.activation[1]),
            norm=norms[-1],
            logits=logits,
            x=None if logits is not None else self.x.tensor,
            gate_weight=None if logits is not None else weight,
            gate_bias=None if logits is not None else bias,
            logits_norm=None if logits is not None else logits_norm,
            mixture_slots=slots,
            offset=self.offset,
            temperature=plan.gate_spec.temperature,
            keep_output=needs.weights or (need.output and by_output and spec.activation.name != "identity"),
            keep_input=need.output and not by_output,
            keep_weights=weights_wanted,
            precision=self.precision,
        )
        keep = NOTHING_KEPT
        if need.output and spec.activation.name != "identity":
            keep = keep._replace(act=h if by_output else z)
        kept_p = p if needs.experts or needs.logits else None
        return y, p, BlockKept([[keep], []], h if needs.weights else None, kept_p, None, None, None, None, None)

    def listed(self, p: Tensor) -> Tensor:
        """The weights as users see them: with the learned scalars."""
        if self.offset is None:
            return p
        index = index_of(offset_columns(self.plan), p.device)
        return p.index_add(1, index, self.offset.to(p.dtype).expand(p.shape[0], -1))

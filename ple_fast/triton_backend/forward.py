"""A level forward: a launch per layer and one that mixes, or a fused launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ple_fast_kernels import (
    NO_GATES,
    fused_level_fwd,
    fused_two_layers_fwd,
    gate_combine_fwd,
    grouped_linear_fwd,
)

from ..plan import LayerState, MLPPlan
from ..torch_backend.activations import from_output
from ..torch_backend.gate_combine import index_of
from ..torch_backend.level import BlockKept, layers_of, still
from ..torch_backend.mlp import NOTHING_KEPT, LayerKept, LayerNeeds, after_linear
from ..torch_backend.norms import batch_norm_forward
from .fusion import Fusion, choose_fusion
from .run import IDENTITY, Run, dense, in_epilogue
from .wiring import Source, columns_of, offset_columns


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

    def mlp_forward(
        self,
        mlp: MLPPlan,
        source: Source,
        needs: Sequence[LayerNeeds],
        states: Sequence[LayerState],
        out: Tensor | None,
        *,
        with_gates: bool,
        layers: int | None = None,
    ) -> tuple[Tensor, list[LayerKept], Tensor | None]:
        """The first ``layers`` of stacked MLPs (default all), into ``out`` if given: output, kept, logits."""
        tensors = self.inputs.layers[layers_of(self.inputs, mlp)]
        count = len(mlp.layers) if layers is None else layers
        a, columns, logits = source.tensor, columns_of(mlp.slots, source.columns), None
        kept: list[LayerKept] = []
        for i in range(count):
            spec, tensor, state, need = mlp.layers[i], tensors[i], states[i], needs[i]
            done = in_epilogue(spec, state)
            activation = spec.activation if done else IDENTITY
            by_output = from_output(spec.activation)
            keeps_input = done and need.output and not by_output
            own_out = out if done and i == len(mlp.layers) - 1 else None
            gate = self.inputs.gate if with_gates and i == 0 else None
            y, z, found = grouped_linear_fwd(
                a,
                tensor.weight.contiguous(),
                dense(tensor.bias),
                columns,
                activation=(activation[0], activation[1]),
                keep_input=keeps_input,
                out=own_out,
                gate_weight=None if gate is None else dense(gate.weight),
                gate_bias=None if gate is None else dense(gate.bias),
                gates=NO_GATES if gate is None else self.runs,
                precision=self.precision,
            )
            assert y is not None
            logits = found if logits is None else logits
            keep = NOTHING_KEPT
            if not done:
                y, keep = after_linear(
                    y, spec, tensor, state, need, self.inputs.state.seed, mlp.position + i, 0, activated=False
                )
                y = y.contiguous()
            elif need.output and spec.activation.name != "identity":
                keep = keep._replace(act=y if by_output else z)
            if need.output and need.tensors.weight and i > 0:
                keep = keep._replace(a=a)
            kept.append(keep)
            a, columns = y, tuple(range(len(mlp.slots)))
        if out is not None and count == len(mlp.layers) and a is not out:
            out.copy_(a)
            a = out
        return a, kept, logits

    def experts_forward(self, states: Sequence[LayerState]) -> tuple[Tensor, list[list[LayerKept]], Tensor | None]:
        """Outputs of all experts ``(B, E, H)``, what is kept per block, the logits if they were computed beside."""
        plan, blocks = self.plan, self.plan.blocks
        h, logits = None, None
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
                states[layers_of(self.inputs, block)],
                None if h is None else h[:, self.block_rows(block)],
                with_gates=self.gates_beside_experts and j == 0,
            )
            kept.append(keep)
            logits = found if j == 0 else logits
            if len(blocks) == 1:
                h = done
        assert h is not None
        return h, kept, logits

    def logits_forward(self, found: Tensor | None, states: Sequence[LayerState], *, again: bool) -> _Logits:
        """Logits ``(B, G)`` in float32 (float64), computed here unless ``found`` beside the experts; normed."""
        plan, gate = self.plan, self.inputs.gate
        if gate.weight is None:
            return _Logits(None)
        hidden: Tensor | None = None
        kept: list[LayerKept] = []
        if found is None:
            a = self.gate_x.tensor
            if plan.gate.layers:
                own = states[layers_of(self.inputs, plan.gate)]
                hidden, kept, _ = self.mlp_forward(
                    plan.gate, self.gate_x, self.needs.mlps[-1], own, None, with_gates=False
                )
                a = hidden
            _, _, found = grouped_linear_fwd(
                a,
                None,
                None,
                (),
                gate_weight=gate.weight.contiguous(),
                gate_bias=dense(gate.bias),
                gates=self.runs,
                precision=self.precision,
            )
        assert found is not None
        norm = (still(self.inputs.state) if again else self.inputs.state).gate_norm
        if norm is None:
            return _Logits(found, hidden, kept=kept)
        raw = found.to(gate.weight.dtype).unsqueeze(1)
        normed, saved = batch_norm_forward(raw, gate.norm_weight, gate.norm_bias, norm)
        return _Logits(normed.squeeze(1).to(found.dtype), hidden, raw, saved.mean, saved.var, kept)

    def forward(self, *, keeps: bool, listed: bool, again: bool = False) -> tuple[Tensor, Tensor | None, BlockKept]:
        """``y (B, O, H)``, the softmax weights ``(B, W)`` if anybody reads them, what backward needs."""
        inputs, needs, plan = self.inputs, self.needs, self.plan
        states = (still(inputs.state) if again else inputs.state).layers
        weights_wanted = listed or needs.experts or needs.logits
        fusion = choose_fusion(inputs, self.x, self.gates_beside_experts, keeps=keeps)
        if fusion is not None:
            return self.fused_forward(fusion, states, weights_wanted)
        h, mlps, found = self.experts_forward(states)
        logits = self.logits_forward(found, states, again=again)
        y, p = gate_combine_fwd(
            h,
            logits.value,
            self.mixtures,
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

    def fused_forward(
        self, fusion: Fusion, states: Sequence[LayerState], weights_wanted: bool
    ) -> tuple[Tensor, Tensor | None, BlockKept]:
        """The level in one launch, or its last layer with gates and mixtures."""
        inputs, needs, plan, gate = self.inputs, self.needs, self.plan, self.inputs.gate
        block = plan.blocks[0]
        tensors = inputs.layers[layers_of(inputs, block)]
        need, spec = needs.mlps[0][-1], block.layers[-1]
        topology = plan.topology
        slots = tuple(self.x.columns[s] for s in topology.mixture_slot)
        weight, bias = dense(gate.weight), dense(gate.bias)
        if fusion is Fusion.TWO_LAYERS:
            first, second = tensors
            y, p = fused_two_layers_fwd(
                self.x.tensor,
                (first.weight.contiguous(), second.weight.contiguous()),
                (dense(first.bias), dense(second.bias)),
                columns_of(block.slots, self.x.columns),
                self.mixtures,
                activations=(tuple(block.layers[0].activation), tuple(spec.activation)),  # type: ignore[arg-type]
                x=self.x.tensor,
                gate_weight=weight,
                gate_bias=bias,
                mixture_slots=slots,
                offset=self.offset,
                temperature=plan.gate_spec.temperature,
                keep_weights=weights_wanted,
                precision=self.precision,
            )
            return y, p, BlockKept([[], []], None, None, None, None, None, None, None)
        a, columns, logits = self.x.tensor, columns_of(block.slots, self.x.columns), None
        if fusion is Fusion.LAST_LAYER:
            a, _, logits = self.mlp_forward(
                block, self.x, needs.mlps[0], states, None, with_gates=True, layers=len(block.layers) - 1
            )
            columns = tuple(range(len(block.slots)))
        by_output = from_output(spec.activation)
        y, h, z, p = fused_level_fwd(
            a,
            tensors[-1].weight.contiguous(),
            dense(tensors[-1].bias),
            columns,
            self.mixtures,
            activation=(spec.activation[0], spec.activation[1]),
            logits=logits,
            x=None if logits is not None else self.x.tensor,
            gate_weight=None if logits is not None else weight,
            gate_bias=None if logits is not None else bias,
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

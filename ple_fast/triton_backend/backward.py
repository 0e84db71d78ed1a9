"""A level backward: one launch undoes mixtures and gates, then two per layer, and one adds up all weight gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ple_fast_kernels import NO_END, LayerEnd, gate_combine_bwd, grouped_data_grad, grouped_input_grad

from ..grads import GateGrads, LevelGrads
from ..plan import MLPPlan
from ..torch_backend.barriers import run_steps
from ..torch_backend.gate_combine import index_of
from ..torch_backend.level import BlockKept, layers_of
from ..torch_backend.mlp import LayerKept, LayerNeeds, after_linear_backward
from .gradients import InputGrads, WeightGrads
from .norms import at_norm, dropout_of, end_backward, end_of, from_sums, logits_norm_of, norm_of
from .run import IDENTITY, Run, in_epilogue, in_kernels
from .wiring import Source, columns_of, offset_columns, readers_of


class BackwardRun(Run):
    """The backward of one call."""

    def backward(
        self, kept: BlockKept, dy: Tensor | None, dlisted: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
        """Gradients of the two sources (the second one None where it is the first) and of the flat tuple."""
        inputs, needs, plan, gate = self.inputs, self.needs, self.plan, self.inputs.gate
        grads = LevelGrads(plan.num_layers)
        out = InputGrads(self)
        weights = WeightGrads(self, grads)
        last = plan.blocks[0].layers[-1]
        number = plan.blocks[0].position + len(plan.blocks[0].layers) - 1
        last_state = inputs.state.layers[number]
        in_combine = len(plan.blocks) == 1 and in_epilogue(last, last_state) and last_state.norm is None
        goes_on = in_combine and needs.experts
        p = kept.gated
        dh = dl = None
        if p is not None:
            dh, dp, dl = gate_combine_bwd(
                None if dy is None else dy.contiguous(),
                None if dlisted is None else dlisted.contiguous(),
                kept.h,
                p,
                self.mixtures,
                last.units,
                inputs.layers[0].weight.dtype,
                end=self._deferred_end(kept),
                kept=kept.mlps[0][-1].act if goes_on else None,
                activation=(last.activation[0], last.activation[1]) if goes_on else IDENTITY,
                dropout=dropout_of(last_state, inputs.state.seed, number) if goes_on else None,
                offset=self.offset,
                temperature=plan.gate_spec.temperature,
                experts_grad=needs.experts,
                weights_grad=needs.weights,
                logits_grad=needs.logits,
            )
            if needs.gate.offset and gate.offset is not None:
                total = dlisted if dp is None else dp if dlisted is None else dp + dlisted
                assert total is not None
                index = index_of(offset_columns(plan), total.device)
                grads.gate.offset = total.index_select(1, index).sum(0).to(gate.offset.dtype)
        elif needs.gate.offset and gate.offset is not None:  # nothing else is asked for
            grads.gate.offset = self._offset_grad_alone(kept, dy, dlisted)
        if dl is not None:
            dl = self._logits_backward(kept, dl, grads.gate)
        if dh is not None:
            for j, block in enumerate(plan.blocks):
                d = dh if len(plan.blocks) == 1 else dh[:, self.block_rows(block)]
                beside = dl if self.gates_beside_experts and j == 0 else None
                self._mlp_backward(
                    block,
                    self.x,
                    needs.mlps[j],
                    kept.mlps[j],
                    d,
                    grads,
                    out,
                    weights,
                    beside=beside,
                    is_done=in_combine,
                )
        if dl is not None:
            self._gate_backward(kept, dl, grads, out, weights)
        weights.finish()
        dx, dgate_x = out.finish()
        return dx, dgate_x, grads.flat()

    def _deferred_end(self, kept: BlockKept) -> LayerEnd:
        """What the mixtures did of the experts' last layer."""
        block = self.plan.blocks[0]
        if not self.defers_end(block):
            return NO_END
        return self._end(block, len(block.layers) - 1, kept.mlps[0][-1])

    def _end(self, mlp: MLPPlan, i: int, keep: LayerKept) -> LayerEnd:
        """What layer ``i`` ends in."""
        number = mlp.position + i
        spec, state = mlp.layers[i], self.inputs.state.layers[number]
        return end_of(
            norm_of(spec, self.inputs.layers[number], state),
            (spec.activation[0], spec.activation[1]),
            dropout_of(state, self.inputs.state.seed, number),
            keep.mean,
            keep.var,
        )

    def _offset_grad_alone(self, kept: BlockKept, dy: Tensor | None, dlisted: Tensor | None) -> Tensor:
        """Gradient of the learned scalars where neither experts nor gates take part."""
        assert self.inputs.gate.offset is not None
        total = dlisted
        if dy is not None:
            assert kept.h is not None
            ones = torch.ones(
                (dy.shape[0], self.mixtures.weights),
                dtype=torch.promote_types(dy.dtype, torch.float32),
                device=dy.device,
            )
            _, dp, _ = gate_combine_bwd(
                dy.contiguous(), None, kept.h, ones, self.mixtures, dy.shape[2], dy.dtype,
                end=self._deferred_end(kept), offset=self.offset,
                experts_grad=False, weights_grad=True, logits_grad=False,
            )  # fmt: skip
            assert dp is not None
            total = dp if total is None else dp + total
        assert total is not None
        index = index_of(offset_columns(self.plan), total.device)
        return total.index_select(1, index).sum(0).to(self.inputs.gate.offset.dtype)

    def _logits_backward(self, kept: BlockKept, dl: Tensor, own: GateGrads) -> Tensor:
        """Backward of the norm of the logits."""
        norm, needs = logits_norm_of(self.inputs.gate, self.inputs.state.gate_norm), self.needs
        if norm is None:
            return dl
        assert kept.logits is not None
        d = end_backward(
            dl.unsqueeze(1), kept.logits.unsqueeze(1), norm, end_of(norm, IDENTITY, None, kept.mean, kept.var), own,
            affine=bool(needs.gate.norm_weight or needs.gate.norm_bias),
        )  # fmt: skip
        return d.squeeze(1)

    def _gate_backward(
        self,
        kept: BlockKept,
        dl: Tensor,
        grads: LevelGrads,
        out: InputGrads,
        weights: WeightGrads,
    ) -> None:
        """What the gates still owe after the experts: with layers or an input of their own, nearly everything."""
        needs, plan, gate = self.needs, self.plan, self.inputs.gate
        assert gate.weight is not None
        if not plan.gate.layers:
            source = self.gate_x
            if out.wants(source) and not out.has_gates:
                out.add(source, None, None, None, dl)
            if not weights.has_gates:
                weights.add_gates(source.tensor, dl)
            return
        weights.add_gates(kept.hidden, dl)
        if not needs.mlps[-1][-1].output:
            return
        rows, width = dl.shape[0], gate.weight.shape[1]
        dhidden = torch.empty((rows, len(plan.gate.slots), width), dtype=dl.dtype, device=dl.device)
        grouped_input_grad(
            None, None, None, dhidden, dl=dl, gate_weight=gate.weight.contiguous(),
            gates=self.runs, precision=self.precision,
        )  # fmt: skip
        self._mlp_backward(
            plan.gate,
            self.gate_x,
            needs.mlps[-1],
            kept.mlps[-1],
            dhidden,
            grads,
            out,
            weights,
            beside=None,
            is_done=False,
        )

    def _mlp_backward(
        self,
        mlp: MLPPlan,
        source: Source,
        needs: Sequence[LayerNeeds],
        kept: Sequence[LayerKept],
        d: Tensor,
        grads: LevelGrads,
        out: InputGrads,
        weights: WeightGrads,
        *,
        beside: Tensor | None,
        is_done: bool,
    ) -> None:
        """From ``d``, the gradient of the outputs, down to the input; ``is_done``: that of the last activation's input.

        ``beside``: gradient of the logits, where the gates read what the first layer reads.
        """
        part = layers_of(self.inputs, mlp)
        tensors, states = self.inputs.layers[part], self.inputs.state.layers[part]
        seed = self.inputs.state.seed
        parts: Tensor | None = None
        for i in range(len(mlp.layers) - 1, -1, -1):
            spec, tensor, state, need, keep = mlp.layers[i], tensors[i], states[i], needs[i], kept[i]
            if not need.output:
                return
            own = grads.layers[mlp.position + i]
            affine = bool(need.tensors.norm_weight or need.tensors.norm_bias)
            bias_parts: Tensor | None = None
            if parts is not None and state.norm is None:
                bias_parts, parts = parts, None
            elif parts is not None:
                norm = norm_of(spec, tensor, state)
                assert norm is not None and keep.normed is not None
                d = from_sums(d, keep.normed, parts, norm, at_norm(self._end(mlp, i, keep)), own, affine=affine)
                parts = None
            elif not is_done and in_kernels(spec, state):
                norm = norm_of(spec, tensor, state)
                read = keep.act if norm is None else keep.normed
                d = end_backward(d, read, norm, self._end(mlp, i, keep), own, affine=affine)
            elif not is_done:
                d = d.contiguous()
                d = run_steps(after_linear_backward(d, spec, tensor, state, need, keep, own, seed, mlp.position + i, 0))
                d = d.contiguous()
            columns = columns_of(mlp.slots, source.columns) if i == 0 else tuple(range(len(mlp.slots)))
            a = source.tensor if i == 0 else keep.a
            weights.add(mlp.position + i, tensor, need, a, d, columns, beside if i == 0 else None, bias_parts)
            if not need.below:
                return
            weight = tensor.weight.contiguous()
            if i == 0:
                readers = readers_of(mlp.slots, source.columns, source.tensor.shape[1])
                out.add(source, d, weight, readers, beside)
                return
            below, below_state = mlp.layers[i - 1], states[i - 1]
            is_done = in_epilogue(below, below_state)
            kept_below = kept[i - 1]
            leaves_sums = i == 1 and is_done and weights.leaves_bias(tensors[0], needs[0], source.tensor)
            d, parts = grouped_data_grad(
                d,
                weight,
                kept=(kept_below.act if below_state.norm is None else kept_below.normed) if is_done else None,
                end=self._end(mlp, i - 1, kept_below) if is_done else NO_END,
                sums=leaves_sums,
                precision=self.precision,
            )

"""A level backward: one launch undoes mixtures and gates, then two per layer, and one adds up all weight gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ple_fast_kernels import NO_END, LayerEnd, gate_combine_bwd, grouped_data_grad, grouped_input_grad

from ..call import LevelInput, Wants
from ..grads import GateGrads, LevelGrads
from ..plan import MLPPlan
from ..saved import in_kernels
from ..torch_backend.mix import index_of
from .ends import NormOf, at_norm, dropout_of, end_backward, end_of, from_sums, logits_norm_of, norm_of
from .gradients import InputGrads, Product, WeightGrads
from .inputs import IDENTITY, Run, Source, columns_of, in_epilogue, offset_columns, readers_of


class BackwardRun(Run):
    """The backward of one call."""

    def __init__(self, inputs: LevelInput, wants: Wants, kept: Sequence[Tensor | None]) -> None:
        super().__init__(inputs, wants)
        self.kept = list(kept)
        self.grads = LevelGrads(inputs.plan.num_layers)
        self.out = InputGrads(self)
        self.weights = WeightGrads(self, self.grads)

    def _kept(self, number: int) -> Tensor | None:
        return None if number < 0 else self.kept[number]

    def _output(self, mlp: MLPPlan, i: int) -> Tensor | None:
        """What is kept of the output of layer ``i``: of several blocks of experts a part of all."""
        h = self._kept(self.saved.layers[mlp.position + i].h)
        is_part = h is not None and i + 1 == len(mlp.layers) and mlp is not self.plan.gate and len(self.plan.blocks) > 1
        return h[:, self.block_rows(mlp)] if is_part and h is not None else h

    def _act(self, mlp: MLPPlan, i: int) -> Tensor | None:
        """What the derivative of the activation of layer ``i`` reads."""
        at = self.saved.layers[mlp.position + i]
        return self._output(mlp, i) if at.act == at.h else self._kept(at.act)

    def backward(
        self, dy: Tensor | None, dlisted: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
        """Gradients of the two sources (the second one None where it is the first) and of the flat tuple."""
        inputs, wants, plan, gate = self.inputs, self.wants, self.plan, self.inputs.gate
        grads, at = self.grads, self.saved.mix
        last = plan.blocks[0].layers[-1]
        number = plan.blocks[0].position + len(plan.blocks[0].layers) - 1
        last_state = inputs.state.layers[number]
        in_combine = len(plan.blocks) == 1 and in_epilogue(last, last_state) and last_state.norm is None
        goes_on = in_combine and wants.experts
        p = self._kept(at.p)
        dh = dl = None
        if p is not None:
            dh, dp, dl = gate_combine_bwd(
                None if dy is None else dy.contiguous(),
                None if dlisted is None else dlisted.contiguous(),
                self._kept(at.h),
                p,
                self.mixtures,
                last.units,
                inputs.layers[0].weight.dtype,
                end=self._deferred_end(),
                kept=self._act(plan.blocks[0], len(plan.blocks[0].layers) - 1) if goes_on else None,
                activation=(last.activation[0], last.activation[1]) if goes_on else IDENTITY,
                dropout=dropout_of(last_state, inputs.state.seed, number) if goes_on else None,
                offset=self.offset,
                temperature=plan.gate_spec.temperature,
                experts_grad=wants.experts,
                weights_grad=wants.weights,
                logits_grad=wants.logits,
            )
            if wants.gate.offset and gate.offset is not None:
                total = dlisted if dp is None else dp if dlisted is None else dp + dlisted
                assert total is not None
                index = index_of(offset_columns(plan), total.device)
                grads.gate.offset = total.index_select(1, index).sum(0).to(gate.offset.dtype)
        elif plan.passes:
            dh = dy.contiguous() if dy is not None and wants.experts else None
        elif wants.gate.offset and gate.offset is not None:  # nothing else is asked for
            grads.gate.offset = self._offset_grad_alone(dy, dlisted)
        if dl is not None:
            dl = self._logits_backward(dl, grads.gate)
        if dh is not None:
            for j, block in enumerate(plan.blocks):
                d = dh if len(plan.blocks) == 1 else dh[:, self.block_rows(block)]
                beside = dl if self.gates_beside_experts and j == 0 else None
                self._mlp_backward(block, self.x, d, beside=beside, is_done=in_combine)
        if dl is not None:
            self._gate_backward(dl)
        self.weights.finish()
        dx, dgate_x = self.out.finish()
        return dx, dgate_x, grads.flat()

    def _deferred_end(self) -> LayerEnd:
        """What the mixtures did of the experts' last layer."""
        block = self.plan.blocks[0]
        return self._end(block, len(block.layers) - 1) if self.defers_end(block) else NO_END

    def _end(self, mlp: MLPPlan, i: int) -> LayerEnd:
        """What layer ``i`` ends in."""
        number = mlp.position + i
        spec, state, at = mlp.layers[i], self.inputs.state.layers[number], self.saved.layers[number]
        norm = norm_of(spec, self.inputs.layers[number], state)
        return end_of(
            norm,
            (spec.activation[0], spec.activation[1]),
            dropout_of(state, self.inputs.state.seed, number),
            *self._statistics(norm, at.mean, at.rstd),
        )

    def _statistics(self, norm: NormOf | None, mean: int, rstd: int) -> tuple[Tensor | None, Tensor | None]:
        """What forward normalised by."""
        if norm is not None and mean < 0:
            return norm.state.running_mean, norm.state.running_var
        return self._kept(mean), self._kept(rstd)

    def _offset_grad_alone(self, dy: Tensor | None, dlisted: Tensor | None) -> Tensor:
        """Gradient of the learned scalars where neither experts nor gates take part."""
        assert self.inputs.gate.offset is not None
        total = dlisted
        if dy is not None:
            h = self._kept(self.saved.mix.h)
            assert h is not None
            ones = torch.ones(
                (dy.shape[0], self.mixtures.weights),
                dtype=torch.promote_types(dy.dtype, torch.float32),
                device=dy.device,
            )
            _, dp, _ = gate_combine_bwd(
                dy.contiguous(), None, h, ones, self.mixtures, dy.shape[2], dy.dtype,
                end=self._deferred_end(), offset=self.offset,
                experts_grad=False, weights_grad=True, logits_grad=False,
            )  # fmt: skip
            assert dp is not None
            total = dp if total is None else dp + total
        assert total is not None
        index = index_of(offset_columns(self.plan), total.device)
        return total.index_select(1, index).sum(0).to(self.inputs.gate.offset.dtype)

    def _logits_backward(self, dl: Tensor, own: GateGrads) -> Tensor:
        """Backward of the norm of the logits."""
        norm, at = logits_norm_of(self.inputs.gate, self.inputs.state.gate_norm), self.saved.mix
        if norm is None:
            return dl
        z = self._kept(at.z)
        assert z is not None
        end = end_of(norm, IDENTITY, None, *self._statistics(norm, at.mean, at.rstd))
        return end_backward(dl.unsqueeze(1), z.unsqueeze(1), norm, end, own, affine=self.wants.gate.affine).squeeze(1)

    def _gate_backward(self, dl: Tensor) -> None:
        """What the gates still owe after the experts: with layers or an input of their own, nearly everything."""
        mlp, gate = self.plan.gate, self.inputs.gate
        assert gate.weight is not None
        if not mlp.layers:
            source = self.gate_x
            if self.out.wants(source) and not self.out.has_gates:
                self.out.add(source, None, None, None, dl)
            if not self.weights.has_gates:
                self.weights.add_gates(source.tensor, dl)
            return
        self.weights.add_gates(self._output(mlp, len(mlp.layers) - 1) if self.wants.gate.weight else None, dl)
        if not self.wants.layers[-1].output:
            return
        rows, width = dl.shape[0], gate.weight.shape[1]
        dhidden = torch.empty((rows, len(mlp.slots), width), dtype=dl.dtype, device=dl.device)
        grouped_input_grad(
            None, None, None, dhidden, dl=dl, gate_weight=gate.weight.contiguous(),
            gates=self.runs, precision=self.precision,
        )  # fmt: skip
        self._mlp_backward(mlp, self.gate_x, dhidden, beside=None, is_done=False)

    def _mlp_backward(self, mlp: MLPPlan, source: Source, d: Tensor, *, beside: Tensor | None, is_done: bool) -> None:
        """From ``d``, the gradient of the outputs, down to the input; ``is_done``: that of the last activation's input.

        ``beside``: gradient of the logits, where the gates read what the first layer reads.
        """
        part = slice(mlp.position, mlp.position + len(mlp.layers))
        tensors, states, wants = self.inputs.layers[part], self.inputs.state.layers[part], self.wants.layers[part]
        parts: Tensor | None = None
        for i in range(len(mlp.layers) - 1, -1, -1):
            tensor, want = tensors[i], wants[i]
            if not want.output:
                return
            bias_parts = parts if states[i].norm is None else None
            d = self._end_backward(mlp, i, d, None if bias_parts is not None else parts, is_done=is_done)
            columns = columns_of(mlp.slots, source.columns) if i == 0 else tuple(range(len(mlp.slots)))
            a = source.tensor if i == 0 else self._output(mlp, i - 1) if want.weight else None
            self.weights.add(mlp.position + i, want, Product(a, d, columns), beside if i == 0 else None, bias_parts)
            if not want.below:
                return
            weight = tensor.weight.contiguous()
            if i == 0:
                readers = readers_of(mlp.slots, source.columns, source.tensor.shape[1])
                self.out.add(source, d, weight, readers, beside)
                return
            below, below_state = mlp.layers[i - 1], states[i - 1]
            is_done = in_epilogue(below, below_state)
            reads: Tensor | None = None
            if is_done and below_state.norm is None:
                reads = self._act(mlp, i - 1)
            elif is_done:
                reads = self._kept(self.saved.layers[mlp.position + i - 1].z)
            leaves_sums = i == 1 and is_done and self.weights.leaves_bias(tensors[0], wants[0], source.tensor)
            d, parts = grouped_data_grad(
                d,
                weight,
                kept=reads,
                end=self._end(mlp, i - 1) if is_done else NO_END,
                sums=leaves_sums,
                precision=self.precision,
            )

    def _end_backward(self, mlp: MLPPlan, i: int, d: Tensor, parts: Tensor | None, *, is_done: bool) -> Tensor:
        """To the gradient of the product of layer ``i``.

        ``is_done``: ``d`` is that already or, before batch norm, whose sums are ``parts``, that of the norm's output.
        """
        number = mlp.position + i
        spec, state, at = mlp.layers[i], self.inputs.state.layers[number], self.saved.layers[number]
        norm, own, affine = None, self.grads.layers[number], self.wants.layers[number].affine
        if state.norm is not None and in_kernels(spec, state):
            norm = norm_of(spec, self.inputs.layers[number], state)
        z = self._kept(at.z)
        if parts is not None:
            assert norm is not None and z is not None
            return from_sums(d, z, parts, norm, at_norm(self._end(mlp, i)), own, affine=affine)
        if is_done:
            return d
        if in_kernels(spec, state):
            return end_backward(
                d, self._act(mlp, i) if norm is None else z, norm, self._end(mlp, i), own, affine=affine
            )
        layer, rows = self.in_operators(mlp, i), self.all_rows(self.kept)
        d = layer.end_backward(self.inputs, rows, d.contiguous(), self.grads)
        return layer.norm_backward(self.inputs, rows, d, self.grads, None).contiguous()

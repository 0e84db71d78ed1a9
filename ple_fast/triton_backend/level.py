"""A whole extraction network in Triton kernels, forward and backward: the twin of ``torch_backend/level.py``.

One layer is one launch for all experts of a block. A layer with a norm, dropout, or an activation with learned
parameters runs those in PyTorch's operators between two launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ple_fast_kernels import (
    FUSED,
    NO_GATES,
    Readers,
    WeightGrad,
    WeightGradResult,
    fused_level_fwd,
    fused_two_layers_fwd,
    gate_combine_bwd,
    gate_combine_fwd,
    grouped_data_grad,
    grouped_input_grad,
    grouped_linear_fwd,
    grouped_weight_grads,
)

from ..plan import LayerState, LayerTensors, MLPPlan
from ..specs import LayerSpec
from ..torch_backend.activations import activation_backward, from_output
from ..torch_backend.gate_combine import index_of
from ..torch_backend.level import BlockKept, LevelInput, LevelNeeds, layers_of, still, tables
from ..torch_backend.mlp import (
    NOTHING_KEPT,
    LayerKept,
    LayerNeeds,
    accumulate,
    after_linear,
    after_linear_backward,
)
from ..torch_backend.norms import BatchNormSaved, batch_norm_backward, batch_norm_forward
from .fusion import Fusion, choose_fusion
from .wiring import (
    Source,
    columns_of,
    gate_runs,
    matmul_precision,
    mixtures_of,
    offset_columns,
    readers_of,
    source_grads,
    source_of,
)

IDENTITY = ("identity", 0.0)


def in_epilogue(spec: LayerSpec, state: LayerState) -> bool:
    """Whether the kernel of the product does all that follows it."""
    return state.norm is None and state.dice is None and not state.dropout and spec.activation.name in FUSED


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


class _Logits(NamedTuple):
    """Gates' logits on the way, and what backward needs of them."""

    value: Tensor | None
    hidden: Tensor | None = None
    raw: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    kept: Sequence[LayerKept] = ()


class _Pass:
    """What forward and backward of one call share."""

    def __init__(self, inputs: LevelInput, needs: LevelNeeds) -> None:
        self.inputs, self.needs, self.plan = inputs, needs, inputs.plan
        self.x = source_of(inputs.x)
        self.gate_x = self.x if inputs.gate_x is inputs.x else source_of(inputs.gate_x)
        self.mixtures = mixtures_of(inputs.plan)
        self.precision = matmul_precision()
        gate = inputs.plan.gate
        # Without hidden layers the gates read slots; with them, each reads its own last hidden layer.
        columns = tuple(range(len(gate.slots))) if gate.layers else columns_of(gate.slots, self.gate_x.columns)
        self.runs = gate_runs(inputs.plan, columns) if gate.slots else NO_GATES
        self.gates_beside_experts = bool(gate.slots) and not gate.layers and self.gate_x is self.x
        self.offset = _dense(inputs.gate.offset)

    def block_rows(self, block: MLPPlan) -> slice:
        return slice(block.start, block.start + len(block.slots))

    # Forward

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
                _dense(tensor.bias),
                columns,
                activation=(activation[0], activation[1]),
                keep_input=keeps_input,
                out=own_out,
                gate_weight=None if gate is None else _dense(gate.weight),
                gate_bias=None if gate is None else _dense(gate.bias),
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
                gate_bias=_dense(gate.bias),
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
        weight, bias = _dense(gate.weight), _dense(gate.bias)
        if fusion is Fusion.TWO_LAYERS:
            first, second = tensors
            y, p = fused_two_layers_fwd(
                self.x.tensor,
                (first.weight.contiguous(), second.weight.contiguous()),
                (_dense(first.bias), _dense(second.bias)),
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
            _dense(tensors[-1].bias),
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

    # Backward

    def backward(
        self, kept: BlockKept, dy: Tensor | None, dlisted: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
        """Gradients of the two sources (the second one None where it is the first) and of the flat tuple."""
        inputs, needs, plan, gate = self.inputs, self.needs, self.plan, self.inputs.gate
        grads: list[list[Tensor | None]] = [[None] * 5 for _ in range(plan.num_layers + 1)]
        out = _InputGrads(self)
        weights = _WeightGrads(self, grads)
        last = plan.blocks[0].layers[-1]
        in_combine = (
            len(plan.blocks) == 1
            and last.activation.name != "identity"
            and in_epilogue(last, inputs.state.layers[plan.blocks[0].position + len(plan.blocks[0].layers) - 1])
        )
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
                kept=kept.mlps[0][-1].act if in_combine and needs.experts else None,
                activation=(last.activation[0], last.activation[1]) if in_combine and needs.experts else IDENTITY,
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
                grads[-1][4] = total.index_select(1, index).sum(0).to(gate.offset.dtype)
        elif needs.gate.offset and gate.offset is not None:  # nothing else is asked for
            grads[-1][4] = self._offset_grad_alone(kept, dy, dlisted)
        if dl is not None:
            dl = self._logits_backward(kept, dl, grads[-1])
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
        return dx, dgate_x, [grad for row in grads for grad in row]

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
                dy.contiguous(), None, kept.h, ones, self.mixtures, dy.shape[2], dy.dtype, offset=self.offset,
                experts_grad=False, weights_grad=True, logits_grad=False,
            )  # fmt: skip
            assert dp is not None
            total = dp if total is None else dp + total
        assert total is not None
        index = index_of(offset_columns(self.plan), total.device)
        return total.index_select(1, index).sum(0).to(self.inputs.gate.offset.dtype)

    def _logits_backward(self, kept: BlockKept, dl: Tensor, own: list[Tensor | None]) -> Tensor:
        """Backward of the norm of the logits."""
        norm, gate, needs = self.inputs.state.gate_norm, self.inputs.gate, self.needs
        if norm is None:
            return dl
        assert kept.logits is not None
        d, dw, db = batch_norm_backward(
            dl.unsqueeze(1), kept.logits, gate.norm_weight, norm, BatchNormSaved(kept.mean, kept.var),
            affine=bool(needs.gate.norm_weight or needs.gate.norm_bias),
        )  # fmt: skip
        accumulate(own, 2, dw)
        accumulate(own, 3, db)
        return d.squeeze(1).contiguous()

    def _gate_backward(
        self,
        kept: BlockKept,
        dl: Tensor,
        grads: list[list[Tensor | None]],
        out: _InputGrads,
        weights: _WeightGrads,
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
        grads: list[list[Tensor | None]],
        out: _InputGrads,
        weights: _WeightGrads,
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
        for i in range(len(mlp.layers) - 1, -1, -1):
            spec, tensor, state, need, keep = mlp.layers[i], tensors[i], states[i], needs[i], kept[i]
            if not need.output:
                return
            own = grads[mlp.position + i]
            if not is_done:
                d = d.contiguous()
                if in_epilogue(spec, state):
                    if spec.activation.name != "identity":
                        assert keep.act is not None
                        activation_backward(d, keep.act, spec.activation, None, slope_grad=False)
                else:
                    d = after_linear_backward(d, spec, tensor, state, need, keep, own, seed, mlp.position + i, 0)
                    d = d.contiguous()
            columns = columns_of(mlp.slots, source.columns) if i == 0 else tuple(range(len(mlp.slots)))
            a = source.tensor if i == 0 else keep.a
            weights.add(mlp.position + i, tensor, need, a, d, columns, beside if i == 0 else None)
            if not need.below:
                return
            weight = tensor.weight.contiguous()
            if i == 0:
                readers = readers_of(mlp.slots, source.columns, source.tensor.shape[1])
                out.add(source, d, weight, readers, beside)
                return
            below, below_state = mlp.layers[i - 1], states[i - 1]
            is_done = in_epilogue(below, below_state) and below.activation.name != "identity"
            activation = below.activation if is_done else IDENTITY
            d = grouped_data_grad(
                d,
                weight,
                kept=kept[i - 1].act if is_done else None,
                activation=(activation[0], activation[1]),
                precision=self.precision,
            )
            is_done = is_done or (in_epilogue(below, below_state) and below.activation.name == "identity")


class _InputGrads:
    """Gradients of the two sources: the first contribution writes, the next ones add to it, in wide numbers."""

    def __init__(self, owner: _Pass) -> None:
        self.owner = owner
        plan, needs = owner.plan, owner.needs
        separate = (bool(plan.gate.layers) or owner.gate_x is not owner.x) and bool(plan.gate.slots)
        self.several = len(plan.blocks) > 1 or (separate and owner.gate_x is owner.x)
        self.has_gates = False
        self.dx: Tensor | None = None
        self.dgate_x: Tensor | None = None
        self.needs_x, self.needs_gate_x = any(needs.x), any(needs.gate_x)

    def wants(self, source: Source) -> bool:
        return self.needs_x if source is self.owner.x else self.needs_gate_x

    def add(
        self,
        source: Source,
        d: Tensor | None,
        weight: Tensor | None,
        readers: Readers | None,
        dl: Tensor | None,
    ) -> None:
        """Add what experts (``d``, ``weight``) and gates (``dl``) that read ``source`` contribute."""
        owner = self.owner
        is_x = source is owner.x
        target = self.dx if is_x else self.dgate_x
        adds = target is not None
        if target is None:
            shape, dtype = source.tensor.shape, source.tensor.dtype
            if self.several:
                dtype = torch.promote_types(dtype, torch.float32)
            target = torch.empty(shape, dtype=dtype, device=source.tensor.device)
            if is_x:
                self.dx = target
            else:
                self.dgate_x = target
        gate = owner.inputs.gate
        if dl is not None:
            self.has_gates = True
        grouped_input_grad(
            d,
            weight,
            readers,
            target,
            dl=dl,
            gate_weight=None if dl is None else _dense(gate.weight),
            gates=NO_GATES if dl is None else owner.runs,
            adds=adds,
            precision=owner.precision,
        )

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients, 0 where nothing contributed."""
        owner = self.owner
        found = []
        for source, grad, wanted in (
            (owner.x, self.dx, self.needs_x),
            (owner.gate_x, self.dgate_x, self.needs_gate_x and owner.gate_x is not owner.x),
        ):
            if wanted and grad is None:
                grad = torch.zeros(source.tensor.shape, dtype=source.tensor.dtype, device=source.tensor.device)
            found.append(None if grad is None or not wanted else grad.to(source.tensor.dtype))
        return found[0], found[1]


class _WeightGrads:
    """Weight and bias gradients of all layers, gathered for one call of the kernels."""

    def __init__(self, owner: _Pass, grads: list[list[Tensor | None]]) -> None:
        self.owner, self.grads = owner, grads
        self.entries: list[WeightGrad] = []
        self.positions: list[int] = []
        self.has_gates = False

    def add(
        self,
        position: int,
        tensor: LayerTensors,
        need: LayerNeeds,
        a: Tensor | None,
        d: Tensor,
        columns: tuple[int, ...],
        dl: Tensor | None,
    ) -> None:
        """A layer that read ``a``; ``dl``: the gates read it too."""
        weight, bias = bool(need.tensors.weight), tensor.bias is not None and bool(need.tensors.bias)
        gate_weight, gate_bias = self._gates_wanted() if dl is not None else (False, False)
        if dl is not None:
            self.has_gates = True
        if not (weight or bias or gate_weight or gate_bias):
            return
        if a is None:  # a bias alone: nothing reads the layer's input
            a = d
        runs = self.owner.runs if gate_weight or gate_bias else NO_GATES
        self.entries.append(
            WeightGrad(
                a, d, columns, weight, bias, dl if gate_weight or gate_bias else None, runs, gate_weight, gate_bias
            )
        )
        self.positions.append(position)

    def add_gates(self, a: Tensor | None, dl: Tensor) -> None:
        """The gates' end on its own."""
        weight, bias = self._gates_wanted()
        self.has_gates = True
        if weight or bias:
            self.entries.append(
                WeightGrad(
                    dl.unsqueeze(1) if a is None else a, None, (), False, False, dl, self.owner.runs, weight, bias
                )
            )
            self.positions.append(-1)

    def _gates_wanted(self) -> tuple[bool, bool]:
        gate, needs = self.owner.inputs.gate, self.owner.needs.gate
        return bool(needs.weight), gate.bias is not None and bool(needs.bias)

    def finish(self) -> None:
        """Compute all of them."""
        dtype = self.owner.inputs.layers[0].weight.dtype
        results: list[WeightGradResult] = grouped_weight_grads(self.entries, dtype, precision=self.owner.precision)
        for position, result in zip(self.positions, results, strict=True):
            for row, index, grad in (
                (position, 0, result.weight),
                (position, 1, result.bias),
                (-1, 0, result.gate_weight),
                (-1, 1, result.gate_bias),
            ):
                if grad is not None:
                    self.grads[row][index] = grad


def level_forward(
    inputs: LevelInput, needs: LevelNeeds | None, *, listed: bool
) -> tuple[Tensor, Tensor | None, list[BlockKept]]:
    """``y (B, O, H)``, the listed weights ``(B, num_weights)`` if asked for, and what backward needs.

    Without ``needs`` nothing is kept.
    """
    run = _Pass(inputs, tables(inputs.plan).no_needs if needs is None else needs)
    y, p, kept = run.forward(keeps=needs is not None, listed=listed)
    weights = None
    if listed:
        assert p is not None
        weights = run.listed(p)
    return y, weights, [] if needs is None else [kept]


def level_backward(
    inputs: LevelInput, needs: LevelNeeds, kept: list[BlockKept], dy: Tensor | None, dlisted: Tensor | None
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Gradients of the inputs, the gate inputs and the flat tuple. Without ``kept`` the forward is run again."""
    run = _Pass(inputs, needs)
    keep = kept[0] if kept else run.forward(keeps=True, listed=False, again=True)[2]
    dx, dgate_x, flat = run.backward(keep, dy, dlisted)
    nothing: list[Tensor | None] = [None] * len(inputs.x.tensors)
    dxs = nothing if dx is None else source_grads(inputs.x, run.x, dx)
    if run.gate_x is run.x:
        return dxs, [], flat
    empty: list[Tensor | None] = [None] * len(inputs.gate_x.tensors)
    return dxs, empty if dgate_x is None else source_grads(inputs.gate_x, run.gate_x, dgate_x), flat

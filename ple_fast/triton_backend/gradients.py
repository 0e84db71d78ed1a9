"""Where the gradients of a backward pass gather: those of the inputs, and those of weights and biases."""

from __future__ import annotations

import torch
from torch import Tensor

from ple_fast_kernels import (
    NO_GATES,
    Readers,
    WeightGrad,
    WeightGradResult,
    column_sums_merge,
    grouped_input_grad,
    grouped_weight_grads,
    weight_grad_by_width,
)

from ..grads import LevelGrads, plus
from ..plan import LayerTensors
from ..torch_backend.mlp import LayerNeeds
from .run import Run, dense
from .wiring import Source


class InputGrads:
    """Gradients of the two sources: the first contribution writes, the next ones add to it, in wide numbers."""

    def __init__(self, owner: Run) -> None:
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
            gate_weight=None if dl is None else dense(gate.weight),
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


class WeightGrads:
    """Weight and bias gradients of all layers, gathered for one call of the kernels."""

    def __init__(self, owner: Run, grads: LevelGrads) -> None:
        self.owner, self.grads = owner, grads
        self.entries: list[WeightGrad] = []
        self.positions: list[int | None] = []
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
        bias_parts: Tensor | None = None,
    ) -> None:
        """A layer that read ``a``; ``dl``: the gates read it too; ``bias_parts``: the bias' gradient, in parts."""
        weight, bias = bool(need.tensors.weight), tensor.bias is not None and bool(need.tensors.bias)
        if bias_parts is not None:
            assert tensor.bias is not None
            self.grads.layers[position].bias = column_sums_merge(bias_parts, tensor.bias)
            bias = False
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

    def leaves_bias(self, tensor: LayerTensors, need: LayerNeeds, a: Tensor) -> bool:
        """Whether the library takes the weight of a first layer that read ``a``: then the launch that makes its ``d``
        adds up the bias' gradient, and nothing reads ``d`` a second time for it."""
        if tensor.bias is None or not (need.tensors.weight and need.tensors.bias):
            return False
        return weight_grad_by_width(a, tensor.bias.numel(), self.owner.precision)

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
            self.positions.append(None)

    def _gates_wanted(self) -> tuple[bool, bool]:
        gate, needs = self.owner.inputs.gate, self.owner.needs.gate
        return bool(needs.weight), gate.bias is not None and bool(needs.bias)

    def finish(self) -> None:
        """Compute all of them."""
        dtype = self.owner.inputs.layers[0].weight.dtype
        results: list[WeightGradResult] = grouped_weight_grads(self.entries, dtype, precision=self.owner.precision)
        for position, result in zip(self.positions, results, strict=True):
            if position is not None:
                own = self.grads.layers[position]
                own.weight = plus(own.weight, result.weight)
                own.bias = plus(own.bias, result.bias)
            gate = self.grads.gate
            gate.weight = plus(gate.weight, result.gate_weight)
            gate.bias = plus(gate.bias, result.gate_bias)

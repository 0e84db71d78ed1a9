"""Where the gradients of a backward pass gather: those of the inputs, and those of weights and biases."""

from __future__ import annotations

from typing import NamedTuple

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

from ..call import LayerWants
from ..grads import LevelGrads, plus
from ..tensors import LayerTensors
from .inputs import Run, Source, dense


class InputGrads:
    """Gradients of the two sources: the first contribution writes, the next ones add to it, in wide numbers."""

    def __init__(self, owner: Run) -> None:
        self.owner = owner
        plan, wants = owner.plan, owner.wants
        separate = (bool(plan.gate.layers) or owner.gate_x is not owner.x) and bool(plan.gate.slots)
        self.several = len(plan.blocks) > 1 or (separate and owner.gate_x is owner.x)
        self.has_gates = False
        self.dx: Tensor | None = None
        self.dgate_x: Tensor | None = None
        self.wants_x, self.wants_gate_x = any(wants.x), any(wants.gate_x)

    def wants(self, source: Source) -> bool:
        return self.wants_x if source is self.owner.x else self.wants_gate_x

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
            (owner.x, self.dx, self.wants_x),
            (owner.gate_x, self.dgate_x, self.wants_gate_x and owner.gate_x is not owner.x),
        ):
            if wanted and grad is None:
                grad = torch.zeros(source.tensor.shape, dtype=source.tensor.dtype, device=source.tensor.device)
            found.append(None if grad is None or not wanted else grad.to(source.tensor.dtype))
        return found[0], found[1]


class Product(NamedTuple):
    """A layer's product, backwards."""

    a: Tensor | None
    """What it read; None where no weight is wanted."""
    d: Tensor
    """The gradient of its result."""
    columns: tuple[int, ...]
    """Of ``a``, that each member read."""


class WeightGrads:
    """Weight and bias gradients of all layers, gathered for one call of the kernels."""

    def __init__(self, owner: Run, grads: LevelGrads) -> None:
        self.owner, self.grads = owner, grads
        self.entries: list[WeightGrad] = []
        self.positions: list[int | None] = []
        self.has_gates = False

    def add(
        self, position: int, want: LayerWants, product: Product, dl: Tensor | None, bias_parts: Tensor | None
    ) -> None:
        """A layer's; ``dl``: the gates read its input too; ``bias_parts``: the bias' gradient, in parts."""
        bias = want.bias
        if bias_parts is not None:
            like = self.owner.inputs.layers[position].bias
            assert like is not None
            self.grads.layers[position].bias = column_sums_merge(bias_parts, like)
            bias = False
        gate_weight, gate_bias = self._gates_wanted() if dl is not None else (False, False)
        if dl is not None:
            self.has_gates = True
        if not (want.weight or bias or gate_weight or gate_bias):
            return
        # Of a bias alone nothing reads the layer's input.
        a = product.d if product.a is None else product.a
        runs = self.owner.runs if gate_weight or gate_bias else NO_GATES
        given = dl if gate_weight or gate_bias else None
        self.entries.append(
            WeightGrad(a, product.d, product.columns, want.weight, bias, given, runs, gate_weight, gate_bias)
        )
        self.positions.append(position)

    def leaves_bias(self, tensor: LayerTensors, want: LayerWants, a: Tensor) -> bool:
        """Whether the library takes the weight of a first layer that read ``a``: then the launch that makes its ``d``
        adds up the bias' gradient, and nothing reads ``d`` a second time for it."""
        if tensor.bias is None or not (want.weight and want.bias):
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
        want = self.owner.wants.gate
        return want.weight, want.bias

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

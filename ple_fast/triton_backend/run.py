"""What the forward and the backward of one call share: inputs as the kernels want them, and tables."""

from __future__ import annotations

from torch import Tensor

from ple_fast_kernels import FUSED, NO_GATES

from ..call import LevelInput, Wants
from ..plan import MLPPlan
from ..saved import saved_by_kernels
from ..specs import LayerSpec
from ..state import LayerState
from ..torch_backend.layer import Layer, RowBlock
from .wiring import columns_of, gate_runs, matmul_precision, mixtures_of, source_of

IDENTITY = ("identity", 0.0)


def in_kernels(spec: LayerSpec, state: LayerState) -> bool:
    """Whether kernels do all that follows the product; else PyTorch's operators do, between two launches."""
    return state.dice is None and spec.activation.name in FUSED


def in_epilogue(spec: LayerSpec, state: LayerState) -> bool:
    """Whether the kernel that brings the gradient of the layer's output goes on: to the product, or to batch norm."""
    return in_kernels(spec, state) and (state.norm is None or state.norm.kind == "batch")


def dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


class Run:
    """What forward and backward of one call share."""

    def __init__(self, inputs: LevelInput, wants: Wants) -> None:
        self.inputs, self.wants, self.plan = inputs, wants, inputs.plan
        self.saved = saved_by_kernels(inputs.plan, wants, inputs.state.kind())
        self.x = source_of(inputs.x)
        self.gate_x = self.x if inputs.gate_x is inputs.x else source_of(inputs.gate_x)
        self.mixtures = mixtures_of(inputs.plan)
        self.precision = matmul_precision()
        gate = inputs.plan.gate
        # Without hidden layers the gates read slots; with them, each reads its own last hidden layer.
        columns = tuple(range(len(gate.slots))) if gate.layers else columns_of(gate.slots, self.gate_x.columns)
        self.runs = gate_runs(inputs.plan, columns) if gate.slots else NO_GATES
        self.gates_beside_experts = bool(gate.slots) and not gate.layers and self.gate_x is self.x
        self.offset = dense(inputs.gate.offset)

    def defers_end(self, mlp: MLPPlan) -> bool:
        """Whether the mixtures do norm, activation and dropout of the experts' last layer as they load its product."""
        if len(self.plan.blocks) > 1 or mlp is not self.plan.blocks[0]:
            return False
        spec, state = mlp.layers[-1], self.inputs.state.layers[mlp.position + len(mlp.layers) - 1]
        norm = state.norm
        return in_kernels(spec, state) and norm is not None and norm.kind == "batch" and norm.batch

    def in_operators(self, mlp: MLPPlan, i: int) -> Layer:
        """Layer ``i``, which is not ``in_kernels``: all but its product runs in PyTorch's operators."""
        number = mlp.position + i
        kind = self.inputs.state.kind().layers[number]
        return Layer(mlp, number, self.wants.layers[number], kind, self.saved.layers[number])

    def all_rows(self, kept: list[Tensor | None]) -> RowBlock:
        """The batch, for such a layer."""
        return RowBlock(slice(0, self.inputs.x.batch), kept)

    def block_rows(self, block: MLPPlan) -> slice:
        return slice(block.start, block.start + len(block.slots))

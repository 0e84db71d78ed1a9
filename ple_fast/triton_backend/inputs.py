"""What the forward and the backward of one call share: a level's input as one tensor with a column per slot, and the
tables of its plan for the kernels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ple_fast_kernels import MAX_RUN, NO_GATES, GateRuns, Mixtures, Readers

from ..call import LevelInput, Wants
from ..plan import LevelPlan, MLPPlan
from ..saved import in_kernels, saved_by_kernels
from ..slots import Slots
from ..specs import LayerSpec
from ..state import LayerState
from ..torch_backend.layer import Layer, RowBlock

IDENTITY = ("identity", 0.0)


def in_epilogue(spec: LayerSpec, state: LayerState) -> bool:
    """Whether the kernel that brings the gradient of the layer's output goes on: to the product, or to batch norm."""
    return in_kernels(spec, state) and (state.norm is None or state.norm.kind == "batch")


def dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


class Source(NamedTuple):
    """``tensor (B, S', D)``, D contiguous, and the column of every slot: 0 for all where they share one input."""

    tensor: Tensor
    columns: tuple[int, ...]
    is_copy: bool
    """The slots were separate tensors: every slot has a column of its own."""


def source_of(slots: Slots) -> Source:
    """The input without a copy, where it is one tensor or evenly spaced views of one."""
    first, count = slots.tensors[0], len(slots.places)
    if len(slots.tensors) == 1 and first.dim() == 2:
        x, columns, is_copy = first.unsqueeze(1), (0,) * count, False
    elif slots.stacked is not None:
        whole = first.dim() == 3
        columns = tuple(place.column if whole else place.tensor for place in slots.places)
        x, is_copy = slots.stacked, False
    else:
        x, columns, is_copy = torch.stack([slots.at(s) for s in range(count)], dim=1), tuple(range(count)), True
    if x.shape[2] > 1 and x.stride(2) != 1:
        x = x.contiguous()
    return Source(x, columns, is_copy)


def source_grads(slots: Slots, source: Source, dx: Tensor) -> list[Tensor | None]:
    """Gradients of the tensors of ``slots`` from that of the source, ``(B, S', D)``."""
    if source.is_copy:
        parts: list[Tensor | None] = [None] * len(slots.tensors)
        for s, place in enumerate(slots.places):
            part = dx.select(1, s)
            before = parts[place.tensor]
            parts[place.tensor] = part if before is None else before + part
        return parts
    if slots.tensors[0].dim() == 3:
        return [dx]
    return [dx.squeeze(1)] if len(slots.tensors) == 1 else list(dx.unbind(1))


@lru_cache(maxsize=1024)
def mixtures_of(plan: LevelPlan) -> Mixtures:
    """Which experts every mixture weighs."""
    t = plan.topology
    assert t.mixture_offset is not None
    sigmoid = tuple(kind == "sigmoid" for kind in t.mixture_kind or ())
    return Mixtures.build(
        t.num_experts, t.mixture_experts, t.logit_offset, t.mixture_offset, t.mixture_stop, t.mixture_output, sigmoid
    )


@lru_cache(maxsize=4096)
def readers_of(slots: tuple[int, ...], columns: tuple[int, ...], count: int) -> Readers:
    """Which members read each of ``count`` columns of the source; gates may read slots in any order."""
    return Readers.build(columns_of(slots, columns), count)


@lru_cache(maxsize=4096)
def columns_of(slots: tuple[int, ...], columns: tuple[int, ...]) -> tuple[int, ...]:
    """Column of the source that each member reads."""
    return tuple(columns[s] for s in slots)


@lru_cache(maxsize=4096)
def gate_runs(plan: LevelPlan, columns: tuple[int, ...]) -> GateRuns:
    """Runs of rows of the gates' last weight; ``columns``: what each gated mixture reads."""
    topology = plan.topology
    runs: list[list[int]] = []
    for o, column in zip(topology.gated_mixtures, columns, strict=True):
        first, count = topology.logit_offset[o], len(topology.mixture_experts[o])
        if runs and runs[-1][0] == column:
            runs[-1][2] += count
        else:
            runs.append([column, first, count])
    cut = [
        (column, first + i, min(MAX_RUN, count - i)) for column, first, count in runs for i in range(0, count, MAX_RUN)
    ]
    slot, first_rows, counts = zip(*cut, strict=True) if cut else ((), (), ())
    return GateRuns(tuple(slot), tuple(first_rows), tuple(counts))


@lru_cache(maxsize=1024)
def offset_columns(plan: LevelPlan) -> tuple[int, ...]:
    """Columns of the weights that a learned scalar is added to."""
    t = plan.topology
    assert t.mixture_offset is not None
    return tuple(i for i, marked in enumerate(m for row in t.mixture_offset for m in row) if marked)


def matmul_precision() -> str:
    """``"tf32"`` or ``"ieee"`` for float32 products on a GPU, as PyTorch is set."""
    backends = torch.backends
    for owner in (backends.cuda.matmul, backends):
        setting: str = owner.fp32_precision
        if setting != "none":
            return "tf32" if setting == "tf32" else "ieee"
    return "ieee"


class Run:
    """What forward and backward of one call share."""

    def __init__(self, inputs: LevelInput, wants: Wants) -> None:
        self.inputs, self.wants, self.plan = inputs, wants, inputs.plan
        self.kind = inputs.state.kind()
        self.saved = saved_by_kernels(inputs.plan, wants, self.kind)
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
        return Layer(mlp, number, self.wants.layers[number], self.kind.layers[number], self.saved.layers[number])

    def all_rows(self, kept: list[Tensor | None]) -> RowBlock:
        """The batch, for such a layer."""
        return RowBlock(slice(0, self.inputs.x.batch), kept)

    def block_rows(self, block: MLPPlan) -> slice:
        return slice(block.start, block.start + len(block.slots))

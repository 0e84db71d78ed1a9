"""A level, prepared once for all calls that want and keep the same: its layers, stages, and row blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from ..call import LevelInput, Wants, nothing_wanted
from ..plan import LevelPlan, MLPPlan
from ..saved import Saved, saved_by_rows
from ..slots import Groups, Place, groups_of
from ..state import LevelKind
from .gates import GateEnd
from .layer import Layer, RowBlock
from .table_in_use import limits_of

ROW_STEP = 512
"""Row blocks begin at multiples of this."""


class Stage(NamedTuple):
    """What a row block does of an MLP between two statistics of the batch."""

    resumed: Layer | None
    """Whose statistics are there now."""
    whole: tuple[Layer, ...]
    begun: Layer | None
    """Whose statistics are taken in the end."""


def _stages(layers: Sequence[Layer]) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    resumed: Layer | None = None
    whole: list[Layer] = []
    for layer in layers:
        if layer.waits:
            stages.append(Stage(resumed, tuple(whole), layer))
            resumed, whole = layer, []
        else:
            whole.append(layer)
    return (*stages, Stage(resumed, tuple(whole), None))


class MLP:
    """Stacked MLPs: the experts of a block, or all gates' hidden layers."""

    def __init__(
        self, plan: MLPPlan, wants: Wants, kind: LevelKind, saved: Saved, groups: Groups, *, reads_gate_x: bool
    ) -> None:
        self.plan = plan
        layers: list[Layer] = []
        for number in range(plan.position, plan.position + len(plan.layers)):
            below = layers[-1] if layers else None
            layers.append(
                Layer(
                    plan, number, wants.layers[number], kind.layers[number], saved.layers[number],
                    groups=groups, below=below, reads_gate_x=reads_gate_x,
                )
            )  # fmt: skip
        self.layers = tuple(layers)
        self.whole = (Stage(None, self.layers, None),)
        self.stages = _stages(layers)
        # The gradient goes down as far as it is wanted; the steps of its stages are those of forward, backwards.
        reached = tuple(reversed([layer for layer in layers if layer.want.output]))
        self.whole_backward = (Stage(None, reached, None),)
        self.stages_backward = _stages(reached)
        self.goes_back = layers[-1].want.output if layers else False


class Level:
    """A level, prepared once for all calls that want and keep the same."""

    def __init__(self, plan: LevelPlan, wants: Wants, kind: LevelKind, groups: Sequence[Groups]) -> None:
        self.plan, self.wants = plan, wants
        self.saved = saved_by_rows(plan, wants, kind)
        *experts, gate = (
            MLP(mlp, wants, kind, self.saved, own, reads_gate_x=mlp is plan.gate)
            for mlp, own in zip(plan.mlps(), groups, strict=True)
        )
        self.experts = tuple(experts)
        self.hidden = gate if gate.layers else None
        last = gate.layers[-1] if gate.layers else None
        self.gate = GateEnd(plan, wants, self.saved, kind.gate_norm, groups[-1], last) if plan.gate.slots else None
        self.waits = "batch" in (kind.gate_norm, *(own.norm for own in kind.layers))
        """Row blocks wait for each other, where there are several; with such dice there is one."""
        self.has_batch_dice = any(own.dice == "batch" for own in kind.layers)
        self.width = sum(spec.units * len(mlp.slots) for mlp in plan.mlps() for spec in mlp.layers)
        """Activations of one row, over all layers."""

    def blocks(self, inputs: LevelInput) -> list[RowBlock]:
        """All rows in blocks, which have kept nothing yet."""
        size = len(self.saved.values)
        return [RowBlock(rows, [None] * size) for rows in row_blocks(inputs, self)]


@lru_cache(maxsize=4096)
def _prepared(
    plan: LevelPlan,
    places: tuple[Place, ...],
    gate_places: tuple[Place, ...],
    wants: Wants,
    kind: LevelKind,
) -> Level:
    groups = [groups_of(places, block.slots) for block in plan.blocks]
    return Level(plan, wants, kind, [*groups, groups_of(gate_places, plan.gate.slots)])


def prepared(inputs: LevelInput, wants: Wants | None) -> Level:
    """The level of a call; without ``wants`` no backward follows."""
    plan = inputs.plan
    wants = nothing_wanted(plan) if wants is None else wants
    return _prepared(plan, inputs.x.places, inputs.gate_x.places, wants, inputs.state.kind())


def row_blocks(inputs: LevelInput, level: Level) -> list[slice]:
    """Blocks of rows; the whole batch where dice's statistics, or a norm's in low precision, run over all of it."""
    batch, weight = inputs.x.batch, inputs.layers[0].weight
    if batch <= ROW_STEP or level.has_batch_dice:
        return [slice(0, batch)]
    if level.waits and weight.dtype not in (torch.float32, torch.float64):
        return [slice(0, batch)]
    size = limits_of(weight).block_values // level.width
    size = max(ROW_STEP, size // ROW_STEP * ROW_STEP)
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]

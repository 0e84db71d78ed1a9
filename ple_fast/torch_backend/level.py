"""A whole extraction network, forward and backward by hand, in blocks of rows that stay in cache.

``level_forward`` and ``level_backward`` see plain tensors; autograd is not involved. Between them lies a flat tuple of
tensors, so that autograd can guard it, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..plan import GateTensors, LayerTensors, LevelPlan, LevelState, MLPPlan, NormState
from . import gate_combine as gates
from .grouped_linear import slots_linear_backward, slots_linear_forward
from .mlp import KEPT_WIDTH, LayerKept, LayerNeeds, accumulate, mlp_backward, mlp_forward, needs_of
from .norms import BatchNormSaved, batch_norm_backward, batch_norm_forward
from .products import linear
from .slots import Groups, Place, SlotGrads, Slots, rows_of

BLOCK_BYTES = 13 << 20
"""Activations of a row block take about this much."""
ROW_STEP = 512
"""Row blocks begin at multiples of this."""


class LevelInput(NamedTuple):
    """Everything a level computes from."""

    plan: LevelPlan
    layers: Sequence[LayerTensors]
    gate: GateTensors
    state: LevelState
    x: Slots
    gate_x: Slots


class LevelNeeds(NamedTuple):
    """Which gradients backward will be asked for."""

    mlps: list[list[LayerNeeds]]
    """Per block of experts, then the gates' hidden layers."""
    gate: GateTensors
    """A bool in the place of each tensor."""
    x: Sequence[bool]
    gate_x: Sequence[bool]
    logits: bool
    """The gradient must reach the logits."""

    @property
    def weights(self) -> bool:
        """The gradient must reach the mixtures' weights."""
        return self.logits or bool(self.gate.offset)

    @property
    def experts(self) -> bool:
        """The gradient must reach the experts' outputs."""
        return any(needs[-1].output for needs in self.mlps[:-1])


class BlockKept(NamedTuple):
    """What backward needs of one block of rows."""

    mlps: list[list[LayerKept]]
    h: Tensor | None
    """Outputs of all experts."""
    gated: Tensor | None
    """Softmax of the gated mixtures."""
    weights: Tensor | None
    """All mixtures' dense weights."""
    hidden: Tensor | None
    """Output of the gates' hidden layers."""
    logits: Tensor | None
    """Input of the norm of the logits."""
    mean: Tensor | None
    var: Tensor | None


@lru_cache(maxsize=1024)
def level_needs(
    plan: LevelPlan,
    places: tuple[Place, ...],
    gate_places: tuple[Place, ...],
    x: tuple[bool, ...],
    gate_x: tuple[bool, ...],
    tensors: tuple[bool, ...],
) -> LevelNeeds:
    """Needs from those of the input tensors, the gate inputs and the flat tuple of the level's tensors.

    ``places``: of the slots among the input tensors; ``gate_places``: among the gate inputs.
    """
    rows = [tensors[i : i + 5] for i in range(0, len(tensors), 5)]
    mlps, source = [], (places, x)
    for mlp in plan.mlps():
        if mlp is plan.gate:
            source = (gate_places, gate_x)
        at, needed = source
        wanted = any(needed[at[slot].tensor] for slot in mlp.slots)
        mlps.append(needs_of(len(mlp.layers), rows[mlp.position : mlp.position + len(mlp.layers)], wanted))
    gate = GateTensors(*rows[-1])  # type: ignore[arg-type]  # bools in the place of tensors
    below = mlps[-1][-1].output if mlps[-1] else any(gate_x[gate_places[slot].tensor] for slot in plan.gate.slots)
    return LevelNeeds(mlps, gate, x, gate_x, below or any(rows[-1][:4]))


def _no_needs(plan: LevelPlan) -> LevelNeeds:
    """Needs of a forward pass that no backward follows."""
    nothing = (False,) * 5
    mlps = [needs_of(len(mlp.layers), [nothing] * len(mlp.layers), False) for mlp in plan.mlps()]
    return LevelNeeds(mlps, GateTensors(*nothing), (), (), False)  # type: ignore[arg-type]  # bools for tensors


class Tables(NamedTuple):
    """What follows from a plan alone."""

    no_needs: LevelNeeds
    width: int
    """Activations of one row, over all layers."""


@lru_cache(maxsize=1024)
def tables(plan: LevelPlan) -> Tables:
    width = sum(spec.units * len(mlp.slots) for mlp in plan.mlps() for spec in mlp.layers)
    return Tables(_no_needs(plan), width)


def row_blocks(inputs: LevelInput) -> list[slice]:
    """Blocks of rows; the whole batch where statistics, or sums in low precision, run over all of it."""
    batch, weight = inputs.x.batch, inputs.layers[0].weight
    if batch <= ROW_STEP or inputs.state.uses_batch or weight.dtype not in (torch.float32, torch.float64):
        return [slice(0, batch)]
    size = BLOCK_BYTES // (tables(inputs.plan).width * weight.element_size())
    size = max(ROW_STEP, size // ROW_STEP * ROW_STEP)
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


@lru_cache(maxsize=4096)
def _gate_groups(plan: LevelPlan, groups: Groups) -> Groups:
    """Rows of the gates' last weight by the slot that they read, where gates have no hidden layer."""
    topology, runs = plan.topology, []
    for slot, first, last in groups:
        start, end = topology.gated_mixtures[first], topology.gated_mixtures[last - 1]
        stop = topology.logit_offset[end] + len(topology.mixture_experts[end])
        runs.append((slot, topology.logit_offset[start], stop))
    return tuple(runs)


def _mixture_rows(plan: LevelPlan) -> list[tuple[int, int, int]]:
    """Rows of the gates' last weight by gated mixture."""
    topology = plan.topology
    starts = [topology.logit_offset[o] for o in topology.gated_mixtures]
    return [
        (i, start, stop) for i, (start, stop) in enumerate(zip(starts, [*starts[1:], topology.num_logits], strict=True))
    ]


def layers_of(inputs: LevelInput, mlp: MLPPlan) -> slice:
    return slice(mlp.position, mlp.position + len(mlp.layers))


class Run:
    """One forward or backward pass of a level: what all its row blocks share."""

    def __init__(self, inputs: LevelInput, needs: LevelNeeds) -> None:
        self.inputs, self.needs = inputs, needs
        plan = inputs.plan
        self.groups = [inputs.x.groups(mlp.slots) for mlp in plan.blocks]
        self.groups.append(inputs.gate_x.groups(plan.gate.slots))
        self.gate_groups: Groups = (
            () if plan.gate.layers or not plan.gate.slots else _gate_groups(plan, self.groups[-1])
        )

    def forward(self, rows: slice, *, again: bool = False) -> tuple[Tensor, Tensor, BlockKept]:
        """``y (rows, O, H)``, dense weights ``(rows, O, E)``, and what backward needs of these rows.

        ``again``: this forward repeats another, and running statistics stay.
        """
        inputs, needs = self.inputs, self.needs
        plan, state = inputs.plan, inputs.state
        states = still(state) if again else state
        mlps, parts = [], []
        for block, groups, need in zip(plan.blocks, self.groups, needs.mlps, strict=False):
            part = layers_of(inputs, block)
            done, kept = mlp_forward(
                block, inputs.layers[part], states.layers[part], inputs.x, groups, rows, need, state.seed
            )
            mlps.append(kept)
            parts.append(done)
        h = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        gated, hidden, logits, mean, var, kept = self._gate_forward(rows, states)
        mlps.append(kept)
        weights = gates.mixture_weights(plan, gated, inputs.gate.offset, h.shape[0], h)
        y = gates.combine(weights, h)
        keep = BlockKept(
            mlps,
            h if needs.weights else None,
            gated if needs.logits else None,
            weights if needs.experts else None,
            hidden if needs.logits and needs.gate.weight else None,
            logits if needs.logits else None,
            mean if needs.logits else None,
            var if needs.logits else None,
        )
        return y, weights, keep

    def _gate_forward(
        self, rows: slice, states: LevelState
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, list[LayerKept]]:
        inputs, plan = self.inputs, self.inputs.plan
        gate = inputs.gate
        if gate.weight is None:
            return None, None, None, None, None, []
        hidden: Tensor | None = None
        kept: list[LayerKept] = []
        if plan.gate.layers:
            part = layers_of(inputs, plan.gate)
            hidden, kept = mlp_forward(
                plan.gate, inputs.layers[part], states.layers[part], inputs.gate_x, self.groups[-1], rows,
                self.needs.mlps[-1], inputs.state.seed,
            )  # fmt: skip
            logits = torch.empty((hidden.shape[0], gate.weight.shape[0]), dtype=hidden.dtype, device=hidden.device)
            for i, start, stop in _mixture_rows(plan):
                bias = None if gate.bias is None else gate.bias[start:stop]
                logits[:, start:stop] = linear(hidden[:, i], gate.weight[start:stop], bias)
        else:
            bias = None if gate.bias is None else gate.bias.view(-1, 1)
            logits = slots_linear_forward(
                inputs.gate_x, rows, self.gate_groups, gate.weight.unsqueeze(1), bias
            ).squeeze(2)
        raw, saved = None, BatchNormSaved(None, None)
        if states.gate_norm is not None:
            raw = logits.unsqueeze(1)
            normed, saved = batch_norm_forward(raw, gate.norm_weight, gate.norm_bias, states.gate_norm)
            logits = normed.squeeze(1)
        if plan.gate_spec.temperature != 1.0:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / plan.gate_spec.temperature
        return gates.gate_softmax(plan, logits), hidden, raw, saved.mean, saved.var, kept

    def backward(
        self,
        rows: slice,
        kept: BlockKept,
        dy: Tensor | None,
        dlisted: Tensor | None,
        grads: list[list[Tensor | None]],
        dx: SlotGrads,
        dgate_x: SlotGrads,
    ) -> None:
        """Accumulate every gradient of these rows into ``grads`` (per layer, then the gates' end), dx and dgate_x."""
        inputs, needs, plan = self.inputs, self.needs, self.inputs.plan
        dweights = None
        if needs.weights:
            if dy is not None:
                assert kept.h is not None
                wide = torch.promote_types(dy.dtype, torch.float32)
                dweights = torch.bmm(rows_of(dy, rows).to(wide), kept.h.to(wide).transpose(1, 2))
            if dlisted is not None:
                listed = gates.listed_weights_backward(plan, rows_of(dlisted, rows))
                dweights = listed if dweights is None else dweights.add_(listed)
        if dy is not None and needs.experts:
            assert kept.weights is not None
            dh = torch.bmm(kept.weights.transpose(1, 2), rows_of(dy, rows).to(kept.weights.dtype)).to(dy.dtype)
            for block, groups, need, keep in zip(plan.blocks, self.groups, needs.mlps, kept.mlps, strict=False):
                part = layers_of(inputs, block)
                d = dh
                if len(plan.blocks) > 1:
                    d = dh[:, block.start : block.start + len(block.slots)].contiguous()
                mlp_backward(
                    block, inputs.layers[part], inputs.state.layers[part], inputs.x, groups, rows, need,
                    inputs.state.seed, keep, d, grads[part], dx,
                )  # fmt: skip
        if dweights is None:
            return
        if needs.gate.offset:
            assert inputs.gate.offset is not None
            doffset = gates.offset_grad(plan, dweights, inputs.gate.offset.dtype)
            accumulate(grads[-1], 4, doffset)
        if needs.logits:
            assert kept.gated is not None
            dlogits = gates.gate_softmax_backward(plan, gates.gated_part(plan, dweights), kept.gated)
            if plan.gate_spec.temperature != 1.0:
                dlogits = dlogits / plan.gate_spec.temperature
            dlogits = dlogits.to(inputs.gate_x.tensors[0].dtype)
            self._gate_backward(rows, kept, dlogits, grads, dgate_x)

    def _gate_backward(
        self,
        rows: slice,
        kept: BlockKept,
        d: Tensor,
        grads: list[list[Tensor | None]],
        dgate_x: SlotGrads,
    ) -> None:
        inputs, needs, plan = self.inputs, self.needs, self.inputs.plan
        gate, own = inputs.gate, grads[-1]
        assert gate.weight is not None
        if inputs.state.gate_norm is not None:
            assert kept.logits is not None
            normed, dw, db = batch_norm_backward(
                d.unsqueeze(1), kept.logits, gate.norm_weight, inputs.state.gate_norm,
                BatchNormSaved(kept.mean, kept.var), affine=bool(needs.gate.norm_weight or needs.gate.norm_bias),
            )  # fmt: skip
            d = normed.squeeze(1)
            accumulate(own, 2, dw)
            accumulate(own, 3, db)
        if gate.bias is not None and needs.gate.bias:
            accumulate(own, 1, d.sum(0))
        wanted = bool(needs.gate.weight)
        if not plan.gate.layers:
            dweight = slots_linear_backward(
                inputs.gate_x, rows, self.gate_groups, d.unsqueeze(2), gate.weight.unsqueeze(1), dgate_x,
                weight_grad=wanted,
            )  # fmt: skip
            accumulate(own, 0, None if dweight is None else dweight.squeeze(1))
            return
        below = needs.mlps[-1][-1].output
        dweight = torch.empty_like(gate.weight, memory_format=torch.contiguous_format) if wanted else None
        dhidden = torch.empty((d.shape[0], len(plan.gate.slots), gate.weight.shape[1]), dtype=d.dtype, device=d.device)
        for i, start, stop in _mixture_rows(plan):
            if dweight is not None:
                assert kept.hidden is not None
                torch.mm(d[:, start:stop].t(), kept.hidden[:, i], out=dweight[start:stop])
            if below:
                torch.mm(d[:, start:stop], gate.weight[start:stop], out=dhidden[:, i])
        accumulate(own, 0, dweight)
        if below:
            part = layers_of(inputs, plan.gate)
            mlp_backward(
                plan.gate, inputs.layers[part], inputs.state.layers[part], inputs.gate_x, self.groups[-1], rows,
                needs.mlps[-1], inputs.state.seed, kept.mlps[-1], dhidden, grads[part], dgate_x,
            )  # fmt: skip


def still(state: LevelState) -> LevelState:
    """The state of a forward that is run again: batch statistics are taken, running ones stay."""

    def norm(n: NormState | None) -> NormState | None:
        return n._replace(factor=0.0, running_mean=None, running_var=None) if n is not None and n.batch else n

    layers = tuple(s._replace(norm=norm(s.norm), dice=norm(s.dice)) for s in state.layers)
    return state._replace(layers=layers, gate_norm=norm(state.gate_norm))


def level_forward(
    inputs: LevelInput, needs: LevelNeeds | None, *, listed: bool
) -> tuple[Tensor, Tensor | None, list[BlockKept]]:
    """``y (B, O, H)``, the listed weights ``(B, num_weights)`` if asked for, and what backward needs.

    Without ``needs`` nothing is kept.
    """
    run = Run(inputs, tables(inputs.plan).no_needs if needs is None else needs)
    blocks = row_blocks(inputs)
    plan = inputs.plan
    weight = inputs.layers[0].weight
    units = plan.blocks[0].layers[-1].units
    y = all_weights = None
    if len(blocks) > 1:
        y = torch.empty((inputs.x.batch, plan.topology.num_mixtures, units), dtype=weight.dtype, device=weight.device)
        wide = torch.promote_types(weight.dtype, torch.float32)
        if listed:
            all_weights = torch.empty((inputs.x.batch, plan.topology.num_weights), dtype=wide, device=weight.device)
    kept = []
    for rows in blocks:
        part, weights, keep = run.forward(rows)
        if needs is not None:
            kept.append(keep)
        if listed:
            shown = gates.listed_weights(plan, weights)
            if all_weights is None:
                all_weights = shown
            else:
                all_weights[rows] = shown
        if y is None:
            y = part
        else:
            y[rows] = part
    assert y is not None
    return y, all_weights, kept


def level_backward(
    inputs: LevelInput, needs: LevelNeeds, kept: list[BlockKept], dy: Tensor | None, dlisted: Tensor | None
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Gradients of the inputs, the gate inputs and the flat tuple. Without ``kept`` the forward is run again."""
    run = Run(inputs, needs)
    blocks = row_blocks(inputs)
    grads: list[list[Tensor | None]] = [[None] * 5 for _ in range(inputs.plan.num_layers + 1)]
    dx = SlotGrads(inputs.x, needs.x)
    dgate_x = dx if inputs.gate_x is inputs.x else SlotGrads(inputs.gate_x, needs.gate_x)
    for i, rows in enumerate(blocks):
        keep = kept[i] if kept else run.forward(rows, again=True)[2]
        run.backward(rows, keep, dy, dlisted, grads, dx, dgate_x)
    dgate = [] if dgate_x is dx else dgate_x.finish(blocks)
    # A product may leave its result transposed.
    flat = [None if grad is None else grad.contiguous() for row in grads for grad in row]
    return dx.finish(blocks), dgate, flat


def flatten_kept(kept: Sequence[BlockKept]) -> list[Tensor | None]:
    """The tensors of ``kept``, for ``save_for_backward``."""
    return [t for block in kept for t in (*(t for mlp in block.mlps for layer in mlp for t in layer), *block[1:])]


def unflatten_kept(plan: LevelPlan, flat: Sequence[Tensor | None]) -> list[BlockKept]:
    """The inverse of ``flatten_kept``."""
    kept, i = [], 0
    tail = len(BlockKept._fields) - 1
    while i < len(flat):
        mlps = []
        for mlp in plan.mlps():
            layers = []
            for _ in mlp.layers:
                layers.append(LayerKept(*flat[i : i + KEPT_WIDTH]))
                i += KEPT_WIDTH
            mlps.append(layers)
        kept.append(BlockKept(mlps, *flat[i : i + tail]))
        i += tail
    return kept

"""A whole extraction network, forward and backward by hand, in blocks of rows that stay in cache.

``level_forward`` and ``level_backward`` see plain tensors; autograd is not involved. Between them lies a flat tuple of
tensors, so that autograd can guard it, and nothing else. Row blocks are independent of each other but for batch norm,
where each waits for the statistics of all (``barriers.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..grads import LevelGrads, plus
from ..plan import GateTensors, LayerTensors, LevelPlan, LevelState, MLPPlan, NormState
from . import gate_combine as gates
from .barriers import Steps, run_blocks, run_steps, together
from .folding import fold_norms
from .grouped_linear import slots_linear_backward, slots_linear_forward
from .mlp import (
    KEPT_WIDTH,
    LayerKept,
    LayerNeeds,
    Replayed,
    is_replayed,
    mlp_backward,
    mlp_forward,
    needs_of,
    replay,
)
from .norms import BatchNormSaved, Shared, batch_norm_backward_steps, batch_norm_steps
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
    """Outputs of all experts; None where they are replayed, too."""
    gated: Tensor | None
    """Softmax of the gated mixtures."""
    weights: Tensor | None
    """All mixtures' dense weights."""
    hidden: Tensor | None
    """Output of the gates' hidden layers; None where it is replayed, too."""
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
    has_norms: bool
    """Of layers or of the logits."""


@lru_cache(maxsize=1024)
def tables(plan: LevelPlan) -> Tables:
    width = sum(spec.units * len(mlp.slots) for mlp in plan.mlps() for spec in mlp.layers)
    normed = any(spec.norm is not None for mlp in plan.mlps() for spec in mlp.layers)
    return Tables(_no_needs(plan), width, normed or plan.gate_spec.logits_norm is not None)


def row_blocks(inputs: LevelInput) -> list[slice]:
    """Blocks of rows; the whole batch where dice's statistics, or sums in low precision, run over all of it."""
    batch, weight = inputs.x.batch, inputs.layers[0].weight
    if batch <= ROW_STEP or weight.dtype not in (torch.float32, torch.float64):
        return [slice(0, batch)]
    if any(state.dice is not None and state.dice.batch for state in inputs.state.layers):
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
        self.blocks = row_blocks(inputs)
        self.waits = len(self.blocks) > 1 and inputs.state.uses_batch
        """Row blocks wait for each other."""
        self.groups = [inputs.x.groups(mlp.slots) for mlp in plan.blocks]
        self.groups.append(inputs.gate_x.groups(plan.gate.slots))
        self.gate_groups: Groups = (
            () if plan.gate.layers or not plan.gate.slots else _gate_groups(plan, self.groups[-1])
        )

    def sharing(self) -> Shared | None:
        """For one pass over all row blocks, where they wait for each other."""
        return Shared() if self.waits else None

    def forward(
        self, rows: slice, shared: Shared | None, *, again: bool = False
    ) -> Steps[tuple[Tensor, Tensor, BlockKept]]:
        """``y (rows, O, H)``, dense weights ``(rows, O, E)``, and what backward needs of these rows.

        ``again``: this forward repeats another, and running statistics stay.
        """
        inputs, needs = self.inputs, self.needs
        plan, state = inputs.plan, inputs.state
        states = still(state) if again else state
        steps: list[Steps[Any]] = [
            self._mlp_forward(mlp, states, inputs.x, groups, rows, need, shared)
            for mlp, groups, need in zip(plan.blocks, self.groups, needs.mlps, strict=False)
        ]
        *parts, gate = yield from together([*steps, self._gate_forward(rows, states, shared)])
        h = parts[0][0] if len(parts) == 1 else torch.cat([done for done, _ in parts], dim=1)
        gated, hidden, logits, mean, var, kept = gate
        weights = gates.mixture_weights(plan, gated, inputs.gate.offset, h.shape[0], h)
        y = gates.combine(plan, weights, h)
        keeps_hidden = (
            hidden is not None
            and needs.logits
            and needs.gate.weight
            and not self._replays([plan.gate], needs.mlps[-1:])
        )
        keep = BlockKept(
            [*(kept for _, kept in parts), kept],
            h if needs.weights and not self._replays(plan.blocks, needs.mlps[:-1]) else None,
            gated if needs.logits else None,
            weights if needs.experts else None,
            hidden if keeps_hidden else None,
            logits if needs.logits else None,
            mean if needs.logits else None,
            var if needs.logits else None,
        )
        return y, weights, keep

    def _replays(self, mlps: Sequence[MLPPlan], needs: Sequence[list[LayerNeeds]]) -> bool:
        """Whether the outputs of all these MLPs are computed again in backward."""
        states = self.inputs.state.layers
        lasts = [states[mlp.position + len(mlp.layers) - 1] for mlp in mlps]
        return all(is_replayed(state, need[-1]) for state, need in zip(lasts, needs, strict=True))

    def _mlp_forward(
        self,
        mlp: MLPPlan,
        states: LevelState,
        x: Slots,
        groups: Groups,
        rows: slice,
        needs: list[LayerNeeds],
        shared: Shared | None,
    ) -> Steps[tuple[Tensor, list[LayerKept]]]:
        part = layers_of(self.inputs, mlp)
        return mlp_forward(
            mlp, self.inputs.layers[part], states.layers[part], x, groups, rows, needs, self.inputs.state.seed, shared
        )

    def _gate_forward(
        self, rows: slice, states: LevelState, shared: Shared | None
    ) -> Steps[tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, list[LayerKept]]]:
        inputs, plan = self.inputs, self.inputs.plan
        gate = inputs.gate
        if gate.weight is None:
            return None, None, None, None, None, []
        hidden: Tensor | None = None
        kept: list[LayerKept] = []
        if plan.gate.layers:
            hidden, kept = yield from self._mlp_forward(
                plan.gate, states, inputs.gate_x, self.groups[-1], rows, self.needs.mlps[-1], shared
            )
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
            normed, saved = yield from batch_norm_steps(
                raw, gate.norm_weight, gate.norm_bias, states.gate_norm, shared, plan.num_layers
            )
            logits = normed.squeeze(1)
        if plan.gate_spec.temperature != 1.0:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / plan.gate_spec.temperature
        return gates.gate_softmax(plan, logits), hidden, raw, saved.mean, saved.var, kept

    def backward(
        self,
        rows: slice,
        shared: Shared | None,
        kept: BlockKept,
        dy: Tensor | None,
        dlisted: Tensor | None,
        grads: LevelGrads,
        dx: SlotGrads,
        dgate_x: SlotGrads,
    ) -> Steps[None]:
        """Accumulate every gradient of these rows into ``grads``, dx and dgate_x."""
        needs, plan = self.needs, self.inputs.plan
        dweights, last = self._weights_grad(rows, kept, dy, dlisted)
        steps: list[Steps[None]] = []
        if dy is not None and needs.experts:
            steps += self._experts_backward(rows, shared, kept, last, dy, grads, dx)
        last.clear()  # nothing that is large outlives a barrier
        if dweights is not None and needs.gate.offset:
            assert self.inputs.gate.offset is not None
            doffset = gates.offset_grad(plan, dweights, self.inputs.gate.offset.dtype)
            grads.gate.offset = plus(grads.gate.offset, doffset)
        if dweights is not None and needs.logits:
            assert kept.gated is not None
            dlogits = gates.gate_softmax_backward(plan, gates.gated_part(plan, dweights), kept.gated)
            if plan.gate_spec.temperature != 1.0:
                dlogits = dlogits / plan.gate_spec.temperature
            dlogits = dlogits.to(self.inputs.gate_x.tensors[0].dtype)
            steps.append(self._gate_backward(rows, shared, kept, dlogits, grads, dgate_x))
        yield from together(steps)

    def _weights_grad(
        self, rows: slice, kept: BlockKept, dy: Tensor | None, dlisted: Tensor | None
    ) -> tuple[Tensor | None, list[Replayed | None]]:
        """Gradient of the dense weights ``(rows, O, E)`` if wanted, and what was replayed for it, per block."""
        plan = self.inputs.plan
        last: list[Replayed | None] = [None] * len(plan.blocks)
        dweights = None
        if self.needs.weights and dy is not None:
            h = kept.h
            if h is None:
                lasts = [self._replay_last(mlp, keep) for mlp, keep in zip(plan.blocks, kept.mlps, strict=False)]
                last = [*lasts]
                parts = [replayed.output for replayed in lasts]
                h = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            wide = torch.promote_types(dy.dtype, torch.float32)
            dweights = torch.bmm(rows_of(dy, rows).to(wide), h.to(wide).transpose(1, 2))
        if self.needs.weights and dlisted is not None:
            listed = gates.listed_weights_backward(plan, rows_of(dlisted, rows))
            dweights = listed if dweights is None else dweights.add_(listed)
        return dweights, last

    def _experts_backward(
        self,
        rows: slice,
        shared: Shared | None,
        kept: BlockKept,
        last: Sequence[Replayed | None],
        dy: Tensor,
        grads: LevelGrads,
        dx: SlotGrads,
    ) -> list[Steps[None]]:
        inputs, blocks = self.inputs, self.inputs.plan.blocks
        assert kept.weights is not None
        dh = gates.combine_backward(inputs.plan, kept.weights, rows_of(dy, rows))
        steps = []
        for j, mlp in enumerate(blocks):
            d = dh if len(blocks) == 1 else dh[:, mlp.start : mlp.start + len(mlp.slots)].contiguous()
            steps.append(
                self._mlp_backward(
                    mlp, inputs.x, self.groups[j], rows, self.needs.mlps[j], kept.mlps[j], last[j], d, grads, dx, shared
                )
            )
        return steps

    def _replay_last(self, mlp: MLPPlan, kept: list[LayerKept]) -> Replayed:
        last = mlp.position + len(mlp.layers) - 1
        return replay(mlp.layers[-1], self.inputs.layers[last], self.inputs.state.layers[last], kept[-1])

    def _mlp_backward(
        self,
        mlp: MLPPlan,
        x: Slots,
        groups: Groups,
        rows: slice,
        needs: list[LayerNeeds],
        kept: list[LayerKept],
        last: Replayed | None,
        d: Tensor,
        grads: LevelGrads,
        dx: SlotGrads,
        shared: Shared | None,
    ) -> Steps[None]:
        part, inputs = layers_of(self.inputs, mlp), self.inputs
        return mlp_backward(
            mlp, inputs.layers[part], inputs.state.layers[part], x, groups, rows, needs, inputs.state.seed, kept, last,
            d, grads.layers[part], dx, shared,
        )  # fmt: skip

    def _gate_backward(
        self,
        rows: slice,
        shared: Shared | None,
        kept: BlockKept,
        d: Tensor,
        grads: LevelGrads,
        dgate_x: SlotGrads,
    ) -> Steps[None]:
        inputs, needs, plan = self.inputs, self.needs, self.inputs.plan
        gate, own = inputs.gate, grads.gate
        assert gate.weight is not None
        if inputs.state.gate_norm is not None:
            assert kept.logits is not None
            normed, dw, db = yield from batch_norm_backward_steps(
                d.unsqueeze(1), kept.logits, gate.norm_weight, inputs.state.gate_norm,
                BatchNormSaved(kept.mean, kept.var), shared, plan.num_layers,
                affine=bool(needs.gate.norm_weight or needs.gate.norm_bias),
            )  # fmt: skip
            d = normed.squeeze(1)
            own.norm_weight = plus(own.norm_weight, dw)
            own.norm_bias = plus(own.norm_bias, db)
        if gate.bias is not None and needs.gate.bias:
            own.bias = plus(own.bias, d.sum(0))
        wanted = bool(needs.gate.weight)
        if not plan.gate.layers:
            dweight = slots_linear_backward(
                inputs.gate_x, rows, self.gate_groups, d.unsqueeze(2), gate.weight.unsqueeze(1), dgate_x,
                weight_grad=wanted,
            )  # fmt: skip
            own.weight = plus(own.weight, None if dweight is None else dweight.squeeze(1))
            return
        below = needs.mlps[-1][-1].output
        hidden, last = kept.hidden, None
        if wanted and hidden is None:
            last = self._replay_last(plan.gate, kept.mlps[-1])
            hidden = last.output
        dweight = torch.empty_like(gate.weight, memory_format=torch.contiguous_format) if wanted else None
        dhidden = torch.empty((d.shape[0], len(plan.gate.slots), gate.weight.shape[1]), dtype=d.dtype, device=d.device)
        for i, start, stop in _mixture_rows(plan):
            if dweight is not None:
                assert hidden is not None
                torch.mm(d[:, start:stop].t(), hidden[:, i], out=dweight[start:stop])
            if below:
                torch.mm(d[:, start:stop], gate.weight[start:stop], out=dhidden[:, i])
        own.weight = plus(own.weight, dweight)
        if below:
            yield from self._mlp_backward(
                plan.gate, inputs.gate_x, self.groups[-1], rows, needs.mlps[-1], kept.mlps[-1], last, dhidden, grads,
                dgate_x, shared,
            )  # fmt: skip


def still(state: LevelState) -> LevelState:
    """The state of a forward that is run again: batch statistics are taken, running ones stay."""

    def norm(n: NormState | None) -> NormState | None:
        return n._replace(factor=0.0, running_mean=None, running_var=None) if n is not None and n.batch else n

    layers = tuple(s._replace(norm=norm(s.norm), dice=norm(s.dice)) for s in state.layers)
    return state._replace(layers=layers, gate_norm=norm(state.gate_norm))


def level_forward(
    inputs: LevelInput,
    needs: LevelNeeds | None,
    *,
    listed: bool,
    take: Callable[[slice, BlockKept], None] | None = None,
) -> tuple[Tensor, Tensor | None, list[BlockKept]]:
    """``y (B, O, H)``, the listed weights ``(B, num_weights)`` if asked for, and what backward needs.

    Without ``needs`` nothing is kept, and norms that can be folded are. ``take``: gets the rows of each block, and what
    they keep, as soon as it is there; the list is then empty.
    """
    if needs is None and tables(inputs.plan).has_norms:
        layers, gate, state = fold_norms(inputs.plan, inputs.layers, inputs.gate, inputs.state, inputs.x.batch)
        inputs = inputs._replace(layers=layers, gate=gate, state=state)
    run = Run(inputs, tables(inputs.plan).no_needs if needs is None else needs)
    blocks = run.blocks
    plan = inputs.plan
    weight = inputs.layers[0].weight
    units = plan.blocks[0].layers[-1].units
    y = all_weights = None
    if len(blocks) > 1:
        y = torch.empty((inputs.x.batch, plan.topology.num_mixtures, units), dtype=weight.dtype, device=weight.device)
        wide = torch.promote_types(weight.dtype, torch.float32)
        if listed:
            all_weights = torch.empty((inputs.x.batch, plan.topology.num_weights), dtype=wide, device=weight.device)
    shared = run.sharing()
    steps = [run.forward(rows, shared) for rows in blocks]
    done = run_blocks(steps) if run.waits else map(run_steps, steps)
    kept = []
    for rows, (part, weights, keep) in zip(blocks, done, strict=True):
        if take is not None:
            take(rows, keep)
        elif needs is not None:
            kept.append(keep)
        del keep  # before the next block is computed, if it has been taken
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
    blocks = run.blocks
    grads = LevelGrads(inputs.plan.num_layers)
    dx = SlotGrads(inputs.x, needs.x)
    dgate_x = dx if inputs.gate_x is inputs.x else SlotGrads(inputs.gate_x, needs.gate_x)
    if run.waits and not kept:
        shared = run.sharing()
        kept = [keep for _, _, keep in run_blocks([run.forward(rows, shared, again=True) for rows in blocks])]
    shared, steps = run.sharing(), []
    for i, rows in enumerate(blocks):
        keep = kept[i] if kept else run_steps(run.forward(rows, None, again=True))[2]
        step = run.backward(rows, shared, keep, dy, dlisted, grads, dx, dgate_x)
        if run.waits:
            steps.append(step)
        else:
            run_steps(step)
    run_blocks(steps)
    dgate = [] if dgate_x is dx else dgate_x.finish(blocks)
    # A product may leave its result transposed.
    flat = [None if grad is None else grad.contiguous() for grad in grads.flat()]
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

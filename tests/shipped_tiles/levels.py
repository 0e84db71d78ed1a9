"""Work of the kernels of a level: fused ones, and those that mix."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ple_fast import Topology
from ple_fast_kernels import fused_level_fwd, fused_two_layers_fwd, gate_combine_bwd, gate_combine_fwd, wide_of
from tests.kernel_helpers import chain, guarded, linears, mix, mixtures_of, softmaxes, values
from tests.shipped_tiles.cases import NONE, RELU, WIDTHS, Case, Work

ONE_LAYER, TWO_LAYERS = Topology.ple(2, 1, 1, last=True), Topology.ple(1, 2, 1, last=True)
"""Few mixtures, so that every tile holds their sums."""


def _gate_logits(t: Topology, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    parts = []
    for o, mixed in enumerate(t.mixture_experts):
        rows = slice(t.logit_offset[o], t.logit_offset[o] + len(mixed))
        parts.append(F.linear(x[:, t.mixture_slot[o]], weight[rows], bias[rows]))
    return torch.cat(parts, 1).to(wide_of(x.dtype))


def _level(t: Topology, widths: tuple[int, ...], rows: int, case: Case, device: torch.device) -> list[Any]:
    """Input, weights, biases, the gates' weight and bias of a level of experts of these widths."""
    assert t.num_slots is not None
    weights, biases = [], []
    for i, (depth, units) in enumerate(pairwise(widths)):
        weights.append(values(t.num_experts, units, depth, device=device, seed=i).mul(depth**-0.5).to(case.dtype))
        biases.append(values(t.num_experts, units, dtype=case.dtype, device=device, seed=i))
    x = values(rows, t.num_slots, widths[0], dtype=case.dtype, device=device)
    gate_w = values(t.num_logits, widths[0], device=device, seed=7).mul(widths[0] ** -0.5).to(case.dtype)
    gate_b = values(t.num_logits, dtype=case.dtype, device=device, seed=8)
    return [guarded(x), [*map(guarded, weights)], [*map(guarded, biases)], guarded(gate_w), guarded(gate_b)]


def _level_truths(t: Topology, operands: list[Any]) -> dict[str, tuple[Any, ...]]:
    def p(x: Tensor, weights: Any, biases: Any, gate_w: Tensor, gate_b: Tensor) -> Tensor:
        return softmaxes(t, _gate_logits(t, x, gate_w, gate_b), 1.0)

    def y(x: Tensor, weights: Any, biases: Any, gate_w: Tensor, gate_b: Tensor) -> Tensor:
        h, slots = x, t.expert_slot
        for weight, bias in zip(weights, biases, strict=True):
            h, slots = linears(h, weight, bias, slots, RELU), tuple(range(t.num_experts))
        return mix(t, p(x, weights, biases, gate_w, gate_b), None, h)

    return {"y": (y, *operands), "p": (p, *operands)}


def level(case: Case, device: torch.device, tiles: int) -> Work:
    t, rows = ONE_LAYER, tiles * case.tile.rows + 5
    operands = _level(t, (case.along, case.across(case.tile.columns)), rows, case, device)
    x, (weight,), (bias,), gate_w, gate_b = operands

    def run() -> dict[str, Tensor | None]:
        y, h, z, p = fused_level_fwd(
            x, weight, bias, t.expert_slot, mixtures_of(t), activation=RELU, x=x, gate_weight=gate_w, gate_bias=gate_b,
            mixture_slots=t.mixture_slot, keep_output=True, keep_input=True, keep_weights=True,
            precision=case.precision,
        )  # fmt: skip
        return {"y": y, "p": p, "h": h, "z": z}

    h = (linears, x, weight, bias, t.expert_slot)
    return Work(run, {**_level_truths(t, operands), "h": (*h, RELU), "z": (*h, NONE)})


def two_layers(case: Case, device: torch.device, tiles: int) -> Work:
    """One tile has all units of the last layer; hidden ones come in chunks of its depth."""
    t, rows, tail = TWO_LAYERS, tiles * case.tile.rows + 5, WIDTHS[case.widths]
    less = 8 if case.widths == "tails" else tail  # so that no narrower tile covers them
    widths = (case.along, 2 * case.tile.depth + tail, case.tile.columns - less)
    operands = _level(t, widths, rows, case, device)
    x, weights, biases, gate_w, gate_b = operands

    def run() -> dict[str, Tensor | None]:
        y, p = fused_two_layers_fwd(
            x, tuple(weights), tuple(biases), t.expert_slot, mixtures_of(t), activations=(RELU, RELU), x=x,
            gate_weight=gate_w, gate_bias=gate_b, mixture_slots=t.mixture_slot, keep_weights=True,
            precision=case.precision,
        )  # fmt: skip
        return {"y": y, "p": p}

    return Work(run, _level_truths(t, operands))


def _mixtures(case: Case, device: torch.device, tiles: int) -> tuple[Topology, Tensor, Tensor]:
    """Outputs of the experts ``(B, E, H)`` and logits; odd: fewer units than a tile has, which gets more rows."""
    t, wide = ONE_LAYER, wide_of(case.dtype)
    rows, units = tiles * case.tile.rows + 5, 13 if case.widths == "odd" else case.across(case.tile.columns)
    h = guarded(values(rows, t.num_experts, units, dtype=case.dtype, device=device))
    return t, h, guarded(values(rows, t.num_logits, dtype=wide, device=device, seed=1))


def combine(case: Case, device: torch.device, tiles: int) -> Work:
    t, h, logits = _mixtures(case, device, tiles)

    def run() -> dict[str, Tensor | None]:
        y, p = gate_combine_fwd(h, logits, mixtures_of(t))
        return {"y": y, "p": p}

    def weights(logits: Tensor) -> Tensor:
        return softmaxes(t, logits, 1.0)

    return Work(run, {"y": (lambda h, logits: mix(t, weights(logits), None, h), h, logits), "p": (weights, logits)})


def combine_grad(case: Case, device: torch.device, tiles: int) -> Work:
    t, h, logits = _mixtures(case, device, tiles)
    p, kept = guarded(softmaxes(t, logits, 1.0)), guarded(h.relu())
    dy = guarded(values(h.shape[0], t.num_mixtures, h.shape[2], dtype=case.dtype, device=device, seed=2))

    def run() -> dict[str, Tensor | None]:
        dh, dp, dl = gate_combine_bwd(
            dy, None, kept, p, mixtures_of(t), h.shape[2], case.dtype, kept=kept, activation=RELU
        )
        return {"dh": dh, "dp": dp, "dl": dl}

    def gradients(dy: Tensor, kept: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dh, dps, dls, column = torch.zeros_like(kept, dtype=p.dtype), [], [], 0
        for o, mixed in enumerate(t.mixture_experts):
            wide = dy[:, o].to(p.dtype)
            own = p[:, column : column + len(mixed)]
            dp = torch.stack([(wide * kept[:, e].to(p.dtype)).sum(1) for e in mixed], 1)
            for i, e in enumerate(mixed):
                dh[:, e] += own[:, i, None] * wide
            dps.append(dp)
            dls.append(own * (dp - (own * dp).sum(1, keepdim=True)))
            column += len(mixed)
        return chain(dh.to(kept.dtype), kept, RELU), torch.cat(dps, 1), torch.cat(dls, 1).to(kept.dtype)

    names = ("dh", "dp", "dl")
    return Work(run, {name: (lambda *o, i=i: gradients(*o)[i], dy, kept, p) for i, name in enumerate(names)})

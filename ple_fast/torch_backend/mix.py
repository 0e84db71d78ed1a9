"""Gate weights out of logits, and the mixtures: ``y_o = sum_e P_oe h_e`` with dense weights ``P``, ``(rows, O, E)``.

Mixtures that are added into one output are so before they weigh anything: that takes one sum of weights.

An expert that a mixture does not weigh has weight 0 there: one softmax and one batched product then serve a ragged
wiring as they serve a dense one. But 0 times infinity is NaN, and a task must not see what overflows in another one's
expert: ``combine`` looks at its result, and where that is not finite sums over each mixture's own experts alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..plan import LevelPlan
from .finite import looks_finite
from .top_k import keep_joint, keep_top_k


@lru_cache(maxsize=4096)
def _cached_index(entries: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with _untraced(), torch.inference_mode(False):  # an inference tensor could not be saved for a later backward
        return torch.tensor(entries, dtype=dtype, device=device)


@contextmanager
def _untraced() -> Iterator[None]:
    """Hides from ``torch.jit.trace`` what only its first trace would see."""
    binding: Any = torch._C
    tracing = binding._get_tracing_state()
    if tracing is None or binding._dispatch_tls_is_dispatch_key_excluded("Tracer"):
        yield
        return
    binding._set_tracing_state(None)
    try:
        yield
    finally:
        binding._set_tracing_state(tracing)


def index_of(entries: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """The entries as a tensor. While tracing, under a transform or a mode it is fresh: theirs must not outlive them."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    ):
        return torch.tensor(entries, dtype=dtype, device=device)
    return _cached_index(entries, device, dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``; itself where it has that dtype, which takes no operator."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


NARROW = 16
"""Experts below which PyTorch's softmax, which goes through each mixture element by element, takes the longest."""
NARROW_ELEMENTS = 2048
"""Elements from which on five passes over all of them take less."""


def dense_logits(plan: LevelPlan, logits: Tensor) -> Tensor:
    """``(rows, G)`` to ``(rows, O_gated, E)`` in float32 (float64), minus infinity where a gate has no such expert."""
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    if not plan.is_dense:
        padded = torch.constant_pad_nd(logits, (0, 1), -torch.inf)
        logits = padded.index_select(1, index_of(plan.dense_logit, logits.device))
    return logits.view(logits.shape[0], len(plan.topology.gated_mixtures), plan.topology.num_experts)


def chosen_logits(plan: LevelPlan, dense: Tensor, *, is_traced: bool = False) -> Tensor:
    """Dense logits with minus infinity in the place of those that gates do not choose, where they choose."""
    if plan.joint:
        every = None if len(plan.joint) == dense.shape[2] else index_of(plan.joint, dense.device)
        return keep_joint(dense, plan.top_k, plan.gate_spec.joint_k, every, is_traced=is_traced)
    return keep_top_k(dense, plan.top_k, is_traced=is_traced)


def gate_softmax(plan: LevelPlan, logits: Tensor, *, is_traced: bool = False) -> Tensor:
    """``(rows, O_gated, E)`` float32 (or float64) out of logits ``(rows, G)``; the temperature has been applied.

    ``is_traced``: by an operator that can be differentiated and exported.
    """
    experts = plan.topology.num_experts
    dense = dense_logits(plan, logits)
    if plan.top_k:
        dense = chosen_logits(plan, dense, is_traced=is_traced)
    if plan.sigmoid_rows:
        return _squashed(plan, dense)
    if is_traced or experts >= NARROW or dense.numel() < NARROW_ELEMENTS or not dense.is_cpu:
        return torch.softmax(dense, dim=2)
    weights = (dense - dense.amax(2, keepdim=True)).exp_()
    return weights.div_(weights.sum(2, keepdim=True))


@lru_cache(maxsize=1024)
def _rows_by_kind(plan: LevelPlan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The softmax mixtures among the gated ones; of each gated one its number where the sigmoid ones come last."""
    sigmoid = plan.sigmoid_rows
    softmax = tuple(i for i in range(len(plan.topology.gated_mixtures)) if i not in sigmoid)
    found = (*softmax, *sigmoid)
    return softmax, tuple(found.index(i) for i in range(len(found)))


def _squashed(plan: LevelPlan, dense: Tensor) -> Tensor:
    """The weights of gates some of which are sigmoids; of an expert that a mixture does not weigh they are 0."""
    softmax, order = _rows_by_kind(plan)
    # Not one of both and a choice: a logit that overflows would be NaN in the gradient of the other.
    own = torch.sigmoid(dense.index_select(1, index_of(plan.sigmoid_rows, dense.device)))
    if not softmax:
        return own
    both = torch.cat((torch.softmax(dense.index_select(1, index_of(softmax, dense.device)), dim=2), own), dim=1)
    return both.index_select(1, index_of(order, dense.device))


def gate_softmax_backward(plan: LevelPlan, d: Tensor, weights: Tensor) -> Tensor:
    """Gradient of the logits ``(rows, G)``, past the temperature, from that of the weights ``d``, overwritten."""
    if not plan.is_dense:
        # What overflows of an expert that is not weighed would be NaN times 0.
        d.masked_fill_(index_of(plan.is_absent, d.device, torch.bool).view(d.shape[1:]), 0.0)
    dense = torch._softmax_backward_data(d, weights, 2, weights.dtype)
    if plan.sigmoid_rows:
        rows = index_of(plan.sigmoid_rows, d.device)
        own = weights.index_select(1, rows)
        dense.index_copy_(1, rows, d.index_select(1, rows) * (own * (1.0 - own)))
    dense = dense.flatten(1)
    if not plan.is_dense:
        dense = dense.index_select(1, index_of(plan.logit_entry, dense.device))
    return dense


def mixture_weights(plan: LevelPlan, gated: Tensor | None, offset: Tensor | None, rows: int, like: Tensor) -> Tensor:
    """All weights, dense ``(rows, O, E)``: the softmax, the constant ones, the learned scalars."""
    topology = plan.topology
    if plan.passes:
        return torch.eye(topology.num_experts, dtype=_wide(like.dtype), device=like.device).expand(rows, -1, -1)
    if gated is not None and not plan.static_entry:
        weights = gated
    else:
        constants = torch.zeros(
            topology.num_mixtures * topology.num_experts, dtype=_wide(like.dtype), device=like.device
        )
        if plan.static_entry:
            constants[index_of(plan.static_entry, like.device)] = 1.0
        weights = constants.view(1, topology.num_mixtures, topology.num_experts).repeat(rows, 1, 1)
        if gated is not None:
            weights = weights.index_copy(1, index_of(topology.gated_mixtures, like.device), gated)
    if offset is not None:
        added = torch.zeros(topology.num_mixtures * topology.num_experts, dtype=weights.dtype, device=weights.device)
        added = added.index_copy(0, index_of(plan.offset_entry, weights.device), offset.to(weights.dtype))
        weights = weights + added.view(1, topology.num_mixtures, topology.num_experts)
    return weights


def output_weights(plan: LevelPlan, weights: Tensor) -> Tensor:
    """Weights of outputs ``(rows, O, E)`` out of those of mixtures, several of which may be added into one output."""
    if not plan.outputs:
        return weights
    if any(plan.is_unweighed):
        # A gate that is NaN has NaN for what it does not weigh, which another mixture of the output may weigh.
        unweighed = index_of(plan.is_unweighed, weights.device, torch.bool)
        weights = weights.masked_fill(unweighed.view(weights.shape[1:]), 0.0)
    mixtures, outputs = plan.topology.num_mixtures, plan.topology.num_outputs
    several = mixtures // outputs
    if plan.outputs == tuple(o // several for o in range(mixtures)):
        return weights.view(weights.shape[0], outputs, several, weights.shape[2]).sum(2)
    # A product with zeros and ones would bring what is not finite of one output into all others.
    padded, total = torch.constant_pad_nd(weights, (0, 0, 0, 1)), None
    for terms in _terms(plan):
        term = padded.index_select(1, index_of(terms, weights.device))
        total = term if total is None else total + term
    assert total is not None
    return total


@lru_cache(maxsize=1024)
def _terms(plan: LevelPlan) -> tuple[tuple[int, ...], ...]:
    """The first mixture of each output, the second ones, and so on; one after the last where there is none."""
    none = plan.topology.num_mixtures
    rows = [[o for o in range(none) if plan.outputs[o] == i] for i in range(plan.topology.num_outputs)]
    return tuple(tuple(row[i] if i < len(row) else none for row in rows) for i in range(max(map(len, rows))))


def mixture_part(plan: LevelPlan, d: Tensor) -> Tensor:
    """Gradient of the mixtures' weights from that of the outputs'."""
    return d.index_select(1, index_of(plan.outputs, d.device)) if plan.outputs else d


def gated_part(plan: LevelPlan, d: Tensor) -> Tensor:
    """The gated mixtures' part of a dense ``(rows, O, E)``."""
    if not plan.static_entry:
        return d
    return d.index_select(1, index_of(plan.topology.gated_mixtures, d.device))


def offset_grad(plan: LevelPlan, d: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of the learned scalars from that of the dense weights."""
    return d.sum(0).flatten().index_select(0, index_of(plan.offset_entry, d.device)).to(dtype)


def listed_weights(plan: LevelPlan, weights: Tensor) -> Tensor:
    """The weights as users see them: ``(rows, num_weights)``, mixture after mixture, each in its own order."""
    return weights.flatten(1).index_select(1, index_of(plan.weight_entry, weights.device))


def listed_weights_backward(plan: LevelPlan, d: Tensor) -> Tensor:
    """Dense gradient ``(rows, O, E)`` of ``listed_weights``."""
    topology = plan.topology
    size = topology.num_mixtures * topology.num_experts
    dense = torch.zeros((d.shape[0], size), dtype=d.dtype, device=d.device)
    dense = dense.index_copy(1, index_of(plan.weight_entry, d.device), d)
    return dense.view(d.shape[0], topology.num_mixtures, topology.num_experts)


class Sums(NamedTuple):
    """Which of the sources each of some sums takes, and by which entry of the dense ``(O, E)`` weights."""

    groups: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]
    """Sums over equally many: how many sums, their sources, their entries, sum after sum."""
    order: tuple[int, ...]
    """Number of each sum among those of the groups; empty where they are in order."""


def _grouped_sums(sums: Sequence[Sequence[tuple[int, int]]]) -> Sums:
    """Of the pairs of source and entry that each sum takes."""
    groups, done = [], []
    for count in sorted({len(terms) for terms in sums}):
        members = [i for i, terms in enumerate(sums) if len(terms) == count]
        terms = [term for i in members for term in sums[i]]
        groups.append((len(members), tuple(source for source, _ in terms), tuple(entry for _, entry in terms)))
        done += members
    order = tuple(done.index(i) for i in range(len(sums)))
    return Sums(tuple(groups), () if order == tuple(range(len(sums))) else order)


@lru_cache(maxsize=1024)
def mixture_sums(plan: LevelPlan) -> Sums:
    """Of outputs, over the experts that each weighs."""
    experts = plan.topology.num_experts
    mixed = plan.topology.output_experts
    return _grouped_sums([[(e, o * experts + e) for e in row] for o, row in enumerate(mixed)])


@lru_cache(maxsize=1024)
def stopped_sums(plan: LevelPlan) -> Sums:
    """``mixture_sums`` of the experts' outputs and then the same ones detached, which stopped entries take."""
    experts = plan.topology.num_experts
    rows = enumerate(plan.topology.mixture_experts)
    entries = [[(e, o * experts + e) for e in row] for o, row in rows]
    return _grouped_sums([[(e + experts * plan.is_stopped[at], at) for e, at in row] for row in entries])


@lru_cache(maxsize=1024)
def _expert_sums(plan: LevelPlan) -> Sums:
    """Of experts, over the outputs that weigh each and whose gradient reaches it."""
    experts = plan.topology.num_experts
    mixed, stopped = plan.topology.output_experts, plan.is_stopped
    sums = [[(o, o * experts + e) for o, row in enumerate(mixed) if e in row] for e in range(experts)]
    return _grouped_sums([[(o, at) for o, at in terms if not (stopped and stopped[at])] for terms in sums])


def sum_weighted(sums: Sums, weights: Tensor, sources: Tensor, *, multiplies: bool = True) -> Tensor:
    """Each sum over its own sources and no others: dense ``(rows, O, E)``, ``(rows, n, H)`` to ``(rows, sums, H)``.

    ``multiplies``: by matrix products; else by products and sums of elements, which compilers fuse.
    """
    flat, parts = weights.flatten(1), []
    for members, taken, entries in sums.groups:
        # The older exporter to ONNX makes a constant of the rows that unflatten leaves out.
        shape = (flat.shape[0], members, len(taken) // members)
        own = flat.index_select(1, index_of(entries, flat.device)).view(shape)
        if members == 1 and taken == tuple(range(sources.shape[1])):
            terms = sources.unsqueeze(1)
        else:
            terms = sources.index_select(1, index_of(taken, sources.device)).view(*shape, sources.shape[2])
        parts.append((own.unsqueeze(2) @ terms).squeeze(2) if multiplies else (own.unsqueeze(3) * terms).sum(2))
    done = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return done.index_select(1, index_of(sums.order, done.device)) if sums.order else done


def mix(
    plan: LevelPlan, weights: Tensor, sources: Tensor, *, backward: bool = False, out: Tensor | None = None
) -> Tensor:
    """``weights @ sources``, or with the weights transposed, of what is weighed alone; all of one dtype.

    Backward the weights of entries that are stopped are 0. ``out``: contiguous memory that the result may be in, or
    None.
    """
    takes_all = plan.weighs_all and not (backward and plan.is_stopped)
    if takes_all or weights.is_cpu:
        dense = torch.bmm(weights.transpose(1, 2) if backward else weights, sources, out=out)
        if takes_all or looks_finite(dense):
            return dense
    return sum_weighted(_expert_sums(plan) if backward else mixture_sums(plan), weights, sources)


WIDENED_VALUES = 1 << 18
"""Values of low precision that are widened at once: their memory is then always the same, and stays in cache."""


def _parts(rows: int, values: int) -> list[slice]:
    """Rows of so many values each, in parts that are widened one after the other."""
    step = max(1, WIDENED_VALUES // max(values, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _widened(plan: LevelPlan, weights: Tensor, sources: Tensor, out: Tensor, *, backward: bool = False) -> Tensor:
    """``mix`` of sources in low precision, in the dtype of the weights, rounded into ``out``."""
    for part in _parts(out.shape[0], max(sources.shape[1], out.shape[1]) * out.shape[2]):
        out[part] = mix(plan, weights[part], sources[part].to(weights.dtype), backward=backward)
    return out


def combine(plan: LevelPlan, weights: Tensor, h: Tensor, out: Tensor | None = None) -> Tensor:
    """Dense ``(rows, O, E)``, ``(rows, E, H)`` to ``(rows, O, H)`` like ``h``, summed in the dtype of the weights; into
    ``out``, contiguous, if it is given."""
    if plan.passes:
        if out is not None:
            return out.copy_(h)
        # The output of an autograd Function: a view could not be written to.
        return h.clone(memory_format=torch.contiguous_format) if h._is_view() or not h.is_contiguous() else h
    if h.dtype != weights.dtype:
        shape = (*weights.shape[:2], h.shape[2])
        return _widened(plan, weights, h, torch.empty(shape, dtype=h.dtype, device=h.device) if out is None else out)
    mixed = mix(plan, weights, h, out=out)
    return mixed if out is None or mixed is out else out.copy_(mixed)


def combine_backward(plan: LevelPlan, weights: Tensor, dy: Tensor) -> Tensor:
    """Gradient of ``h``, ``(rows, E, H)``, like ``dy``, ``(rows, O, H)``."""
    if plan.passes:
        return dy.contiguous()
    if plan.is_stopped:
        stopped = index_of(plan.is_stopped, weights.device, torch.bool)
        weights = weights.masked_fill(stopped.view(weights.shape[1:]), 0.0)
    if dy.dtype != weights.dtype:
        shape = (weights.shape[0], weights.shape[2], dy.shape[2])
        return _widened(plan, weights, dy, torch.empty(shape, dtype=dy.dtype, device=dy.device), backward=True)
    return mix(plan, weights, dy, backward=True)


def weights_grad(dy: Tensor, h: Tensor) -> Tensor:
    """Gradient of the dense weights ``(rows, O, E)`` in float32 (or float64), of ``(rows, O, H)``, ``(rows, E, H)``."""
    wide = _wide(dy.dtype)
    if dy.dtype == h.dtype == wide:
        return torch.bmm(dy, h.transpose(1, 2))
    grad = torch.empty((h.shape[0], dy.shape[1], h.shape[1]), dtype=wide, device=h.device)
    for part in _parts(h.shape[0], max(dy.shape[1], h.shape[1]) * h.shape[2]):
        torch.bmm(as_dtype(dy[part], wide), as_dtype(h[part], wide).transpose(1, 2), out=grad[part])
    return grad


def combine_dense(weights: Tensor, h: Tensor) -> Tensor:
    """``combine`` where every mixture weighs every expert."""
    return torch.bmm(weights, h.to(weights.dtype)).to(h.dtype)

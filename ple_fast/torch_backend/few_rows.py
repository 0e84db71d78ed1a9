"""The level for a handful of rows, where the host's time counts beside the arithmetic: forward, and backward by hand.

As few operators and as little Python as possible, for the make-up that is met most: one block of experts and gates of
one linear layer. In training it has no norms or dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..plan import LevelPlan
from ..specs import from_output
from ..state import LevelState, NormState
from ..tensors import WIDTH, GateTensors, LayerTensors, check_shapes
from .activations import activation_backward, activation_forward
from .mix import as_dtype, combine, combine_backward, gate_softmax, gate_softmax_backward, weights_grad
from .norms import BatchNormSaved, batch_norm_coefficients, batch_norm_forward, layer_norm_forward
from .products import batched, linear, linear_input_grad, linear_weight_grad
from .table_in_use import limits_of

WIDE = (torch.float32, torch.float64)
REPEATED_ROWS = 64
"""From here on slots are copied for each of their experts, so that results need not be: they are wider."""


@lru_cache(maxsize=1024)
def serves(plan: LevelPlan, stacked: bool, *, trains: bool = True) -> bool:
    """Whether this path can run the plan on one ``(B, D)`` for all slots or on a stacked ``(B, S, D)``.

    Unless it ``trains``, there may be norms, and dropout that is off: see ``serves_state``.
    """
    topology = plan.topology
    if len(plan.blocks) > 1 or plan.gate.layers or (trains and plan.gate_spec.logits_norm is not None):
        return False
    if plan.gate_spec.temperature != 1.0 or plan.top_k or plan.static_entry or plan.offset_entry:
        return False
    if plan.sigmoid_rows or plan.outputs:
        return False
    for spec in plan.blocks[0].layers:
        if spec.activation.name in ("prelu", "dice", "row_dice") or (
            trains and (spec.norm is not None or spec.dropout)
        ):
            return False
    if not stacked:
        return plan.gate_spec.input != "with_shared" or topology.num_slots == 1
    counts = {stop - start for start, stop in topology.slot_experts}
    sizes = {len(experts) for experts in topology.mixture_experts}
    return len(counts) == 1 and len(sizes) == 1 and topology.mixture_slot == tuple(range(topology.num_mixtures))


def uses_wide_product(x: Tensor) -> bool:
    """Whether the first layer of experts that all read ``x (B, D)`` is one product."""
    return x.shape[0] > limits_of(x).wide_rows


def takes(plan: LevelPlan, x: Tensor, *, trains: bool, autocast: torch.dtype | None = None) -> bool:
    """Whether a call of the plan on ``x`` is for this path: one that it ``serves``, of so few rows.

    In low precision, by ``autocast`` or as ``x`` is, the level has no norms.
    """
    limits = limits_of(x)
    return (
        x.shape[0] < (limits.few_rows_training if trains else limits.few_rows)
        and (not plan.has_norms or (autocast is None and x.dtype in WIDE))
        and (autocast is None or plan.gate_spec.input != "with_shared")  # slots are added before they are rounded
        and serves(plan, x.dim() == 3, trains=trains)
    )


def serves_state(state: LevelState) -> bool:
    """Whether it can run the plan in this state: nothing is dropped, and every norm is ours."""
    return state.seed is None and not state.has_foreign_norm


def few_rows_forward(
    plan: LevelPlan, layers: Sequence[LayerTensors], gate: GateTensors, x: Tensor, state: LevelState | None = None
) -> Tensor:
    """``y (B, O, H)`` of ``x (B, D)`` or ``(B, S, D)``; the plan is one that ``serves``.

    ``state``: of a level with norms or dropout, whose shapes have been checked.
    """
    return few_rows_train_forward(plan, layers, gate, x, state)[0]


def few_rows_train_forward(
    plan: LevelPlan, layers: Sequence[LayerTensors], gate: GateTensors, x: Tensor, state: LevelState | None = None
) -> tuple[Tensor, list[Tensor]]:
    """``few_rows_forward``, and what backward needs of a level without norms.

    That is the softmax ``(B, O, E)``, then per layer the output and, where the derivative does not follow from it, the
    input of the activation, ``(E, B, H)`` each.
    """
    rows = x.shape[0]
    weight, bias = layers[0].weight, layers[0].bias
    try:
        count, units, width = weight.shape
    except ValueError:
        check_shapes(plan, layers, gate, x.shape[-1], x.shape[-1])
        raise
    specs = plan.blocks[0].layers
    norms = [None] * len(specs) if state is None else [layer.norm for layer in state.layers]
    applied = False  # by the product
    assert gate.weight is not None
    # Shapes that the products would not refuse, because biases are read by their size; the check of all takes longer.
    logits_shape = (plan.topology.num_logits,)
    if (
        (bias is not None and bias.shape != (count, units))
        or (gate.bias is not None and gate.bias.shape != logits_shape)
        or gate.weight.shape != (*logits_shape, width)
    ):
        check_shapes(plan, layers, gate, x.shape[-1], x.shape[-1])
    if x.dim() == 2:
        if not uses_wide_product(x):
            a = batched(x.expand(count, rows, width), weight, bias)
        else:
            applied = specs[0].activation.name == "relu" and (norms[0] is None or specs[0].norm_position == "after")
            flat_bias = None if bias is None else bias.reshape(-1)
            z = linear(x, weight.reshape(count * units, width), flat_bias, relu=applied)
            a = z.view(rows, count, units).transpose(0, 1)
        logits = linear(x, gate.weight, gate.bias)
    else:
        slots, x = x.shape[1], x.transpose(0, 1)
        if rows < REPEATED_ROWS:
            z = batched(x, weight.reshape(slots, -1, width), bias)
            a = z.view(slots, rows, -1, units).transpose(1, 2).reshape(count, rows, units)
        else:
            repeated = x.unsqueeze(1).expand(slots, count // slots, rows, width)
            a = batched(repeated.reshape(count, rows, width), weight, bias)
        mixtures = plan.topology.num_mixtures
        listed = batched(_gate_slots(plan, x), gate.weight.reshape(mixtures, -1, width), gate.bias)
        logits = listed.transpose(0, 1).reshape(rows, -1)
    if state is not None and state.gate_norm is not None:
        logits = _normed(logits.unsqueeze(0), gate.norm_weight, gate.norm_bias, state.gate_norm)[0]
    weights = gate_softmax(plan, logits)
    kept = [weights]
    for i, (spec, norm) in enumerate(zip(specs, norms, strict=True)):
        z = a
        if i > 0:
            weight, bias = layers[i].weight, layers[i].bias
            if bias is not None and bias.shape != (count, spec.units):
                check_shapes(plan, layers, gate, width, width)
            z = batched(a, weight, bias)
        if norm is not None and spec.norm_position == "before":
            z = _normed(z, layers[i].norm_weight, layers[i].norm_bias, norm)
        if i == 0 and applied:
            kept.append(a)
        elif from_output(spec.activation):
            a = activation_forward(z, spec.activation, None, keep_input=False)
            kept.append(a)
        else:
            a = activation_forward(z, spec.activation, None, keep_input=True)
            kept += (a, z)
        if norm is not None and spec.norm_position == "after":
            a = _normed(a, layers[i].norm_weight, layers[i].norm_bias, norm)
    return combine(plan, weights, a.transpose(0, 1)), kept


def few_rows_train_backward(
    plan: LevelPlan,
    layers: Sequence[LayerTensors],
    gate: GateTensors,
    x: Tensor,
    kept: Sequence[Tensor],
    dy: Tensor,
    *,
    want_x: bool,
    want_tensors: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of ``x`` and, in the order of ``flatten``, of the level's tensors, each if wanted."""
    specs, gate_weight = plan.blocks[0].layers, gate.weight
    rows, at = x.shape[0], len(kept)
    grads: list[Tensor | None] = [None] * (WIDTH * (len(specs) + 1))
    assert gate_weight is not None
    d = _by_member(combine_backward(plan, kept[0], dy))
    dlogits = None
    for i in range(len(specs) - 1, -1, -1):
        activation = specs[i].activation
        at -= 1
        act = kept[at]
        if not from_output(activation):
            at -= 1
        if dlogits is None:
            dweights = weights_grad(dy, kept[at].transpose(0, 1))
            dlogits = as_dtype(gate_softmax_backward(plan, dweights, kept[0]), x.dtype)
        activation_backward(d, act, activation, None, slope_grad=False)
        if i > 0:
            if want_tensors:
                below = kept[at - 1 if from_output(specs[i - 1].activation) else at - 2]
                grads[WIDTH * i] = torch.bmm(d.transpose(1, 2), below)
                if layers[i].bias is not None:
                    grads[WIDTH * i + 1] = d[:, 0] if rows == 1 else d.sum(1)  # of one row the row itself
            d = torch.bmm(d, layers[i].weight)
    assert dlogits is not None
    weight = layers[0].weight
    count, units, width = weight.shape
    d = d.transpose(0, 1).reshape(rows, -1)
    if want_tensors:
        if layers[0].bias is not None:
            grads[1] = (d if rows == 1 else d.sum(0)).view(count, units)
        if gate.bias is not None:
            grads[1 - WIDTH] = dlogits.view(-1) if rows == 1 else dlogits.sum(0)
    dx = None
    if x.dim() == 2:
        if want_tensors:
            grads[0] = linear_weight_grad(d, x).reshape(count, units, width)
            grads[-WIDTH] = torch.mm(dlogits.t(), x)
        if want_x:
            dx = linear_input_grad(d, weight.reshape(-1, width))
            torch.addmm(dx, dlogits, gate_weight, out=dx)
        return dx, grads
    slots, mixtures = x.shape[1], plan.topology.num_mixtures
    d = _by_member(d.view(rows, slots, -1))
    dlogits = _by_member(dlogits.view(rows, mixtures, -1))
    if want_tensors:
        x = _by_member(x)
        grads[0] = torch.bmm(d.transpose(1, 2), x).view(count, units, width)
        grads[-WIDTH] = torch.bmm(dlogits.transpose(1, 2), _gate_slots(plan, x)).view(-1, width)
    if want_x:
        dx = torch.empty((rows, slots, width), dtype=d.dtype, device=d.device)
        by_slot = torch.bmm(d, weight.reshape(slots, -1, width), out=dx.transpose(0, 1))
        by_gate = by_slot[:mixtures]
        torch.baddbmm(by_gate, dlogits, gate_weight.reshape(mixtures, -1, width), out=by_gate)
        if own := _tasks_beside_shared(plan):
            logits = dlogits[:own].transpose(0, 1).reshape(rows, -1)
            shared = by_slot[-1]
            torch.addmm(shared, logits, gate_weight[: logits.shape[1]], out=shared)
    return dx, grads


def _tasks_beside_shared(plan: LevelPlan) -> int:
    """Mixtures whose gate reads the last slot beside its own: the first ones."""
    topology = plan.topology
    if plan.gate_spec.input != "with_shared" or topology.num_slots == 1:
        return 0
    assert topology.num_slots is not None
    return min(topology.num_mixtures, topology.num_slots - 1)


def _gate_slots(plan: LevelPlan, x: Tensor) -> Tensor:
    """What the gates read of the slots ``x (S, rows, D)``."""
    mixtures, own = plan.topology.num_mixtures, _tasks_beside_shared(plan)
    if not own:
        return x[:mixtures]
    added = x[:own] + x[-1:]
    return added if own == mixtures else torch.cat((added, x[-1:]))


def _by_member(d: Tensor) -> Tensor:
    """``(rows, n, H)`` as ``(n, rows, H)``; in low precision, whose products copy what has gaps, without gaps."""
    turned = d.transpose(0, 1)
    return turned if d.dtype in WIDE else turned.contiguous()


def _normed(z: Tensor, weight: Tensor | None, bias: Tensor | None, norm: NormState) -> Tensor:
    """A norm of ``(n, rows, H)``, whose batch norm has ``n H`` features."""
    if norm.kind == "batch" and not norm.batch:
        # PyTorch's kernel wakes every thread for however little, and waits for those that the system runs elsewhere.
        saved = BatchNormSaved(norm.running_mean, norm.running_var)
        scale, shift = batch_norm_coefficients(weight, bias, norm, saved)
        return torch.addcmul(shift.view(z.shape[0], 1, -1), z, scale.view(z.shape[0], 1, -1))
    by_row = z.transpose(0, 1)
    if norm.kind == "batch":
        return batch_norm_forward(by_row, weight, bias, norm)[0].transpose(0, 1)
    assert weight is not None and bias is not None
    return layer_norm_forward(by_row, weight, bias, norm.eps)[0].transpose(0, 1)

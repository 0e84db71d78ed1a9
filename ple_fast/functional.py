"""The operators that modules call: checks, then the choice of backend, then the arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Proxy

from .autocast import autocast_dtype, cast_once
from .autograd import ExtractionLevelFunction, run_differentiable, run_without_grad
from .backend import Choice, note, resolve
from .call import LevelCall
from .checks import check_input, check_scaled, shape_of
from .ops import run_op
from .plan import LevelPlan
from .routes import Asked, must_see_operators, route_of
from .scalars import check_number
from .slot_scale import SlotScaleFunction
from .slots import Place, Slots, first_of, with_shared
from .state import NO_STATE, LevelState
from .tensors import GateTensors, LayerTensors, check_shapes, flatten
from .torch_backend import differentiable
from .torch_backend.few_rows import few_rows_forward
from .torch_backend.mix import combine_dense
from .torch_backend.scale import scaled as scaled_by_operators

Input = Tensor | Sequence[Tensor]


@lru_cache(maxsize=256)
def _places(slots: int, stacked: bool) -> tuple[Place, ...]:
    """Of the slots of one tensor."""
    return tuple(Place(0, slot if stacked else -1) for slot in range(slots))


def _place(x: Input, slots: int) -> tuple[tuple[Tensor, ...], tuple[Place, ...]]:
    """Distinct tensors, and where every slot lies in them."""
    if isinstance(x, Tensor):
        return (x,), _places(slots, x.dim() == 3)
    tensors: list[Tensor] = []
    places = []
    for entry in x:
        number = next((i for i, t in enumerate(tensors) if t is entry), len(tensors))
        if number == len(tensors):
            tensors.append(entry)
        places.append(Place(number, -1))
    return tuple(tensors), tuple(places)


def _gate_input(x: Input, gate_input: Input | None, plan: LevelPlan) -> Input | None:
    """What the gates read beside ``x``, where it is given or made of ``x``; None: ``x``."""
    slots = plan.topology.num_slots
    assert slots is not None
    if plan.gate_spec.input == "with_shared" and gate_input is None and plan.gate.slots and slots > 1:
        return with_shared(x, slots, is_read=slots - 1 in plan.gate.slots)
    return gate_input


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _cast_layers(
    layers: Sequence[LayerTensors], gate: GateTensors, dtype: torch.dtype, *, once: bool
) -> tuple[list[LayerTensors], GateTensors]:
    """What autocast casts: linear layers and slopes. Norms keep their dtype, as in PyTorch."""

    def cast(tensor: Tensor | None) -> Any:
        return cast_once(tensor, dtype) if once and tensor is not None else _cast(tensor, dtype)

    rows = [row._replace(weight=cast(row.weight), bias=cast(row.bias), slope=cast(row.slope)) for row in layers]
    return rows, gate._replace(weight=cast(gate.weight), bias=cast(gate.bias))


def _run(
    call: LevelCall, given: tuple[Tensor, ...], layers: Sequence[LayerTensors], gate: GateTensors, way: str
) -> tuple[Tensor, Tensor | None]:
    """Output and, where the call lists them, the weights. ``way``: the name of a route, but that of few rows."""
    if way == "by hand" and not torch.is_grad_enabled():
        return run_without_grad(call, given, layers, gate)
    flat = (*given, *flatten(layers, gate))
    if way == "operator":
        return run_op(call, flat)
    if way == "differentiable":
        return run_differentiable(call, flat)
    if not any(t is not None and t.requires_grad for t in flat):
        return run_without_grad(call, given, layers, gate)
    out: Any = ExtractionLevelFunction.apply(call, *flat)  # type: ignore[no-untyped-call]  # untyped in torch
    return out if call.listed else (out, None)


@lru_cache(maxsize=1024)
def _bare_state(num_layers: int) -> LevelState:
    """Of a level that has neither norms nor dropout."""
    return LevelState((NO_STATE,) * num_layers, None, None)


@lru_cache(maxsize=1024)
def _few_rows_call(plan: LevelPlan, stacked: bool, recompute: bool) -> LevelCall:
    """Every training step of a plan on the short path: it has no norm and drops nothing."""
    slots = plan.topology.num_slots
    assert slots is not None
    state = _bare_state(plan.num_layers)
    return LevelCall(
        plan, state, _places(slots, stacked), 1, None, 0, listed=False, recompute=recompute, few_rows=True
    )  # fmt: skip


def _run_few_rows(
    plan: LevelPlan,
    state: LevelState,
    x: Tensor,
    layers: Sequence[LayerTensors],
    gate: GateTensors,
    recompute: bool,
) -> Tensor:
    """The route of few rows, where every parameter has been seen to require a gradient if anything is recorded."""
    if not torch.is_grad_enabled():
        return few_rows_forward(plan, layers, gate, x, state if plan.has_state else None)
    call = _few_rows_call(plan, x.dim() == 3, recompute)
    y: Tensor = ExtractionLevelFunction.apply(call, x, *flatten(layers, gate))  # type: ignore[no-untyped-call]  # untyped in torch
    return y


def _check(
    plan: LevelPlan,
    layers: Sequence[LayerTensors],
    gate: GateTensors,
    x: Input,
    gate_input: Input | None,
    gate_features: int,
) -> None:
    """What the checks of single inputs do not see: rows of both, and the shapes of parameters."""
    first = first_of(x)
    if torch._C._get_tracing_state() is None:  # torch.jit.trace, to whom shapes are values
        check_shapes(plan, layers, gate, first.shape[-1], gate_features)
    if gate_input is not None:
        other = first_of(gate_input)
        if other.shape[0] != first.shape[0]:
            raise ValueError(f"gate_input: expected {first.shape[0]} rows like x, got {other.shape[0]}")


def extraction_level(
    x: Input,
    gate_input: Input | None,
    plan: LevelPlan,
    layers: Sequence[LayerTensors],
    gate: GateTensors,
    state: Callable[[int, str], LevelState],
    *,
    in_features: int,
    gate_features: int,
    return_gates: bool = False,
    recompute: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, list[Tensor] | None]:
    """A whole extraction network (paper eq. 2-4): experts, gates, mixtures.

    Args:
        x: ``(B, D)``, ``(B, S, D)`` or S tensors ``(B, D)``.
        gate_input: what the gates read, in the same forms; None: ``x``.
        plan, layers, gate: the level, see ``plan.py``.
        state: gives the level's state for a number of rows on a backend; called once, after the checks of the input.
        in_features, gate_features: widths of ``x`` and of what the gates read.
        return_gates: also return the weights of every mixture.
        recompute: save inputs only, and run the forward again in backward.
        backend: ``"auto"``, ``"triton"`` or ``"torch"`` for this call; default as set by ``use_backend``.

    Returns:
        ``(B, O, H)``, and per mixture ``(B, |A(o)|)`` in float32 (float64 for float64) or None.

    Raises:
        TypeError, ValueError: an input or a parameter does not fit; the message says how to mend it.
    """
    topology = plan.topology
    slots = topology.num_slots
    assert slots is not None
    weight = layers[0].weight
    autocast = autocast_dtype(weight)
    check_input("x", x, in_features, slots, weight, autocast)
    if gate_input is not None:
        check_input("gate_input", gate_input, gate_features, slots, weight, autocast)
    elif gate_features != in_features:
        raise ValueError(
            f"gate_input: the gates read {gate_features} features and x has {in_features}; pass gate_input="
        )
    is_traced = must_see_operators(weight)
    choice = resolve(weight.device, backend)
    is_special = gate_input is not None or return_gates
    records = torch.is_grad_enabled()
    if not plan.has_state:
        now = _bare_state(plan.num_layers)
    else:  # what is refused must have moved no statistics
        _check(plan, layers, gate, x, gate_input, gate_features)
        now = state(first_of(x).shape[0], choice.name)
    asked = Asked(
        plan, now, x, layers, gate, choice.name, backend == "torch", is_traced, records, is_special, autocast,
    )  # fmt: skip
    way = route_of(asked).name
    if way == "few rows":  # whose products refuse what does not fit
        note(choice)
        assert isinstance(x, Tensor)
        if autocast is None:
            return _run_few_rows(plan, now, x, layers, gate, recompute), None
        layers, gate = _cast_layers(layers, gate, autocast, once=True)
        with torch.autocast(weight.device.type, enabled=False):
            return _run_few_rows(plan, now, x.to(autocast), layers, gate, recompute), None
    if not plan.has_state:
        _check(plan, layers, gate, x, gate_input, gate_features)
    gate_input = _gate_input(x, gate_input, plan)
    if way == "differentiable" and choice.name == "triton":
        choice = Choice("torch", "PyTorch's own operators: traced, transformed, empty, or a norm of another kind")
    note(choice)
    tensors, places = _place(x, slots)
    gate_tensors: tuple[Tensor, ...] = ()
    gate_places = None
    if gate_input is not None:
        gate_tensors, gate_places = _place(gate_input, slots)
    if autocast is not None:
        layers, gate = _cast_layers(layers, gate, autocast, once=way == "by hand")
        tensors = tuple(t.to(autocast) for t in tensors)
        gate_tensors = tuple(t.to(autocast) for t in gate_tensors)
    call = LevelCall(
        plan, now, places, len(tensors), gate_places, len(gate_tensors), return_gates, recompute, choice.name
    )
    given = (*tensors, *gate_tensors)
    if autocast is None:
        y, listed = _run(call, given, layers, gate, way)
    else:
        # What autocast asks for has been cast; the mixing stays in float32, forward and backward.
        with torch.autocast(weight.device.type, enabled=False):
            y, listed = _run(call, given, layers, gate, way)
    if not return_gates:
        return y, None
    assert listed is not None
    return y, list(listed.split([len(mixed) for mixed in topology.mixture_experts], dim=1))


class GateShares(NamedTuple):
    """What the gates of a level would take of each expert, for losses that balance it; of softmax mixtures alone."""

    shares: Tensor
    """Each gate's softmax over all experts that it weighs, ``(B, gates, E)`` in float32 (float64), differentiable; 0 at
    experts that it does not weigh."""
    chosen: Tensor | None
    """``(B, gates, E)`` bool: the experts that gates with ``top_k`` choose; None where each takes all of its own."""
    experts: tuple[tuple[int, ...], ...]
    """Per gate the experts that it weighs."""


def gate_shares(
    x: Input,
    gate_input: Input | None,
    plan: LevelPlan,
    layers: Sequence[LayerTensors],
    gate: GateTensors,
    state: LevelState,
) -> GateShares:
    """The gates of a level once more, in differentiable operators, as they were in a forward in this state.

    Args:
        x, gate_input: as for ``extraction_level``, which has checked them.
        plan, layers, gate, state: the level.

    Raises:
        ValueError: a norm of the gates is of another class, and would move its statistics again.
    """
    topology = plan.topology
    assert topology.num_slots is not None and topology.mixture_kind is not None
    if state.has_foreign_norm and (state.gate_norm is not None or plan.gate.layers):
        raise ValueError(
            'return_gates="shares": expected gates with norms of this library, got another class of batch norm, whose '
            "statistics would move twice a step; convert none, or balance without norms in gates"
        )
    first, gated = first_of(x), [o for o in topology.gated_mixtures if topology.mixture_kind[o] == "softmax"]
    if gate.weight is None or not gated:
        wide = torch.promote_types(first.dtype, torch.float32)
        return GateShares(first.new_zeros((first.shape[0], 0, topology.num_experts), dtype=wide), None, ())
    gate_input = _gate_input(x, gate_input, plan)
    tensors, places = _place(x if gate_input is None else gate_input, topology.num_slots)
    autocast = autocast_dtype(layers[0].weight)
    if autocast is not None:
        layers, gate = _cast_layers(layers, gate, autocast, once=False)
        tensors = tuple(t.to(autocast) for t in tensors)
    # Where there is none there may be no such device to autocast: meta.
    with nullcontext() if autocast is None else torch.autocast(first.device.type, enabled=False):
        shares, chosen = differentiable.gate_shares(plan, layers, gate, state, Slots(tensors, places))
    return GateShares(shares, chosen, tuple(topology.mixture_experts[o] for o in gated))


def grouped_linear(x: Input, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``n`` linear layers at once: ``(B, K)`` for all of them, or ``(B, n, K)``, to ``(B, n, H)``.

    Args:
        x: one input for all layers ``(B, K)`` (one wide product), one each ``(B, n, K)``, or a list of n ``(B, K)``.
        weight: ``(n, H, K)``.
        bias: ``(n, H)`` or None.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit.
    """
    if weight.dim() != 3:
        raise ValueError(f"weight: expected shape (n, H, K), got {shape_of(weight)}")
    count, units, width = weight.shape
    if bias is not None and tuple(bias.shape) != (count, units):
        raise ValueError(f"bias: expected shape {(count, units)}, got {shape_of(bias)}")
    autocast = autocast_dtype(weight)
    check_input("x", x, width, count, weight, autocast)
    tensors, places = _place(x, count)
    if autocast is not None:
        tensors, weight, bias = tuple(t.to(autocast) for t in tensors), weight.to(autocast), _cast(bias, autocast)
    if len(tensors) == 1 and tensors[0].dim() == 3:
        return differentiable.stacked_linear(tensors[0], weight, bias)
    return differentiable.grouped_linear(Slots(tensors, places), range(count), weight, bias)


def gate_combine(h: Tensor, weights: Tensor) -> Tensor:
    """Mixtures ``y_o = sum_e weights_oe h_e`` (paper eq. 2): ``(B, E, H)`` and dense ``(B, O, E)`` to ``(B, O, H)``.

    The sum runs in the dtype of ``weights`` (float32 for half-precision experts), the result has that of ``h``. It is a
    product: an infinity or a NaN of an expert whose weight is 0 is NaN in the mixture.

    Raises:
        ValueError: the shapes do not fit.
    """
    if h.dim() != 3 or weights.dim() != 3 or h.shape[:2] != (weights.shape[0], weights.shape[2]):
        raise ValueError(
            f"gate_combine: expected h (B, E, H) and weights (B, O, E), got {shape_of(h)} and {shape_of(weights)}"
        )
    with torch.autocast(h.device.type, enabled=False):  # it would round the weights
        return combine_dense(weights, h)


def scaled(x: Tensor, scale: Tensor, *, factor: float = 2.0, backend: str | None = None) -> Tensor:
    """Slots scaled element by element, ``y_j = factor x_j s_j``: with a sigmoid as scale, the gate NU of PEPNet.

    Computed in float32 (float64), the sum over slots of the gradient of what all of them read included, and rounded
    once. As PyTorch's own product, a 0 beside an infinity or a NaN is NaN.

    Args:
        x: ``(B, S, D)``, or ``(B, D)``, which every slot reads.
        scale: ``(B, S, D)``, or ``(B, D)`` for every slot.
        factor: a finite number.
        backend: ``"auto"``, ``"triton"`` or ``"torch"`` for this call; default as set by ``use_backend``.

    Returns:
        ``(B, S, D)``, or ``(B, D)`` for two ``(B, D)``; of the dtype that PyTorch promotes both to.

    Raises:
        TypeError: other than dense floating tensors, or a factor that is no number.
        ValueError: the shapes or devices do not fit, or the factor is not finite.
    """
    factor = check_number("factor", factor)
    for given in (x, scale):
        if isinstance(given, Proxy):  # a symbolic trace of torch.fx, in which the call is one node
            traced: Tensor = given.tracer.create_proxy("call_function", scaled, (x, scale), {"factor": factor})
            return traced
    check_scaled(x, scale, factor)
    choice = resolve(x.device, backend)
    if choice.name == "triton" and (
        must_see_operators(x) or must_see_operators(scale) or x.numel() == 0 or scale.numel() == 0
    ):
        # A compiler fuses the operators with what stands around them.
        choice = Choice("torch", "PyTorch's own operators: traced, transformed or empty")
    note(choice)
    if choice.name == "torch":
        return scaled_by_operators(x, scale, factor)
    if x.dim() == scale.dim() == 2:
        x, scale = x.unsqueeze(1), scale.unsqueeze(1)
        return _scaled_in_kernels(x, scale, factor).squeeze(1)
    return _scaled_in_kernels(x, scale, factor)


def _scaled_in_kernels(x: Tensor, scale: Tensor, factor: float) -> Tensor:
    y: Tensor = SlotScaleFunction.apply(x, scale, factor)  # type: ignore[no-untyped-call]  # untyped in torch
    return y

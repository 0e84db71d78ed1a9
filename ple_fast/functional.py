"""The operators that modules call: checks, then the choice of backend, then the arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .autocast import autocast_dtype, cast_once
from .autograd import ExtractionLevelFunction, run_composed, run_without_grad
from .backend import Choice, is_exporting, note, resolve
from .call import LevelCall
from .checks import check_input, shape_of
from .ops import run_op
from .plan import LevelPlan
from .slots import Place, Slots
from .state import NO_STATE, LevelState
from .tensors import GateTensors, LayerTensors, check_shapes, flatten
from .torch_backend import differentiable
from .torch_backend.few_rows import MAX_ROWS, MAX_TRAIN_ROWS, few_rows_forward, serves, serves_state
from .torch_backend.mix import combine_dense

Input = Tensor | Sequence[Tensor]
_TRACED = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
"""What parameters are to a tracer."""


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


def must_compose(weight: Tensor) -> bool:
    """Whether a tracer, a transform or a tensor subclass is at work that needs to see PyTorch's own operators."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or weight.is_meta
        or type(weight) not in (Tensor, nn.Parameter)
        or torch._C._get_tracing_state() is not None
    )


def _is_compiled_alone(weight: Tensor) -> bool:
    """Whether ``torch.compile`` or export traces, and nothing else is at work that must see through an operator."""
    return (
        torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not weight.is_meta
        and type(weight) in _TRACED
    )


def _is_operator(choice: Choice, weight: Tensor, state: LevelState, backend: str | None) -> bool:
    """Whether a compiled level is one operator: where that is faster than what compilers make of PyTorch's own.

    What is exported from a CPU is PyTorch's own operators, which run without this library.
    """
    if choice.name == "triton":
        return state.is_plain
    is_plain_asked_for = backend == "torch"
    return weight.device.type == "cpu" and not is_plain_asked_for and not is_exporting() and not state.has_foreign_norm


def _run(call: LevelCall, flat: tuple[Tensor | None, ...], way: str) -> tuple[Tensor, Tensor | None]:
    """Output and, where the call lists them, the weights. ``way``: ``"hand"``, ``"composed"`` or ``"operator"``."""
    if way == "operator":
        return run_op(call, flat)
    if way == "composed":
        return run_composed(call, flat)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in flat)):
        return run_without_grad(call, flat)
    out: Any = ExtractionLevelFunction.apply(call, *flat)  # type: ignore[no-untyped-call]  # untyped in torch
    return out if call.listed else (out, None)


@lru_cache(maxsize=1024)
def _few_rows_call(plan: LevelPlan, stacked: bool) -> LevelCall:
    """Every call of a plan on the short path: it has no norm and drops nothing, so its state is always the same."""
    slots = plan.topology.num_slots
    assert slots is not None
    state = LevelState((NO_STATE,) * plan.num_layers, None, None)
    return LevelCall(plan, state, _places(slots, stacked), 1, None, 0, listed=False, recompute=False, few_rows=True)


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
    composes = must_compose(weight)
    choice = resolve(weight.device, backend)
    records = torch.is_grad_enabled()
    now: LevelState | None = None
    # Traced programs must not come to a comparison of the batch: it would become a condition of theirs.
    if (
        not composes
        and choice.name == "torch"
        and isinstance(x, Tensor)
        and 0 < x.shape[0] < (MAX_TRAIN_ROWS if records else MAX_ROWS)
        and gate_input is None
        and gate_features == in_features
        and not return_gates
        and autocast is None
        and weight.dtype in (torch.float32, torch.float64)
        and serves(plan, x.dim() == 3, trains=records)
    ):
        if not records:
            now = None if serves(plan, x.dim() == 3) else state(x.shape[0], choice.name)
            if now is None or serves_state(now):
                note(choice)
                return few_rows_forward(plan, layers, gate, x, now), None
        elif not recompute:
            parameters = flatten(layers, gate)
            if all(t is None or t.requires_grad for t in parameters):
                note(choice)
                return _run(_few_rows_call(plan, x.dim() == 3), (x, *parameters), "hand")[0], None
    if torch._C._get_tracing_state() is None:  # torch.jit.trace, to whom shapes are values
        check_shapes(plan, layers, gate, in_features, gate_features)
    tensors, places = _place(x, slots)
    batch = tensors[0].shape[0]
    gate_tensors: tuple[Tensor, ...] = ()
    gate_places = None
    if gate_input is not None:
        check_input("gate_input", gate_input, gate_features, slots, weight, autocast)
        gate_tensors, gate_places = _place(gate_input, slots)
        if gate_tensors[0].shape[0] != batch:
            raise ValueError(f"gate_input: expected {batch} rows like x, got {gate_tensors[0].shape[0]}")
    elif gate_features != in_features:
        raise ValueError(
            f"gate_input: the gates read {gate_features} features and x has {in_features}; pass gate_input="
        )
    now = state(batch, choice.name) if now is None else now
    way = "composed" if composes or now.has_foreign_norm or batch == 0 else "hand"
    if way == "composed":
        if composes and _is_compiled_alone(weight) and _is_operator(choice, weight, now, backend):
            way = "operator"
        elif choice.name == "triton":
            choice = Choice("torch", "PyTorch's own operators: traced, transformed, empty, or a norm of another kind")
    note(choice)
    if autocast is not None:
        layers, gate = _cast_layers(layers, gate, autocast, once=way == "hand")
        tensors = tuple(t.to(autocast) for t in tensors)
        gate_tensors = tuple(t.to(autocast) for t in gate_tensors)
    call = LevelCall(
        plan, now, places, len(tensors), gate_places, len(gate_tensors), return_gates, recompute, choice.name
    )
    flat = (*tensors, *gate_tensors, *flatten(layers, gate))
    if autocast is None:
        y, listed = _run(call, flat, way)
    else:
        # What autocast asks for has been cast; the mixing stays in float32, forward and backward.
        with torch.autocast(weight.device.type, enabled=False):
            y, listed = _run(call, flat, way)
    if not return_gates:
        return y, None
    assert listed is not None
    return y, list(listed.split([len(mixed) for mixed in topology.mixture_experts], dim=1))


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

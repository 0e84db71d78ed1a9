"""Which way a call of a level takes through the library: one table, asked from the top."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .backend import is_exporting
from .plan import LevelPlan
from .slots import first_of
from .state import LevelState
from .tensors import GateTensors, LayerTensors
from .torch_backend.few_rows import serves_state, takes

_TRACED = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
"""What parameters are to a tracer."""


class Asked(NamedTuple):
    """What a call asks for, as far as it decides the route."""

    plan: LevelPlan
    state: LevelState
    x: Any
    """A tensor, or one for each slot."""
    layers: Sequence[LayerTensors]
    gate: GateTensors
    backend: str
    """That was chosen, ``"torch"`` or ``"triton"``."""
    is_plain: bool
    """``"torch"`` was asked for, for this very call."""
    is_traced: bool
    """``must_see_operators``."""
    records: bool
    """A backward may follow."""
    is_special: bool
    """The gates have an input of their own, or the weights are an output."""
    autocast: torch.dtype | None
    """In which the products run, if autocast is at work."""


class Route(NamedTuple):
    """A way through the library."""

    name: str
    condition: Callable[[Asked], bool]
    """Whether a call takes it, if it takes none of those before it; the first line of its docstring says when."""
    reason: str


def must_see_operators(weight: Tensor) -> bool:
    """Whether a tracer, a transform or a tensor subclass is at work that needs to see PyTorch's own operators."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or weight.is_meta
        or type(weight) not in (Tensor, nn.Parameter)
        or torch._C._get_tracing_state() is not None
    )


def _is_operator(asked: Asked) -> bool:
    """``torch.compile`` traces a CPU level, or any program with kernels a level without norms and dropout."""
    weight = asked.layers[0].weight
    # What else must see through an operator: function transforms, and tensors that have no memory.
    if not asked.is_traced:
        return False
    if not (
        torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not weight.is_meta
        and type(weight) in _TRACED
    ):
        return False
    if asked.backend == "triton":
        return asked.state.is_plain and not asked.state.has_foreign_norm
    # What is exported from a CPU is PyTorch's own operators, which run without this library.
    return (
        weight.device.type == "cpu" and not asked.is_plain and not is_exporting() and not asked.state.has_foreign_norm
    )


def _is_differentiable(asked: Asked) -> bool:
    """Another tracer, a transform or a tensor subclass is at work, a norm is not ours, or there is no row."""
    if asked.is_traced or (asked.plan.has_state and asked.state.has_foreign_norm):
        return True
    return first_of(asked.x).shape[0] == 0


def _has_few_rows(asked: Asked) -> bool:
    """A CPU batch of fewer rows than the table of the processor says, of a level of one block and plain gates."""
    if asked.backend != "torch" or asked.is_special or not isinstance(asked.x, Tensor):
        return False
    if not takes(asked.plan, asked.x, trains=asked.records, autocast=asked.autocast):
        return False
    if asked.records:
        for row in (*asked.layers, asked.gate):  # plain loops: a small batch waits for this
            for tensor in row:
                if tensor is not None and not tensor.requires_grad:
                    return False
        return True
    return not asked.plan.has_state or serves_state(asked.state)


def _is_any(asked: Asked) -> bool:
    """Everything else."""
    return True


ROUTES = (
    Route("operator", _is_operator, "a compiler plans around one operator with a known result"),
    Route("differentiable", _is_differentiable, "PyTorch's own operators can be traced, transformed and run on no row"),
    Route("few rows", _has_few_rows, "the host's time counts beside the arithmetic: as few operators as possible"),
    Route("by hand", _is_any, "forward and backward are written out, in row blocks or in launches"),
)


_watchers: dict[int, Callable[[Route, Asked], None]] = {}
"""By thread. Nearly always empty, which costs a call next to nothing to see."""


@contextmanager
def watching(watcher: Callable[[Route, Asked], None]) -> Iterator[None]:
    """Tell ``watcher`` of every route that a call of this thread takes; of traced calls nobody is told."""
    thread = get_ident()
    before = _watchers.get(thread)
    _watchers[thread] = watcher
    try:
        yield
    finally:
        del _watchers[thread]
        if before is not None:
            _watchers[thread] = before


def route_of(asked: Asked) -> Route:
    """The first route whose condition holds."""
    for route in ROUTES:
        if route.condition(asked):
            if not asked.is_traced and _watchers and (watcher := _watchers.get(get_ident())) is not None:
                watcher(route, asked)
            return route
    raise AssertionError("the last route takes every call")

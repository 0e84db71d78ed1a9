"""Casts under autocast: no changed weight is missed, nothing outlives the region, in any thread."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from ple_fast import PLE
from ple_fast.modules.layers import StackedLayer
from tests.test_mixed_precision import Casts, build


def region(dtype: torch.dtype = torch.bfloat16, **options: Any) -> torch.autocast:
    return torch.autocast("cpu", dtype, **options)


def _through_data(ple: nn.Module) -> None:
    for parameter in ple.parameters():
        parameter.data.mul_(1.5)


def _other_data(ple: nn.Module) -> None:
    for parameter in ple.parameters():
        parameter.data = parameter.detach() * 1.5


def _from_a_vector(ple: nn.Module) -> None:
    vector = torch.nn.utils.parameters_to_vector(ple.parameters()).detach()
    torch.nn.utils.vector_to_parameters(vector * 1.5, ple.parameters())


@torch.no_grad()
def _other_storage(ple: nn.Module) -> None:
    for parameter in ple.parameters():
        with _unsafe_preserve_version_counter(parameter):
            parameter.set_(parameter * 1.5)  # type: ignore[call-overload]  # the stub of set_ knows storages only


@torch.no_grad()
def _without_a_version(ple: nn.Module) -> None:
    """As FSDP2 writes what it has gathered."""
    for parameter in ple.parameters():
        with _unsafe_preserve_version_counter(parameter):
            parameter.mul_(1.5)


@torch.no_grad()
def _in_numpy(ple: nn.Module) -> None:
    for parameter in ple.parameters():
        array = parameter.detach().numpy()
        array *= 1.5


CHANGES = [_through_data, _other_data, _from_a_vector, _other_storage, _without_a_version, _in_numpy]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("options", [{}, {"norm": "batch", "activation": "prelu", "gate_units": (5,)}], ids=str)
def test_no_cast_outlives_the_region(options: dict[str, Any], change: Callable[[nn.Module], None]) -> None:
    """The graph of a forward is alive, weights change and leave no trace: the next region casts them anew."""
    ple, x = build(**options), torch.randn(40, 7)
    with region():
        before = ple(x)
    change(ple)
    with region():
        after, expected = ple(x), copy.deepcopy(ple)(x)
    assert before.grad_fn is not None
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("other", ["nested", "in another thread", "left by an error"])
def test_another_region_on_the_way_changes_nothing(other: str) -> None:
    ple, x = build(), torch.randn(40, 7)
    with region():
        first = ple(x)
        with Casts(ple) as casts, region(), torch.autocast("cpu", enabled=False):
            pass
        with casts, region():
            assert torch.equal(ple(x), first)
        assert casts.count == 0
        if other == "nested":
            with region(torch.float16):
                assert ple(x).dtype == torch.float16
            with casts:
                assert torch.equal(ple(x), first)
            assert casts.count == 0
    if other == "in another thread":
        with _open_in_another_thread(ple, x):
            _through_data(ple)
            with region():
                assert torch.equal(ple(x), copy.deepcopy(ple)(x))
    if other == "left by an error":
        with pytest.raises(ValueError, match="after a forward"), region():
            _fail(ple(x))
    _through_data(ple)
    with region():
        assert torch.equal(ple(x), copy.deepcopy(ple)(x))
    assert first.grad_fn is not None


def _fail(y: Tensor) -> None:
    raise ValueError(f"after a forward of {len(y)} rows")


@contextmanager
def _open_in_another_thread(ple: nn.Module, x: Tensor) -> Iterator[None]:
    """A region, with a forward in it, that another thread has entered and not left."""
    inside, leave = threading.Event(), threading.Event()

    def run() -> None:
        with region():
            y = ple(x)
            inside.set()
            assert leave.wait(60)
        assert y.grad_fn is not None

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert inside.wait(60)
        yield
    finally:
        leave.set()
        thread.join()


def test_threads_with_regions_of_their_own_each_see_their_weights() -> None:
    """Every thread changes its weights without a trace between its regions, while others are within theirs."""
    x, failures = torch.randn(40, 7), []

    def run(ple: PLE) -> None:
        graphs = []
        for _ in range(15):
            with region():
                y = ple(x)
                again = ple(x)
            with region(cache_enabled=False):
                expected = ple(x)
            if not (torch.equal(y, expected) and torch.equal(again, expected)):
                failures.append(ple)
            graphs.append(y)
            for parameter in ple.parameters():
                parameter.data.mul_(1.01)

    threads = [threading.Thread(target=run, args=(build(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("graph", [True, False], ids=["graph alive", "graph gone"])
def test_nothing_of_a_parameter_outlives_the_region(graph: bool) -> None:
    """Neither the parameter nor a weak reference to it, which ``swap_tensors`` refuses."""
    ple, x = build(), torch.randn(40, 7)
    with region():
        y = ple(x)
        ple(-x)
    assert not any(weakref.getweakrefs(parameter) for parameter in ple.parameters())
    if not graph:
        del y
        gone = [weakref.ref(parameter) for parameter in ple.parameters()]
        del ple
        gc.collect()
        assert not any(reference() is not None for reference in gone)


@pytest.fixture
def swaps() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swaps")
@pytest.mark.parametrize("step", [False, True], ids=["forward", "step"])
def test_parameters_are_swapped_after_a_forward(step: bool) -> None:
    """``to`` and ``load_state_dict`` with parameters swapped, where PyTorch's own layers allow it."""
    ple, other, x = build(), build(), torch.randn(40, 7)
    with region():
        y = ple(x)
        if step:
            y.float().sum().backward()
            del y
            ple.load_state_dict(other.state_dict())
            assert torch.equal(ple(x), other(x))
    y = None
    ple.load_state_dict(other.state_dict())
    with region():
        assert torch.equal(ple(x), other(x))
    ple.to(torch.float64)
    assert ple(x.double()).dtype == torch.float64


def test_a_cast_is_shared_while_pytorch_shares_its_own() -> None:
    """Calls in one region share casts, as two calls of a linear layer do; hooks of saved tensors see none of it."""
    ple, linear, x = build(), nn.Linear(7, 5), torch.randn(40, 7)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    sizes = []
    for _ in range(2):
        with Casts(ple) as ours, Casts(linear) as plain, region():
            for _ in range(3):
                packed.clear()
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                    ple(x)
                sizes.append(len(packed))
                linear(x)
        assert (ours.count, plain.count) == (sum(1 for _ in ple.parameters()), 2)
    assert len(set(sizes)) == 1


class ForeignNorm(nn.BatchNorm1d):
    """Of a class that a level does not know, so that it is composed of PyTorch's operators."""


def _with_foreign_norm() -> PLE:
    ple = build(norm="batch")
    for layer in ple.modules():
        if isinstance(layer, StackedLayer) and isinstance(layer.norm, nn.BatchNorm1d):
            layer.norm = ForeignNorm(layer.norm.num_features)
    return ple


def _grads(ple: PLE, x: Tensor, run: Callable[[Tensor], Tensor], way: str, *, inside: bool) -> list[Tensor]:
    """Gradients of the input and the parameters of a step whose backward runs inside or outside its region."""
    leaves = [x, *ple.parameters()]

    def backward(y: Tensor) -> tuple[Tensor | None, ...]:
        loss = y.float().square().mean()
        if way == "create_graph":
            first = torch.autograd.grad(loss, x, create_graph=True)[0]
            return torch.autograd.grad(first.float().square().sum(), leaves, allow_unused=True)
        if way == "batched":
            rows = torch.stack([torch.ones_like(loss), 2 * torch.ones_like(loss)])
            return torch.autograd.grad(loss, leaves, rows, is_grads_batched=True)
        if way == "jacobian":
            return torch.vmap(lambda d: torch.autograd.grad(loss, leaves, d, retain_graph=True))(torch.ones(2))
        return torch.autograd.grad(loss, leaves)

    with region():
        y = run(x)
        found = backward(y) if inside else None
    found = backward(y) if found is None else found
    return [torch.zeros(()) if g is None else g for g in found]


MAKE_UPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norms": {"norm": "batch", "activation": "prelu", "gate_units": (5,)},
    "dropout": {"dropout": 0.3, "norm": "layer"},
    "recompute": {"recompute": True},
}


PYTORCHS = "create_graph", "differentiable"
"""Ways in which operators of PyTorch's own run in backward, which autocast reaches."""


def _assert_same_inside(ple: PLE, run: Callable[[Tensor], Tensor], way: str) -> None:
    x = torch.randn(40, 7, requires_grad=True)
    found = []
    for inside in (True, False):
        torch.manual_seed(1)
        torch._dynamo.reset()
        found.append(_grads(ple, x, run, way, inside=inside))
    largest = max(float(g.abs().max()) for g in found[1])
    assert largest > 0
    for ours, expected in zip(*found, strict=True):
        if way in PYTORCHS:
            assert (ours - expected).abs().max() <= 0.05 * largest
        else:
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("way", ["backward", "create_graph", "batched", "jacobian"])
@pytest.mark.parametrize("make_up", MAKE_UPS.values(), ids=MAKE_UPS)
def test_backward_within_the_region_gives_the_same_gradients(make_up: dict[str, Any], way: str) -> None:
    ple = build(**make_up)
    _assert_same_inside(ple, ple, way)


@pytest.mark.parametrize("make_up", ["plain", "norms", "recompute"])
def test_a_compiled_backward_within_the_region_gives_the_same_gradients(make_up: str) -> None:
    """By a compiler that has no backward of its own."""
    ple = build(num_levels=1, **MAKE_UPS[make_up])
    _assert_same_inside(ple, torch.compile(ple, backend="eager"), "backward")


def test_a_composed_backward_within_the_region_is_that_of_pytorch() -> None:
    ple = _with_foreign_norm()
    _assert_same_inside(ple, ple, "differentiable")

"""Whatever backward reads goes through ``save_for_backward``: a change in between is an error, and hooks see it all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ple_fast import ExtractionNetwork, GateSpec, MLPSpec, Topology
from ple_fast.modules.layers import OffsetStart
from tests.helpers import by_route, randomise

TWO_BLOCKS = [MLPSpec((6, 4), norm="batch"), *[MLPSpec((5, 4), "gelu")] * 4]
MAKE_UPS: dict[str, dict[str, Any]] = {
    "norm": {"experts": MLPSpec((6, 4), norm="batch")},
    "norm after": {"experts": MLPSpec((6, 4), norm="batch", norm_position="after")},
    "dice": {"experts": MLPSpec((6, 4), "dice")},
    "hidden gates": {"experts": MLPSpec((6, 4)), "gate": GateSpec((5,), norm="batch")},
    "logits": {"experts": TWO_BLOCKS, "gate": GateSpec(logits_norm="batch")},
}
PLAIN: dict[str, dict[str, Any]] = {
    "few rows": {"experts": MLPSpec((6, 4), "gelu")},
    "prelu": {"experts": MLPSpec((6, 4), "prelu", norm="layer"), "gate": GateSpec((5,))},
    "dropout": {"experts": MLPSpec((6, 4), "silu", dropout=0.3), "gate": GateSpec((5,), dropout=0.3)},
}
WAYS = ["saved", "recompute", "differentiable", "operator"]
DERIVATIVES = [
    (way, create_graph) for way in WAYS for create_graph in (False, True) if not (way == "operator" and create_graph)
]


def build(way: str, **options: Any) -> ExtractionNetwork:
    given: dict[str, Any] = {"gate": GateSpec(), "recompute": way == "recompute", **options}
    level = ExtractionNetwork(7, Topology.ple(2, 2, 1, last=False), **given)
    randomise(level)
    return level


def going(way: str) -> AbstractContextManager[Any]:
    """Eager calls go where compiled or transformed ones go."""
    if way not in ("differentiable", "operator"):
        return nullcontext()
    return by_route(way)


def statistics(level: nn.Module) -> dict[str, Tensor]:
    return {name: b for name, b in level.named_buffers() if name.endswith(("running_mean", "running_var"))}


def grads(y: Tensor, leaves: list[Tensor], *, create_graph: bool) -> tuple[Tensor | None, ...]:
    torch.manual_seed(2)
    return torch.autograd.grad(y, leaves, torch.randn(y.shape), create_graph=create_graph, allow_unused=True)


@pytest.mark.parametrize(("way", "create_graph"), DERIVATIVES)
@pytest.mark.parametrize("make_up", MAKE_UPS)
def test_running_statistics_that_backward_reads_may_not_change_before(
    make_up: str, way: str, create_graph: bool
) -> None:
    level, x = build(way, **MAKE_UPS[make_up]).eval(), torch.randn(40, 7, requires_grad=True)
    with going(way):
        expected = grads(level(x), [x], create_graph=create_graph)
        for name, tensor in statistics(level).items():
            y = level(x)
            before = tensor.clone()
            tensor.mul_(9)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                pytest.fail(f"{name}: {grads(y, [x], create_graph=create_graph)}")
            tensor.copy_(before)
        assert statistics(level)
        torch.testing.assert_close(grads(level(x), [x], create_graph=create_graph), expected, rtol=0, atol=0)


@pytest.mark.parametrize("recompute", [False, True])
def test_derivatives_of_derivatives_read_the_statistics_of_what_is_frozen(recompute: bool) -> None:
    """The gradient of a gate needs no norm of a frozen expert; where it is differentiable, the level is run again."""
    level = build("recompute" if recompute else "saved", **MAKE_UPS["norm"]).eval()
    level.blocks.requires_grad_(False)
    x, weight = torch.randn(40, 7), level.gate.weight
    assert weight is not None
    y = level(x)
    for tensor in statistics(level).values():
        tensor.mul_(9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grads(y, [weight], create_graph=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make_up", MAKE_UPS)
def test_running_statistics_that_backward_does_not_read_may_change_before(make_up: str, way: str) -> None:
    """In train mode they are the batch's, and other forward passes move the running ones."""
    level, x = build(way, **MAKE_UPS[make_up]), torch.randn(40, 7, requires_grad=True)
    with going(way):
        leaves = [x, *level.parameters()]
        expected = grads(level(x), leaves, create_graph=False)
        y = level(x)
        for tensor in statistics(level).values():
            if way != "differentiable":  # PyTorch's own batch norm saves them in any case
                tensor.mul_(9)
        level(2 * x)
        torch.testing.assert_close(grads(y, leaves, create_graph=False), expected, rtol=0, atol=0)


@contextmanager
def copies_for_backward() -> Iterator[None]:
    """Backward gets copies, made in forward, as with ``save_on_cpu``."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        yield


@pytest.mark.parametrize(("way", "create_graph"), DERIVATIVES)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("make_up", MAKE_UPS | PLAIN)
def test_backward_reads_nothing_but_what_was_saved(make_up: str, train: bool, way: str, create_graph: bool) -> None:
    """Parameters, buffers and inputs are other ones by the time of backward, which reads what hooks give it."""
    level, x = build(way, **(MAKE_UPS | PLAIN)[make_up]).train(train), torch.randn(40, 7, requires_grad=True)
    gate_x = torch.randn(40, 7, requires_grad=True) if make_up == "prelu" else None
    with going(way):
        leaves = [x, *([] if gate_x is None else [gate_x]), *level.parameters()]
        results = []
        for changes in (False, True):
            torch.manual_seed(1)
            with copies_for_backward():
                y = level(x, gate_x)
            if changes:
                for tensor in [*leaves, *statistics(level).values()]:
                    tensor.data.fill_(torch.nan)
            results.append(grads(y, leaves, create_graph=create_graph))
    for expected, found in zip(*results, strict=True):
        assert (expected is None) == (found is None)
        if expected is not None and found is not None:
            assert torch.equal(found, expected)


def test_constant_offsets_that_backward_reads_may_not_change_before() -> None:
    """They are a buffer, and read only where a derivative is wanted again."""
    topology = Topology.adatt(2, 2, last=True)
    marked = sum(map(sum, topology.mixture_offset or ()))
    offset = OffsetStart((0.5,) * marked, (0.5,) * marked, learned=False)
    level = ExtractionNetwork(7, topology, experts=MLPSpec((6, 4)), gate=GateSpec(), _offset=offset)
    x = torch.randn(40, 7, requires_grad=True)
    y = level(x)
    assert level.gate.offset is not None
    level.gate.offset.mul_(9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grads(y, [x], create_graph=True)

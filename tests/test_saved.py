"""What forward keeps for backward is what ``saved.py`` declares: each value, of its shape and dtype, and no other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from ple_fast import ExtractionNetwork, GateSpec, MLPSpec, use_backend
from ple_fast.autograd import arithmetic_of
from ple_fast.call import LevelCall
from ple_fast.saved import saved_by_kernels, saved_by_rows
from ple_fast.tensors import flatten
from tests.helpers import EXPERTS, GATES, TOPOLOGIES, by_route, level

FROZEN: dict[str, Callable[[ExtractionNetwork], Any]] = {
    "nothing": lambda module: None,
    "experts": lambda module: module.blocks.requires_grad_(False),
    "gates": lambda module: module.gate.requires_grad_(False),
    "all but norms": lambda module: [p.requires_grad_("norm" in name) for name, p in module.named_parameters()],
}
BLOCKS: Any = (MLPSpec((6, 4), norm="batch"),) * 2 + (MLPSpec((6, 4), "silu", norm="layer", dropout=0.1),) * 2
WIRINGS = ("mmoe", "mixed-kinds", "static-offsets", "adatt")
LEVELS: dict[str, tuple[str, Any, Any]] = {
    **{f"{experts}, plain gates": ("ple", EXPERTS[experts], GATES["plain"]) for experts in EXPERTS},
    **{f"3 layers, {gates}": ("ple-last", MLPSpec((5, 6, 4)), GATES[gates]) for gates in GATES},
    **{f"{topology}, 1 layer": (topology, MLPSpec((4,), "gelu"), GATES["plain"]) for topology in WIRINGS},
    "several blocks": ("unordered", BLOCKS, GATES["everything"]),
}


class _Seen(Exception):
    pass


def _call(module: ExtractionNetwork, x: Tensor, backend: str) -> tuple[LevelCall, tuple[Any, ...]]:
    """The call of a level and its tensors, and no result."""
    seen: list[Any] = []

    def stop(*given: Any) -> None:
        seen.extend(given[:-1])
        raise _Seen

    stopped = mock.patch("ple_fast.functional._run", stop)
    with stopped, by_route("by hand"), use_backend(backend), suppress(_Seen):  # type: ignore[arg-type]  # a literal
        module(x)
    call, given, layers, gate = seen
    return call, (*given, *flatten(layers, gate))


@pytest.mark.parametrize(
    ("backend", "frozen"), [*(("torch", frozen) for frozen in FROZEN), ("triton", "nothing"), ("triton", "experts")]
)
@pytest.mark.parametrize("name", LEVELS)
def test_what_is_kept_is_what_is_declared(name: str, frozen: str, backend: str, device: torch.device) -> None:
    topology, experts, gate = LEVELS[name]
    module = level(TOPOLOGIES[topology], experts, gate).to(device).train()
    FROZEN[frozen](module)
    slots = TOPOLOGIES[topology].num_slots
    assert slots is not None
    x = torch.randn(9, slots, module.in_features, dtype=torch.float64, device=device, requires_grad=frozen != "nothing")
    call, flat = _call(module, x, backend)
    needed = tuple(t is not None and t.requires_grad for t in flat)
    assert any(needed)
    inputs, wants = call.inputs(flat), call.wants(needed)
    with torch.no_grad():
        _, _, kept = arithmetic_of(call).level_forward(inputs, wants, listed=False)
    saved = (saved_by_rows if backend == "torch" else saved_by_kernels)(call.plan, wants, call.state.kind())
    declared = saved.empty(inputs, 9)
    assert len(kept) == len(declared)
    for number, (tensor, like) in enumerate(zip(kept, declared, strict=True)):
        assert tensor is not None, (number, saved.values[number])
        assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype), (number, saved)
    assert len({t.data_ptr() for t in kept}) == len(kept)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_is_kept_that_no_wanted_gradient_reads(backend: str, device: torch.device) -> None:
    """The last hidden layer of the gates is read by the gradient of the gates' weight alone."""
    module = level(TOPOLOGIES["ple"], MLPSpec((4,), "gelu"), GateSpec((5,), "gelu")).to(device)
    x = torch.randn(9, 7, dtype=torch.float64, device=device)
    kept = []
    for learns in (True, False):
        assert module.gate.weight is not None
        module.gate.weight.requires_grad_(learns)
        call, flat = _call(module, x, backend)
        wants = call.wants(tuple(t is not None and t.requires_grad for t in flat))
        saved = (saved_by_rows if backend == "torch" else saved_by_kernels)(call.plan, wants, call.state.kind())
        kept.append(len(saved.values))
    assert kept[0] == kept[1] + 1

"""Numbers of one fused level against the reference: every wiring, expert, gate, input form, batch size and dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ple_fast import GateSpec, MLPSpec, Topology
from ple_fast.torch_backend.row_dice import row_dice_forward
from tests.helpers import (
    EXPERTS,
    GATES,
    TOPOLOGIES,
    assert_close,
    compare,
    compare_low_precision,
    draw,
    has_dropout,
    level,
)

PLE = TOPOLOGIES["ple"]
BLOCKS: dict[str, tuple[MLPSpec, ...]] = {
    "task-and-shared": (MLPSpec((6, 4)),) * 6 + (MLPSpec((5, 3, 4)),) * 2,
    "alternating": (MLPSpec((6, 4)), MLPSpec((4,), "tanh")) * 4,
    "norms-differ": (MLPSpec((6, 4), norm="batch"),) * 3
    + (MLPSpec((6, 4), norm="layer"),) * 3
    + (MLPSpec((6, 4)),) * 2,
    "bias-differs": (MLPSpec((6, 4), bias=False),) * 3 + (MLPSpec((6, 4), "prelu"),) * 4 + (MLPSpec((6, 4), "dice"),),
    "all-different": tuple(MLPSpec((width, 4)) for width in range(1, 9)),
}
"""Experts of several specs, for the eight experts of ``PLE``: as many blocks as runs of equal specs."""


def _slots(topology: Topology) -> int:
    assert topology.num_slots is not None
    return topology.num_slots


def _check(
    topology: Topology,
    experts: Any,
    gate: GateSpec | None = None,
    *,
    form: str = "stacked",
    batch: int = 9,
    **how: Any,
) -> None:
    module = level(topology, experts, gate)
    slots = _slots(topology)
    if has_dropout(experts, gate if gate is not None else GateSpec()):
        how["train"] = False
    compare(module, draw(form, batch, slots, module.in_features), form=form, slots=slots, **how)


@pytest.mark.parametrize("experts", ["2-layers", "batch-norm"])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_wirings(name: str, experts: str) -> None:
    _check(TOPOLOGIES[name], EXPERTS[experts])


@pytest.mark.parametrize("topology", ["ple", "static-offsets"])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name: str, topology: str) -> None:
    _check(TOPOLOGIES[topology], EXPERTS[name])


@pytest.mark.parametrize("topology", ["ple", "mixed-kinds", "unordered"])
@pytest.mark.parametrize("name", GATES)
def test_gates(name: str, topology: str) -> None:
    _check(TOPOLOGIES[topology], EXPERTS["2-layers"], GATES[name])


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str) -> None:
    _check(PLE, BLOCKS[name])
    expected = [spec for i, spec in enumerate(BLOCKS[name]) if i == 0 or spec != BLOCKS[name][i - 1]]
    assert len(level(PLE, BLOCKS[name]).blocks) == len(expected)


@pytest.mark.parametrize("experts", ["batch-norm", "batch-norm-after", "dice", "per-layer"])
@pytest.mark.parametrize(("batch", "train"), [(0, True), (0, False), (1, False), (2, True), (33, True), (33, False)])
def test_batch_sizes_with_batch_norm(batch: int, train: bool, experts: str) -> None:
    for gate in (GateSpec(), GATES["everything"]):
        module = level(PLE, EXPERTS[experts], gate)
        leaves = draw("stacked", batch, _slots(PLE), module.in_features)
        compare(module, leaves, form="stacked", slots=_slots(PLE), train=train, common_scale=True)


@pytest.mark.parametrize(
    ("experts", "gate"),
    [("batch-norm", "plain"), ("dice", "plain"), ("2-layers", "logits-norm"), ("2-layers", "hidden-batch-norm")],
)
def test_one_sample_in_train_mode_raises_as_batch_norm_does(experts: str, gate: str) -> None:
    module = level(PLE, EXPERTS[experts], GATES[gate]).train()
    x = torch.randn(1, module.in_features, dtype=torch.float64)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        nn.BatchNorm1d(3).train()(torch.randn(1, 3))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(x)
    assert module.eval()(x).shape == (1, PLE.num_mixtures, 4)


def test_gates_alone_are_differentiable() -> None:
    module = level(PLE, EXPERTS["2-layers"])
    x = torch.randn(5, module.in_features, dtype=torch.float64, requires_grad=True)
    _, gates = module(x, return_gates=True)
    entropy = -sum((g * g.log()).sum() for g in gates)
    assert isinstance(entropy, Tensor)
    (grad,) = torch.autograd.grad(entropy, x)
    reference = level(PLE, EXPERTS["2-layers"])
    assert reference.gate.weight is not None
    logits = torch.nn.functional.linear(x, reference.gate.weight, reference.gate.bias)
    sizes = [len(mixed) for mixed in PLE.mixture_experts]
    expected = -sum((g.softmax(1) * g.log_softmax(1)).sum() for g in logits.split(sizes, dim=1))
    assert isinstance(expected, Tensor)
    assert_close("entropy", entropy, expected, 1e-12)
    assert_close("x.grad", grad, torch.autograd.grad(expected, x)[0], 1e-12)


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_batch_norm_settings_are_read_at_each_call(momentum: float | None) -> None:
    module = level(PLE, EXPERTS["per-layer"], GATES["everything"])
    for child in module.modules():
        if isinstance(child, nn.BatchNorm1d):
            child.momentum, child.eps = momentum, 1e-2
    compare(module, draw("one", 9, 4, module.in_features), slots=4, common_scale=True)


def test_no_grad_and_inference_mode_give_the_same_output() -> None:
    module = level(PLE, EXPERTS["per-layer"], GATES["everything"]).eval()
    x = torch.randn(9, module.in_features, dtype=torch.float64)
    expected = module(x)
    with torch.no_grad():
        assert_close("no_grad", module(x), expected, 1e-12)
    with torch.inference_mode():
        assert_close("inference_mode", module(x), expected, 1e-12)
    assert expected.requires_grad


LOW = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_low_precision_of_norms(norm: str, position: str, dtype: torch.dtype) -> None:
    module = level(PLE, MLPSpec((48, 32), "silu", norm=norm, norm_position=position), GateSpec((24,)), in_features=40)
    compare_low_precision(module, draw("stacked", 64, 4, 40), dtype=dtype, form="stacked", slots=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "spec", [MLPSpec((48, 32)), MLPSpec((48, 32), "silu", norm="batch"), MLPSpec((48, 32), "gelu")]
)
def test_autocast(spec: MLPSpec, dtype: torch.dtype) -> None:
    for form in ("one", "stacked"):
        module = level(PLE, spec, GateSpec((24,)), in_features=40)
        compare_low_precision(module, draw(form, 64, 4, 40), dtype=dtype, autocast=True, form=form, slots=4)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("form", ["one", "stacked", "list"])
@pytest.mark.parametrize("spec", [MLPSpec((96, 64)), MLPSpec((80, 72, 64), "gelu", norm="batch"), MLPSpec((64,))])
def test_batches_beyond_a_cache_block(spec: MLPSpec, form: str) -> None:
    """Rows enough for several tasks of the two threads, and odd, so that the last block is not full."""
    module = level(PLE, spec, GateSpec((24,)), in_features=96)
    compare_low_precision(module, draw(form, 1501, 4, 96), dtype=torch.float32, form=form, slots=4)


@pytest.mark.parametrize("name", ["plain", "hidden"])
def test_extreme_logits_are_a_choice_of_one_expert(name: str) -> None:
    """Logits far apart: the softmax must neither overflow nor divide zero by zero."""
    module = level(PLE, EXPERTS["2-layers"], GATES[name])
    with torch.no_grad():
        assert module.gate.weight is not None
        module.gate.weight.mul_(1e4)
    leaves = draw("stacked", 9, 4, module.in_features)
    ours, _ = compare(module, leaves, form="stacked", slots=4, common_scale=True)
    assert all(bool((g.max(1).values > 0.99).any()) for g in ours.gates)


def test_row_dice_adds_up_squares_in_float32() -> None:
    """In half precision they would overflow."""
    z, alpha = (300 * torch.randn(5, 2, 48)).half(), torch.tensor([0.3, -0.2]).half()
    got = row_dice_forward(z, alpha, 1e-3)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.double(), row_dice_forward(z.double(), alpha.double(), 1e-3), rtol=2e-3, atol=1e-2)

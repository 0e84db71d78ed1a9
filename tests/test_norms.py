"""Norms in training over several row blocks, which meet where statistics are taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ple_fast import GateSpec, MLPSpec
from ple_fast.torch_backend import prepared
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
    reference_of,
    saved_bytes,
)
from tests.product_helpers import blocks_of

BLOCKS: dict[str, tuple[MLPSpec, ...]] = {
    "norms-differ": (MLPSpec((6, 4), norm="batch"),) * 3
    + (MLPSpec((6, 4), norm="layer"),) * 3
    + (MLPSpec((6, 4)),) * 2,
    "depths-differ": (MLPSpec((6, 5, 4), norm="batch"),) * 6 + (MLPSpec((4,), norm="batch"),) * 2,
    "dice-beside-batch-norm": (MLPSpec((6, 4), norm="batch"),) * 6 + (MLPSpec((6, 4), "dice"),) * 2,
}


@pytest.fixture
def four_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row blocks of four rows."""
    blocks_of(4, monkeypatch)


def _compare(experts: Any, gate: GateSpec, batch: int, *, topology: str = "ple", **how: Any) -> None:
    module = level(TOPOLOGIES[topology], experts, gate)
    slots = module.topology.num_slots
    assert slots is not None
    leaves = draw("stacked", batch, slots, module.in_features)
    compare(module, leaves, form="stacked", slots=slots, common_scale=True, **how)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("batch", [9, 12, 14])
@pytest.mark.parametrize(("experts", "gate"), [(e, "everything") for e in EXPERTS] + [("batch-norm", g) for g in GATES])
@pytest.mark.usefixtures("four_rows")
def test_row_blocks_meet_where_statistics_are_taken(experts: str, gate: str, batch: int, train: bool) -> None:
    drops = has_dropout(EXPERTS[experts], GATES[gate])
    _compare(EXPERTS[experts], GATES[gate], batch, train=train and not drops)


@pytest.mark.parametrize("gate", ["plain", "everything"])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.usefixtures("four_rows")
def test_experts_of_several_make_ups_meet_too(name: str, gate: str) -> None:
    _compare(BLOCKS[name], GATES[gate], 14)


def test_levels_with_batch_norm_have_row_blocks(monkeypatch: pytest.MonkeyPatch, four_rows: None) -> None:
    seen: list[int] = []
    whole = prepared.row_blocks

    def spy(inputs: Any, own: Any) -> list[slice]:
        seen.append(len(whole(inputs, own)))
        return whole(inputs, own)

    monkeypatch.setattr(prepared, "row_blocks", spy)
    x = torch.randn(14, 7, dtype=torch.float64)
    for spec, blocks in ((EXPERTS["batch-norm"], 4), (EXPERTS["dice"], 1)):
        level(TOPOLOGIES["ple-last"], spec, GATES["logits-norm"]).train()(x)
        assert seen == [blocks]
        seen.clear()


@pytest.mark.parametrize("experts", ["batch-norm", "batch-norm-after", "prelu-norms", "layer-norm"])
@pytest.mark.usefixtures("four_rows")
def test_recomputation_over_row_blocks(experts: str) -> None:
    """Same numbers, and running statistics move once."""
    outcomes = []
    for recompute in (False, True):
        module = level(TOPOLOGIES["ple-last"], EXPERTS[experts], GATES["everything"], recompute=recompute).train()
        x = torch.randn(14, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        module(x).square().sum().backward()
        assert x.grad is not None
        outcomes.append([x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    for saved, again in zip(*outcomes, strict=True):
        assert_close("gradient or statistics", again, saved, 1e-12)


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.usefixtures("four_rows")
def test_running_statistics_over_row_blocks(momentum: float | None) -> None:
    """Three steps, with a moving and with a plain average; without gradients too."""
    module = level(TOPOLOGIES["ple-last"], EXPERTS["batch-norm"], GATES["logits-norm"])
    reference = reference_of(module)
    for norm in (m for net in (module, reference) for m in net.modules() if isinstance(m, nn.BatchNorm1d)):
        norm.momentum = momentum
    x = torch.randn(3, 14, 7, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1], dtype=torch.float64).view(3, 1, 1)
    for step in range(3):
        with torch.set_grad_enabled(step != 1):
            module.train()(x[step])
            reference.train()(x[step])
    module.eval()
    reference.eval()
    assert_close("y", module(x[0]), reference(x[0]), 1e-12)


def test_float32_statistics_of_features_far_from_zero() -> None:
    """Means a thousand deviations away, over blocks of 512 rows: merged sums of squares would be all rounding."""
    module = level(TOPOLOGIES["ple-last"], EXPERTS["batch-norm"], GATES["logits-norm"], in_features=64)
    with torch.no_grad():
        for layer in module.blocks[0].layers:  # type: ignore[union-attr]  # ModuleList
            layer.bias.add_(1000.0)
    x = torch.randn(1300, 64, dtype=torch.float64)
    compare_low_precision(module, [x], dtype=torch.float32)


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "prelu"])
def test_of_a_layer_with_a_norm_only_its_input_is_kept(activation: str, norm: str) -> None:
    x = torch.randn(64, 7)
    module = level(TOPOLOGIES["ple-last"], MLPSpec((6, 4), activation, norm=norm), dtype=torch.float32).train()
    inputs = module.topology.num_experts * 64 * (6 + 4) * 4
    assert inputs < saved_bytes(module, x) < 1.8 * inputs  # statistics and the gates' weights


@pytest.mark.parametrize("experts", ["batch-norm", "batch-norm-after", "dice"])
def test_a_derivative_of_a_derivative_moves_no_statistics(experts: str) -> None:
    """Its backward runs the level again."""
    statistics = []
    for create_graph in (False, True):
        module = level(TOPOLOGIES["ple"], EXPERTS[experts], GATES["logits-norm"]).train()
        torch.manual_seed(5)
        y = module(torch.randn(9, 7, dtype=torch.float64))
        torch.autograd.grad(y.square().sum(), list(module.parameters()), create_graph=create_graph)
        statistics.append({name: b.clone() for name, b in module.named_buffers()})
    assert statistics[0].keys() == statistics[1].keys()
    assert all(torch.equal(statistics[0][name], statistics[1][name]) for name in statistics[0])

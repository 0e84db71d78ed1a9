"""Mistakes that once were, each with the smallest case that showed it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ple_fast import GateSpec, MLPSpec, Topology
from ple_fast.functional import gate_combine
from ple_fast.reference import correspondence
from tests.helpers import EXPERTS, GATES, TOPOLOGIES, assert_close, draw, level, reference_of

PLE = TOPOLOGIES["ple"]


@pytest.mark.parametrize("recompute", [False, True])
def test_backward_within_the_autocast_region(recompute: bool) -> None:
    """PyTorch advises against it, yet its layers allow it: the same gradients as outside."""
    module = level(PLE, MLPSpec((48, 32), norm="layer"), GateSpec((24,)), in_features=40, recompute=recompute).float()
    grads = []
    for inside in (False, True):
        x = draw("one", 64, 1, 40, dtype=torch.float32)[0].requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y, gates = module(x, return_gates=True)
            loss = y.float().square().sum() + sum(g.square().sum() for g in gates)
            assert isinstance(loss, Tensor)
            wanted = [x, *module.parameters()]
            found: Any = torch.autograd.grad(loss, wanted) if inside else None
        grads.append(torch.autograd.grad(loss, wanted) if found is None else found)
    for outside, within in zip(*grads, strict=True):
        assert torch.equal(outside, within)


def test_autocast_does_not_round_the_weights_of_mixtures() -> None:
    """Autocast turns batched products into low precision; sums over experts are float32 and rounded once."""
    module = level(Topology.mmoe(1, 2), MLPSpec((1,), "identity", bias=False), in_features=2).float()
    reference = reference_of(module)
    x = torch.randn(500, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), reference(x))
        h, weights = torch.randn(50, 2, 1), torch.rand(50, 1, 2)
        combined = gate_combine(h, weights)
    torch.testing.assert_close(combined, (weights[:, 0, :, None] * h).sum(1, keepdim=True))


def test_export_of_a_small_batch_serves_any() -> None:
    """The choice of the short path once made the batch size a condition of the exported program."""
    module = level(PLE, EXPERTS["2-layers"]).eval()
    (x,) = draw("one", 9, 1, module.in_features)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    for batch in (2, 33, 600):
        (x,) = draw("one", batch, 1, module.in_features)
        assert_close("y", program.module()(x), module(x), 1e-12)


@pytest.mark.parametrize("train", [True, False])
def test_a_norm_that_stops_tracking_leaves_its_statistics(train: bool) -> None:
    """``track_running_stats = False`` on a norm that has statistics, as adversarial training does for a while."""
    module = level(PLE, EXPERTS["per-layer"], GATES["everything"]).train(train)
    reference = reference_of(module)
    for child in [*module.modules(), *reference.modules()]:
        if isinstance(child, nn.BatchNorm1d):
            child.track_running_stats = False
    (x,) = draw("one", 9, 1, module.in_features)
    assert_close("y", module(x), reference(x), 1e-10)
    for pair in correspondence(module, reference):
        if not isinstance(pair.reference, nn.Parameter):
            assert torch.equal(pair.fused[pair.part], pair.reference), pair.name


def test_an_identity_in_the_place_of_a_norm_is_no_norm() -> None:
    """As when a batch norm has been folded into the weights."""
    module = level(PLE, EXPERTS["batch-norm"], GATES["logits-norm"])
    without = copy.deepcopy(module)
    for child in list(module.modules()):
        if isinstance(getattr(child, "norm", None), nn.BatchNorm1d):
            child.norm = nn.Identity()
    for child in list(without.modules()):
        if isinstance(getattr(child, "norm", None), nn.BatchNorm1d):
            child.norm = None  # type: ignore[assignment]  # what the attribute may also be
    (x,) = draw("one", 9, 1, module.in_features)
    y = module(x)
    assert torch.equal(y, without(x))
    y.sum().backward()


def test_dropout_under_another_default_device() -> None:
    module = level(PLE, MLPSpec((6, 4), dropout=0.5))
    (x,) = draw("one", 9, 1, module.in_features)
    with torch.device("meta"):
        assert not module(x).is_meta


def test_a_gate_does_not_see_what_overflows_in_an_expert_that_it_does_not_weigh() -> None:
    """Everything is finite going forward; a product of no meaning overflows going back."""
    module = level(Topology.ple(2, 1, 1, last=True), MLPSpec((4,), "identity")).float()
    with torch.no_grad():
        module.get_parameter("blocks.0.layers.0.weight")[0].mul_(1e30)
    y = module(torch.randn(40, module.in_features))
    assert bool(y.isfinite().all())
    (y[:, 1] * 1e10).sum().backward()
    grad = module.get_parameter("gate.weight").grad
    assert grad is not None and bool(grad.isfinite().all())


def test_low_precision_gradients_pass_the_temperature_before_they_are_rounded() -> None:
    module = level(PLE, EXPERTS["identity"], GateSpec(temperature=1e-3)).half()
    with torch.no_grad():
        for parameter in module.gate.parameters():
            parameter.mul_(1e-3)
    reference = reference_of(module)
    (x,) = draw("one", 64, 1, module.in_features, dtype=torch.float16)
    for model in (module, reference):
        (model(x) * 1e-6).sum().backward()
    for pair in correspondence(module, reference):
        if pair.name.startswith("gates") and isinstance(pair.reference, nn.Parameter):
            assert pair.fused.grad is not None and pair.reference.grad is not None
            torch.testing.assert_close(pair.fused.grad[pair.part], pair.reference.grad, rtol=2e-2, atol=2e-6)

"""Mistakes that once were, each with the smallest case that showed it."""

from __future__ import annotations


from typing import Any

import pytest
import torch
from torch import Tensor

from ple_fast import GateSpec, MLPSpec, Topology
from ple_fast.functional import gate_combine
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

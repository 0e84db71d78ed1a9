"""Weights, gradients of weights and their workspace of more than 2**31 elements; see ``test_large_tensors.py``."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ple_fast_kernels import (
    GateRuns,
    Readers,
    Tile,
    WeightGrad,
    fused_level_fwd,
    grouped_data_grad,
    grouped_input_grad,
    grouped_linear_fwd,
    grouped_weight_grads,
)
from tests.kernel_helpers import mixtures_of, values
from tests.large_tensors import HALF, LEVEL, SMALL, needs, same, vast

pytestmark = pytest.mark.usefixtures("last_programs")

MANY = 2**25 + 2**21
"""Units or inputs: 64 times as many are more than 2**31, and so are 63 times as many."""
DEEP = Tile(32, 32, 64, 4, 2)


def test_weights_of_many_units(device: torch.device) -> None:
    needs(device, MANY * 64, MANY * 3)
    a, w = values(3, 1, 64, dtype=HALF, device=device), vast(1, MANY, 64, device=device)
    w[0, -8:] = values(8, 64, dtype=HALF, device=device)
    y, _, _ = grouped_linear_fwd(a, w, None, (0,), tile=DEEP)
    assert y is not None
    same("y", y[:, 0, -8:], a[:, 0].double() @ w[0, -8:].double().T)


@pytest.mark.parametrize("kernel", ["data_grad", "input_grad"])
def test_weights_of_many_inputs(kernel: str, device: torch.device) -> None:
    needs(device, MANY * 64, MANY * 3)
    d, w = values(3, 1, 64, dtype=HALF, device=device), vast(1, 64, MANY, device=device)
    w[0, :, -8:] = values(64, 8, dtype=HALF, device=device)
    if kernel == "data_grad":
        out, _ = grouped_data_grad(d, w, tile=DEEP)
    else:
        out = grouped_input_grad(d, w, Readers.build((0,), 1), vast(3, 1, MANY, device=device), tile=DEEP)
    same("out", out[:, 0, -8:], d[:, 0].double() @ w[0, :, -8:].double())


def test_weights_of_many_members(device: torch.device) -> None:
    members = 2**13 + 1
    needs(device, members * 512 * 512)
    d, w = values(3, members, 512, dtype=HALF, device=device), vast(members, 512, 512, device=device)
    w[-1] = values(512, 512, dtype=HALF, device=device).mul(0.1)
    out, _ = grouped_data_grad(d, w, tile=SMALL)
    same("out", out[:, -1, -32:], d[:, -1].double() @ w[-1, :, -32:].double())


GATES, GATE_INPUTS = 2064, 2**20 + 8
"""Rows and columns of a gates' weight of more than 2**31 elements."""
LAST_GATES = GateRuns((0,), (GATES - 8,), (8,))


def test_weight_of_many_gates(device: torch.device) -> None:
    needs(device, GATES * GATE_INPUTS)
    w = vast(GATES, GATE_INPUTS, device=device)
    w[-8:, -8:] = values(8, 8, dtype=HALF, device=device)
    dl = values(3, GATES, dtype=HALF, device=device)
    out = vast(3, 1, GATE_INPUTS, device=device)
    grouped_input_grad(None, None, None, out, dl=dl, gate_weight=w, gates=LAST_GATES, tile=SMALL)
    same("out", out[:, 0, -8:], dl[:, -8:].double() @ w[-8:, -8:].double())


def test_gradient_of_a_weight_of_many_gates(device: torch.device) -> None:
    needs(device, GATES * GATE_INPUTS * 2, GATES * GATE_INPUTS)
    a, dl = values(5, 1, GATE_INPUTS, dtype=HALF, device=device), values(5, GATES, dtype=HALF, device=device)
    layer = WeightGrad(a, None, (), False, False, dl, LAST_GATES, True, False)
    (found,) = grouped_weight_grads([layer], HALF, tile=SMALL)
    assert found.gate_weight is not None
    same("gate_weight", found.gate_weight[-1:, -8:], dl[:, -1:].double().T @ a[:, 0, -8:].double())


def test_gradient_of_a_weight_of_many_units(device: torch.device) -> None:
    needs(device, MANY * 64 * 2, MANY * 64, MANY * 5)
    a, d = values(5, 1, 64, dtype=HALF, device=device), vast(5, 1, MANY, device=device)
    d[:, 0, -8:] = values(5, 8, dtype=HALF, device=device)
    (found,) = grouped_weight_grads([WeightGrad(a, d, (0,), True, False)], HALF, tile=SMALL)
    assert found.weight is not None
    same("weight", found.weight[0, -8:, -8:], d[:, 0, -8:].double().T @ a[:, 0, -8:].double())


def test_parts_of_a_weight_gradient(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """The workspace of all parts, and the bias behind a weight in it."""
    units, depth, parts = 4104, 8200, 33
    needs(device, 2 * units * depth * parts * 2, 2 * units * depth)
    monkeypatch.setattr("ple_fast_kernels.weight_grad.row_splits", lambda *_: parts)
    rows = (parts - 1) * 32 + 5
    a, d = vast(rows, 1, depth, device=device), vast(rows, 2, units, device=device)
    a[:], d[:] = 0.0, 0.0
    a[-5:], d[-5:] = values(5, 1, depth, dtype=HALF, device=device), values(5, 2, units, dtype=HALF, device=device)
    (found,) = grouped_weight_grads([WeightGrad(a, d, (0, 0), True, False)], HALF, tile=SMALL)
    assert found.weight is not None
    same("weight", found.weight[-1, -1:, -8:], d[-5:, 1, -1:].double().T @ a[-5:, 0, -8:].double())
    (found,) = grouped_weight_grads([WeightGrad(a, d, (0, 0), True, True)], HALF, tile=SMALL)
    assert found.bias is not None
    same("bias", found.bias[1, -8:], d[-5:, 1, -8:].double().sum(0))


def test_weights_of_a_fused_level(device: torch.device) -> None:
    units = 2**24 + 8
    needs(device, 3 * units * 64, 3 * 2 * units)
    a, w = values(3, 2, 64, dtype=HALF, device=device), vast(3, units, 64, device=device)
    w[:, -8:] = values(3, 8, 64, dtype=HALF, device=device)
    logits = torch.zeros(3, LEVEL.num_logits, device=device)
    y, *_ = fused_level_fwd(
        a, w, None, LEVEL.expert_slot, mixtures_of(LEVEL), logits=logits, tile=Tile(32, 32, 64, 4, 2)
    )
    experts = torch.stack([a[:, s].double() @ w[e, -8:].double().T for e, s in enumerate(LEVEL.expert_slot)], 1)
    same("y", y[:, -1, -8:], experts.mean(1))

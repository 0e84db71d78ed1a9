"""Activations of more than 2**31 elements, in every kernel: an offset that is counted in 32 bits wraps, as on a GPU.

In the interpreter only the last program of a launch runs (``tests/large_tensors.py``), so that this is quick.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ple_fast_kernels import (
    NO_END,
    GateRuns,
    LayerEnd,
    Readers,
    Tile,
    WeightGrad,
    batch_norm_sums,
    fused_level_fwd,
    fused_two_layers_fwd,
    gate_combine_bwd,
    gate_combine_fwd,
    grouped_data_grad,
    grouped_input_grad,
    grouped_linear_fwd,
    grouped_weight_grads,
    layer_end_fwd,
    layer_end_grad,
    layer_norm_grad,
)
from tests.helpers import assert_close
from tests.kernel_helpers import mixtures_of, values
from tests.large_tensors import HALF, LEVEL, ROWS, SMALL, WIDE, needs, rows_of, same, vast

pytestmark = pytest.mark.usefixtures("last_programs")


def test_rows_of_a_layer(device: torch.device) -> None:
    needs(device, *[ROWS * WIDE] * 3)
    a, w = rows_of(16, device).unsqueeze(1), values(2, WIDE // 2, 16, dtype=HALF, device=device)
    y, z, _ = grouped_linear_fwd(a, w, None, (0, 0), activation=("relu", 0.0), keep_input=True, tile=SMALL)
    assert y is not None and z is not None and min(y.numel(), a.stride(0) * ROWS) > 2**31
    product = a[-5:, 0].double() @ w[1, -8:].double().T
    same("y", y[-5:, 1, -8:], product.relu())
    same("z", z[-5:, 1, -8:], product)


def test_logits(device: torch.device) -> None:
    needs(device, ROWS * WIDE * 2, ROWS * WIDE)
    a, w = rows_of(16, device).unsqueeze(1), values(WIDE, 16, dtype=HALF, device=device)
    runs = GateRuns((0,), (WIDE - 8,), (8,))
    _, _, logits = grouped_linear_fwd(a, None, None, (), gate_weight=w, gates=runs, tile=SMALL)
    assert logits is not None
    assert_close("logits", logits[-5:, -8:].double(), a[-5:, 0].double() @ w[-8:].double().T, 1e-4)


def test_data_grad(device: torch.device) -> None:
    needs(device, *[ROWS * WIDE] * 3)
    d, w = rows_of(32, device).view(ROWS, 2, 16), values(2, 16, WIDE // 2, dtype=HALF, device=device)
    kept = rows_of(WIDE, device, seed=1).view(ROWS, 2, -1)
    out, _ = grouped_data_grad(d, w, kept=kept, end=LayerEnd(("relu", 0.0)), tile=SMALL)
    through = d[-5:, 1].double() @ w[1, :, -8:].double()
    same("out", out[-5:, 1, -8:], through * (kept[-5:, 1, -8:] > 0))


def test_input_grad(device: torch.device) -> None:
    needs(device, *[ROWS * WIDE] * 3)
    d, w = rows_of(32, device).view(ROWS, 2, 16), values(2, 16, WIDE // 2, dtype=HALF, device=device)
    dl, gate_w = rows_of(WIDE, device, seed=1), values(WIDE, WIDE // 2, dtype=HALF, device=device)
    out = vast(ROWS, 2, WIDE // 2, device=device)
    grouped_input_grad(
        d, w, Readers.build((0, 1), 2), out, dl=dl, gate_weight=gate_w, gates=GateRuns((1,), (WIDE - 8,), (8,)),
        tile=SMALL,
    )  # fmt: skip
    expected = d[-5:, 1].double() @ w[1, :, -8:].double() + dl[-5:, -8:].double() @ gate_w[-8:, -8:].double()
    same("out", out[-5:, 1, -8:], expected)


@pytest.fixture
def few_parts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Tile | None:
    """33 parts of 2**15 rows, of which the interpreter takes all in one step; a GPU takes its own."""
    if device.type == "cuda":
        return None
    monkeypatch.setattr("ple_fast_kernels.weight_grad.row_splits", lambda *_: 33)
    return Tile(16, 16, 2**15, 4, 2)


@pytest.mark.parametrize("asked", ["weight", "bias", "gate_weight", "gate_bias"])
def test_rows_of_weight_grads(asked: str, few_parts: Tile | None, device: torch.device) -> None:
    needs(device, *[ROWS * WIDE] * 3)
    a, d, dl = rows_of(16, device).unsqueeze(1), rows_of(32, device, seed=1), rows_of(WIDE, device, seed=2)
    wants = {name: name == asked for name in ("weight", "bias", "gate_weight", "gate_bias")}
    layer = WeightGrad(a, d.view(ROWS, 2, 16), (0, 0), dl=dl, gates=GateRuns((0,), (WIDE - 8,), (8,)), **wants)
    a[-64:-5] = d[-64:-5] = dl[-64:-5] = 0.0  # the last part has five rows
    (found,) = grouped_weight_grads([layer], HALF, tile=few_parts)
    inputs, of_member, of_logits = (t[-5:].double() for t in (a[:, 0], d[:, 16:], dl[:, -8:]))
    expected = {
        "weight": of_member.T @ inputs,
        "bias": of_member.sum(0),
        "gate_weight": of_logits.T @ inputs,
        "gate_bias": of_logits.sum(0),
    }[asked]
    ours = getattr(found, asked)
    same(asked, ours[1] if asked in ("weight", "bias") else ours[-8:], expected)


LEVEL_UNITS = WIDE // 3


def shares(device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits of the level, and the weights of its last mixture in its last rows."""
    logits = vast(ROWS, LEVEL.num_logits, dtype=torch.float32, device=device)
    logits[-5:] = values(5, LEVEL.num_logits, dtype=torch.float32, device=device)
    return logits, logits[-5:, LEVEL.logit_offset[-1] :].double().softmax(1)


def test_mixtures(device: torch.device) -> None:
    needs(device, *[ROWS * WIDE] * 2)
    h = rows_of(WIDE, device).view(ROWS, 3, LEVEL_UNITS)
    logits, p = shares(device)
    y, _ = gate_combine_fwd(h, logits, mixtures_of(LEVEL))
    same("y", y[-5:, -1, -8:], torch.einsum("be,beh->bh", p, h[-5:, :, -8:].double()))


def test_backward_of_mixtures(device: torch.device) -> None:
    needs(device, *[ROWS * WIDE] * 4)
    h = rows_of(WIDE, device).view(ROWS, 3, LEVEL_UNITS)
    dy = rows_of(WIDE, device, seed=1).reshape(-1)[-ROWS * 2 * LEVEL_UNITS :].view(ROWS, 2, LEVEL_UNITS)
    p = vast(ROWS, LEVEL.num_weights, dtype=torch.float32, device=device)
    p[-5:] = values(5, LEVEL.num_weights, dtype=torch.float32, device=device).softmax(1)
    dh, dp, dl = gate_combine_bwd(
        dy, None, h, p, mixtures_of(LEVEL), LEVEL_UNITS, HALF, kept=h, activation=("relu", 0.0)
    )
    assert dh is not None and dp is not None
    weights, last = p[-5:].double().view(5, 2, 3), dy[-5:].double()
    same("dh", dh[-5:, -1], (weights[:, :, 2, None] * last).sum(1) * (h[-5:, -1] > 0))
    of_weights = torch.einsum("boh,beh->boe", last, h[-5:].double())
    assert_close("dp", dp[-5:].double(), of_weights.view(5, -1), 1e-4)
    of_logits = weights * (of_weights - (weights * of_weights).sum(2, keepdim=True))
    same("dl", dl[-5:] if dl is not None else None, of_logits.view(5, -1))


def test_rows_of_a_fused_level(device: torch.device) -> None:
    needs(device, *[ROWS * WIDE] * 4)
    a = rows_of(32, device).view(ROWS, 2, 16)
    w = values(3, LEVEL_UNITS, 16, dtype=HALF, device=device)
    logits, p = shares(device)
    y, h, z, _ = fused_level_fwd(
        a, w, None, LEVEL.expert_slot, mixtures_of(LEVEL), logits=logits, keep_output=True, keep_input=True,
        tile=Tile(32, 16, 16, 4, 2),
    )  # fmt: skip
    experts = torch.stack([a[-5:, s].double() @ w[e, -8:].double().T for e, s in enumerate(LEVEL.expert_slot)], 1)
    assert h is not None and z is not None
    same("h", h[-5:, :, -8:], experts)
    same("z", z[-5:, :, -8:], experts)
    same("y", y[-5:, -1, -8:], torch.einsum("be,beh->bh", p, experts))


def test_rows_of_two_fused_layers(device: torch.device) -> None:
    needs(device, ROWS * WIDE)
    a, weights = rows_of(32, device).view(ROWS, 2, 16), values(3, 16, 16, dtype=HALF, device=device).mul(0.25)
    x = a[:, :1]
    y, _ = fused_two_layers_fwd(
        a, (weights, weights), (None, None), LEVEL.expert_slot, mixtures_of(LEVEL),
        activations=(("identity", 0.0), ("identity", 0.0)), x=x, mixture_slots=(0, 0),
        gate_weight=torch.zeros(6, 16, dtype=HALF, device=device), tile=SMALL._replace(columns=16, depth=16),
    )  # fmt: skip
    both = torch.stack([w.double().T @ w.double().T for w in weights])
    experts = torch.stack([a[-5:, s].double() @ both[e] for e, s in enumerate(LEVEL.expert_slot)], 1)
    same("y", y[-5:, -1], experts.mean(1))


def of_norm(kind: str, device: torch.device) -> tuple[Tensor, Tensor, LayerEnd]:
    """Gradient and product of two members, and a norm without weight that takes off 1 and doubles."""
    d, z = (rows_of(WIDE, device, seed=i).view(ROWS, 2, WIDE // 2) for i in (1, 2))
    size = (WIDE,) if kind == "batch" else (ROWS, 2)
    mean, rstd = (torch.full(size, number, dtype=torch.float32, device=device) for number in (1.0, 2.0))
    return d, z, NO_END._replace(mean=mean, spread=rstd)


def test_ends_of_layers(device: torch.device) -> None:
    needs(device, *[ROWS * WIDE] * 3)
    d, z, end = of_norm("batch", device)
    y, _ = layer_end_fwd(z, end)
    same("y", y[-5:, -1, -8:], (z[-5:, -1, -8:].double() - 1) * 2)
    same("dz", layer_end_grad(d, z, end)[-5:, -1, -8:], d[-5:, -1, -8:].double() * 2)


def test_statistics_of_layers_by_row(device: torch.device) -> None:
    """Of parts of units, merged."""
    needs(device, *[ROWS * WIDE] * 2)
    _, z, end = of_norm("batch", device)
    moments = vast(ROWS, 2, 2, 2, dtype=torch.float32, device=device)
    moments[-5:, :, :, 0], moments[-5:, :, :, 1] = 1.0, WIDE / 4 * 0.25
    y, found = layer_end_fwd(z, end, moments=moments, part_units=WIDE // 4)
    same("y", y[-5:, -1, -8:], (z[-5:, -1, -8:].double() - 1) * 2)
    assert found.mean is not None


def test_sums_of_batch_norm(device: torch.device) -> None:
    needs(device, *[ROWS * WIDE] * 2)
    d, z, end = of_norm("batch", device)
    parts = batch_norm_sums(d, z, end)[-1]
    gradient, normed = d[-5:, -1, -8:].double(), (z[-5:, -1, -8:].double() - 1) * 2
    assert_close("sums", parts[0, -8:].double(), gradient.sum(0), 1e-4)
    assert_close("products", parts[1, -8:].double(), (gradient * normed).sum(0), 1e-4)


def test_backward_of_layer_norm(device: torch.device) -> None:
    needs(device, *[ROWS * WIDE] * 3)
    d, z, end = of_norm("layer", device)
    dz, _, _ = layer_norm_grad(d, z, end, affine_grad=False)
    gradient, normed = d[-5:, -1].double(), (z[-5:, -1].double() - 1) * 2
    expected = gradient - gradient.mean(1, keepdim=True) - normed * (gradient * normed).mean(1, keepdim=True)
    same("dz", dz[-5:, -1], expected * 2)

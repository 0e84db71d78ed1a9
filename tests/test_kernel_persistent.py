"""Products by programs that stay, which load by descriptors: against float64, what they read, and who takes them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernel_helpers import chain, guarded, hold, kept_of, linears, slots_first, values
from tests.persistent_helpers import HALVES, KERNELS, launched, route, routed, same

pytest.importorskip("triton")

from ple_fast_kernels import (
    Dropout,
    GateRuns,
    LayerEnd,
    Norm,
    Tile,
    column_sums_merge,
    grouped_data_grad,
    grouped_linear_fwd,
)

pytestmark = pytest.mark.usefixtures("guard_bands")
tiles: Any = importlib.import_module("ple_fast_kernels._tiles")
persistent: Any = importlib.import_module("ple_fast_kernels.persistent")
RELU, NONE = ("relu", 0.0), ("identity", 0.0)
RUNS = GateRuns((0, 1), (0, 3), (3, 2))


@pytest.fixture(autouse=True)
def _routed(device: torch.device) -> Iterator[None]:
    with routed(device):
        yield


def forward(a: Tensor, w: Tensor, b: Tensor | None, slots: tuple[int, ...], **options: Any) -> Tensor:
    """By the persistent kernel, twice: the same bits."""
    with launched() as found:
        y, z, _ = grouped_linear_fwd(a, w, b, slots, **options)
        again, _, _ = grouped_linear_fwd(a, w, b, slots, **options)
    assert [name for name, _ in found] == [KERNELS["linear"]] * 2
    assert y is not None and again is not None and z is None
    assert same(y, again)
    return y


def data_grad(d: Tensor, w: Tensor, kept: Tensor | None, activation: tuple[str, float]) -> tuple[Tensor, Tensor]:
    """The same of the data gradient, and the sums of its columns."""
    with launched() as found:
        out, parts = grouped_data_grad(d, w, kept=kept, end=LayerEnd(activation), sums=True)
        again, others = grouped_data_grad(d, w, kept=kept, end=LayerEnd(activation), sums=True)
        alone, none = grouped_data_grad(d, w, kept=kept, end=LayerEnd(activation))
    assert [name for name, _ in found] == [KERNELS["data_grad"]] * 3
    assert parts is not None and others is not None and none is None
    assert same(out, again) and same(parts, others) and same(out, alone)
    return out, parts


SIZES = {
    "exact": (64, 32, 64),
    "one-tile": (32, 32, 32),
    "ragged": (39, 40, 40),
    "a-part-of-a-step": (33, 24, 24),
    "deep": (33, 32, 104),
}
"""Rows, columns and depth."""


@pytest.mark.parametrize("processors", [1, 3])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_forward(
    size: str, dtype: torch.dtype, processors: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one program that has all tiles, and by three that share them."""
    rows, units, depth = SIZES[size]
    if device.type == "cpu":
        monkeypatch.setattr(tiles, "table_of", lambda device: ("interpreter", processors))
    elif processors > 1:  # more tiles than programs
        rows *= 200
    a, w = values(rows, 2, depth, dtype=dtype, device=device), values(3, units, depth, dtype=dtype, device=device) / 4
    b = values(3, units, dtype=dtype, device=device, seed=1)
    for slots, bias, activation in (((0, 0, 1), b, RELU), ((1, 0, 1), None, NONE)):
        y = forward(guarded(a), guarded(w), None if bias is None else guarded(bias), slots, activation=activation)
        hold("y", y, linears, a, w, bias, slots, activation)
    if device.type == "cpu":
        with launched() as found:
            grouped_linear_fwd(a, w, b, (0, 0, 1))
        count = -(-rows // 32) * 3 * -(-units // 32)
        assert found == [(KERNELS["linear"], min(processors, count))]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_data_gradient(size: str, dtype: torch.dtype, device: torch.device) -> None:
    rows, units, depth = SIZES[size]
    d, w = values(rows, 2, depth, dtype=dtype, device=device), values(2, depth, units, dtype=dtype, device=device) / 4
    z = values(rows, 2, units, dtype=dtype, device=device, seed=1)

    def through(d: Tensor, w: Tensor, kept: Tensor | None, activation: tuple[str, float]) -> Tensor:
        return chain(torch.einsum("bnh,nhk->bnk", d, w), kept, activation)

    for activation in (RELU, NONE):
        kept = kept_of(z, activation)
        out, parts = data_grad(guarded(d), guarded(w), None if kept is None else guarded(kept), activation)
        hold("out", out, through, d, w, kept, activation)
        bias = column_sums_merge(parts, torch.empty(2, units, dtype=dtype, device=device))
        hold("bias", bias, lambda *o: through(*o).sum(0), d, w, kept, activation)


@pytest.mark.parametrize("activation", [(name, 0.1) for name in persistent.ACTIVATIONS["linear"]], ids=str)
def test_activations(activation: tuple[str, float], device: torch.device) -> None:
    a, w = (values(*shape, dtype=torch.float16, device=device) for shape in ((40, 1, 24), (2, 24, 24)))
    b, z = values(2, 24, dtype=torch.float16, device=device), values(40, 2, 24, dtype=torch.float16, device=device)
    hold("y", forward(a, w / 4, b, (0, 0), activation=activation), linears, a, w / 4, b, (0, 0), activation)
    kept = kept_of(z, activation)
    if activation[0] not in persistent.ACTIVATIONS["data_grad"]:
        return

    def through(d: Tensor, w: Tensor, kept: Tensor | None) -> Tensor:
        return chain(torch.einsum("bnh,nhk->bnk", d, w), kept, activation)

    out, _ = data_grad(z, w / 4, kept, activation)
    hold("out", out, through, z, w / 4, kept)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaps-between-rows": lambda t: guarded(t, 8),
    "slots-first": slots_first,
    "every-other-slot": lambda t: torch.stack((t, torch.full_like(t, float("nan"))), 2).flatten(1, 2)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_that_the_engine_can_load(layout: str, device: torch.device) -> None:
    a, w = (values(*shape, dtype=torch.bfloat16, device=device) for shape in ((40, 2, 24), (2, 24, 24)))
    hold("y", forward(LAYOUTS[layout](a), w, None, (1, 0)), linears, a, w, None, (1, 0), NONE)
    wide = torch.full((40, 4, 24), 3.0, dtype=torch.bfloat16, device=device)
    y = forward(a, w, None, (0, 0), out=wide[:, 1:3])
    assert y.data_ptr() == wide[:, 1:3].data_ptr() and bool((wide[:, [0, 3]] == 3.0).all())
    hold("y in wider rows", y, linears, a, w, None, (0, 0), NONE)
    out, _ = data_grad(LAYOUTS[layout](a), w.transpose(1, 2).contiguous(), None, NONE)
    hold("out", out, lambda d, w: torch.einsum("bnh,nkh->bnk", d, w), a, w)


@pytest.mark.parametrize("depth", [24, 40])
def test_a_box_reaches_into_no_other_slot_or_member(depth: int, device: torch.device) -> None:
    """All of them are NaN: 0 times NaN would be one."""
    a, w = (values(*shape, dtype=torch.bfloat16, device=device) for shape in ((40, 3, depth), (3, 24, depth)))
    alone = forward(a, w, None, (1, 1, 1))
    back, sums = data_grad(a, w.transpose(1, 2).contiguous(), None, NONE)
    for other in (0, 2):
        a[:, other] = float("nan")
        w[other] = float("nan")
    y = forward(a, w, None, (1, 1, 1))
    out, parts = data_grad(a, w.transpose(1, 2).contiguous(), None, NONE)
    for mine, before in ((y, alone), (out, back), (parts.view(-1, 3, 24), sums.view(-1, 3, 24))):
        assert torch.equal(mine[:, 1], before[:, 1])
        assert bool(mine[:, [0, 2]].isnan().all())


def test_a_row_that_is_not_finite_stays_alone(device: torch.device) -> None:
    a, w = (values(*shape, dtype=torch.bfloat16, device=device) for shape in ((70, 1, 24), (1, 40, 24)))
    a[3, 0, 2], a[66, 0, 1] = float("nan"), float("inf")
    y = forward(a, w, None, (0,), activation=RELU)
    assert y.isnan().flatten(1).any(1).nonzero().flatten().tolist() == [3]
    assert y.isfinite().flatten(1).all(1).logical_not().nonzero().flatten().tolist() == [3, 66]


def test_rows_beyond_the_batch_are_not_summed(device: torch.device) -> None:
    """Where a weight is infinite their products are not 0."""
    d, w = torch.ones(33, 1, 32, dtype=torch.float16, device=device), torch.ones(1, 32, 32, device=device).half()
    w[0, 0, 0] = float("inf")
    _, parts = data_grad(d, w, None, NONE)
    assert parts.sum(0)[0, :2].tolist() == [float("inf"), 33 * 32.0]


def operands(device: torch.device, rows: int = 70, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    a, w = values(rows, 2, 40, device=device), values(2, 40, 40, device=device) / 4
    return guarded(a.to(dtype)), guarded(w.to(dtype))


def shifted(t: Tensor) -> Tensor:
    """The same numbers from an address on that is no multiple of 16 bytes."""
    buffer = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return buffer[1:].view(t.shape).copy_(t)


ELSEWHERE: dict[str, Callable[[Tensor, Tensor], dict[str, Any]]] = {
    "float32": lambda a, w: {"a": a.float(), "weight": w.float()},
    "few-rows": lambda a, w: {"a": a[:31]},
    "one-row": lambda a, w: {"a": a[:1]},
    "unaligned-input": lambda a, w: {"a": shifted(a)},
    "unaligned-weight": lambda a, w: {"weight": shifted(w)},
    "odd-depth": lambda a, w: {"a": a[..., :39].contiguous(), "weight": w[..., :39].contiguous()},
    "odd-steps": lambda a, w: {"a": torch.nn.functional.pad(a, (0, 3))[..., :-3]},
    "equal-rows": lambda a, w: {"a": a[:1].expand(a.shape)},
    "silu": lambda a, w: {"activation": ("silu", 0.0)},
    "sigmoid": lambda a, w: {"activation": ("sigmoid", 0.0)},
    "kept-product": lambda a, w: {"keep_input": True},
    "dropout": lambda a, w: {"dropout": Dropout(torch.tensor(1, device=a.device), 0, 0.5)},
    "norm": lambda a, w: {
        "norm": Norm("batch", torch.zeros(80, device=a.device), torch.ones(80, device=a.device), None, None, 1e-5)
    },
    "narrow": lambda a, w: {"weight": w[:, :8].contiguous()},
    "shallow": lambda a, w: {"a": a[..., :8], "weight": w[..., :8].contiguous()},
    "tile": lambda a, w: {"tile": Tile(16, 16, 16, 4, 2)},
}
"""Of a call: what is other than the engine, the epilogue or the tile takes."""


@pytest.mark.parametrize("why", ELSEWHERE)
def test_everything_else_is_loaded_by_pointers(why: str, device: torch.device) -> None:
    a, w = operands(device)
    given = {"a": a, "weight": w, "bias": None, "slots": (1, 0), **ELSEWHERE[why](a, w)}
    with launched() as found:
        ours, _, _ = grouped_linear_fwd(**given)
    assert [name for name, _ in found] == ["_grouped_linear_fwd_kernel"]
    if why not in ("dropout", "norm"):
        activation = given.get("activation", NONE)
        hold("y", ours, linears, given["a"], given["weight"], None, (1, 0), activation)


@pytest.mark.parametrize("why", ["float32", "few-rows", "unaligned-input", "unaligned-weight", "odd-steps", "sigmoid"])
def test_so_is_the_data_gradient(why: str, device: torch.device) -> None:
    d, w = operands(device)
    given = {"a": d, "weight": w, "activation": NONE, **ELSEWHERE[why](d, w)}
    d, kept = given["a"], None if why != "sigmoid" else values(70, 2, 40, dtype=torch.bfloat16, device=device)
    for end in (LayerEnd(given["activation"]), LayerEnd(dropout=Dropout(torch.tensor(1, device=device), 0, 0.5))):
        with launched() as found:
            grouped_data_grad(d, given["weight"], kept=kept, end=end)
        assert [name for name, _ in found] == ["_grouped_data_grad_kernel"]


@pytest.mark.parametrize("least", [None, 1 << 20])
def test_the_table_says_from_which_amount_of_work_on(least: int | None, device: torch.device) -> None:
    a, w = operands(device)
    route(device, least)
    with launched() as found:
        grouped_linear_fwd(a, w, None, (0, 1))
        grouped_data_grad(a, w)
    assert [name for name, _ in found] == ["_grouped_linear_fwd_kernel", "_grouped_data_grad_kernel"]


def test_gates_beside_it_are_a_launch_of_their_own(device: torch.device) -> None:
    a, w = operands(device)
    gate_w, gate_b = values(5, 40, dtype=a.dtype, device=device), values(5, dtype=a.dtype, device=device)
    gates: dict[str, Any] = {"gate_weight": gate_w, "gate_bias": gate_b, "gates": RUNS}
    with launched() as found:
        y, _, logits = grouped_linear_fwd(a, w, None, (0, 1), **gates)
    assert sorted(name for name, _ in found) == ["_grouped_linear_fwd_kernel", KERNELS["linear"]]
    route(device, None)
    one, _, beside = grouped_linear_fwd(a, w, None, (0, 1), **gates)
    torch.testing.assert_close((y, logits), (one, beside), rtol=2e-2, atol=2e-2)

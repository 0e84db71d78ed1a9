"""``grouped_linear_fwd`` and ``grouped_data_grad`` against float64: activations, sizes, layouts, gates, dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from ple_fast import specs
from ple_fast_kernels import FUSED, MAX_RUN, NO_GATES, GateRuns, LayerEnd, Tile, grouped_data_grad, grouped_linear_fwd
from tests.kernel_helpers import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    TILES,
    apply,
    chain,
    guarded,
    hold,
    kept_of,
    linears,
    values,
)

pytestmark = pytest.mark.usefixtures("guard_bands")

SMALL = Tile(16, 16, 16, 4, 2)
RUNS = GateRuns((0, 2, 0), (0, 3, 7), (3, 4, 1))
"""Eight logits: three and one of slot 0, four of slot 2."""


def logits_of(a: Tensor, weight: Tensor, bias: Tensor | None, runs: GateRuns) -> Tensor:
    """Logits of every run, in the order of the rows of ``weight``."""
    parts = []
    for slot, first, size in zip(runs.slot, runs.first, runs.sizes, strict=True):
        rows = slice(first, first + size)
        parts.append(F.linear(a[:, slot], weight[rows], None if bias is None else bias[rows]))
    return torch.cat(parts, 1)


def test_every_fused_activation_has_a_case() -> None:
    assert {name for name, _ in ACTIVATIONS} == set(FUSED)


def test_kernels_know_every_activation_that_learns_nothing() -> None:
    """``saved.py`` declares what kernels keep without asking them."""
    assert set(FUSED) == set(specs.ACTIVATIONS) - set(specs.LEARNED)


@pytest.mark.parametrize("keep_input", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(activation: tuple[str, float], keep_input: bool, device: torch.device) -> None:
    a, w, b = values(5, 3, 7, device=device), values(3, 6, 7, device=device), values(3, 6, device=device)
    slots = (0, 0, 2)
    y, z, logits = grouped_linear_fwd(
        guarded(a), guarded(w), guarded(b), slots, activation=activation, keep_input=keep_input
    )
    hold("y", y, linears, a, w, b, slots, activation)
    assert logits is None and (z is not None) == keep_input
    if keep_input:
        hold("z", z, linears, a, w, b, slots, ("identity", 0.0))


@pytest.mark.usefixtures("alignment")
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("rows", "depth", "units"), [(1, 1, 1), (1, 35, 6), (37, 35, 33), (40, 64, 32), (17, 16, 1)])
def test_sizes(rows: int, depth: int, units: int, tile: Tile | None, device: torch.device) -> None:
    """One, no multiple of a tile, more than a tile, and exact multiples: with and without masks."""
    a, w, b = (
        values(rows, 3, depth, device=device),
        values(2, units, depth, device=device),
        values(2, units, device=device),
    )
    gate_w, gate_b = values(8, depth, device=device), values(8, device=device)
    y, z, logits = grouped_linear_fwd(
        guarded(a, 3), guarded(w), guarded(b), (1, 2), activation=("silu", 0.0), keep_input=True,
        gate_weight=guarded(gate_w), gate_bias=guarded(gate_b), gates=RUNS, tile=tile,
    )  # fmt: skip
    hold("y", y, linears, a, w, b, (1, 2), ("silu", 0.0))
    hold("z", z, linears, a, w, b, (1, 2), ("identity", 0.0))
    hold("logits", logits, logits_of, a, gate_w, gate_b, RUNS)


@pytest.mark.usefixtures("alignment")
@pytest.mark.parametrize("slots", [(0, 0, 0), (0, 1, 2), (0, 0, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_input(layout: str, slots: tuple[int, ...], device: torch.device) -> None:
    a = LAYOUTS[layout](values(19, 3, 18, device=device))
    w, gate_w = values(len(slots), 5, 18, device=device), values(8, 18, device=device)
    y, _, logits = grouped_linear_fwd(a, guarded(w), None, slots, gate_weight=guarded(gate_w), gates=RUNS, tile=SMALL)
    hold("y", y, linears, a, w, None, slots, ("identity", 0.0))
    hold("logits", logits, logits_of, a, gate_w, None, RUNS)


def test_the_result_may_be_a_part_of_wider_rows(device: torch.device) -> None:
    a, w = values(19, 1, 18, device=device), values(2, 17, 18, device=device)
    whole = torch.full((19, 5, 17), 3.0, dtype=torch.float64, device=device)
    out = whole[:, 1:3]
    y, z, _ = grouped_linear_fwd(a, w, None, (0, 0), activation=("relu", 0.0), keep_input=True, out=out, tile=SMALL)
    assert y is out
    hold("y", y, linears, a, w, None, (0, 0), ("relu", 0.0))
    hold("z", z, linears, a, w, None, (0, 0), ("identity", 0.0))
    assert bool((whole[:, [0, 3, 4]] == 3.0).all())


@pytest.mark.usefixtures("alignment")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_gates_alone(tile: Tile | None, bias: bool, device: torch.device) -> None:
    a, w = values(19, 3, 18, device=device), values(8, 18, device=device)
    b = values(8, device=device) if bias else None
    y, z, logits = grouped_linear_fwd(guarded(a, 1), None, None, (), gate_weight=w, gate_bias=b, gates=RUNS, tile=tile)
    assert y is None and z is None
    hold("logits", logits, logits_of, a, w, b, RUNS)


def test_more_logits_of_a_slot_than_a_run_has(device: torch.device) -> None:
    total = MAX_RUN + 9
    runs = GateRuns((0, 0, 1), (0, MAX_RUN, MAX_RUN + 6), (MAX_RUN, 6, 3))
    a, w, b = values(3, 2, 18, device=device), values(total, 18, device=device), values(total, device=device)
    member = values(1, 4, 18, device=device)
    y, _, logits = grouped_linear_fwd(a, member, None, (1,), gate_weight=guarded(w), gate_bias=guarded(b), gates=runs)
    hold("logits", logits, logits_of, a, w, b, runs)
    hold("y", y, linears, a, member, None, (1,), ("identity", 0.0))


@pytest.mark.usefixtures("alignment")
@pytest.mark.parametrize("activation", [("relu", 0.0), ("gelu", 0.0), ("tanh", 0.0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_dtypes(dtype: torch.dtype, activation: tuple[str, float], device: torch.device) -> None:
    a = values(37, 2, 40, dtype=dtype, device=device)
    w, b = values(2, 35, 40, device=device).mul(0.2).to(dtype), values(2, 35, dtype=dtype, device=device)
    gate_w, runs = values(6, 40, device=device).mul(0.2).to(dtype), GateRuns((0, 1), (0, 4), (4, 2))
    y, z, logits = grouped_linear_fwd(
        guarded(a, 8), w, b, (0, 1), activation=activation, keep_input=True, gate_weight=gate_w, gates=runs
    )
    assert y is not None and z is not None and logits is not None
    assert (y.dtype, z.dtype, logits.dtype) == (dtype, dtype, torch.float32)
    hold("y", y, linears, a, w, b, (0, 1), activation)
    hold("z", z, linears, a, w, b, (0, 1), ("identity", 0.0))
    hold("logits", logits, logits_of, a, gate_w, None, runs)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_nan_stays_nan_and_in_its_row(activation: tuple[str, float], device: torch.device) -> None:
    a, w = values(5, 1, 7, device=device), values(2, 6, 7, device=device)
    a[2, 0, 3] = float("nan")
    y, _, _ = grouped_linear_fwd(a, w, None, (0, 0), activation=activation)
    assert y is not None
    assert torch.equal(y.isnan().all(2).all(1), torch.arange(5, device=device) == 2)
    assert not bool(y[[0, 1, 3, 4]].isnan().any())


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_large_inputs_of_an_activation(activation: tuple[str, float], device: torch.device) -> None:
    """No overflow on the way: what PyTorch has as a number is one, forward and backward."""
    z = torch.tensor([-1e30, -750.0, -90.0, -20.0, -0.0, 0.0, 20.0, 90.0, 750.0, 1e30], device=device)
    z = z.double() if activation[0] == "gelu_tanh" else z  # its cube is infinite in float32
    a, w = z.view(-1, 1, 1), torch.ones(1, 1, 1, dtype=z.dtype, device=device)
    y, _, _ = grouped_linear_fwd(a, w, None, (0,), activation=activation)
    torch.testing.assert_close(y, apply(a, activation))
    kept = kept_of(a, activation)
    d, _ = grouped_data_grad(torch.ones_like(a), w, kept=kept, end=LayerEnd(activation))
    torch.testing.assert_close(d, chain(torch.ones_like(a), kept, activation))


def test_the_same_inputs_give_the_same_bits(device: torch.device) -> None:
    a, w = values(37, 1, 35, dtype=torch.float32, device=device), values(3, 33, 35, dtype=torch.float32, device=device)
    first, second = (grouped_linear_fwd(a, w, None, (0, 0, 0), activation=("gelu", 0.0), tile=SMALL) for _ in range(2))
    assert first[0] is not None and second[0] is not None and torch.equal(first[0], second[0])


def test_a_slot_may_begin_beyond_what_32_bits_count(device: torch.device) -> None:
    """Slots first in memory, as a transposed view has them; the memory between the slots is never touched."""
    step = 2**30 + 8
    memory = torch.empty(2 * step + 100, dtype=torch.float16, device=device)
    a = memory.as_strided((3, 3, 16), (16, step, 1))
    a.copy_(values(3, 3, 16, dtype=torch.float16, device=device))
    w = values(2, 4, 16, device=device).mul(0.2).half()
    y, _, logits = grouped_linear_fwd(a, w, None, (1, 2), gate_weight=w[0], gates=GateRuns((2,), (0,), (4,)))
    hold("y", y, linears, a.contiguous(), w, None, (1, 2), ("identity", 0.0))
    hold("logits", logits, logits_of, a.contiguous(), w[0], None, GateRuns((2,), (0,), (4,)))


def data_grad(d: Tensor, w: Tensor, kept: Tensor | None, activation: tuple[str, float]) -> Tensor:
    return chain(torch.stack([d[:, m] @ w[m] for m in range(w.shape[0])], 1), kept, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_data_grad_of_activations(activation: tuple[str, float], device: torch.device) -> None:
    """Against autograd through the layer below, at a zero too."""
    d, w, z = values(5, 3, 4, device=device), values(3, 4, 7, device=device), values(5, 3, 7, device=device)
    z[0, 0, 0] = 0.0
    kept = kept_of(z, activation)
    kept = None if kept is None else guarded(kept, 2)
    ours, parts = grouped_data_grad(guarded(d, 3), guarded(w), kept=kept, end=LayerEnd(activation))
    assert parts is None
    leaf = z.clone().requires_grad_()
    y = torch.einsum("bmk,mhk->bmh", apply(leaf, activation), w)
    hold("d", ours, lambda: torch.autograd.grad(y, leaf, d)[0])


@pytest.mark.usefixtures("alignment")
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("rows", "depth", "units"), [(1, 1, 1), (1, 35, 6), (37, 35, 33), (40, 64, 32), (17, 16, 1)])
def test_data_grad_of_sizes(rows: int, depth: int, units: int, tile: Tile | None, device: torch.device) -> None:
    d, w = values(rows, 2, depth, device=device), values(2, depth, units, device=device)
    kept = values(rows, 2, units, device=device)
    ours, _ = grouped_data_grad(guarded(d, 3), guarded(w), kept=guarded(kept), end=LayerEnd(("silu", 0.0)), tile=tile)
    hold("d", ours, data_grad, d, w, kept, ("silu", 0.0))


@pytest.mark.usefixtures("alignment")
@pytest.mark.parametrize("activation", [("identity", 0.0), ("relu", 0.0), ("gelu", 0.0), ("tanh", 0.0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_data_grad_of_dtypes(dtype: torch.dtype, activation: tuple[str, float], device: torch.device) -> None:
    d, w = values(37, 2, 40, dtype=dtype, device=device), values(2, 40, 35, device=device).mul(0.2).to(dtype)
    kept = kept_of(values(37, 2, 35, dtype=dtype, device=device), activation)
    ours, _ = grouped_data_grad(guarded(d, 8), w, kept=kept, end=LayerEnd(activation))
    assert ours.dtype == dtype
    hold("d", ours, data_grad, d, w, kept, activation)


def test_no_gates_are_no_runs() -> None:
    assert GateRuns((), (), ()) == NO_GATES

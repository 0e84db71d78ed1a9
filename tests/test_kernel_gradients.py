"""``grouped_input_grad`` and ``grouped_weight_grads`` against plain float64 sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ple_fast_kernels import GateRuns, Readers, Tile, WeightGrad, grouped_input_grad, grouped_weight_grads
from tests.kernel_helpers import DTYPES, LAYOUTS, TILES, guarded, hold, values

pytestmark = pytest.mark.usefixtures("guard_bands")

SMALL = Tile(16, 16, 16, 4, 2)
RUNS = GateRuns((0, 2, 0), (0, 3, 7), (3, 4, 1))
"""Eight logits: three and one of slot 0, four of slot 2; slot 1 has none."""
MEMBERS: dict[str, tuple[int, ...]] = {
    "one-each": (0, 1, 2),
    "shared": (0, 0, 0),
    "unread": (0, 2, 2),
    "out-of-order": (2, 0, 2, 0, 1),
}


def input_grad(
    d: Tensor | None, w: Tensor | None, members: Sequence[int], dl: Tensor | None, gate_w: Tensor | None, runs: GateRuns
) -> Tensor:
    """``(B, 3, K)``."""
    some, weight = (d, w) if d is not None and w is not None else (dl, gate_w)
    assert some is not None and weight is not None
    out = some.new_zeros(some.shape[0], 3, weight.shape[-1])
    for m, slot in enumerate(members):
        assert d is not None and w is not None
        out[:, slot] += d[:, m] @ w[m]
    for slot, first, size in zip(runs.slot, runs.first, runs.sizes, strict=True) if dl is not None else ():
        assert dl is not None and gate_w is not None
        out[:, slot] += dl[:, first : first + size] @ gate_w[first : first + size]
    return out


def result(rows: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """A result ``(B, 3, K)`` of NaN, and the buffer with bands of 3 around it."""
    size = rows * 3 * width
    buffer = torch.full((size + 128,), 3.0, dtype=like.dtype, device=like.device)
    out = buffer[64 : 64 + size].view(rows, 3, width)
    out.fill_(float("nan"))
    return out, buffer


def assert_bands(buffer: Tensor) -> None:
    assert bool((buffer[:64] == 3.0).all()) and bool((buffer[-64:] == 3.0).all())


def test_readers_of_slots() -> None:
    assert Readers.build((0, 2, 2), 4) == Readers((0, 1, 1, 3), (1, 1, 3, 3), ())
    assert Readers.build((2, 0, 2, 0, 1), 3) == Readers((0, 2, 3), (2, 3, 5), (1, 3, 4, 0, 2))


@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("name", MEMBERS)
def test_input_grad_of_wirings(name: str, gates: bool, device: torch.device) -> None:
    """What nobody reads gets 0."""
    members = MEMBERS[name]
    d, w = values(19, len(members), 18, device=device), values(len(members), 18, 20, device=device)
    dl, gate_w = values(19, 8, device=device), values(8, 20, device=device)
    out, buffer = result(19, 20, d)
    given = {"dl": guarded(dl), "gate_weight": guarded(gate_w), "gates": RUNS} if gates else {}
    ours = grouped_input_grad(guarded(d, 3), guarded(w), Readers.build(members, 3), out, tile=SMALL, **given)  # type: ignore[arg-type]  # of three types
    assert ours is out
    hold("out", out, input_grad, d, w, members, dl if gates else None, gate_w, RUNS)
    if name == "unread" and not gates:
        assert not bool(out[:, 1].any())
    assert_bands(buffer)


@pytest.mark.usefixtures("alignment")
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("rows", "depth", "width"), [(1, 1, 1), (1, 35, 6), (37, 35, 33), (40, 32, 32), (17, 16, 1)])
def test_input_grad_of_sizes(rows: int, depth: int, width: int, tile: Tile | None, device: torch.device) -> None:
    members = (0, 0, 2)
    d, w = values(rows, 3, depth, device=device), values(3, depth, width, device=device)
    dl, gate_w = values(rows, 8, device=device), values(8, width, device=device)
    out, buffer = result(rows, width, d)
    grouped_input_grad(
        guarded(d, 3), guarded(w), Readers.build(members, 3), out, dl=guarded(dl), gate_weight=guarded(gate_w),
        gates=RUNS, tile=tile,
    )  # fmt: skip
    hold("out", out, input_grad, d, w, members, dl, gate_w, RUNS)
    assert_bands(buffer)


def test_input_grad_of_gates_alone(device: torch.device) -> None:
    dl, gate_w = values(19, 8, device=device), values(8, 20, device=device)
    out, buffer = result(19, 20, dl)
    grouped_input_grad(None, None, None, out, dl=guarded(dl), gate_weight=guarded(gate_w), gates=RUNS, tile=SMALL)
    hold("out", out, input_grad, None, None, (), dl, gate_w, RUNS)
    assert not bool(out[:, 1].any())
    assert_bands(buffer)


@pytest.mark.parametrize("tile", TILES[:2], ids=str)
def test_input_grad_is_added_to_what_is_there(tile: Tile | None, device: torch.device) -> None:
    d, w = values(19, 3, 18, device=device), values(3, 18, 20, device=device)
    out, buffer = result(19, 20, d)
    before = values(19, 3, 20, device=device, seed=9)
    out.copy_(before)
    grouped_input_grad(guarded(d), guarded(w), Readers.build((0, 2, 2), 3), out, adds=True, tile=tile)
    hold("out", out, lambda: before + input_grad(d, w, (0, 2, 2), None, None, RUNS))
    assert torch.equal(out[:, 1], before[:, 1])
    assert_bands(buffer)


@pytest.mark.usefixtures("alignment")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_input_grad_of_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    """Half-precision gradients may be added up in a float32 result."""
    d, w = values(37, 3, 40, dtype=dtype, device=device), values(3, 40, 35, device=device).mul(0.2).to(dtype)
    dl, gate_w = values(37, 8, dtype=dtype, device=device), values(8, 35, device=device).mul(0.2).to(dtype)
    for kind in (dtype, torch.float32):
        out = torch.full((37, 3, 35), float("nan"), dtype=kind, device=device)
        readers = Readers.build((0, 2, 2), 3)
        grouped_input_grad(d, w, readers, out, dl=dl, gate_weight=gate_w, gates=RUNS)
        hold("out", out, input_grad, d, w, (0, 2, 2), dl, gate_w, RUNS)


def weight_grads(layer: WeightGrad) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of weight, bias, the gates' weight, the gates' bias."""
    a, d, dl = layer.a, layer.d, layer.dl
    empty = a.new_zeros(0)
    weight = bias = gate_weight = gate_bias = empty
    if d is not None:
        weight = torch.stack([d[:, m].T @ a[:, s] for m, s in enumerate(layer.slots)]) if layer.weight else empty
        bias = d.sum(0)
    if dl is not None:
        gate_bias = dl.sum(0)
        gates = zip(layer.gates.slot, layer.gates.first, layer.gates.sizes, strict=True)
        parts = [dl[:, f : f + n].T @ a[:, s] for s, f, n in gates if layer.gate_weight]
        gate_weight = torch.cat(parts) if parts else empty
    return weight, bias, gate_weight, gate_bias


def _one_of(a: Tensor, d: Tensor | None, dl: Tensor | None, layer: list[Any], which: int) -> Tensor:
    return weight_grads(WeightGrad(*layer)._replace(a=a, d=d, dl=dl))[which]


def hold_layers(layers: Sequence[WeightGrad], tile: Tile | None, dtype: torch.dtype = torch.float64) -> None:
    """All gradients of all layers, which are asked for, and none else."""
    found = grouped_weight_grads(layers, dtype, tile=tile)
    assert len(found) == len(layers)
    names = ("weight", "bias", "gate_weight", "gate_bias")
    for i, (layer, ours) in enumerate(zip(layers, found, strict=True)):
        for name, part in zip(names, ours, strict=True):
            assert (part is not None) == getattr(layer, name), name
            if part is not None:
                assert part.dtype == dtype and part.is_contiguous()
                hold(f"layer {i} {name}", part, _one_of, layer.a, layer.d, layer.dl, layer, names.index(name))


@pytest.fixture(params=[1, 4])
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Parts that the rows are cut into: the library cuts from some hundred rows on."""
    number = int(request.param)
    monkeypatch.setattr("ple_fast_kernels.weight_grad.row_splits", lambda *_: number)
    return number


@pytest.mark.usefixtures("splits", "alignment")
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("rows", "depth", "units"), [(1, 1, 1), (1, 35, 6), (50, 35, 33), (64, 32, 16), (17, 16, 1)])
def test_weight_grads_of_sizes(rows: int, depth: int, units: int, tile: Tile | None, device: torch.device) -> None:
    """More parts than there are rows, too: those are 0."""
    layer = WeightGrad(
        guarded(values(rows, 3, depth, device=device), 3),
        guarded(values(rows, 2, units, device=device), 2),
        (0, 2),
        True,
        True,
        guarded(values(rows, 8, device=device)),
        RUNS,
        True,
        True,
    )
    hold_layers([layer], tile)


def test_the_library_cuts_many_rows(device: torch.device) -> None:
    a, d = values(2100, 1, 4, device=device), values(2100, 1, 3, device=device)
    hold_layers([WeightGrad(a, d, (0,), True, True)], Tile(16, 16, 512, 4, 2))


@pytest.mark.usefixtures("splits", "alignment")
@pytest.mark.parametrize("slots", [(0, 0, 0), (0, 1, 2), (2, 0)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_grads_of_layouts(layout: str, slots: tuple[int, ...], device: torch.device) -> None:
    a = LAYOUTS[layout](values(19, 3, 18, device=device))
    d, dl = values(19, len(slots), 5, device=device), values(19, 8, device=device)
    hold_layers([WeightGrad(a, guarded(d, 1), slots, True, False, guarded(dl), RUNS, True, False)], SMALL)


@pytest.mark.usefixtures("splits")
def test_several_layers_in_one_call(device: torch.device) -> None:
    """Other widths, some biases alone, gates on their own, gates beside a layer whose weight is frozen."""
    x, h = values(37, 3, 18, device=device), values(37, 4, 6, device=device)
    d1, d2 = values(37, 4, 6, device=device), values(37, 4, 3, device=device)
    dl = values(37, 8, device=device)
    hold_layers(
        [
            WeightGrad(h, d2, (0, 1, 2, 3), True, True),
            WeightGrad(d2, d2, (0, 1, 2, 3), False, True),
            WeightGrad(x, d1, (0, 0, 1, 2), True, False, dl, RUNS, True, True),
            WeightGrad(x, None, (), False, False, dl, RUNS, True, False),
            WeightGrad(dl.unsqueeze(1), None, (), False, False, dl, RUNS, False, True),
            WeightGrad(x, d1, (0, 0, 1, 2), False, False, dl, RUNS, True, False),
        ],
        None,
    )


def test_no_layer_takes_no_launch() -> None:
    assert grouped_weight_grads([], torch.float32) == []


@pytest.mark.usefixtures("splits", "alignment")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_weight_grads_of_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    a, d = values(70, 2, 40, dtype=dtype, device=device), values(70, 2, 35, dtype=dtype, device=device)
    dl, runs = values(70, 6, dtype=dtype, device=device), GateRuns((0, 1), (0, 4), (4, 2))
    hold_layers([WeightGrad(a, d, (0, 1), True, True, dl, runs, True, True)], None, dtype)


@pytest.mark.usefixtures("splits")
def test_the_same_inputs_give_the_same_bits(device: torch.device) -> None:
    a, d = values(70, 1, 40, dtype=torch.float32, device=device), values(70, 2, 35, dtype=torch.float32, device=device)
    layer = WeightGrad(a, d, (0, 0), True, True)
    (first,), (second,) = (grouped_weight_grads([layer], torch.float32) for _ in range(2))
    assert first.weight is not None and second.weight is not None and torch.equal(first.weight, second.weight)
    assert first.bias is not None and second.bias is not None and torch.equal(first.bias, second.bias)


def test_a_slot_may_begin_beyond_what_32_bits_count(device: torch.device) -> None:
    step = 2**30 + 8
    memory = torch.empty(2 * step + 100, dtype=torch.float16, device=device)
    a = memory.as_strided((3, 3, 16), (16, step, 1))
    a.copy_(values(3, 3, 16, dtype=torch.float16, device=device))
    d, dl = (values(3, n, 4, dtype=torch.float16, device=device) for n in (2, 1))
    layer = WeightGrad(a, d, (1, 2), True, False, dl[:, 0].contiguous(), GateRuns((2,), (0,), (4,)), True, False)
    (found,) = grouped_weight_grads([layer], torch.float16)
    near = layer._replace(a=a.contiguous())
    (expected,) = grouped_weight_grads([near], torch.float16)
    assert found.weight is not None and expected.weight is not None and torch.equal(found.weight, expected.weight)
    assert found.gate_weight is not None and expected.gate_weight is not None
    assert torch.equal(found.gate_weight, expected.gate_weight)

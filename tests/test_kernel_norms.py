"""Norms and dropout in kernels against PyTorch in float64: beside a product, in a launch of their own, and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

import ple_fast_kernels as kernels
from ple_fast.torch_backend.dropout import keep_mask
from tests.helpers import TOPOLOGIES, assert_close
from tests.kernel_helpers import ACTIVATIONS, DTYPES, apply, chain, guarded, hold, kept_of, linears, mixtures_of, values

pytestmark = pytest.mark.usefixtures("guard_bands")

EPS = 1e-3
SIZES = [(2, 1, 4), (37, 33, 6), (40, 64, 32), (40, 7, 70)]
"""Rows, depth, units: below, beyond and exactly tiles; more units than layer norm's backward holds at once."""
RELU, SILU, TANH = ("relu", 0.0), ("silu", 0.0), ("tanh", 0.0)


def parameters(units: int, device: torch.device, members: int = 2) -> tuple[Tensor, Tensor]:
    """Weight and bias of a norm, ``(n, H)``."""
    return values(members, units, device=device, seed=1) + 1, values(members, units, device=device, seed=2)


def normed(v: Tensor, kind: str, weight: Tensor, bias: Tensor, running: Sequence[Tensor] = ()) -> Tensor:
    """The norm of ``(B, n, H)`` by PyTorch."""
    if kind == "layer":
        out = F.layer_norm(v, [v.shape[-1]], eps=EPS)
        return out * weight.to(v.dtype) + bias.to(v.dtype)
    mean, var = running or (None, None)
    out = F.batch_norm(v.flatten(1), mean, var, weight.flatten(), bias.flatten(), not running, 0.0, EPS)
    return out.view(v.shape)


def finished(
    z: Tensor, kind: str, weight: Tensor, bias: Tensor, activation: Any, after: bool, *running: Tensor
) -> Tensor:
    """Norm and activation of a product, in their order."""
    if after:
        return normed(apply(z, activation), kind, weight, bias, running)
    return apply(normed(z, kind, weight, bias, running), activation)


def masked(y: Tensor, dropout: kernels.Dropout | None) -> Tensor:
    """``y`` after dropout, with the mask of the other backend."""
    if dropout is None:
        return y
    return y * keep_mask(int(dropout.seed), dropout.layer, 0, y, dropout.rate).to(y.dtype) / (1 - dropout.rate)


def dropped(y: Tensor, dropout: kernels.Dropout, activation: tuple[str, float]) -> Tensor:
    """``masked`` of an activation's output as the kernels keep it: -0 where ReLU let nothing through."""
    out = masked(y, dropout)
    return torch.where(y == 0, -out.abs(), out) if activation[0] == "relu" else out


def dropout_on(device: torch.device, layer: int = 3, rate: float = 0.4, seed: int = 2**31 - 5) -> kernels.Dropout:
    return kernels.Dropout(torch.tensor(seed, device=device), layer, rate)


def operands(rows: int, depth: int, units: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Input with slots, weight and bias of two members; far from 0, where a variance by squares would be noise."""
    a, w = values(rows, 2, depth, device=device), values(2, units, depth, device=device).mul(depth**-0.5)
    return a, w, values(2, units, device=device) + 30


@pytest.mark.parametrize("rate", [0.0001, 0.4, 0.5, 0.999])
@pytest.mark.parametrize("units", [1, 4, 7, 33, 36])
def test_dropout_draws_the_mask_of_the_other_backend(units: int, rate: float, device: torch.device) -> None:
    """Whatever the tile: a word of the generator serves four elements, some of them in another tile or member."""
    for seed in (0, 1, 2**31 - 2):
        dropout = dropout_on(device, 5, rate, seed)
        a, w = values(37, 3, 6, device=device).abs() + 1, values(3, units, 6, device=device).abs()
        expected = masked(linears(a, w, None, (0, 1, 2), ("identity", 0.0)), dropout)
        for tile in (None, kernels.Tile(16, 16, 16, 4, 2)):
            y, _, _ = kernels.grouped_linear_fwd(a, w, None, (0, 1, 2), dropout=dropout, tile=tile)
            assert_close("y", y, expected, 1e-10)
            assert y is not None and torch.equal(y == 0, expected == 0)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_backward_of_dropout_and_activation(activation: tuple[str, float], device: torch.device) -> None:
    """In all three kernels that take a gradient through a layer's end; the output is the one after dropout."""
    d, w, z = values(21, 3, 5, device=device), values(3, 5, 8, device=device), values(21, 3, 8, device=device)
    dropout = dropout_on(device)
    kept = kept_of(z, activation)
    by_output = kept is not None and kept is not z
    read = None if kept is None else guarded(dropped(kept, dropout, activation) if by_output else kept, 2)
    dh = torch.einsum("bmh,mhk->bmk", d, w)
    expected = chain(masked(dh, dropout), kept, activation)
    ours, _ = kernels.grouped_data_grad(guarded(d), w, kept=read, end=kernels.LayerEnd(activation, dropout))
    assert_close("data_grad", ours, expected, 1e-10)
    ours = kernels.layer_end_grad(guarded(dh, 1), read, kernels.LayerEnd(activation, dropout))
    assert_close("layer_end_grad", ours, expected, 1e-10)
    t = TOPOLOGIES["single-task"]
    ones, dy = torch.ones(21, t.num_weights, dtype=torch.float64, device=device), values(21, 3, 8, device=device)
    found, _, _ = kernels.gate_combine_bwd(
        dy, None, None, ones, mixtures_of(t), 8, torch.float64, kept=read, activation=activation, dropout=dropout,
        weights_grad=False, logits_grad=False,
    )  # fmt: skip
    assert_close("combine_bwd", found, chain(masked(dy, dropout), kept, activation), 1e-10)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("activation", [RELU, SILU], ids=str)
@pytest.mark.parametrize(("rows", "depth", "units"), SIZES)
def test_running_statistics_fold_into_the_product(
    rows: int, depth: int, units: int, activation: Any, after: bool, device: torch.device
) -> None:
    """Of the layer and of the logits beside it, in one launch; with and without weight and bias."""
    a, w, b = operands(rows, depth, units, device)
    weight, bias = parameters(units, device)
    mean, var = values(2 * units, device=device) + 30, values(2 * units, device=device).square() + 0.1
    gate_w, runs = values(8, depth, device=device), kernels.GateRuns((0, 1), (0, 3), (3, 5))
    for gamma, beta in ((weight, bias), (None, None)):
        norm = kernels.Norm("batch", mean, var, gamma, beta, EPS, after)
        own = None if gamma is None else gamma.flatten()[:1].expand(8).contiguous()
        logits_norm = kernels.Norm(
            "batch", mean[:1].expand(8).contiguous(), var[:1].expand(8).contiguous(), own, own, EPS
        )
        y, _, logits = kernels.grouped_linear_fwd(
            guarded(a, 3), w, b, (0, 1), activation=activation, norm=norm, dropout=dropout_on(device),
            gate_weight=gate_w, gates=runs, logits_norm=logits_norm,
        )  # fmt: skip
        z = linears(a, w, b, (0, 1), ("identity", 0.0))
        ones, zeros = torch.ones_like(weight), torch.zeros_like(weight)
        used = (ones, zeros) if gamma is None else (weight, bias)
        expected = masked(finished(z, "batch", *used, activation, after, mean, var), dropout_on(device))
        assert_close("y", y, expected, 1e-10)
        raw = torch.cat([F.linear(a[:, 0], gate_w[:3]), F.linear(a[:, 1], gate_w[3:])], 1)
        first = (used[0].flatten()[:1], zeros.flatten()[:1] if gamma is None else used[0].flatten()[:1])
        shown = (raw - mean[0]) / (var[0] + EPS).sqrt() * first[0] + first[1]
        assert_close("logits", logits, shown, 1e-10)


@pytest.mark.usefixtures("alignment")
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("activation", [RELU, SILU], ids=str)
@pytest.mark.parametrize("tile", [None, kernels.Tile(16, 16, 16, 4, 2)], ids=str)
@pytest.mark.parametrize(("rows", "depth", "units"), SIZES)
def test_batch_statistics(
    rows: int, depth: int, units: int, tile: kernels.Tile | None, activation: Any, after: bool, device: torch.device
) -> None:
    """Moments beside the product, merged, applied; running statistics move as PyTorch's."""
    a, w, b = operands(rows, depth, units, device)
    weight, bias = parameters(units, device)
    tile = kernels.linear_tile(a, 2, units, "ieee", has_norm=True, has_dropout=False) if tile is None else tile
    tiles = -(-rows // tile.rows)
    moments, logit_moments = (
        torch.full((tiles, 2, c), float("nan"), dtype=a.dtype, device=device) for c in (2 * units, 4)
    )
    gate_w, runs = values(4, depth, device=device), kernels.GateRuns((1, 0), (0, 1), (1, 3))
    z, none, logits = kernels.grouped_linear_fwd(
        guarded(a), w, b, (0, 1), activation=activation, gate_weight=gate_w, gates=runs, tile=tile,
        norm=kernels.Norm("moments", moments, None, weight, bias, EPS, after),
        logits_norm=kernels.Norm("moments", logit_moments, None, None, None, EPS),
    )  # fmt: skip
    product = linears(a, w, b, (0, 1), ("identity", 0.0))
    assert none is None and z is not None and logits is not None
    assert_close("z", z, product, 1e-10)
    running = [values(2 * units, device=device), values(2 * units, device=device).square()]
    peers = [t.clone() for t in running]
    mean, rstd = kernels.batch_norm_merge(
        moments, rows, tile.rows, EPS, running_mean=running[0], running_var=running[1], factor=0.1
    )
    dropout = dropout_on(device)
    y, _ = kernels.layer_end_fwd(
        z, kernels.LayerEnd(activation, dropout, weight, bias, mean, rstd, eps=EPS, after=after)
    )
    assert_close("y", y, masked(finished(product, "batch", weight, bias, activation, after), dropout), 1e-9)
    value = apply(product, activation) if after else product
    F.batch_norm(value.flatten(1), peers[0], peers[1], training=True, momentum=0.1)
    for name, ours, other in zip(("mean", "variance"), running, peers, strict=True):
        assert_close(f"running {name}", ours, other, 1e-12)
    mean, rstd = kernels.batch_norm_merge(logit_moments, rows, tile.rows, EPS)
    normed_logits, _ = kernels.layer_end_fwd(logits.unsqueeze(1), kernels.LayerEnd(mean=mean, spread=rstd, eps=EPS))
    assert_close("logits", normed_logits.squeeze(1), F.batch_norm(logits, None, None, training=True, eps=EPS), 1e-10)


@pytest.mark.usefixtures("alignment")
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("tile", [None, kernels.Tile(16, 16, 16, 4, 2), kernels.Tile(16, 64, 16, 4, 2)], ids=str)
@pytest.mark.parametrize(("rows", "depth", "units"), SIZES)
def test_layer_norm(
    rows: int, depth: int, units: int, tile: kernels.Tile | None, after: bool, device: torch.device
) -> None:
    """In the product's launch where a tile has all units; else its tiles leave moments, which a second one merges."""
    a, w, b = operands(rows, depth, units, device)
    weight, bias = parameters(units, device)
    dropout = dropout_on(device)
    tile = kernels.linear_tile(a, 2, units, "ieee", has_norm=True, has_dropout=False) if tile is None else tile
    whole = kernels.has_whole_rows(tile, units)
    assert whole == (units <= tile.columns)
    if whole:
        mean, rstd = torch.full((2, rows, 2), float("nan"), dtype=a.dtype, device=device).unbind(0)
        norm = kernels.Norm("row", mean, rstd, weight, bias, EPS, after)
    else:
        moments = torch.full((rows, 2, -(-units // tile.columns), 2), float("nan"), dtype=a.dtype, device=device)
        norm = kernels.Norm("row_moments", moments, None, weight, bias, EPS, after)
    out, z, _ = kernels.grouped_linear_fwd(
        guarded(a),
        w,
        b,
        (0, 1),
        activation=SILU,
        norm=norm,
        dropout=dropout if whole else None,
        keep_input=True,
        tile=tile,
    )
    product = linears(a, w, b, (0, 1), ("identity", 0.0))
    assert out is not None
    if not whole:
        z, end = out, kernels.LayerEnd(SILU, dropout, weight, bias, eps=EPS, after=after)
        out, end = kernels.layer_end_fwd(z, end, moments=moments, part_units=tile.columns)
        assert end.mean is not None and end.spread is not None
        mean, rstd = end.mean, end.spread
    assert_close("z", z, product, 1e-10)
    assert_close("y", out, masked(finished(product, "layer", weight, bias, SILU, after), dropout), 1e-9)
    value = apply(product, SILU) if after else product
    assert_close("mean", mean, value.mean(2), 1e-10)
    assert_close("rstd", rstd, (value.var(2, unbiased=False) + EPS).rsqrt(), 1e-10)


def statistics(z: Tensor, kind: str, activation: Any, after: bool) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation of the norm's input."""
    v = apply(z, activation) if after else z
    axis = 2 if kind == "layer" else 0
    mean, rstd = v.mean(axis), (v.var(axis, unbiased=False) + EPS).rsqrt()
    return (mean, rstd) if kind == "layer" else (mean.flatten(), rstd.flatten())


def backward(d: Tensor, z: Tensor, end: kernels.LayerEnd, kind: str) -> dict[str, Tensor | None]:
    """Gradients by the kernels."""
    if kind == "layer":
        dz, dw, db = kernels.layer_norm_grad(d, z, end, affine_grad=True)
    else:
        parts = kernels.batch_norm_sums(d, z, end)
        dw, db, means = kernels.norm_sums_merge(parts, z.shape[0], end.weight, means=kind == "batch")
        dz = kernels.layer_end_grad(d, z, end, means)
    return {"dz": dz, "dweight": dw, "dbias": db}


@pytest.mark.usefixtures("alignment")
@pytest.mark.parametrize("kind", ["batch", "running"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("rows", "units"), [(37, 33), (5, 8)])
def test_data_grad_goes_on_to_a_batch_norm(rows: int, units: int, after: bool, kind: str, device: torch.device) -> None:
    """Gradient of the norm's output and the sums over tiles, which ``layer_end_grad`` takes from there."""
    d, w = values(rows, 2, 5, device=device), values(2, 5, units, device=device)
    z, dropout = values(rows, 2, units, device=device, seed=3) + 0.5, dropout_on(device)
    weight, bias = parameters(units, device)
    running = [values(2 * units, device=device), values(2 * units, device=device).square() + 0.1]
    mean, spread = running if kind == "running" else statistics(z, kind, SILU, after)
    end = kernels.LayerEnd(SILU, dropout, weight, bias, mean, spread, kind == "running", EPS, after)
    at, parts = kernels.grouped_data_grad(
        guarded(d), guarded(w), kept=guarded(z, 2), end=end, tile=kernels.Tile(16, 16, 16, 4, 2)
    )
    assert parts is not None
    dweight, dbias, means = kernels.norm_sums_merge(parts, rows, weight, means=kind == "batch")
    rest = end._replace(dropout=None, activation=SILU if after else ("identity", 0.0))
    ours = {"dz": kernels.layer_end_grad(at, z, rest, means), "dweight": dweight, "dbias": dbias}
    dy = torch.einsum("bmh,mhk->bmk", d, w)
    for name, expected in theirs(
        dy, z, weight, bias, kind, SILU, after, dropout, running if kind == "running" else ()
    ).items():
        assert_close(name, ours[name], expected, 1e-9)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("units", [6, 8, 300])
def test_mixtures_finish_the_last_layer_as_they_load_it(units: int, after: bool, device: torch.device) -> None:
    t = TOPOLOGIES["ple-even"]
    members, p = t.num_experts, values(9, t.num_weights, device=device).softmax(1)
    z, logits = values(9, members, units, device=device) + 0.5, values(9, t.num_logits, device=device)
    weight, bias = parameters(units, device, members)
    end = kernels.LayerEnd(
        SILU, dropout_on(device), weight, bias, *statistics(z, "batch", SILU, after), eps=EPS, after=after
    )  # fmt: skip
    h, _ = kernels.layer_end_fwd(z, end)
    dy = values(9, t.num_mixtures, units, device=device)
    (expected_y, _), (y, _) = (
        kernels.gate_combine_fwd(read, logits, mixtures_of(t), end=how)
        for read, how in ((h, kernels.NO_END), (guarded(z), end))
    )
    assert_close("y", y, expected_y, 1e-12)
    expected, ours = (
        kernels.gate_combine_bwd(dy, None, read, p, mixtures_of(t), units, torch.float64, end=how)
        for read, how in ((h, kernels.NO_END), (guarded(z), end))
    )
    for name, a, b in zip(("dh", "dp", "dl"), ours, expected, strict=True):
        assert a is not None
        assert_close(name, a, b, 1e-11)


def theirs(
    d: Tensor, z: Tensor, weight: Tensor, bias: Tensor, kind: str, activation: Any, after: bool, dropout: Any,
    running: Sequence[Tensor] = (),
) -> dict[str, Tensor]:  # fmt: skip
    """Gradients by autograd."""
    leaves = [t.detach().clone().requires_grad_() for t in (z, weight, bias)]
    name = "batch" if kind == "running" else kind
    y = masked(finished(leaves[0], name, leaves[1], leaves[2], activation, after, *running), dropout)
    return dict(zip(("dz", "dweight", "dbias"), torch.autograd.grad(y, leaves, d.to(y.dtype)), strict=True))


@pytest.mark.parametrize("kind", ["batch", "running", "layer"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_backward_of_norms(activation: tuple[str, float], after: bool, kind: str, device: torch.device) -> None:
    d, z = values(37, 2, 6, device=device), values(37, 2, 6, device=device, seed=3) + 0.5
    weight, bias = parameters(6, device)
    dropout = dropout_on(device)
    running = [values(12, device=device), values(12, device=device).square() + 0.1] if kind == "running" else []
    mean, spread = running or statistics(z, kind, activation, after)
    end = kernels.LayerEnd(activation, dropout, weight, bias, mean, spread, kind == "running", EPS, after)
    ours = backward(guarded(d, 3), guarded(z, 2), end, kind)
    for name, expected in theirs(d, z, weight, bias, kind, activation, after, dropout, running).items():
        assert_close(name, ours[name], expected, 1e-9)


@pytest.mark.usefixtures("alignment")
@pytest.mark.parametrize("kind", ["batch", "layer"])
@pytest.mark.parametrize(("rows", "units"), [(2, 1), (33, 33), (300, 8), (40, 70)])
def test_backward_of_sizes(rows: int, units: int, kind: str, device: torch.device) -> None:
    """Several parts of the rows, several tiles or chunks of the units, and one of each."""
    d, z = values(rows, 2, units, device=device), values(rows, 2, units, device=device, seed=3)
    weight, bias = parameters(units, device)
    mean, rstd = statistics(z, kind, TANH, False)
    end = kernels.LayerEnd(TANH, None, weight, bias, mean, rstd, eps=EPS)
    ours = backward(guarded(d), guarded(z, 1), end, kind)
    for name, expected in theirs(d, z, weight, bias, kind, TANH, False, None).items():
        assert_close(name, ours[name], expected, 1e-9)


@pytest.mark.parametrize("kind", ["batch", "layer"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_dtypes(dtype: torch.dtype, kind: str, device: torch.device) -> None:
    """Low precision is read, float32 is computed; parameters of either dtype."""
    z, d = values(70, 2, 40, device=device).to(dtype), values(70, 2, 40, device=device, seed=4).to(dtype)
    for stored in {dtype, torch.float32}:
        weight, bias = (t.to(stored) for t in parameters(40, device))
        mean, rstd = (t.float() for t in statistics(z.double(), kind, RELU, False))
        end = kernels.LayerEnd(RELU, None, weight, bias, mean, rstd, eps=EPS)
        ours = backward(d, z, end, kind)

        def plain(d: Tensor, z: Tensor, w: Tensor, b: Tensor) -> list[Tensor]:
            found = theirs(d, z, w, b, kind, RELU, False, None)
            return [found[name].flatten() for name in ("dz", "dweight", "dbias")]

        for i, name in enumerate(("dz", "dweight", "dbias")):
            got = ours[name]
            assert got is not None and got.dtype == (dtype if name == "dz" else stored)
            hold(name, got.flatten(), lambda *t, i=i: plain(*t)[i], d, z, weight, bias)


def test_the_same_inputs_give_the_same_bits(device: torch.device) -> None:
    z, d = (values(300, 2, 8, dtype=torch.float32, device=device, seed=s) for s in (0, 1))
    weight, bias = (t.float() for t in parameters(8, device))
    for kind in ("batch", "layer"):
        end = kernels.LayerEnd(SILU, dropout_on(device), weight, bias, *statistics(z, kind, SILU, False), eps=EPS)
        first, second = (backward(d, z, end, kind) for _ in range(2))
        for name, tensor in first.items():
            other = second[name]
            assert tensor is not None and other is not None and torch.equal(tensor, other), name

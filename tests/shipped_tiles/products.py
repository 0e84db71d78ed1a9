"""Work of the kernels of one layer: products with their ends, data gradients, gradients of inputs and weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ple_fast.torch_backend.dropout import keep_mask
from ple_fast_kernels import (
    Dropout,
    GateRuns,
    LayerEnd,
    Norm,
    Readers,
    WeightGrad,
    batch_norm_merge,
    column_sums_merge,
    grouped_data_grad,
    grouped_input_grad,
    grouped_linear_fwd,
    grouped_weight_grads,
    linear_tile,
    norm_sums_merge,
    wide_of,
)
from tests.kernel_helpers import chain, guarded, linears, values
from tests.shipped_tiles.cases import NONE, RELU, SILU, Case, Work

SLOTS, WIRED = (1, 0), 2
RUNS = GateRuns((1, 0), (0, 20), (20, 5))
"""Two runs of the gates' rows, one of them more than the least width of a tile."""
EPS = 1e-3


def _product(case: Case, device: torch.device, tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input of the slots ``(B, 2, K)``, weight ``(2, H, K)``, bias ``(2, H)``."""
    rows, units, depth = tiles * case.tile.rows + 5, case.across(case.tile.columns), case.along
    a = values(rows, WIRED, depth, dtype=case.dtype, device=device)
    w = values(len(SLOTS), units, depth, device=device).mul(depth**-0.5).to(case.dtype)
    return guarded(a), guarded(w), guarded(values(len(SLOTS), units, dtype=case.dtype, device=device, seed=1))


def _gates(case: Case, depth: int, device: torch.device) -> tuple[Tensor, Tensor]:
    total = sum(RUNS.sizes)
    weight = values(total, depth, device=device, seed=2).mul(depth**-0.5).to(case.dtype)
    return guarded(weight), guarded(values(total, dtype=case.dtype, device=device, seed=3))


def _logits(a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    runs = ((s, slice(first, first + size)) for s, first, size in zip(RUNS.slot, RUNS.first, RUNS.sizes, strict=True))
    return torch.cat([F.linear(a[:, s], weight[rows], bias[rows]) for s, rows in runs], 1)


def _dropped(y: Tensor, dropout: Dropout) -> Tensor:
    kept = keep_mask(int(dropout.seed), dropout.layer, 0, y, dropout.rate)
    return y * kept.to(y.dtype) / (1 - dropout.rate)


def _dropout(device: torch.device) -> Dropout:
    return Dropout(torch.tensor(12345, device=device), 3, 0.25)


def linear(case: Case, device: torch.device, tiles: int) -> Work:
    a, w, b = _product(case, device, tiles)
    gate_w, gate_b = _gates(case, a.shape[2], device)

    def run() -> dict[str, Tensor | None]:
        y, z, logits = grouped_linear_fwd(
            a, w, b, SLOTS, activation=RELU, keep_input=True, gate_weight=gate_w, gate_bias=gate_b, gates=RUNS,
            precision=case.precision,
        )  # fmt: skip
        return {"y": y, "z": z, "logits": logits}

    truths = {
        "y": (linears, a, w, b, SLOTS, RELU),
        "z": (linears, a, w, b, SLOTS, NONE),
        "logits": (_logits, a, gate_w, gate_b),
    }
    return Work(run, truths)


def persistent_linear(case: Case, device: torch.device, tiles: int) -> Work:
    """Without the product itself, which such a kernel does not keep."""
    a, w, b = _product(case, device, tiles)

    def run() -> dict[str, Tensor | None]:
        y, _, _ = grouped_linear_fwd(a, w, b, SLOTS, activation=RELU, precision=case.precision)
        return {"y": y}

    return Work(run, {"y": (linears, a, w, b, SLOTS, RELU)})


def linear_with_dropout(case: Case, device: torch.device, tiles: int) -> Work:
    a, w, b = _product(case, device, tiles)
    dropout = _dropout(device)

    def run() -> dict[str, Tensor | None]:
        y, _, _ = grouped_linear_fwd(a, w, b, SLOTS, activation=RELU, dropout=dropout, precision=case.precision)
        return {"y": y}

    return Work(run, {"y": (lambda a, w, b: _dropped(linears(a, w, b, SLOTS, RELU), dropout), a, w, b)})


def linear_before_batch_norm(case: Case, device: torch.device, tiles: int) -> Work:
    """Moments of the columns of each row tile, merged."""
    a, w, b = _product(case, device, tiles)
    rows, width, wide = a.shape[0], w.shape[0] * w.shape[1], wide_of(case.dtype)
    tile = linear_tile(a, len(SLOTS), w.shape[1], case.precision, has_norm=True, has_dropout=False)

    def run() -> dict[str, Tensor | None]:
        moments = torch.full((-(-rows // tile.rows), 2, width), float("nan"), dtype=wide, device=device)
        norm = Norm("moments", moments, None, None, None, EPS)
        z, _, _ = grouped_linear_fwd(a, w, b, SLOTS, norm=norm, precision=case.precision)
        mean, rstd = batch_norm_merge(moments, rows, tile.rows, EPS)
        return {"z": z, "mean": mean, "rstd": rstd}

    def product(a: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linears(a, w, b, SLOTS, NONE)

    truths = {
        "z": (product, a, w, b),
        "mean": (lambda *o: product(*o).flatten(1).mean(0), a, w, b),
        "rstd": (lambda *o: (product(*o).flatten(1).var(0, unbiased=False) + EPS).rsqrt(), a, w, b),
    }
    return Work(run, truths)


def _backward(case: Case, device: torch.device, tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient ``(B, 2, H)``, weight ``(2, H, K)``, the layer below ``(B, 2, K)``: a tile covers columns of K."""
    rows, units, depth = tiles * case.tile.rows + 5, case.across(case.tile.columns), case.along
    d = values(rows, len(SLOTS), depth, dtype=case.dtype, device=device)
    w = values(len(SLOTS), depth, units, device=device).mul(depth**-0.5).to(case.dtype)
    return guarded(d), guarded(w), guarded(values(rows, len(SLOTS), units, dtype=case.dtype, device=device, seed=1))


def _through(d: Tensor, w: Tensor) -> Tensor:
    return torch.stack([d[:, m] @ w[m] for m in range(w.shape[0])], 1)


def data_grad(case: Case, device: torch.device, tiles: int) -> Work:
    d, w, z = _backward(case, device, tiles)
    kept = guarded(z.relu())

    def run() -> dict[str, Tensor | None]:
        out, _ = grouped_data_grad(d, w, kept=kept, end=LayerEnd(RELU), precision=case.precision)
        return {"out": out}

    return Work(run, {"out": (lambda d, w, kept: chain(_through(d, w), kept, RELU), d, w, kept)})


def persistent_data_grad(case: Case, device: torch.device, tiles: int) -> Work:
    """The gradient of the bias below too."""
    d, w, z = _backward(case, device, tiles)
    kept = guarded(z.relu())

    def run() -> dict[str, Tensor | None]:
        out, parts = grouped_data_grad(d, w, kept=kept, end=LayerEnd(RELU), sums=True, precision=case.precision)
        assert parts is not None
        return {"out": out, "bias": column_sums_merge(parts, w[:, 0])}

    def expected(d: Tensor, w: Tensor, kept: Tensor) -> Tensor:
        return chain(_through(d, w), kept, RELU)

    return Work(run, {"out": (expected, d, w, kept), "bias": (lambda *o: expected(*o).sum(0), d, w, kept)})


def data_grad_with_dropout(case: Case, device: torch.device, tiles: int) -> Work:
    d, w, z = _backward(case, device, tiles)
    dropout = _dropout(device)
    kept = guarded(torch.where(z > 0, _dropped(z.relu(), dropout), -0.0))  # as ``drop_kept`` leaves it

    def run() -> dict[str, Tensor | None]:
        out, _ = grouped_data_grad(d, w, kept=kept, end=LayerEnd(RELU, dropout), precision=case.precision)
        return {"out": out}

    return Work(run, {"out": (lambda d, w, kept: chain(_dropped(_through(d, w), dropout), kept, RELU), d, w, kept)})


def data_grad_before_batch_norm(case: Case, device: torch.device, tiles: int) -> Work:
    """Down to the output of a norm that stands before SiLU, and the gradients of its weight and bias."""
    d, w, z = _backward(case, device, tiles)
    width, wide = z[0].numel(), wide_of(case.dtype)
    mean, weight, bias = (values(width, dtype=wide, device=device, seed=i) for i in (2, 3, 4))
    var = values(width, dtype=wide, device=device, seed=5).square() + 0.5
    end = LayerEnd(SILU, None, weight, bias, mean, var, True, EPS)

    def run() -> dict[str, Tensor | None]:
        out, parts = grouped_data_grad(d, w, kept=z, end=end, precision=case.precision)
        assert parts is not None
        dweight, dbias, _ = norm_sums_merge(parts, z.shape[0], weight, means=False)
        return {"out": out, "dweight": dweight, "dbias": dbias}

    def at_norm(d: Tensor, w: Tensor, z: Tensor, *of_norm: Tensor) -> tuple[Tensor, Tensor]:
        mean, var, weight, bias = (t.view(z.shape[1:]) for t in of_norm)
        normed = (z - mean) * (var + EPS).rsqrt()
        return chain(_through(d, w), (normed * weight + bias).to(z.dtype), SILU), normed

    operands = (d, w, z, mean, var, weight, bias)
    truths = {
        "out": (lambda *o: at_norm(*o)[0], *operands),
        "dweight": (lambda *o: (at_norm(*o)[0] * at_norm(*o)[1]).sum(0).flatten(), *operands),
        "dbias": (lambda *o: at_norm(*o)[0].sum(0).flatten(), *operands),
    }
    return Work(run, truths)


def input_grad(case: Case, device: torch.device, tiles: int) -> Work:
    """Members out of the order of their slots, and gates."""
    d, w, _ = _backward(case, device, tiles)
    rows, units = d.shape[0], w.shape[2]
    gate_w, _ = _gates(case, units, device)
    dl = guarded(values(rows, sum(RUNS.sizes), dtype=case.dtype, device=device, seed=4))

    def run() -> dict[str, Tensor | None]:
        out = torch.full((rows, WIRED, units), float("nan"), dtype=case.dtype, device=device)
        grouped_input_grad(
            d, w, Readers.build(SLOTS, WIRED), out, dl=dl, gate_weight=gate_w, gates=RUNS, precision=case.precision
        )
        return {"out": out}

    def expected(d: Tensor, w: Tensor, dl: Tensor, gate_w: Tensor) -> Tensor:
        through, out = _through(d, w), [torch.zeros_like(d[:, 0, :1])] * WIRED
        for m, slot in enumerate(SLOTS):
            out[slot] = out[slot] + through[:, m]
        for slot, first, size in zip(RUNS.slot, RUNS.first, RUNS.sizes, strict=True):
            out[slot] = out[slot] + dl[:, first : first + size] @ gate_w[first : first + size]
        return torch.stack(out, 1)

    return Work(run, {"out": (expected, d, w, dl, gate_w)})


def weight_grads(case: Case, device: torch.device, tiles: int) -> Work:
    """A tile covers units by inputs, and its depth is rows: so many that every part of them has enough steps."""
    tile = case.tile
    rows = (16 if tiles > 1 else 2) * (tile.stages + 2) * tile.depth + 5
    units, depth = case.across(tile.rows), case.across(tile.columns)
    a = guarded(values(rows, WIRED, depth, dtype=case.dtype, device=device))
    d = guarded(values(rows, len(SLOTS), units, dtype=case.dtype, device=device, seed=1))
    dl = guarded(values(rows, sum(RUNS.sizes), dtype=case.dtype, device=device, seed=2))
    layer = WeightGrad(a, d, SLOTS, True, True, dl, RUNS, True, True)

    def run() -> dict[str, Tensor | None]:
        return grouped_weight_grads([layer], case.dtype, precision=case.precision)[0]._asdict()

    def gate_weight(dl: Tensor, a: Tensor) -> Tensor:
        return torch.cat(
            [dl[:, f : f + n].T @ a[:, s] for s, f, n in zip(RUNS.slot, RUNS.first, RUNS.sizes, strict=True)]
        )

    truths = {
        "weight": (lambda d, a: torch.stack([d[:, m].T @ a[:, s] for m, s in enumerate(SLOTS)]), d, a),
        "bias": (lambda d: d.sum(0), d),
        "gate_weight": (gate_weight, dl, a),
        "gate_bias": (lambda dl: dl.sum(0), dl),
    }
    return Work(run, truths)

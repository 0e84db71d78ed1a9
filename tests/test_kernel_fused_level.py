"""``fused_level_fwd`` and ``fused_two_layers_fwd`` against the same level as loops in float64."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from ple_fast import Topology
from ple_fast_kernels import Tile, fused_level_fwd, fused_two_layers_fwd
from tests.helpers import TOPOLOGIES
from tests.kernel_helpers import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    TILES,
    guarded,
    hold,
    linears,
    mix,
    mixtures_of,
    num_offsets,
    softmaxes,
    values,
)

pytestmark = pytest.mark.usefixtures("guard_bands")

NONE = ("identity", 0.0)
FUSED = [name for name, t in TOPOLOGIES.items() if t.mixture_output is None]
"""Wirings that are fused: every mixture is an output, and no gate a sigmoid."""


@dataclass(frozen=True)
class Case:
    """Operands of a level of experts of one layer or of two."""

    topology: Topology
    x: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    gate_weight: Tensor | None
    gate_bias: Tensor | None
    offset: Tensor | None
    activation: tuple[str, float] = ("relu", 0.0)
    temperature: float = 1.0

    @property
    def operands(self) -> tuple[Any, ...]:
        return self.x, self.weights, self.biases, self.gate_weight, self.gate_bias, self.offset, self

    @property
    def gates(self) -> dict[str, Any]:
        """What both launchers take of the gates, computed here."""
        gate_weight = None if self.gate_weight is None else guarded(self.gate_weight)
        return {
            "x": self.x,
            "gate_weight": gate_weight,
            "gate_bias": self.gate_bias,
            "mixture_slots": self.topology.mixture_slot,
            "offset": self.offset,
            "temperature": self.temperature,
        }

    def fused(self, *, tile: Tile | None = None, **how: Any) -> tuple[Tensor | None, ...]:
        """The kernel of as many layers. The library has no tile for float64 on a GPU, so there is always one here."""
        if tile is None:
            tile = Tile(32, 32 if len(self.weights) == 1 else 64, 32, 4, 2)
        slots, mixtures = self.topology.expert_slot, mixtures_of(self.topology)
        weights = [guarded(w) for w in self.weights]
        if len(weights) == 1:
            return fused_level_fwd(
                self.x, weights[0], self.biases[0], slots, mixtures, activation=self.activation, tile=tile,
                **{**self.gates, **how},
            )  # fmt: skip
        return fused_two_layers_fwd(
            self.x, (weights[0], weights[1]), (self.biases[0], self.biases[1]), slots, mixtures,
            activations=(("silu", 0.0), self.activation), tile=tile, **{**self.gates, **how},
        )  # fmt: skip


def case(
    name: str,
    rows: int,
    depth: int,
    units: int,
    device: torch.device,
    *,
    hidden: int = 0,
    dtype: torch.dtype = torch.float64,
    layout: str = "gaps-between-rows",
    bias: bool = True,
    **how: Any,
) -> Case:
    t = TOPOLOGIES[name]
    assert t.num_slots is not None
    widths = [depth, hidden, units] if hidden else [depth, units]
    scaled = [
        values(t.num_experts, b, a, device=device, seed=i).mul(a**-0.5).to(dtype)
        for i, (a, b) in enumerate(pairwise(widths))
    ]
    biases = [values(t.num_experts, b, dtype=dtype, device=device, seed=5) if bias else None for b in widths[1:]]
    gated, count = t.num_logits > 0, num_offsets(t)
    return Case(
        t,
        LAYOUTS[layout](values(rows, t.num_slots, depth, dtype=dtype, device=device)),
        tuple(scaled),
        tuple(biases),
        values(t.num_logits, depth, device=device).mul(depth**-0.5).to(dtype) if gated else None,
        values(t.num_logits, dtype=dtype, device=device, seed=6) if gated and bias else None,
        values(count, dtype=dtype, device=device, seed=7) if count else None,
        **how,
    )


def logits_of(x: Tensor, gate_weight: Tensor | None, gate_bias: Tensor | None, c: Case) -> Tensor:
    """In float32 at least."""
    t = c.topology
    wide = torch.promote_types(x.dtype, torch.float32)
    parts = [x.new_zeros(x.shape[0], 0, dtype=wide)]
    for o, mixed in enumerate(t.mixture_experts):
        if t.logit_offset[o] >= 0:
            rows = slice(t.logit_offset[o], t.logit_offset[o] + len(mixed))
            assert gate_weight is not None
            own = F.linear(x[:, t.mixture_slot[o]], gate_weight[rows], None if gate_bias is None else gate_bias[rows])
            parts.append(own.to(wide))
    return torch.cat(parts, 1)


def experts_of(x: Tensor, weights: Any, biases: Any, c: Case, last: tuple[str, float]) -> Tensor:
    """Outputs of all experts, the last activation being ``last``."""
    slots = c.topology.expert_slot
    if len(weights) == 1:
        return linears(x, weights[0], biases[0], slots, last)
    h = linears(x, weights[0], biases[0], slots, ("silu", 0.0))
    return linears(h, weights[1], biases[1], range(len(slots)), last)


def whole(x: Tensor, weights: Any, biases: Any, gate_w: Any, gate_b: Any, offset: Any, c: Case) -> Tensor:
    p = softmaxes(c.topology, logits_of(x, gate_w, gate_b, c), c.temperature)
    return mix(c.topology, p, offset, experts_of(x, weights, biases, c, c.activation))


def weights_of(x: Tensor, weights: Any, biases: Any, gate_w: Any, gate_b: Any, offset: Any, c: Case) -> Tensor:
    return softmaxes(c.topology, logits_of(x, gate_w, gate_b, c), c.temperature)


@pytest.mark.parametrize("hidden", [0, 9])
@pytest.mark.parametrize("name", FUSED)
def test_wirings(name: str, hidden: int, device: torch.device) -> None:
    c = case(name, 5, 7, 6, device, hidden=hidden, temperature=0.3)
    y, *_, p = c.fused(keep_weights=True)
    hold("y", y, whole, *c.operands)
    hold("p", p, weights_of, *c.operands)


@pytest.mark.usefixtures("alignment")
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("rows", "depth", "units"), [(1, 1, 1), (1, 35, 6), (37, 35, 33), (40, 32, 32), (17, 16, 1)])
def test_sizes_of_one_layer(rows: int, depth: int, units: int, tile: Tile | None, device: torch.device) -> None:
    c = case("mixed-kinds", rows, depth, units, device)
    y, h, z, p = c.fused(tile=tile, keep_output=True, keep_input=True, keep_weights=True)
    hold("y", y, whole, *c.operands)
    hold("h", h, experts_of, c.x, c.weights, c.biases, c, c.activation)
    hold("z", z, experts_of, c.x, c.weights, c.biases, c, NONE)
    hold("p", p, weights_of, *c.operands)


@pytest.mark.usefixtures("alignment")
@pytest.mark.parametrize("tile", [None, Tile(16, 64, 16, 4, 2), Tile(32, 64, 32, 4, 2)], ids=str)
@pytest.mark.parametrize(
    ("rows", "depth", "hidden", "units"), [(1, 1, 1, 1), (1, 35, 40, 6), (37, 35, 37, 33), (40, 32, 64, 32)]
)
def test_sizes_of_two_layers(
    rows: int, depth: int, hidden: int, units: int, tile: Tile | None, device: torch.device
) -> None:
    """Up to three chunks of hidden units; the last one may not be full."""
    c = case("mixed-kinds", rows, depth, units, device, hidden=hidden)
    y, p = c.fused(tile=tile, keep_weights=True)
    hold("y", y, whole, *c.operands)
    hold("p", p, weights_of, *c.operands)


@pytest.mark.parametrize("kept", ["", "output", "input", "weights", "output input weights"])
def test_what_is_kept(kept: str, device: torch.device) -> None:
    c = case("static-offsets", 5, 7, 6, device)
    how: dict[str, Any] = {f"keep_{name}": True for name in kept.split()}
    y, h, z, p = c.fused(**how)
    hold("y", y, whole, *c.operands)
    assert [t is not None for t in (h, z, p)] == [name in kept for name in ("output", "input", "weights")]
    if h is not None:
        hold("h", h, experts_of, c.x, c.weights, c.biases, c, c.activation)
    if z is not None:
        hold("z", z, experts_of, c.x, c.weights, c.biases, c, NONE)


@pytest.mark.parametrize("tile", TILES[:2], ids=str)
@pytest.mark.parametrize("name", ["ple", "mixed-kinds", "static-offsets", "hard-sharing"])
def test_logits_from_elsewhere(name: str, tile: Tile | None, device: torch.device) -> None:
    c = case(name, 19, 7, 20, device, temperature=0.3)
    logits = guarded(logits_of(c.x, c.gate_weight, c.gate_bias, c))
    none = dict.fromkeys(("x", "gate_weight", "gate_bias"))
    y, _, _, p = c.fused(tile=tile, keep_weights=True, logits=logits, **none)
    hold("y", y, whole, *c.operands)
    hold("p", p, weights_of, *c.operands)


@pytest.mark.parametrize("hidden", [0, 9])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(activation: tuple[str, float], hidden: int, device: torch.device) -> None:
    c = case("ple-even", 5, 7, 6, device, hidden=hidden, activation=activation, bias=False)
    hold("y", c.fused()[0], whole, *c.operands)


@pytest.mark.usefixtures("alignment")
@pytest.mark.parametrize("hidden", [0, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_input(layout: str, hidden: int, device: torch.device) -> None:
    c = case("unordered", 19, 18, 6, device, hidden=hidden, layout=layout)
    hold("y", c.fused()[0], whole, *c.operands)


@pytest.mark.usefixtures("alignment")
@pytest.mark.parametrize("hidden", [0, 40])
@pytest.mark.parametrize("name", ["ple", "static-offsets"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_dtypes(dtype: torch.dtype, name: str, hidden: int, device: torch.device) -> None:
    c = case(name, 37, 40, 35, device, hidden=hidden, dtype=dtype, activation=("silu", 0.0))
    y, *_, p = c.fused(keep_weights=True)
    assert y is not None and p is not None and (y.dtype, p.dtype) == (dtype, torch.float32)
    hold("y", y, whole, *c.operands)
    hold("p", p, weights_of, *c.operands)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("hidden", [0, 9])
def test_an_expert_that_overflows_reaches_only_mixtures_that_weigh_it(
    hidden: int, value: float, device: torch.device
) -> None:
    c = case("ple", 5, 7, 6, device, hidden=hidden)
    bad = 1
    last = c.biases[-1]
    assert last is not None
    last[bad, 2] = value
    (y, *_) = c.fused()
    assert y is not None
    touched = torch.tensor([bad in mixed for mixed in c.topology.mixture_experts], device=device)
    assert 0 < int(touched.sum()) < c.topology.num_mixtures
    expected = torch.zeros(y.shape, dtype=torch.bool, device=device)
    expected[:, touched, 2] = True
    assert torch.equal(~y.isfinite(), expected)


@pytest.mark.parametrize("hidden", [0, 9])
def test_nan_stays_in_its_row(hidden: int, device: torch.device) -> None:
    c = case("ple", 5, 7, 6, device, hidden=hidden)
    c.x[2] = float("nan")
    y, *_, p = c.fused(keep_weights=True)
    assert y is not None and p is not None
    bad = torch.arange(5, device=device) == 2
    assert bool(y[2].isnan().all()) and bool(p[2].isnan().all())
    assert bool(y[~bad].isfinite().all()) and bool(p[~bad].isfinite().all())


@pytest.mark.parametrize("hidden", [0, 40])
def test_the_same_inputs_give_the_same_bits(hidden: int, device: torch.device) -> None:
    c = case("ple", 37, 35, 33, device, hidden=hidden, dtype=torch.float32)
    for first, second in zip(c.fused(keep_weights=True), c.fused(keep_weights=True), strict=True):
        assert (first is None and second is None) or torch.equal(first, second)  # type: ignore[arg-type]  # both or none


@pytest.mark.parametrize("hidden", [0, 4])
def test_a_slot_may_begin_beyond_what_32_bits_count(hidden: int, device: torch.device) -> None:
    near = case("ple-even", 3, 16, 4, device, hidden=hidden, dtype=torch.float16)
    step = 2**30 + 8
    memory = torch.empty(2 * step + 100, dtype=torch.float16, device=device)
    x = memory.as_strided((3, 3, 16), (16, step, 1))
    x.copy_(near.x)
    far = Case(near.topology, x, near.weights, near.biases, near.gate_weight, near.gate_bias, near.offset)
    hold("y", far.fused()[0], whole, *near.operands)

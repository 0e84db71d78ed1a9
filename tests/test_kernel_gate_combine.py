"""``gate_combine_fwd`` and ``gate_combine_bwd`` against autograd in float64, for every wiring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ple_fast import Topology
from ple_fast_kernels import Tile, gate_combine_bwd, gate_combine_fwd
from tests.helpers import TOPOLOGIES
from tests.kernel_helpers import (
    ACTIVATIONS,
    DTYPES,
    apply,
    guarded,
    hold,
    kept_of,
    mix,
    mixtures_of,
    num_offsets,
    softmaxes,
    values,
)

pytestmark = pytest.mark.usefixtures("guard_bands")

TILES = (None, Tile(16, 16, 0, 4, 2), Tile(4, 64, 0, 4, 2))
"""With 33 units: one tile, three, one that is wider."""


@dataclass(frozen=True)
class Case:
    """Operands of one wiring: ``z`` is the input of the experts' last activation."""

    topology: Topology
    z: Tensor
    logits: Tensor
    offset: Tensor | None
    dy: Tensor
    dlisted: Tensor
    activation: tuple[str, float]
    temperature: float

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """The kernel's output and weights, all operands among NaN."""
        h = guarded(apply(self.z, self.activation), 3)
        return gate_combine_fwd(
            h, self.kernel_logits(), mixtures_of(self.topology), offset=self.offset, temperature=self.temperature
        )

    def kernel_logits(self) -> Tensor | None:
        return guarded(self.logits) if self.logits.shape[1] else None


def case(
    name: str,
    rows: int,
    units: int,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float64,
    activation: tuple[str, float] = ("identity", 0.0),
    temperature: float = 1.0,
) -> Case:
    t = TOPOLOGIES[name]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    count = num_offsets(t)
    return Case(
        t,
        values(rows, t.num_experts, units, dtype=dtype, device=device),
        values(rows, t.num_logits, dtype=wide, device=device, seed=1),
        values(count, dtype=dtype, device=device, seed=2) if count else None,
        values(rows, t.num_outputs, units, dtype=dtype, device=device, seed=3),
        values(rows, t.num_weights, dtype=wide, device=device, seed=4),
        activation,
        temperature,
    )


def output(z: Tensor, c: Case, logits: Tensor, offset: Tensor | None) -> Tensor:
    return mix(c.topology, softmaxes(c.topology, logits, c.temperature), offset, apply(z, c.activation))


def gradients(
    z: Tensor, logits: Tensor, offset: Tensor | None, dy: Tensor | None, dlisted: Tensor | None, c: Case
) -> tuple[Tensor, Tensor, Tensor]:
    """By autograd: of ``z``, of the weights through ``y`` alone, of the logits."""
    z, logits = z.clone().requires_grad_(), logits.clone().requires_grad_()
    p = softmaxes(c.topology, logits, c.temperature)
    p = p if p.requires_grad else p.requires_grad_()
    y = mix(c.topology, p, offset, apply(z, c.activation))
    nothing = torch.zeros_like(p)
    dz, dp = torch.zeros_like(z), nothing
    if dy is not None:
        dz, dp = torch.autograd.grad(y, [z, p], dy, retain_graph=True)
    total = dp if dlisted is None else dp + dlisted
    if not logits.shape[1]:
        return dz, dp, torch.zeros_like(logits)
    return dz, dp, torch.autograd.grad(p, logits, total)[0]


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_forward_of_wirings(name: str, temperature: float, device: torch.device) -> None:
    c = case(name, 5, 6, device, temperature=temperature)
    y, p = c.forward()
    hold("y", y, output, c.z, c, c.logits, c.offset)
    hold("p", p, lambda logits: softmaxes(c.topology, logits, temperature), c.logits)


@pytest.mark.usefixtures("alignment")
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("rows", "units"), [(1, 1), (1, 33), (37, 33), (32, 32), (17, 5)])
@pytest.mark.parametrize("name", ["static-offsets", "sigmoids-and-sums"])
def test_sizes(name: str, rows: int, units: int, tile: Tile | None, device: torch.device) -> None:
    c = case(name, rows, units, device, activation=("silu", 0.0), temperature=0.3)
    h = apply(c.z, c.activation)
    mixtures = mixtures_of(c.topology)
    y, p = gate_combine_fwd(
        guarded(h, 3), guarded(c.logits), mixtures, offset=c.offset, temperature=c.temperature, tile=tile
    )
    hold("y", y, output, c.z, c, c.logits, c.offset)
    assert p is not None
    dz, dp, dl = gate_combine_bwd(
        guarded(c.dy), guarded(c.dlisted), guarded(h, 3), guarded(p), mixtures, units, torch.float64,
        kept=guarded(c.z, 2), activation=c.activation, offset=c.offset, temperature=c.temperature, tile=tile,
    )  # fmt: skip
    for i, (kind, ours) in enumerate(zip(("dz", "dp", "dl"), (dz, dp, dl), strict=True)):
        hold(kind, ours, lambda *o, i=i: gradients(*o)[i], c.z, c.logits, c.offset, c.dy, c.dlisted, c)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_backward_of_wirings(name: str, device: torch.device) -> None:
    c = case(name, 5, 6, device, activation=("tanh", 0.0), temperature=0.3)
    h = apply(c.z, c.activation)
    _, p = c.forward()
    assert p is not None
    dz, dp, dl = gate_combine_bwd(
        c.dy, c.dlisted, h, p, mixtures_of(c.topology), 6, torch.float64,
        kept=h, activation=c.activation, offset=c.offset, temperature=c.temperature,
    )  # fmt: skip
    expected = gradients(c.z, c.logits, c.offset, c.dy, c.dlisted, c)
    hold("dz", dz, lambda: expected[0])
    hold("dp", dp, lambda: expected[1])
    if c.topology.num_logits:
        hold("dl", dl, lambda: expected[2])
    assert (dl is None) == (c.topology.num_logits == 0)
    if dl is not None:
        hold("dl", dl, lambda: expected[2])


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_backward_of_activations(activation: tuple[str, float], device: torch.device) -> None:
    c = case("ple-even", 5, 6, device, activation=activation)
    _, p = c.forward()
    assert p is not None
    dz, _, _ = gate_combine_bwd(
        c.dy, None, apply(c.z, activation), p, mixtures_of(c.topology), 6, torch.float64,
        kept=kept_of(c.z, activation), activation=activation,
    )  # fmt: skip
    hold("dz", dz, lambda: gradients(c.z, c.logits, None, c.dy, None, c)[0])


@pytest.mark.parametrize("flag", ["experts_grad", "weights_grad", "logits_grad", "weights_grad logits_grad"])
@pytest.mark.parametrize("given", ["dy", "dlisted", "dy dlisted"])
def test_what_is_not_asked_for_is_not_computed(given: str, flag: str, device: torch.device) -> None:
    """Operands that only the others read may be absent, and what is left is right."""
    c = case("static-offsets", 5, 6, device)
    _, p = c.forward()
    assert p is not None
    dy = c.dy if "dy" in given.split() else None
    dlisted = c.dlisted if "dlisted" in given else None
    off: dict[str, Any] = dict.fromkeys(flag.split(), False)
    reads_h = dy is not None and ("weights_grad" not in off or "logits_grad" not in off)
    dz, dp, dl = gate_combine_bwd(
        dy, dlisted, c.z if reads_h else None, p, mixtures_of(c.topology), 6, torch.float64, offset=c.offset, **off
    )
    expected = gradients(c.z, c.logits, c.offset, dy, dlisted, c)
    assert (dz is None) == (dy is None or "experts_grad" in off)
    assert (dp is None) == (not reads_h)
    assert (dl is None) == ("logits_grad" in off)
    for kind, ours, truth in zip(("dz", "dp", "dl"), (dz, dp, dl), expected, strict=True):
        if ours is not None:
            hold(kind, ours, lambda truth=truth: truth)


def test_weights_are_kept_on_demand(device: torch.device) -> None:
    c = case("mixed-kinds", 5, 6, device)
    y, p = gate_combine_fwd(c.z, c.logits, mixtures_of(c.topology), keep_weights=False)
    assert p is None
    assert torch.equal(y, c.forward()[0])


@pytest.mark.usefixtures("alignment")
@pytest.mark.parametrize("name", ["ple", "static-offsets"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_dtypes(dtype: torch.dtype, name: str, device: torch.device) -> None:
    c = case(name, 37, 33, device, dtype=dtype, activation=("silu", 0.0), temperature=0.7)
    y, p = c.forward()
    assert p is not None and (y.dtype, p.dtype) == (dtype, torch.float32)
    hold("y", y, output, c.z, c, c.logits, c.offset)
    hold("p", p, lambda logits: softmaxes(c.topology, logits, c.temperature), c.logits)
    h = apply(c.z, c.activation)
    dz, dp, dl = gate_combine_bwd(
        c.dy, c.dlisted, h, p, mixtures_of(c.topology), 33, dtype,
        kept=c.z, activation=c.activation, offset=c.offset, temperature=c.temperature,
    )  # fmt: skip
    assert dz is not None and dp is not None and dl is not None
    assert (dz.dtype, dp.dtype, dl.dtype) == (dtype, torch.float32, dtype)
    for i, (kind, ours) in enumerate(zip(("dz", "dp", "dl"), (dz, dp, dl), strict=True)):
        hold(kind, ours, lambda *o, i=i: gradients(*o)[i], c.z, c.logits, c.offset, c.dy, c.dlisted, c)


def test_extreme_logits(device: torch.device) -> None:
    """Far apart, far below zero, minus infinity for one: neither overflow nor zero by zero."""
    c = case("mmoe", 4, 6, device)
    c.logits[0] *= 1e6
    c.logits[1] -= 1e6
    c.logits[2, ::2] = float("-inf")
    y, p = c.forward()
    hold("p", p, lambda logits: softmaxes(c.topology, logits, 1.0), c.logits)
    hold("y", y, output, c.z, c, c.logits, None)


def test_sigmoids_of_extreme_logits(device: torch.device) -> None:
    c = case("sigmoids-and-sums", 4, 6, device)
    first = c.topology.logit_offset[2]
    c.logits[:, first] = torch.tensor([1e6, -1e6, float("inf"), float("-inf")], dtype=torch.float64, device=device)
    y, p = c.forward()
    assert p is not None
    assert p[:, c.topology.weight_offset[2]].tolist() == [1.0, 0.0, 1.0, 0.0]
    hold("y", y, output, c.z, c, c.logits, c.offset)
    _, _, dl = gate_combine_bwd(c.dy, None, c.z, p, mixtures_of(c.topology), 6, torch.float64, offset=c.offset)
    assert dl is not None and bool(dl.isfinite().all())
    assert not dl[:, first].any(), "a sigmoid is flat at its ends"


@pytest.mark.parametrize("name", ["ple", "home-meta", "home-task"])
def test_an_expert_that_overflows_reaches_only_mixtures_that_weigh_it(name: str, device: torch.device) -> None:
    c = case(name, 5, 6, device)
    t, bad = c.topology, 0
    c.z[1, bad, 2] = float("inf")
    c.z[3, bad, 4] = float("nan")
    y, p = c.forward()
    assert p is not None
    touched = torch.tensor([bad in mixed for mixed in t.output_experts], device=device)
    expected = torch.zeros(y.shape, dtype=torch.bool, device=device)
    expected[1, touched, 2] = True
    expected[3, touched, 4] = True
    assert 0 < int(touched.sum()) < t.num_outputs
    assert torch.equal(~y.isfinite(), expected)
    dz, dp, dl = gate_combine_bwd(c.dy, None, c.z, p, mixtures_of(t), 6, torch.float64)
    assert dz is not None and dp is not None and dl is not None
    assert bool(dz.isfinite().all()), "the gradient of an identity reads no output"
    columns = torch.tensor([e == bad for mixed in t.mixture_experts for e in mixed], device=device)
    of_mixture = torch.tensor([bad in mixed for mixed in t.mixture_experts for _ in mixed], device=device)
    rows = torch.tensor([1, 3], device=device)
    assert torch.equal(~dp[rows].isfinite(), columns.expand(2, -1))
    assert torch.equal(~dl[rows].isfinite(), of_mixture.expand(2, -1))
    others = torch.tensor([0, 2, 4], device=device)
    assert bool(dp[others].isfinite().all()) and bool(dl[others].isfinite().all())


def test_the_same_inputs_give_the_same_bits(device: torch.device) -> None:
    c = case("ple", 37, 33, device, dtype=torch.float32)
    runs = []
    for _ in range(2):
        y, p = c.forward()
        assert p is not None
        runs.append([y, p, *gate_combine_bwd(c.dy, c.dlisted, c.z, p, mixtures_of(c.topology), 33, torch.float32)])
    for first, second in zip(*runs, strict=True):
        assert first is not None and second is not None and torch.equal(first, second)

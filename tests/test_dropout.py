"""The masks of dropout: their bits, their rates, their independence, and what they cost in memory."""

from __future__ import annotations

import pytest
import torch

from ple_fast import GateSpec, MLPSpec
from ple_fast.torch_backend import prepared
from ple_fast.torch_backend.dropout import keep_mask
from tests.helpers import TOPOLOGIES, assert_derivatives_agree, level, saved_bytes
from tests.product_helpers import blocks_of

WORD = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """Output for a state, as Steele, Lea and Flood (OOPSLA 2014) write it."""
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & WORD
    state = (state ^ state >> 27) * 0x94D049BB133111EB & WORD
    return state ^ state >> 31


@pytest.mark.parametrize("shape", [(3, 1), (2, 2, 5), (4, 8), (1, 3, 4)])
@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_bits_are_those_of_the_generator(seed: int, shape: tuple[int, ...]) -> None:
    golden, p, position = 0x9E3779B97F4A7C15, 0.3, 2
    mask = keep_mask(seed, position, 0, torch.empty(shape), p).flatten(1)
    rows, width = mask.shape
    words = -(-width // 4)
    state = splitmix64(splitmix64(seed + golden) + position * golden & WORD)
    for row in range(rows):
        first = state + row * words * golden
        outputs = [splitmix64(first + word * golden & WORD) for word in range(1, words + 1)]
        bits = b"".join(output.to_bytes(8, "little") for output in outputs)
        lanes = [int.from_bytes(bits[2 * i : 2 * i + 2], "little", signed=True) for i in range(width)]
        assert mask[row].tolist() == [int(lane >= 32768 - round(0.7 * 65536)) for lane in lanes]


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_a_seed_in_memory_draws_the_same_mask(seed: int) -> None:
    like = torch.empty(9, 3, 5)
    assert torch.equal(keep_mask(torch.tensor(seed), 3, 2, like, 0.4), keep_mask(seed, 3, 2, like, 0.4))


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 1 - 1e-9])
def test_rate(p: float) -> None:
    dropped = 1 - keep_mask(7, 1, 0, torch.empty(1500, 1000), p).double()
    deviation = max(p * (1 - p), 2**-16) ** 0.5
    assert abs(dropped.mean().item() - p) < 2**-16 + 4 * deviation / dropped.numel() ** 0.5
    assert 0 < dropped.mean().item() < 1, "every rate drops something and keeps something"
    # Neither rows nor columns have rates of their own.
    for axis in (0, 1):
        spread = dropped.mean(axis).var() * dropped.shape[axis] / dropped.mean().mul(1 - dropped.mean())
        assert 0.8 < spread.item() < 1.2


def test_masks_of_seeds_layers_and_neighbours_are_independent() -> None:
    like = torch.empty(1000, 999)
    signs = [2.0 * keep_mask(seed, layer, 0, like, 0.5).flatten() - 1 for seed in (3, 4, 2**30) for layer in (0, 1, 7)]
    shifted = [signs[0].view(1000, 999).roll(by, axis).flatten() for axis in (0, 1) for by in (1, 2, 3, 4, 8)]
    every = torch.stack(signs + shifted)
    correlation = (every @ every.t() / every.shape[1]).fill_diagonal_(0)
    assert correlation.abs().max().item() < 5 / every.shape[1] ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_does_not_depend_on_how_rows_are_cut(dtype: torch.dtype) -> None:
    like = torch.empty(100, 3, 7, dtype=dtype)
    whole = keep_mask(11, 3, 0, like, 0.4)
    assert whole.shape == like.shape
    for start, stop in ((0, 1), (1, 64), (64, 100)):
        assert torch.equal(keep_mask(11, 3, start, like[start:stop], 0.4), whole[start:stop])


@pytest.mark.parametrize("norm", [None, "layer", "batch"])
def test_relu_and_dropout_keep_one_tensor_between_them(norm: str | None) -> None:
    """Their output: it is above 0 where both let a value through."""
    x = torch.randn(50, 7)
    plain, dropping = (
        level(TOPOLOGIES["ple-last"], MLPSpec((6, 4), norm=norm, dropout=p), GateSpec(), dtype=torch.float32)
        for p in (0.0, 0.5)
    )
    extra = saved_bytes(dropping, x) - saved_bytes(plain, x)
    outputs = plain.topology.num_experts * 50 * (6 + 4) * 4
    assert extra == (0 if norm is None else outputs), "after a norm without dropout outputs are computed again"


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu", "identity", "prelu", "dice", "leaky_relu"])
@pytest.mark.parametrize("norm", [None, "batch", "layer"])
@pytest.mark.parametrize("position", ["before", "after"])
def test_every_make_up_has_the_gradient_of_the_mask_that_it_used(
    position: str, norm: str | None, activation: str
) -> None:
    """Against the composed level, which draws the same mask and is differentiated by autograd."""
    spec = MLPSpec((6, 4), activation, norm=norm, norm_position=position, dropout=(0.5, 0.3))
    module = level(TOPOLOGIES["ple-last"], spec, GateSpec((5,), activation, norm, dropout=0.4))
    x = torch.randn(40, 7, dtype=torch.float64)
    assert_derivatives_agree(module, x, 1e-10)


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
@pytest.mark.parametrize("gate", [GateSpec(), GateSpec((5,), dropout=0.3)])
def test_every_row_block_drops_what_the_whole_batch_does(
    activation: str, gate: GateSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward: a later block has the masks of its own rows."""
    module = level(TOPOLOGIES["ple"], MLPSpec((6, 4), activation, dropout=0.4), gate).train()
    outcomes = []
    for step in (prepared.ROW_STEP, 4):
        blocks_of(step, monkeypatch)
        torch.manual_seed(3)
        x = torch.randn(14, module.in_features, dtype=torch.float64, requires_grad=True)
        y = module(x)
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])])
    for whole, parts in zip(*outcomes, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)

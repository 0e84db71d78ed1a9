"""Bytes saved for backward and operators, counted by the benchmarks; ours saves less than its peers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.configs import (
    SIZES,
    TrunkConfig,
)
from benchmarks.contestants import NORM_PAIRS, build
from benchmarks.saved_bytes import cost, saved_bytes
from tests.benchmark_helpers import trunk_of


def test_saved_bytes_of_a_known_graph() -> None:
    x, w = torch.randn(10, 4, requires_grad=True), torch.randn(4, 3, requires_grad=True)

    def forward() -> list[torch.Tensor]:
        h = (x @ w).tanh()  # saves x and w (left out), and its own output
        return [h * h, h.view(-1)[:3].exp()]  # saves h again (once), and 3 numbers

    assert saved_bytes(forward, [x, w]) == (10 * 3 + 3) * 4
    assert saved_bytes(forward) == (10 * 3 + 3 + 10 * 4 + 4 * 3) * 4


def test_saved_bytes_sees_what_a_function_hides_on_its_context() -> None:
    class Hiding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.hidden = {"inside": [x.exp()]}
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return grad * ctx.hidden["inside"][0]

    hide: Any = Hiding.apply
    x = torch.randn(5, requires_grad=True)
    assert saved_bytes(lambda: [hide(x) + 1], [x]) == 5 * 4


def test_cost_counts_operators_but_no_views() -> None:
    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [(x + x)[:, :4].sigmoid() for _ in range(3)]

    config = TrunkConfig("any", 6, 5, 3, units=(4,))
    measured = cost(Doubled(), config)
    assert measured.forward_operators == 3 * 2  # add, sigmoid
    assert measured.saved_bytes == 3 * 6 * 4 * 4  # the outputs of sigmoid
    assert measured.backward_operators > 3


@pytest.mark.parametrize(("name", "limit"), [("fast", 0.65), ("fast_recompute", 0.1)])
def test_ours_saves_less_for_backward_than_the_loop(name: str, limit: float) -> None:
    config = SIZES["cpu"].at(512)
    loop = cost(build("loop", config), config).saved_bytes
    assert cost(build(name, config), config).saved_bytes <= limit * loop


@pytest.mark.parametrize(("peer", "ours"), NORM_PAIRS)
def test_ours_with_norms_or_dropout_saves_less_than_the_peer(peer: str, ours: str) -> None:
    config = SIZES["cpu"].at(512)
    assert cost(trunk_of(ours, config), config).saved_bytes <= 0.7 * cost(trunk_of(peer, config), config).saved_bytes

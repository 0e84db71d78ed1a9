"""``FlopCounterMode`` counts of a trunk what it counts of the plain loop, and the mixing, a product in ours only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ple_fast import PLE, ExtractionNetwork
from ple_fast.reference import PLEReference

MAKE_UPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norms": {"norm": "batch", "activation": "prelu"},
    "hidden gates": {"gate_units": (16,)},
    "few tasks, no shared experts": {"shared_experts": 0},
}
INPUTS: dict[str, Callable[[int], Any]] = {
    "one": lambda rows: torch.randn(rows, 48),
    "stacked": lambda rows: torch.randn(rows, 3, 48),
    "list": lambda rows: [torch.randn(rows, 48) for _ in range(3)],
}


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def mixing(ple: PLE, rows: int) -> int:
    """Of ``(B, O, E)`` times ``(B, E, H)`` in all levels."""
    total = 0
    for level in ple.levels:
        assert isinstance(level, ExtractionNetwork)
        total += 2 * rows * level.topology.num_mixtures * level.topology.num_experts * level.out_features
    return total


def step(module: nn.Module, x: Any) -> None:
    y: Tensor = module(x)
    y.square().sum().backward()


@pytest.mark.parametrize("form", INPUTS)
@pytest.mark.parametrize("make_up", MAKE_UPS)
@pytest.mark.parametrize("rows", [1, 16, 300])
def test_flops_are_those_of_the_plain_loop(make_up: str, form: str, rows: int) -> None:
    if make_up == "norms" and rows == 1:
        pytest.skip("one row has no statistics")
    tasks = 3 if make_up.startswith("few") else 2
    ple = PLE(48, tasks, expert_units=(64, 32), **MAKE_UPS[make_up])
    loop, x, mixed = PLEReference.like(ple), INPUTS[form](rows), mixing(ple, rows)
    with torch.no_grad():
        assert counted(lambda: ple(x)) - mixed == counted(lambda: loop(x))
    for tensor in [x] if isinstance(x, Tensor) else x:
        tensor.requires_grad_()
    assert counted(lambda: step(ple, x)) - 3 * mixed == counted(lambda: step(loop, x))


def test_flops_of_a_copy_for_serving() -> None:
    ple = PLE(48, 2, expert_units=(64, 32), norm="batch").eval()
    x = torch.randn(300, 48)
    loop = PLEReference.like(ple)
    with torch.inference_mode():
        expected = counted(lambda: loop(x)) + mixing(ple, 300)
        served = ple.for_inference()
        assert counted(lambda: ple(x)) == counted(lambda: served(x)) == expected

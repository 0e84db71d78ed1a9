"""What is saved for backward, and what backward leaves alone: bytes, reuse of a graph, recomputation, dropout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from benchmarks.configs import SIZES
from benchmarks.loop import baseline
from ple_fast import PLE, ExtractionNetwork, GateSpec, MLPSpec, Topology
from ple_fast.modules.layers import ExpertBlock, StackedLayer
from tests.helpers import EXPERTS, GATES, TOPOLOGIES, assert_close, level, randomise, saved_bytes
from tests.test_both_backends import STEPS

PLE_LEVEL = TOPOLOGIES["ple"]


def _issue_ple(**kwargs: Any) -> PLE:
    return PLE(512, 3, num_levels=2, task_experts=2, shared_experts=2, expert_units=(256, 128), **kwargs)


def test_saved_bytes_against_the_plain_loop() -> None:
    x = torch.randn(256, 512)
    loop = saved_bytes(baseline(SIZES["cpu"].at(256)), x)
    assert saved_bytes(_issue_ple(), x) <= 0.65 * loop
    assert saved_bytes(_issue_ple(recompute=True), x) <= 0.1 * loop


def _level_bytes(input_grad: bool = False, **frozen: bool) -> int:
    module = ExtractionNetwork(64, PLE_LEVEL, experts=MLPSpec((64, 32), "gelu"), gate=GateSpec((48,), "gelu"))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not any(flag and name.startswith(prefix) for prefix, flag in frozen.items()))
    return saved_bytes(module, torch.randn(128, 64, requires_grad=input_grad))


def test_saved_bytes_shrink_with_what_is_frozen() -> None:
    """A frozen half saves nothing for itself; with a gradient to the input it saves what that one needs."""
    whole = _level_bytes()
    hidden_bytes = 128 * PLE_LEVEL.num_experts * 64 * 4
    assert _level_bytes(blocks=True) <= whole - hidden_bytes
    assert _level_bytes(gate=True) < whole
    assert _level_bytes(input_grad=True, blocks=True) > _level_bytes(blocks=True)


def test_a_changed_input_is_noticed_in_backward() -> None:
    """In-place writes between forward and backward must raise, as for any PyTorch operator, not give wrong numbers."""
    module = level(PLE_LEVEL, *STEPS["relu"])
    x = torch.randn(9, module.in_features, dtype=torch.float64)
    y = module(x)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_recompute_leaves_the_random_stream_where_saving_leaves_it() -> None:
    states = []
    for recompute in (False, True):
        module = level(PLE_LEVEL, *STEPS["dropout"], recompute=recompute).train()
        torch.manual_seed(7)
        module(torch.ones(9, module.in_features, dtype=torch.float64)).sum().backward()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def _layer(module: ExtractionNetwork, index: int) -> StackedLayer:
    """A layer of the first block."""
    block = module.blocks[0]
    assert isinstance(block, ExpertBlock)
    layer = block.layers[index]
    assert isinstance(layer, StackedLayer)
    return layer


def _dropout_level(p: float, units: int = 50) -> ExtractionNetwork:
    """One mixture per expert with weight 1; every expert's output before dropout is 1."""
    module = ExtractionNetwork(
        3, Topology.single_task(4), experts=MLPSpec((units,), "identity", dropout=p), gate=GateSpec()
    )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(float(name.endswith("bias")))
    return module


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_zeroes_with_probability_p_and_scales_the_rest(p: float) -> None:
    module = _dropout_level(p).train()
    x = torch.randn(400, 3, requires_grad=True)
    y = module(x)
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)))
    rate, count = kept.double().mean().item(), kept.numel()
    assert abs(rate - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5
    # Experts, samples and units are dropped independently of each other.
    for a, b in [(kept[:, 0], kept[:, 1]), (kept[:200], kept[200:]), (kept[..., :25], kept[..., 25:])]:
        both = (a & b).double().mean().item()
        assert abs(both - (1 - p) ** 2) < 5 * ((1 - p) ** 2 / a.numel()) ** 0.5
    assert torch.equal(module.eval()(x), torch.ones_like(y))


def test_dropout_follows_the_seed_and_differs_from_step_to_step() -> None:
    module = _dropout_level(0.5).train()
    x = torch.randn(20, 3)
    torch.manual_seed(1)
    first, second = module(x), module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), first)
    assert not torch.equal(first, second)


def test_dropout_passes_gradients_where_it_passed_values() -> None:
    module = _dropout_level(0.5).train()
    y = module(torch.randn(20, 3))
    y.sum().backward()
    bias = _layer(module, 0).bias
    assert bias is not None
    torch.testing.assert_close(bias.grad, y.detach().sum(0))


def test_dropout_before_a_linear_layer() -> None:
    """Two layers: the second sees the dropped hidden units, so its output takes as many values as there are masks."""
    module = ExtractionNetwork(
        3, Topology.single_task(1), experts=MLPSpec((2, 1), "identity", dropout=(0.5, 0.0)), gate=GateSpec()
    ).train()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        bias = _layer(module, 0).bias
        assert bias is not None
        bias.copy_(torch.tensor([[1.0, 10.0]]))
        _layer(module, 1).weight.fill_(1.0)
    values = set(module(torch.zeros(200, 3)).flatten().tolist())
    assert values == {0.0, 2.0, 20.0, 22.0}


def test_a_level_used_twice_in_one_graph() -> None:
    module = level(PLE_LEVEL, *STEPS["per-layer"]).eval()
    x = torch.randn(2, 9, module.in_features, dtype=torch.float64)
    (module(x[0]).square().sum() + module(x[1]).square().sum()).backward()
    together = [p.grad for p in module.parameters()]
    alone = copy.deepcopy(module)
    alone.zero_grad(set_to_none=True)
    for part in x:
        alone(part).square().sum().backward()
    for (name, parameter), grad in zip(alone.named_parameters(), together, strict=True):
        assert_close(name, grad, parameter.grad, 1e-12)


def test_randomised_weights_leave_no_constant() -> None:
    """The helper of these tests does its work: no parameter is left at a value that hides a mistake."""
    module = ExtractionNetwork(5, PLE_LEVEL, experts=EXPERTS["per-layer"], gate=GATES["everything"])
    randomise(module)
    for name, parameter in module.named_parameters():
        assert parameter.unique().numel() == parameter.numel(), name

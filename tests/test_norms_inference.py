"""Norms in inference: folded into a layer, or on the path of few rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ple_fast import ExtractionNetwork, GateSpec, MLPSpec
from tests.helpers import (
    EXPERTS,
    GATES,
    TOPOLOGIES,
    assert_close,
    compare_low_precision,
    draw,
    level,
    reference_of,
)

EVERY_MAKE_UP = list(
    itertools.product(["batch", "layer"], ["before", "after"], ["relu", "tanh", "gelu", "dice"], [True, False])
)


@pytest.mark.parametrize(("norm", "position", "activation", "bias"), EVERY_MAKE_UP)
def test_inference_equals_the_reference(norm: str, position: str, activation: str, bias: bool) -> None:
    """Few rows or many, folded or not (wide inputs of few rows are not), with gates of both kinds."""
    spec = MLPSpec((6, 5, 4), activation, norm=norm, norm_position=position, bias=bias, dropout=0.5)
    for gate in (GATES["logits-norm"], GATES["everything"], GateSpec(logits_norm="batch")):
        module = level(TOPOLOGIES["ple-last"], spec, gate).eval()
        reference = reference_of(module).eval()
        for batch, form in ((1, "one"), (2, "stacked"), (9, "one"), (33, "stacked")):
            (x,) = draw(form, batch, module.topology.num_slots or 0, 7)
            with torch.no_grad():
                expected = reference(x)
                assert_close("y", module(x), expected, 1e-12)
                assert_close("y beside gates", module(x, return_gates=True)[0], expected, 1e-12)


def _norm_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    calls: list[tuple[int, ...]] = []
    native = torch.native_batch_norm

    def spy(z: Tensor, *rest: Any) -> Any:
        calls.append(tuple(z.shape))
        return native(z, *rest)

    monkeypatch.setattr(torch, "native_batch_norm", spy)
    return calls


def test_norms_fold_where_that_costs_less_than_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _norm_calls(monkeypatch)
    module = level(TOPOLOGIES["ple-last"], MLPSpec((6, 4), norm="batch"), GATES["logits-norm"], in_features=200).eval()
    after = level(TOPOLOGIES["ple-last"], MLPSpec((6, 4), norm="batch", norm_position="after"), in_features=200).eval()
    logits, experts = module.topology.num_logits, module.topology.num_experts
    with torch.inference_mode():
        module(torch.randn(100, 200, dtype=torch.float64))
        assert calls == [], "every norm is in a weight"
        module(torch.randn(99, 200, dtype=torch.float64))
        assert sorted(calls) == sorted([(99, experts * 6), (99, logits)]), "200 x 6 weights are more than 2 x 99 x 6"
        calls.clear()
        after(torch.randn(100, 200, dtype=torch.float64))
        assert calls == [(100, experts * 4)], "nothing linear follows the last norm"


def test_low_precision_is_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _norm_calls(monkeypatch)
    module = level(TOPOLOGIES["ple-last"], MLPSpec((4,), norm="batch"), dtype=torch.bfloat16).eval()
    with torch.no_grad():
        module(torch.randn(50, 7, dtype=torch.bfloat16))
    assert len(calls) == 1


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_low_precision_in_eval_mode(norm: str, position: str, autocast: bool) -> None:
    spec = MLPSpec((6, 4), norm=norm, norm_position=position)
    module = level(TOPOLOGIES["ple-last"], spec, GATES["logits-norm"])
    for rows, ask_gates in ((40, True), (3, False)):
        leaves = draw("one", rows, 3, 7)
        compare_low_precision(
            module, leaves, dtype=torch.bfloat16, autocast=autocast, train=False, ask_gates=ask_gates
        )  # fmt: skip


def _scale_in_place(module: ExtractionNetwork) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(0.5)  # past the version counter, as averages of weights are swapped in


def _move_statistics(module: ExtractionNetwork) -> None:
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm1d)):
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.add_(1.0)
        norm.running_var.mul_(3.0)


def _load(module: ExtractionNetwork) -> None:
    other = level(module.topology, module.expert_specs, module.gate_spec, seed=5)
    module.load_state_dict(other.state_dict())


def _assign(module: ExtractionNetwork) -> None:
    other = level(module.topology, module.expert_specs, module.gate_spec, seed=6)
    module.load_state_dict(other.state_dict(), assign=True)


def _change_eps(module: ExtractionNetwork) -> None:
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm1d)):
        norm.eps = 0.3


def _train_a_step(module: ExtractionNetwork) -> None:
    module.train()(torch.randn(20, 7, dtype=torch.float64)).square().sum().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad, alpha=0.1)
    module.eval()


def _other_dtype(module: ExtractionNetwork) -> None:
    module.float().double()


@pytest.mark.parametrize(
    "change",
    [_scale_in_place, _move_statistics, _load, _assign, _change_eps, _train_a_step, _other_dtype],
)
@pytest.mark.parametrize("batch", [3, 40])
def test_nothing_folded_outlives_a_call(batch: int, change: Callable[[ExtractionNetwork], None]) -> None:
    module = level(TOPOLOGIES["ple-last"], EXPERTS["batch-norm"], GATES["logits-norm"]).eval()
    x = torch.randn(batch, 7, dtype=torch.float64)
    with torch.no_grad():
        before = module(x)
    change(module)
    with torch.no_grad():
        after = module(x)
        assert_close("y", after, reference_of(module).eval()(x), 1e-12)
    assert (after - before).abs().max() > 1e-9


def test_a_norm_in_train_mode_among_folded_ones_takes_the_batch() -> None:
    module = level(TOPOLOGIES["ple-last"], MLPSpec((6, 4), norm="batch"), GATES["logits-norm"]).eval()
    block: Any = module.blocks[0]
    block.layers[0].norm.train()
    reference = reference_of(module).eval()
    for expert in reference.experts:  # type: ignore[union-attr]  # a list of modules
        next(m for m in expert.modules() if isinstance(m, nn.BatchNorm1d)).train()
    for batch in (5, 40):
        x = torch.randn(batch, 7, dtype=torch.float64)
        with torch.no_grad():
            assert_close("y", module(x), reference(x), 1e-12)
    assert block.layers[0].norm.num_batches_tracked == 2, "each call is counted once"
    assert block.layers[1].norm.num_batches_tracked == 0


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("batch", [5, 40])
def test_dropout_that_is_on_in_inference_drops_the_same(batch: int, position: str) -> None:
    """Monte Carlo dropout: a norm does not go past it into the next layer, and few rows are dropped too."""
    spec = MLPSpec((6, 4), norm="batch", norm_position=position, dropout=0.5)
    module = level(TOPOLOGIES["ple-last"], spec, GATES["logits-norm"]).eval()
    for block in module.blocks:
        for layer in block.layers:  # type: ignore[union-attr]  # ModuleList
            layer.training = True
    x = torch.randn(batch, 7, dtype=torch.float64)
    outputs = []
    for records in (True, False):
        torch.manual_seed(4)
        with torch.set_grad_enabled(records):
            outputs.append(module(x))
    assert_close("y", outputs[1], outputs[0], 1e-12)
    with torch.no_grad():
        assert not torch.equal(module(x), outputs[1]), "every call draws anew"


@pytest.mark.parametrize("batch", [5, 40])
def test_a_norm_of_somebody_else_is_called_as_it_is(batch: int) -> None:
    class Doubling(nn.BatchNorm1d):
        def forward(self, z: Tensor) -> Tensor:
            return 2 * z

    module = level(TOPOLOGIES["ple-last"], MLPSpec((4,), "identity", norm="batch")).eval()
    plain = level(TOPOLOGIES["ple-last"], MLPSpec((4,), "identity")).eval()
    block: Any = module.blocks[0]
    block.layers[0].norm = Doubling(module.topology.num_experts * 4, dtype=torch.float64).eval()
    plain.load_state_dict({name: module.state_dict()[name] for name in plain.state_dict()})
    x = torch.randn(batch, 7, dtype=torch.float64)
    with torch.no_grad():
        assert_close("y", module(x), 2 * plain(x), 1e-12)

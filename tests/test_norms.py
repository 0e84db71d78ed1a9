"""Norms in training over several row blocks, and in inference: folded into a layer, or on the path of few rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ple_fast import ExtractionNetwork, GateSpec, MLPSpec
from ple_fast.torch_backend import prepared
from tests.helpers import (
    EXPERTS,
    GATES,
    TOPOLOGIES,
    assert_close,
    compare,
    compare_low_precision,
    draw,
    has_dropout,
    level,
    reference_of,
    saved_bytes,
)

BLOCKS: dict[str, tuple[MLPSpec, ...]] = {
    "norms-differ": (MLPSpec((6, 4), norm="batch"),) * 3
    + (MLPSpec((6, 4), norm="layer"),) * 3
    + (MLPSpec((6, 4)),) * 2,
    "depths-differ": (MLPSpec((6, 5, 4), norm="batch"),) * 6 + (MLPSpec((4,), norm="batch"),) * 2,
    "dice-beside-batch-norm": (MLPSpec((6, 4), norm="batch"),) * 6 + (MLPSpec((6, 4), "dice"),) * 2,
}


@pytest.fixture
def four_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row blocks of four rows."""
    monkeypatch.setattr(prepared, "ROW_STEP", 4)
    monkeypatch.setattr(prepared, "BLOCK_BYTES", 0)


def _compare(experts: Any, gate: GateSpec, batch: int, *, topology: str = "ple", **how: Any) -> None:
    module = level(TOPOLOGIES[topology], experts, gate)
    slots = module.topology.num_slots
    assert slots is not None
    leaves = draw("stacked", batch, slots, module.in_features)
    compare(module, leaves, form="stacked", slots=slots, common_scale=True, **how)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("batch", [9, 12, 14])
@pytest.mark.parametrize(("experts", "gate"), [(e, "everything") for e in EXPERTS] + [("batch-norm", g) for g in GATES])
@pytest.mark.usefixtures("four_rows")
def test_row_blocks_meet_where_statistics_are_taken(experts: str, gate: str, batch: int, train: bool) -> None:
    drops = has_dropout(EXPERTS[experts], GATES[gate])
    _compare(EXPERTS[experts], GATES[gate], batch, train=train and not drops)


@pytest.mark.parametrize("gate", ["plain", "everything"])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.usefixtures("four_rows")
def test_experts_of_several_make_ups_meet_too(name: str, gate: str) -> None:
    _compare(BLOCKS[name], GATES[gate], 14)


def test_levels_with_batch_norm_have_row_blocks(monkeypatch: pytest.MonkeyPatch, four_rows: None) -> None:
    seen: list[int] = []
    whole = prepared.row_blocks

    def spy(inputs: Any, own: Any) -> list[slice]:
        seen.append(len(whole(inputs, own)))
        return whole(inputs, own)

    monkeypatch.setattr(prepared, "row_blocks", spy)
    x = torch.randn(14, 7, dtype=torch.float64)
    for spec, blocks in ((EXPERTS["batch-norm"], 4), (EXPERTS["dice"], 1)):
        level(TOPOLOGIES["ple-last"], spec, GATES["logits-norm"]).train()(x)
        assert seen == [blocks]
        seen.clear()


@pytest.mark.parametrize("experts", ["batch-norm", "batch-norm-after", "prelu-norms", "layer-norm"])
@pytest.mark.usefixtures("four_rows")
def test_recomputation_over_row_blocks(experts: str) -> None:
    """Same numbers, and running statistics move once."""
    outcomes = []
    for recompute in (False, True):
        module = level(TOPOLOGIES["ple-last"], EXPERTS[experts], GATES["everything"], recompute=recompute).train()
        x = torch.randn(14, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        module(x).square().sum().backward()
        assert x.grad is not None
        outcomes.append([x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    for saved, again in zip(*outcomes, strict=True):
        assert_close("gradient or statistics", again, saved, 1e-12)


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.usefixtures("four_rows")
def test_running_statistics_over_row_blocks(momentum: float | None) -> None:
    """Three steps, with a moving and with a plain average; without gradients too."""
    module = level(TOPOLOGIES["ple-last"], EXPERTS["batch-norm"], GATES["logits-norm"])
    reference = reference_of(module)
    for norm in (m for net in (module, reference) for m in net.modules() if isinstance(m, nn.BatchNorm1d)):
        norm.momentum = momentum
    x = torch.randn(3, 14, 7, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1], dtype=torch.float64).view(3, 1, 1)
    for step in range(3):
        with torch.set_grad_enabled(step != 1):
            module.train()(x[step])
            reference.train()(x[step])
    module.eval()
    reference.eval()
    assert_close("y", module(x[0]), _outputs(reference, x[0]), 1e-12)


def _outputs(reference: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = reference(x)
    return y


def test_float32_statistics_of_features_far_from_zero() -> None:
    """Means a thousand deviations away, over blocks of 512 rows: merged sums of squares would be all rounding."""
    module = level(TOPOLOGIES["ple-last"], EXPERTS["batch-norm"], GATES["logits-norm"], in_features=64)
    with torch.no_grad():
        for layer in module.blocks[0].layers:  # type: ignore[union-attr]  # ModuleList
            layer.bias.add_(1000.0)
    x = torch.randn(1300, 64, dtype=torch.float64)
    compare_low_precision(module, [x], dtype=torch.float32)


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "prelu"])
def test_of_a_layer_with_a_norm_only_its_input_is_kept(activation: str, norm: str) -> None:
    x = torch.randn(64, 7)
    module = level(TOPOLOGIES["ple-last"], MLPSpec((6, 4), activation, norm=norm), dtype=torch.float32).train()
    inputs = module.topology.num_experts * 64 * (6 + 4) * 4
    assert inputs < saved_bytes(module, x) < 1.8 * inputs  # statistics and the gates' weights


# Inference ------------------------------------------------------------------------------------------

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
                expected = _outputs(reference, x)
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
    leaves = draw("one", 40, 3, 7)
    compare_low_precision(module, leaves, dtype=torch.bfloat16, autocast=autocast, train=False)


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
        assert_close("y", after, _outputs(reference_of(module).eval(), x), 1e-12)
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
            assert_close("y", module(x), _outputs(reference, x), 1e-12)
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

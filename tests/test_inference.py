"""``for_inference``: the results of eval mode, with batch norm in the linear layers and nothing that training needs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from ple_fast import CGC, PLE, ExtractionNetwork, MLPSpec, MMoE, Topology, pack, use_backend
from ple_fast.modules.norms import StackedBatchNorm, StackedLayerNorm
from tests.helpers import EXPERTS, GATES, TOPOLOGIES, assert_close, draw, level, randomise

LEVEL = TOPOLOGIES["ple"]
FEW = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])


def norms(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, (nn.BatchNorm1d, StackedLayerNorm))]


def assert_equal_to_eval(module: ExtractionNetwork, served: ExtractionNetwork, tolerance: float = 1e-12) -> None:
    """Output and weights of ``served`` are those of ``module`` in eval mode; nothing of it trains."""
    assert not any(child.training for child in served.modules())
    assert not any(parameter.requires_grad for parameter in served.parameters())
    reader = copy.deepcopy(module).eval()
    slots = module.topology.num_slots
    assert slots is not None
    for rows in (1, 9):
        (x,) = draw("stacked", rows, slots, module.in_features)
        x = x.to(next(module.parameters()).dtype)
        y, gates = reader(x, return_gates=True)
        own, own_gates = served(x, return_gates=True)
        assert_close("y", own, y, tolerance)
        for a, b in zip(own_gates, gates, strict=True):
            assert_close("gate", a, b, tolerance)


@pytest.mark.parametrize("gate", GATES)
def test_gates(gate: str) -> None:
    module = level(TOPOLOGIES["mixed-kinds"], EXPERTS["batch-norm"], GATES[gate])
    served = module.for_inference()
    assert_equal_to_eval(module, served)
    assert [name for name in norms(served) if "gate" in name] == {
        "hidden-layer-norm": ["gate.layers.0.norm"],
        "hidden-prelu-dice": ["gate.layers.1.activation.norm"],
    }.get(gate, [])


STAYS = {
    "dice": ["0.activation.norm", "1.activation.norm"],
    "batch-norm-after": ["1.norm"],
    "layer-norm": ["0.norm", "1.norm"],
    "layer-norm-after": ["0.norm", "1.norm"],
    "per-layer": ["1.norm", "1.activation.norm"],
    "prelu-norms": ["0.norm", "1.norm"],
}
"""Norms that no linear layer can take: behind the last activation, within dice, and layer norms."""


@pytest.mark.parametrize("experts", EXPERTS)
def test_experts(experts: str) -> None:
    module = level(TOPOLOGIES["adatt"], EXPERTS[experts])
    served = module.for_inference()
    assert_equal_to_eval(module, served)
    assert norms(served) == [f"blocks.0.layers.{name}" for name in STAYS.get(experts, [])]


def test_a_norm_behind_no_activation_folds_into_its_own_layer() -> None:
    spec = MLPSpec((5, 4), "identity", norm="batch", norm_position="after", bias=False)
    module = level(LEVEL, spec)
    assert_equal_to_eval(module, served := module.for_inference())
    assert norms(served) == []


@FEW
@given(data=st.data())
def test_drawn_levels(data: st.DataObject) -> None:
    """Specs that change from expert to expert, and blocks that only their settings part."""
    topology = TOPOLOGIES[data.draw(st.sampled_from(sorted(TOPOLOGIES)))]
    names = [name for name, spec in EXPERTS.items() if spec.units[-1] == 4]
    few = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2))
    experts = [EXPERTS[data.draw(st.sampled_from(few))] for _ in range(topology.num_experts)]
    module = level(
        topology, experts, GATES[data.draw(st.sampled_from(sorted(GATES)))], seed=data.draw(st.integers(0, 9))
    )
    plain, gates = module.unpack()
    for expert in plain:
        for child in expert.modules():
            if isinstance(child, nn.BatchNorm1d) and child.affine and data.draw(st.booleans()):
                child.eps = 1e-2
        expert.requires_grad_(data.draw(st.booleans()))
    assert_equal_to_eval(packed := pack(plain, gates, topology), packed.for_inference())


def test_experts_that_differed_in_training_only_are_one_block() -> None:
    module = level(Topology.mmoe(2, 3), EXPERTS["batch-norm"])
    plain, gates = module.unpack()
    plain[1].requires_grad_(False)
    for child in plain[2].modules():
        if isinstance(child, nn.BatchNorm1d):
            child.eps = 1e-2
    packed = pack(plain, gates, module.topology)
    assert len(packed.blocks) == 3
    served = packed.for_inference()
    assert len(served.blocks) == 1
    assert_equal_to_eval(packed, served)


def test_blocks_whose_remaining_norms_differ_stay_apart() -> None:
    module = level(Topology.mmoe(2, 2), EXPERTS["layer-norm"])
    plain, gates = module.unpack()
    for child in plain[1].modules():
        if isinstance(child, nn.LayerNorm):
            child.eps = 0.1
    packed = pack(plain, gates, module.topology)
    served = packed.for_inference()
    assert len(served.blocks) == 2
    assert_equal_to_eval(packed, served)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    "trunk",
    [
        PLE(7, 2, expert_units=(6, 4), norm="batch", dropout=0.3, gate_units=(5,), recompute=True, dtype=torch.float64),
        CGC(7, 2, expert_units=(6, 4), norm="batch", dtype=torch.float64),
        MMoE(7, 2, experts=3, expert_units=(6, 4), norm="batch", dtype=torch.float64),
    ],
    ids=["ple", "cgc", "mmoe"],
)
def test_trunks(trunk: Any, plain: bool) -> None:
    module = copy.deepcopy(trunk)
    randomise(module)
    served = module.for_inference(plain=plain)
    assert type(served) is type(module)
    x = torch.randn(9, 7, dtype=torch.float64)
    assert_close("y", served(x), module.eval()(x), 1e-12)
    assert norms(served) == [] and ("plain=True" in repr(served)) is plain
    assert not any(spec.dropout[0] for spec in served.levels[0].expert_specs) and not served.levels[0].recompute
    # A copy: training goes on without it.
    before = served(x)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(served(x), before)


def test_a_state_is_loaded_by_a_module_that_was_made_alike() -> None:
    first, second = (
        level(LEVEL, EXPERTS["per-layer"], GATES["everything"], seed=seed).for_inference() for seed in range(2)
    )
    (x,) = draw("stacked", 9, 4, 7)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_a_subclass_keeps_what_it_added() -> None:
    class Doubled(PLE):
        factor = 1.0

        def forward(self, x: Any, **options: Any) -> Any:
            return super().forward(x, **options) * self.factor

    module = Doubled(7, 2, expert_units=(6, 4), norm="batch", dtype=torch.float64).eval()
    module.factor = 2.0
    x = torch.randn(9, 7, dtype=torch.float64)
    assert_close("y", module.for_inference()(x), module(x), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_that_of_the_dtype(dtype: torch.dtype) -> None:
    """Against float64, folding errs at most twice as much as the level that was folded."""
    module = level(LEVEL, EXPERTS["batch-norm"], GATES["everything"]).to(dtype).eval()
    exact = copy.deepcopy(module).double()
    (x,) = draw("stacked", 200, 4, 7)
    x = x.to(dtype)
    truth = exact(x.double())
    errors = [(m(x).double() - truth).square().mean().sqrt() for m in (module.for_inference(), module)]
    assert errors[0] <= 2 * errors[1]


def test_a_parametrised_weight_and_synchronised_norms() -> None:
    module = level(LEVEL, EXPERTS["batch-norm"], GATES["everything"])
    parametrizations.weight_norm(module.get_submodule("blocks.0.layers.0"))
    for name in ("blocks.0.layers.1", "gate"):
        owner = module.get_submodule(name)
        norm = owner.get_submodule("norm")
        assert isinstance(norm, StackedBatchNorm)
        owner.norm = nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    served = module.for_inference()
    assert norms(served) == []
    assert_equal_to_eval(module, served)


def test_norms_that_cannot_be_served_are_named() -> None:
    module = level(LEVEL, EXPERTS["batch-norm"])
    owner = module.get_submodule("blocks.0.layers.1")
    owner.norm = nn.BatchNorm1d(8 * 4, track_running_stats=False, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"blocks\.0\.layers\.1\.norm keeps no running statistics"):
        module.for_inference()
    owner.norm = nn.InstanceNorm1d(8 * 4)
    with pytest.raises(TypeError, match=r"blocks\.0\.layers\.1\.norm to be a batch norm .*, got InstanceNorm1d"):
        module.for_inference()


@pytest.mark.parametrize("plain", [False, True])
def test_what_an_export_for_a_gpu_holds(plain: bool) -> None:
    """With the kernels chosen, the export has one operator per level; a plain module's has PyTorch's own alone."""
    pytest.importorskip("triton")
    module = PLE(7, 2, expert_units=(6, 4), norm="batch")
    served = module.for_inference(plain=plain)
    x = torch.randn(5, 7)
    with use_backend("triton"):
        program = torch.export.export(served, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    ours = [target for target in targets if target.startswith("ple_fast")]
    assert len(ours) == (0 if plain else 2)
    assert not plain or all(target.startswith("aten.") for target in targets)
    torch.testing.assert_close(program.module()(x), module.eval()(x))

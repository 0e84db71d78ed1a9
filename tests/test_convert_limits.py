"""What the swap from libraries that are no packages refuses and why, and what each of them has besides a forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import ple_fast
from ple_fast import PLE, STEM, ExtractionNetwork, GateSpec, MLPSpec, Topology, accelerate, convert, restore
from tests.peers import adatt, fuxictr, libmtl, mtreclib, refused, torcheasyrec
from tests.swap_proof import ROWS, Case, flat, shaken

FIRST = [peer.CASES[0] for peer in (torcheasyrec, fuxictr, mtreclib, adatt, libmtl)]


def left(model: nn.Module) -> str:
    """Why the only known module of a model was left."""
    report = accelerate(model)
    assert not report.replaced
    (site,) = report.left
    return site.why


def with_values(model: Any) -> None:
    model._extraction_nets[0]._shared_layers[0].return_hidden_layer_feature = True


def with_gate_values(model: Any) -> None:
    model.mmoe.gate_mlps[0].return_hidden_layer_feature = True


def with_a_norm_in_the_gates(model: Any) -> None:
    model.mmoe = torcheasyrec.MMoE(7, {"hidden_units": [4]}, 2, 3, {"hidden_units": [4], "use_bn": True})


def weighs_in_another_way(model: Any) -> None:
    model.mmoe.__class__ = type(
        "MMoE", (torcheasyrec.MMoE,), {"forward": lambda self, x: [y * 2 for y in torcheasyrec.MMoE.forward(self, x)]}
    )


def unregistered(model: Any) -> None:
    gates = list(model.task_gates)
    del model.task_gates
    model.task_gates = gates


def reads_a_task(model: Any) -> None:
    model.__class__ = type("PLEModel", (mtreclib.PLEModel,), {"shared_input": lambda self, streams: streams[0]})


@pytest.mark.parametrize(
    ("case", "change", "why"),
    [
        (torcheasyrec.CASES[0], with_values, "return_hidden_layer_feature"),
        (torcheasyrec.MMOES[1], with_gate_values, "return_hidden_layer_feature"),
        (torcheasyrec.MMOES[1], with_a_norm_in_the_gates, "Linear: a hidden layer of a gate has a bias"),
        (torcheasyrec.MMOES[0], weighs_in_another_way, "on random input its output 0 differs"),
        (mtreclib.CASES[0], unregistered, "task_gates: expected a ModuleList, got list: before its commit 8c6529c"),
        (mtreclib.CASES[0], reads_a_task, "on random input its output 0 differs"),
    ],
    ids=["all layers", "of gates", "norm in gates", "another MMoE", "gates in a list", "an old commit"],
)
def test_other_versions_and_options_are_left(case: Case, change: Callable[[Any], None], why: str) -> None:
    model = shaken(case.make())
    change(model)
    assert why in accelerate(model).left[0].why


def test_what_a_library_cannot_run_itself_and_slopes_per_unit() -> None:
    options: dict[str, Any] = {"expert_hidden_units": [5], "gate_hidden_units": []}
    without_shared = fuxictr.CGC_Layer(1, 2, 2, 7, **options)
    without_shared.shared_experts = nn.ModuleList()
    assert "num_shared_experts=0" in left(without_shared)
    assert "num_shared_experts=0" in left(adatt.PLE(7, [[5]], 2, 2, 0))
    for with_slopes in (
        fuxictr.CGC_Layer(1, 2, 2, 7, **options, hidden_activations="prelu"),
        fuxictr.MMoE_Layer(2, 2, 7, **options, hidden_activations="prelu", net_dropout=0.0, batch_norm=False),
    ):
        assert "expected one slope, got num_parameters=5" in left(with_slopes)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (refused.PLEBlock(2), "Merlin's PLEBlock .* is no PLE from depth 2 on"),
        (refused.PLE(), "LibMTL's PLE has the convolutional stages of a ResNet as experts"),
    ],
)
def test_what_is_called_ple_and_is_none(model: nn.Module, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        accelerate(nn.Sequential(model), strict=True)


def stacked(*options: dict[str, Any]) -> PLE:
    """Levels with two tasks of two experts each, and one shared."""
    levels = []
    for i, own in enumerate(options):
        given: dict[str, Any] = {"experts": MLPSpec((4,)), "gate": GateSpec(), **own}
        topology = given.pop("topology", Topology.ple(2, 2, 1, last=i == len(options) - 1))
        levels.append(ExtractionNetwork(given.pop("width", 4), topology, **given))
    return PLE.from_levels(levels)


def mixed(**given: Any) -> PLE:
    """An MMoE of two tasks and two experts."""
    options: dict[str, Any] = {"experts": MLPSpec((4,)), "gate": GateSpec(), **given}
    return PLE.from_levels([ExtractionNetwork(4, Topology.mmoe(2, 2), **options)])


HIDDEN, LAYER = GateSpec((3,)), MLPSpec((4,), norm="layer")
NATIVE = Topology((0, 1, 1), (0, 1), ((0, 1, 2), (0, 1, 2)), mixture_offset=((True, False, False), (False, True, True)))
UNEVEN = Topology.ple(2, [1, 2], 1, last=True)


@pytest.mark.parametrize(
    ("to_theirs", "ple", "why"),
    [
        (convert.to_torcheasyrec, stacked({"gate": HIDDEN}), "its gates are one linear layer with a bias"),
        (convert.to_torcheasyrec, stacked({"topology": UNEVEN}), r"every task has as many experts, got \[1, 2\]"),
        (convert.to_torcheasyrec, stacked({"experts": MLPSpec((4,), norm="batch")}), "under a batch norm never"),
        (convert.to_torcheasyrec, stacked({"experts": MLPSpec((4, 4), ("relu", "tanh"))}), "the same activation"),
        (convert.to_torcheasyrec, mixed(gate=GateSpec(bias=False)), "end in a linear layer with a bias"),
        (convert.to_torcheasyrec, mixed(experts=[MLPSpec((4,)), MLPSpec((3, 4))]), "its MMoE are made alike"),
        (convert.to_torcheasyrec, mixed(gate=GateSpec((3,), norm="batch")), "under a batch norm never"),
        (convert.to_fuxictr, stacked({"gate": GateSpec(bias=False)}), "end in a linear layer with a bias"),
        (convert.to_fuxictr, stacked({"gate": GateSpec(temperature=2.0)}), "without norm and temperature"),
        (convert.to_fuxictr, stacked({"gate": HIDDEN}, {}), "so are all its gates, at every level"),
        (convert.to_fuxictr, stacked({"experts": LAYER}), "have a batch norm, or none has a norm"),
        (convert.to_fuxictr, stacked({"topology": UNEVEN}), "every task has as many experts, and some are shared"),
        (convert.to_fuxictr, stacked({}, {}), "level 0: its wiring is"),
        (convert.to_fuxictr, stacked({"experts": MLPSpec((4,), bias=False)}), "its layers have a bias"),
        (convert.to_fuxictr, mixed(gate=GateSpec((3,), norm="layer")), "have a batch norm, or none has a norm"),
        (convert.to_fuxictr, mixed(gate=GateSpec(temperature=2.0)), "without norm and temperature"),
        (convert.to_mtreclib, stacked({}), "is linear with a bias, a batch norm and a ReLU"),
        (convert.to_mtreclib, stacked({"experts": MLPSpec((4, 4), norm="batch")}), "experts of its PLE are one layer"),
        (convert.to_mtreclib, mixed(), "is linear with a bias, a batch norm and a ReLU"),
        (convert.to_mtreclib, mixed(experts=MLPSpec((4,), norm="batch"), gate=HIDDEN), "gates are one linear layer"),
        (convert.to_mtreclib, stacked({"experts": MLPSpec((4,), "tanh", norm="batch")}), "is relu, got tanh"),
        (convert.to_mtreclib, stacked({"experts": MLPSpec((4,), norm="batch"), "topology": UNEVEN}), "as many experts"),
        (convert.to_adatt, stacked({"experts": LAYER}), "linear and a ReLU, without norm and dropout"),
        (convert.to_adatt, stacked({}, {"topology": UNEVEN}), "all its levels have the same numbers of experts"),
        (convert.to_torcheasyrec, stacked({"gate": GateSpec(input="with_shared")}), "each slot plus the last one"),
        (convert.to_torcheasyrec, stacked({}, {"gate": GateSpec(input="raw")}), "level 1: its gates read the input of"),
        (convert.to_torcheasyrec, STEM(4, 2, expert_units=4), "its wiring is"),
        (convert.to_adatt, stacked({"topology": NATIVE}), "every task has as many experts"),
    ],
)
def test_what_a_library_cannot_represent(to_theirs: Callable[..., Any], ple: PLE, why: str) -> None:
    with pytest.raises(ValueError, match=f"cannot represent this trunk: .*{why}"):
        to_theirs(ple)


@pytest.mark.parametrize("name", ["torcheasyrec", "fuxictr", "mtreclib", "adatt", "libmtl"])
def test_wrong_arguments(name: str) -> None:
    from_theirs, to_theirs = getattr(convert, f"from_{name}"), getattr(convert, f"to_{name}")
    with pytest.raises(TypeError, match="expected a model of"):
        from_theirs(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="like: a state dict says nothing"):
        from_theirs({})
    with pytest.raises(TypeError, match="ple: expected a trunk of ple_fast"):
        to_theirs(nn.Linear(2, 2))


def test_a_target_of_another_wiring() -> None:
    trunk, stitched = convert.from_adatt(adatt.CASES[3].make()), adatt.STITCHED[0].make()
    with pytest.raises(ValueError, match="with learned scalars and no gate"):
        convert.to_adatt(trunk, stitched)


def test_a_target_of_another_class() -> None:
    ple: Any = torcheasyrec.CASES[0].make()
    mmoe: Any = torcheasyrec.MMOES[0].make()
    convert_to, convert_from = convert.to_torcheasyrec, convert.from_torcheasyrec
    with pytest.raises(TypeError, match="levels like MMoE, got PLE"):
        convert_to(convert_from(mmoe), ple)
    with pytest.raises(TypeError, match="levels like ExtractionNet, got MMoE"):
        convert_to(convert_from(ple), mmoe)
    mmoe.mmoe = None
    with pytest.raises(TypeError, match="levels like ExtractionNet or MMoE, got MMoE"):
        convert_from(mmoe)
    with pytest.raises(ValueError, match="target: is of another configuration"):
        convert_to(convert_from(torcheasyrec.MMOES[0].make()), torcheasyrec.MMOES[1].make())


def test_an_mmoe_of_ours_goes_into_a_model_of_a_library() -> None:
    ours = ple_fast.MMoE(7, 2, experts=3, expert_units=(8, 5), gate_units=(4,))
    easyrec = torcheasyrec.MMoE(7, {"hidden_units": [8, 5]}, 3, 2, {"hidden_units": [4]})
    convert.to_torcheasyrec(ours, easyrec)
    fuxi = fuxictr.MMoE_Layer(3, 2, 7, [8, 5], [4], "ReLU", 0.0, False)
    convert.to_fuxictr(ours, fuxi)
    x = torch.randn(ROWS, 7)
    for theirs in (easyrec, fuxi):
        torch.testing.assert_close(torch.stack(theirs(x), 1), ours(x))


@pytest.mark.parametrize(
    "case", [FIRST[0], FIRST[1], FIRST[3], *torcheasyrec.MMOES[1::2], fuxictr.MMOES[0], adatt.STITCHED[0]], ids=str
)
def test_fx_traces_an_accelerated_model_and_a_restored_one_as_ever(case: Case) -> None:
    model = shaken(case.make()).eval()
    x = case.arguments(torch.float32)
    expected = flat(model(*x))
    accelerate(model, strict=True)
    traced = fx.symbolic_trace(model)
    assert any(isinstance(module, ExtractionNetwork) for module in traced.modules())
    torch.testing.assert_close(flat(traced(*x)), expected)
    restore(model)
    torch.testing.assert_close(flat(fx.symbolic_trace(model)(*x)), expected, rtol=0, atol=0)


def test_fuxictrs_mean_gates_and_penalty_stay() -> None:
    model: Any = shaken(fuxictr.CASES[1].make()).double()
    fused = copy.deepcopy(model)
    accelerate(fused, strict=True)
    x = [torch.randn(ROWS, 7, dtype=torch.float64) for _ in range(4)]
    for ours, theirs in zip(fused.cgc_layers[0](x, True), model.cgc_layers[0](x, True), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(fused.regularization_loss(), model.regularization_loss())


def test_fuxictrs_last_shared_gate_has_no_state_so_a_swap_after_a_step_says_so() -> None:
    model: Any = fuxictr.CASES[0].make()
    optimizer = torch.optim.Adam(model.parameters())
    sum(flat(model(torch.randn(ROWS, 7))), torch.zeros(ROWS, 1)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="of some parameters and not of others that become one"):
        accelerate(model, optimizers=optimizer)


def test_a_list_that_adatt_shares_between_models_has_grown() -> None:
    model: Any = adatt.AdaTTWSharedExps(7, [[5]], 2, 1, num_task_expert_list=[1, 2])
    x = torch.randn(ROWS, 3, 7)
    expected = model(x)
    model.num_expert_list.append(1)
    assert accelerate(model, strict=True).replaced[0].unread == ("self_exp_weights.2",)
    torch.testing.assert_close(model(x), expected)


def test_constants_of_adatt_are_not_trained_and_need_no_entry_in_a_checkpoint() -> None:
    model: Any = next(case for case in adatt.CASES if case.name == "AdaTT, AdaTTSp, one expert per task").make()
    names = [name for name, _ in model.named_parameters()]
    report = accelerate(model)
    assert sorted(old for olds in report.parameters.values() for old in olds) == [*sorted(names[:-4])]
    (constant, *_) = [p for name, p in model.named_parameters() if name.endswith("offset")]
    assert not constant.requires_grad
    assert bool((constant == 1).all())
    state: dict[str, Tensor] = model.state_dict()
    assert list(state) == names
    model.load_state_dict(state)
    assert ple_fast.restore(model) == ("mtl_arch",)

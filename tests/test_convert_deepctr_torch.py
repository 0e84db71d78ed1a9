"""A swap in DeepCTR-Torch's own models keeps every result, penalties included, and its checkpoints load both ways."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat
from deepctr_torch.layers import DNN
from deepctr_torch.models import MMOE, PLE
from torch import nn

import ple_fast
from ple_fast import accelerate, restore
from ple_fast.convert import from_deepctr_torch, to_deepctr_torch
from tests.swap_proof import (
    ROWS,
    Case,
    accelerated,
    assert_same_state,
    prove_both_ways,
    prove_checkpoints,
    prove_results,
    prove_training,
    shaken,
)

COLUMNS = [
    SparseFeat("item", 11, embedding_dim=4),
    DenseFeat("age", 2),
    VarLenSparseFeat(SparseFeat("tags", 7, embedding_dim=3), maxlen=3, combiner="mean", length_name="count"),
]
CHILDREN = ("specific_", "shared_")


def rows(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Inputs, a column per feature as ``COLUMNS`` says."""
    ids = [torch.randint(0, 11, (count, 1)), torch.randn(count, 2), torch.randint(0, 7, (count, 3))]
    return torch.cat([*ids, torch.randint(1, 4, (count, 1))], 1).to(dtype)


def case(
    name: str,
    tasks: int = 2,
    shared: int = 1,
    specific: int = 2,
    levels: int = 2,
    stale: tuple[str, ...] = (),
    experts: int = 0,
    **options: Any,
) -> Case:
    """A PLE, or an MMOE of ``experts``."""

    def make() -> nn.Module:
        model: nn.Module = (MMOE if experts else PLE)(
            COLUMNS,
            *([experts] if experts else [shared, specific, levels]),
            **{"expert_dnn_hidden_units": (9, 6), "tower_dnn_hidden_units": (5,), "init_std": 0.3, **options},
            task_types=["binary", *["regression"] * (tasks - 1)],
            task_names=[f"task{t}" for t in range(tasks)],
        )
        return model

    return Case(name, make, lambda dtype: (rows(ROWS, dtype),), stale)


CASES = [
    case("as it comes"),
    case("plain gates, one level", 3, 2, 2, 1, gate_dnn_hidden_units=(), dnn_activation="prelu"),
    case("batch norm", shared=2, gate_dnn_hidden_units=(), dnn_use_bn=True, dnn_activation="sigmoid"),
    case("nothing shared, three levels", 2, 0, 1, 3, gate_dnn_hidden_units=(7, 5), dnn_activation="linear"),
    case("three dead experts, penalty", 2, 1, 4, 2, gate_dnn_hidden_units=(5,), l2_reg_dnn=0.01),
    case("batch norm in gates", stale=("shared_gate_dnn.1.bn",), dnn_use_bn=True, gate_dnn_hidden_units=(5,)),
    case("no tower", tower_dnn_hidden_units=(), dnn_activation="prelu", l2_reg_dnn=0.1),
]
MMOES = [
    case("MMOE as it comes", 3, experts=3),
    case("MMOE of everything", experts=2, dnn_use_bn=True, dnn_activation="prelu", l2_reg_dnn=0.1),
    case("MMOE with plain gates and no tower", experts=2, gate_dnn_hidden_units=(), tower_dnn_hidden_units=()),
]


@pytest.mark.parametrize("case", [*CASES, *MMOES], ids=str)
def test_same_results(case: Case) -> None:
    prove_results(case, torch.float64)


@pytest.mark.parametrize("case", [CASES[0], CASES[5], MMOES[1]], ids=str)
def test_same_results_in_float32(case: Case) -> None:
    prove_results(case, torch.float32)


@pytest.mark.parametrize("case", [*CASES, *MMOES], ids=str)
def test_same_checkpoints(case: Case) -> None:
    prove_checkpoints(case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*CASES, *MMOES], ids=str)
def test_same_loss_curve(case: Case, dtype: torch.dtype) -> None:
    prove_training(case, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_modules_and_checkpoints_go_both_ways_bit_for_bit(case: Case) -> None:
    model = shaken(case.make())
    tree = to_deepctr_torch(from_deepctr_torch(model)).state_dict()
    dead = {name for name, value in tree.items() if not torch.equal(model.state_dict()[name], value)}
    (replaced,) = accelerated(model)[1].replaced
    assert dead <= {*replaced.unread, *(old for olds in replaced.parameters.values() for old in olds)}
    prove_both_ways(case, from_deepctr_torch, to_deepctr_torch, CHILDREN, unread=dead)


@pytest.mark.parametrize("case", MMOES, ids=str)
def test_an_mmoe_goes_both_ways_bit_for_bit(case: Case) -> None:
    prove_both_ways(case, from_deepctr_torch, to_deepctr_torch, ("expert_dnn.", "gate_dnn"))


def test_a_trunk_goes_into_a_model_of_its_class() -> None:
    mixing, layered = MMOES[0].make(), CASES[0].make()
    with pytest.raises(TypeError, match="levels like MMOE, got PLE"):
        to_deepctr_torch(from_deepctr_torch(mixing), layered)
    with pytest.raises(TypeError, match="levels like PLE, got MMOE"):
        to_deepctr_torch(from_deepctr_torch(layered), mixing)
    with pytest.raises(ValueError, match="cannot represent this trunk: its gates end in a linear layer without bias"):
        to_deepctr_torch(ple_fast.MMoE(7, 2, experts=2))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"gate_bias": True}, "its gates end in a linear layer without bias"),
        ({"activation": "tanh"}, "the activation tanh"),
        ({"norm": "layer"}, "a batch norm before the activation or none"),
        ({"shared_experts": 3}, "every task has as many experts"),
        ({"task_experts": [2, 3]}, "every task has as many experts"),
        ({"gate_units": (4,), "dropout": 0.5}, "the same activation, norm and dropout"),
        ({"expert_units": [(5, 4), (4,)]}, "the same widths, at every level"),
        ({"last_shared": True}, "its wiring is"),
        ({"shared_gate_scope": "shared"}, "its wiring is"),
    ],
)
def test_what_deepctr_torch_cannot_represent_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=f"DeepCTR-Torch cannot represent this trunk: .*{why}"):
        to_deepctr_torch(ple_fast.PLE(7, 2, **{"gate_bias": False, "expert_units": (5, 4), **options}))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"shared": 3, "specific": 1}, "makes only specific_expert_num of them, got shared_expert_num=3"),
        ({"dnn_activation": "dice"}, "made for inputs of 3 dimensions, so that its own forward fails"),
        ({"gpus": ["cpu", "cpu"]}, "build it with gpus=None"),
        ({"dnn_activation": nn.Softplus}, "Softplus: cannot be packed"),
    ],
)
def test_what_cannot_be_replaced_is_left_with_the_reason(options: dict[str, Any], why: str) -> None:
    model = case("refused", **options).make()
    (left,) = accelerate(model).left
    assert left.library == "DeepCTR-Torch PLE" and why in left.why
    assert type(model) is PLE


@pytest.mark.parametrize("case", [*CASES, *MMOES], ids=str)
def test_every_parameter_gets_a_gradient(case: Case) -> None:
    """Otherwise DistributedDataParallel wants find_unused_parameters."""
    fused: Any = accelerated(case.make())[0]
    (fused(rows(5)).sum() + fused.get_regularization_loss()).backward()
    assert all(p.grad is not None for p in fused.parameters())


def test_batch_of_one() -> None:
    model = shaken(CASES[0].make()).eval()
    fused, _ = accelerated(model)
    x = rows(1)
    torch.testing.assert_close(fused(x), model(x))


def described(model: Any) -> list[Any]:
    """What is penalised, by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [([(label, names[id(p)]) for label, p in map(pair, w)], l1, l2) for w, l1, l2 in model.regularization_weight]


def pair(weight: Any) -> tuple[Any, Any]:
    return weight if isinstance(weight, tuple) else (None, weight)


def assert_same_penalty(a: Any, b: Any) -> None:
    """The library adds them up in float32."""
    torch.testing.assert_close(a.get_regularization_loss(), b.get_regularization_loss(), rtol=2e-6, atol=0)


def test_penalties_stay_the_same_number_and_the_list_comes_back() -> None:
    model: Any = shaken(CASES[4].make()).double()
    model.add_regularization_weight(model.tower_dnn.parameters(), l1=0.5)
    model.add_regularization_weight([p for dnn in model.specific_experts.modules() for p in dnn._parameters.values()])
    before = described(model)
    fused: Any = copy.deepcopy(model)
    report = accelerate(fused)
    assert_same_penalty(fused, model)
    assert all(name in dict(fused.named_parameters()) for weights, *_ in described(fused) for _, name in weights)
    dead = [name for name, old in report.parameters.items() if ".unread." in name and "weight" in str(old)]
    assert len(dead) == 14  # of 3 dead experts with 2 layers at 2 levels, and of a gate with 2 layers
    assert all("bias" in name for name in report.replaced[0].unread)
    fused = copy.deepcopy(fused)
    for own in (model, fused):
        own.get_regularization_loss().backward()
    restore(fused)
    assert described(fused) == before
    for (name, ours), theirs in zip(fused.named_parameters(), model.parameters(), strict=True):
        assert (ours.grad is None or not ours.grad.any()) if theirs.grad is None else True, name
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=0)


def test_penalties_that_were_changed_meanwhile_are_kept() -> None:
    model: Any = shaken(CASES[4].make()).double()
    fused: Any = copy.deepcopy(model)
    accelerate(fused)
    fused.regularization_weight = [(weights, 3 * l2, l2 / 2) for weights, _, l2 in fused.regularization_weight]
    model.regularization_weight = [(weights, 3 * l2, l2 / 2) for weights, _, l2 in model.regularization_weight]
    for _ in range(2):
        assert_same_penalty(fused, model)
        restore(fused)
    assert all(name in dict(model.named_parameters()) for weights, *_ in described(fused) for _, name in weights)


def test_different_penalties_on_what_becomes_one_are_an_error_that_changes_nothing() -> None:
    model: Any = CASES[0].make()
    model.add_regularization_weight(model.specific_experts[0][1].parameters(), l2=0.1)
    before = described(model)
    with pytest.raises(
        ValueError, match=r"specific_experts.0.0.0.linears.0.weight and specific_experts.0.1.* equal l1"
    ):
        accelerate(model)
    assert type(model) is PLE and described(model) == before


def compiled(case: Case) -> Any:
    model: Any = shaken(case.make())
    model.compile(torch.optim.Adam(model.parameters(), lr=0.01), loss=["binary_crossentropy", "mse"], metrics=["mse"])
    return model


def fit(model: Any, epochs: int = 2) -> dict[str, list[float]]:
    torch.manual_seed(3)
    x = rows(60)
    columns = {name: x[:, a:b].numpy() for name, (a, b) in model.feature_index.items()}
    y = np.stack([(x[:, 0] > 5).numpy(), x[:, 1].numpy()], 1).astype("float32")
    history: dict[str, list[float]] = model.fit(columns, y, batch_size=20, epochs=epochs, verbose=2).history
    return copy.deepcopy(history)


@pytest.mark.parametrize("case", [CASES[0], CASES[4], MMOES[2]], ids=str)
def test_fit_gives_the_same_history_before_and_after_a_swap(case: Case) -> None:
    model, fused = compiled(case), compiled(case)
    with pytest.raises(ValueError, match=r"Adam\) holds parameters .* pass it \(optimizers=\[model\.optim\]\)"):
        accelerate(fused)
    fit(model)
    fit(fused)
    accelerate(fused, optimizers=[fused.optim])  # in the middle: the optimizer's state goes along
    theirs, ours = fit(model), fit(fused)
    assert theirs.keys() == ours.keys() == {"loss", "mse"}
    for name, values in theirs.items():
        assert values[0] != values[-1]
        np.testing.assert_allclose(ours[name], values, rtol=1e-4)
    restore(fused, optimizers=[fused.optim])
    np.testing.assert_allclose(fit(fused)["loss"], fit(model)["loss"], rtol=1e-4)


@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=str)
def test_the_state_of_an_optimizer_fits_into_a_new_one_in_either_form(case: Case) -> None:
    model = compiled(case)
    first = [tuple(p.shape) for p in model.optim.param_groups[0]["params"]]
    fit(model, 1)
    accelerate(model, optimizers=[model.optim])
    assert_fits(model)
    fit(model, 1)
    restore(model, optimizers=[model.optim])
    assert [tuple(p.shape) for p in model.optim.param_groups[0]["params"]] == first
    assert_fits(model)


def assert_fits(model: Any) -> None:
    """A new optimizer takes the state of the old one, for the same parameters."""
    assert [id(p) for p in model.optim.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    new = torch.optim.Adam(model.parameters(), lr=0.01)
    new.load_state_dict(model.optim.state_dict())
    assert new.state
    for parameter, state in new.state.items():
        assert torch.equal(state["exp_avg"], model.optim.state[parameter]["exp_avg"])


def test_models_are_saved_and_loaded_as_the_library_does() -> None:
    fused = compiled(CASES[4])
    accelerate(fused, optimizers=[fused.optim])
    fit(fused, 1)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    x = {name: rows(9)[:, a:b].numpy() for name, (a, b) in fused.feature_index.items()}
    np.testing.assert_array_equal(loaded.predict(copy.copy(x)), fused.predict(copy.copy(x)))
    assert_same_state(loaded, fused)
    assert described(loaded) == described(fused)
    fit(loaded, 1)
    buffer = io.BytesIO()
    torch.save(fused.state_dict(), buffer)
    original: Any = CASES[4].make()
    original.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    np.testing.assert_allclose(original.predict(copy.copy(x)), fused.predict(x), rtol=1e-4)


@pytest.mark.parametrize("case", [CASES[0], *MMOES], ids=str)
def test_the_trial_run_notices_another_version_under_the_initial_weights(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With them, all outputs are nearly 1/2."""
    forward = DNN.forward
    monkeypatch.setattr(DNN, "forward", lambda self, inputs: forward(self, inputs) * 1.001)
    (left,) = accelerate(case.make()).left
    assert "on random input its output 0 differs" in left.why

"""PEPNet's gates against the paper's formulas, forward and every gradient, and their place in a model."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ple_fast import EPNet, GateNU, PPNet, use_backend
from ple_fast.losses import TaskLoss
from ple_fast.model import Encoded, MultiTaskModel, tower_stack
from ple_fast.model.trunks import TRUNKS
from tests.helpers import assert_close
from tests.model_helpers import TASKS, model, table

PRIORS: dict[str, Any] = {"domain_columns": ["country"], "personal_columns": ["hour", "age"]}
CHAIN = (TaskLoss("view"), TaskLoss("click"), TaskLoss("buy"))


def unit(gate: GateNU, number: int, x: Tensor) -> Tensor:
    """``sigmoid(relu(x W + b) W' + b')``, eq. 2-3 without gamma, of one unit."""
    (block,) = gate.level.blocks
    first, second = block.layers  # type: ignore[misc]
    hidden = torch.relu(x @ first.weight[number].T + first.bias[number])
    return torch.sigmoid(hidden @ second.weight[number].T + second.bias[number])


def hold(found: list[Tensor], expected: list[Tensor], leaves: list[Tensor], tolerance: float = 1e-10) -> None:
    given = [torch.randn(y.shape, generator=torch.Generator().manual_seed(k)).to(y) for k, y in enumerate(expected)]
    ours, theirs = (torch.autograd.grad(y, leaves, given) for y in (found, expected))
    for k, (own, other) in enumerate(zip((*found, *ours), (*expected, *theirs), strict=True)):
        assert_close(f"result {k}", own, other, tolerance)


@pytest.mark.parametrize("rows", [1, 9])
def test_embeddings_are_scaled_by_equations_5_and_6(rows: int, backend: str, device: torch.device) -> None:
    net = EPNet(5, 3, hidden_units=4, device=device, dtype=torch.float64)
    x = torch.randn(rows, 5, dtype=torch.float64, device=device, requires_grad=True)
    domain = torch.randn(rows, 3, dtype=torch.float64, device=device, requires_grad=True)
    expected = 2 * unit(net.gate, 0, torch.cat([domain, x.detach()], 1)) * x
    hold([net(x, domain)], [expected], [x, domain, *net.parameters()])


def test_gates_of_towers_are_equation_7(backend: str, device: torch.device) -> None:
    net = PPNet(5, 3, 2, (6, 4), device=device, dtype=torch.float64)
    x = torch.randn(9, 5, dtype=torch.float64, device=device, requires_grad=True)
    personal = torch.randn(9, 3, dtype=torch.float64, device=device, requires_grad=True)
    found = net(x, personal)
    prior = torch.cat([personal, x.detach()], 1)
    expected = [torch.stack([unit(gate, k, prior) for k in range(2)], 1) for gate in net.gates]  # type: ignore[arg-type]
    assert [tuple(y.shape) for y in found] == [(9, 2, 6), (9, 2, 4)]
    hold(found, expected, [personal, *net.parameters()])
    assert torch.autograd.grad(found[0].sum(), x, allow_unused=True)[0] is None


def test_units_begin_as_linear_layers_do_and_what_does_not_fit_is_named() -> None:
    gate = GateNU(400, 300, count=3)
    weights = [parameter for name, parameter in gate.named_parameters() if name.endswith("weight")]
    assert [tuple(weight.shape) for weight in weights] == [(3, 300, 400), (3, 300, 300)]
    for weight in weights:
        bound = weight.shape[2] ** -0.5
        assert 0.95 * bound < weight.abs().max() <= bound
    y = gate.scale(torch.ones(2, 3, 300), torch.zeros(2, 400))
    assert tuple(y.shape) == (2, 3, 300) and bool((y > 0).all()) and bool((y < 2).all())
    with pytest.raises(ValueError, match="count: "):
        GateNU(4, 3, count=0)
    with pytest.raises(TypeError, match="tower_features: expected the widths"):
        PPNet(4, 3, 2, 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected last size 7"):
        EPNet(4, 3)(torch.ones(2, 4), torch.ones(2, 2))


def by_formula(net: MultiTaskModel, rows: Encoded) -> list[Tensor]:
    """A model with both priors, equation by equation."""
    assert net.priors is not None and net.priors.domain is not None and net.priors.personal is not None
    features = net.embedding(rows)
    names = net.embedding.feature_columns
    domain = features[:, [name == "country" for name in names]]
    personal = features[:, [name in ("hour", "age") for name in names]]
    e = 2 * unit(net.priors.domain.gate, 0, torch.cat([domain, features.detach()], 1)) * features
    prior = torch.cat([personal, e.detach()], 1)
    outputs = []
    for k, (tower, h) in enumerate(zip(net.towers, net.trunk(e).unbind(1), strict=True)):
        gates: Any = iter(net.priors.personal.gates)
        for layer in tower:  # type: ignore[attr-defined]
            h = layer(2 * unit(next(gates), k, prior) * h if isinstance(layer, nn.Linear) else h)
        outputs.append(h)
    return outputs


def randomise(net: nn.Module) -> None:
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)


@pytest.mark.parametrize("stacks", [True, False])
@pytest.mark.parametrize("tasks", [CHAIN, TASKS], ids=["alike", "mixed"])
def test_a_model_is_the_paper(tasks: Any, stacks: bool, backend: str) -> None:
    net = model(tasks=tasks, tower_units=(6, 5), tower_activation="tanh", **PRIORS).double()
    randomise(net)
    rows = net.encode(table(20)[0])
    with mock.patch.multiple(tower_stack, STACKED_PRODUCTS=0 if stacks else 1 << 60, _in_kernels=lambda device: stacks):
        outputs = list(net(rows).values())
    expected = [y.squeeze(1) if y.shape[1] == 1 else y for y in by_formula(net, rows)]
    parameters = list(net.parameters())
    given = [torch.randn(y.shape, generator=torch.Generator().manual_seed(k)).to(y) for k, y in enumerate(expected)]
    ours, theirs = (torch.autograd.grad(y, parameters, given) for y in (outputs, expected))
    for k, (own, other) in enumerate(zip((*outputs, *ours), (*expected, *theirs), strict=True)):
        assert_close(f"result {k}", own, other, 1e-9)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_every_trunk_learns_saves_and_serves_with_them(trunk: str, tmp_path: Path) -> None:
    data, labels = table(128)
    net = model(trunk, **PRIORS)
    results = net.fit(data, labels, epochs=12, batch_size=32, lr=1e-2, progress=False)
    assert results[-1].loss < 0.8 * results[0].loss
    net.save(tmp_path)
    loaded, served, rows = MultiTaskModel.load(tmp_path), net.for_inference(), net.encode(data)
    predictions = net.predict(data)
    for name, own in loaded.predict(data).items():
        assert np.array_equal(own, predictions[name])
    for name, found in served(rows.codes, rows.numbers).items():
        assert np.allclose(found, predictions[name], atol=1e-6)


@pytest.mark.parametrize("option", ["domain_columns", "personal_columns"])
def test_one_of_the_two_alone(option: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {option: ["country", "amount"], "prior_gate_units": 7}
    net = model(**options)
    assert net.priors is not None and (net.priors.domain is None) == (option == "personal_columns")
    (first, *_) = [parameter for parameter in net.priors.parameters() if parameter.dim() == 3]
    assert first.shape[1] == 7
    data, _ = table(30)
    net.save(tmp_path)
    assert np.array_equal(MultiTaskModel.load(tmp_path).predict(data)["click"], net.predict(data)["click"])


def test_without_them_a_model_is_what_it_was(tmp_path: Path) -> None:
    net = model()
    assert net.priors is None and not any("prior" in name for name in net.state_dict())
    net.save(tmp_path)
    text = (tmp_path / "model.safetensors").read_bytes()
    assert b"domain_columns" not in text and b"prior" not in text
    theirs = model(**PRIORS)  # drawn after all that there was before
    for name, value in net.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


def test_a_pickle_from_before_has_none() -> None:
    net = model()
    state = net.__getstate__()
    del state["priors"]
    old = MultiTaskModel.__new__(MultiTaskModel)
    old.__setstate__(state)
    data, _ = table(10)
    assert np.array_equal(old.predict(data)["click"], net.predict(data)["click"])
    assert np.array_equal(pickle.loads(pickle.dumps(old)).predict(data)["click"], net.predict(data)["click"])


def test_copies_states_gates_and_modes(backend: str) -> None:
    data, labels = table(40)
    net = model(tower_dropout=0.3, **PRIORS)
    other = model(seed=1, tower_dropout=0.3, **PRIORS)
    other.load_state_dict(net.state_dict())
    with use_backend("torch"):
        assert np.array_equal(other.predict(data)["click"], net.predict(data)["click"])
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
        assert np.array_equal(again.predict(data)["watch"], net.predict(data)["watch"])
        levels = net.gate_weights(data)
        assert len(levels) == 2
        with torch.autocast("cpu", torch.bfloat16):
            total = net.joint_loss(net(data), {name: torch.as_tensor(label) for name, label in labels.items()}).total
        total.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("tasks", [CHAIN, TASKS], ids=["alike", "mixed"])
def test_it_is_exported_and_traced(tasks: Any) -> None:
    net = model(tasks=tasks, tower_units=(6, 5), **PRIORS)
    served, rows = net.for_inference(), net.encode(table(40)[0])
    size = torch.export.Dim("rows", min=2)
    program = torch.export.export(served, (rows.codes, rows.numbers), dynamic_shapes=({0: size}, {0: size}))
    few = rows.rows(slice(0, 3))
    for name, own in program.module()(few.codes, few.numbers).items():
        torch.testing.assert_close(own, served(few.codes, few.numbers)[name])
    assert all("ple_fast" not in str(node.target) for node in program.graph.nodes)
    compiled: Any = torch.compile(served, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(rows.codes, rows.numbers), served(rows.codes, rows.numbers))


def test_a_tower_that_has_other_layers_is_named() -> None:
    data, _ = table(8)
    for change in (nn.Linear(6, 1), nn.Sequential(nn.Linear(6, 1))):
        net = model(**PRIORS)
        net.towers[1] = change
        with pytest.raises(ValueError, match=r"nn.Sequential of 2 nn.Linear with personal_columns"):
            net(data)
    net = model(**PRIORS)
    net.towers[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="no hook of its own"):
        net(data)
    net = model(**PRIORS)
    layers: Any = net.towers[0]
    before = net(data)["click"]
    layers[-1].register_forward_hook(lambda module, inputs, output: 2 * output)
    torch.testing.assert_close(net(data)["click"], 2 * before)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"domain_columns": "country"}, TypeError, "domain_columns: expected a list of names"),
        ({"domain_columns": ["city"]}, ValueError, r"domain_columns: expected some of the columns \['country'"),
        ({"personal_columns": ["age", "age"]}, ValueError, "personal_columns: expected at least one column, each once"),
        ({"personal_columns": []}, ValueError, "personal_columns: expected at least one column"),
        ({"prior_gate_units": 4}, ValueError, "prior_gate_units: expected domain_columns or personal_columns"),
        ({"domain_columns": ["age"], "prior_gate_units": 0}, ValueError, "prior_gate_units: "),
        (
            {"domain_columns": ["age"], "task_columns": {"click": ["age"]}, "trunk": "cgc"},
            ValueError,
            "expected no task_columns with them",
        ),
        ({"domain_columns": ["age"], "task_embeddings": True}, ValueError, "expected no task_embeddings with them"),
    ],
)
def test_what_does_not_fit_is_named(options: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        model(**options)


def test_launches_do_not_grow_with_the_number_of_tasks() -> None:
    pytest.importorskip("triton")
    from ple_fast_kernels import launches

    data, _ = table(20)
    counts = []
    for tasks in (CHAIN[:2], CHAIN):
        net = model("mmoe", tasks=tasks, **PRIORS)
        with use_backend("triton"):
            before = launches()
            outputs = torch.cat(list(net(data).values()))
            middle = launches()
            outputs.sum().backward()
            counts.append((middle - before, launches() - middle))
    assert counts[0] == counts[1]

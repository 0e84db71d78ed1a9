"""HoME: against its reference and its formula written out, in every mode of use, and what it refuses."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ple_fast import HoME, Topology, explain, use_backend
from ple_fast.losses import TaskLoss
from ple_fast.model import MultiTaskModel
from tests.helpers import assert_derivatives_agree, by_route, compare, compare_low_precision, draw, randomise
from tests.model_helpers import COLUMNS

GROUPS = ((0, 2), (1,))
INF = float("inf")


def home(dtype: torch.dtype = torch.float64, **options: Any) -> HoME:
    """Small, with randomised weights."""
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "task_experts": [1, 2, 1],
        "group_experts": [2, 1],
        "expert_units": (6, 4),
        "feature_gate_rank": 3,
    }
    module = HoME(7, 3, groups=GROUPS, dtype=dtype, **{**given, **options})
    randomise(module)
    return module


VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "one projection": {"feature_gate_experts": 1},
    "a feature gate per expert": {"feature_gate_scope": "expert"},
    "no feature gates": {"feature_gate_experts": 0},
    "no self gates": {"self_gates": False},
    "neither": {"feature_gate_experts": 0, "self_gates": False, "norm": None},
    "one expert each": {"task_experts": 1, "group_experts": 1, "shared_experts": 1},
    "widths per level": {"expert_units": ((6, 5), (4,))},
    "hidden gates": {"gate_units": (5,), "norm": "layer", "activation": "gelu"},
    "gates that choose": {"gate_top_k": 2, "gate_bias": False},
    "recomputed": {"recompute": True},
    "one group": {"groups": ((0, 1, 2),), "group_experts": 2},
    "a group for each": {"groups": ((2,), (0,), (1,)), "group_experts": [1, 2, 1]},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_make_up_agrees_with_the_reference(name: str, backend: str, device: torch.device) -> None:
    if backend == "triton" and name not in ("as published", "one projection", "hidden gates", "gates that choose"):
        return  # which launch nothing else
    options = dict(VARIANTS[name])
    module = home(**options) if "groups" not in options else _of_groups(**options)
    for rows in (9, 130) if backend == "torch" else (9,):
        compare(module.to(device), [leaf.to(device) for leaf in draw("one", rows, 1, 7)])


def _of_groups(groups: Any, **options: Any) -> HoME:
    torch.manual_seed(0)
    module = HoME(7, 3, groups=groups, expert_units=(6, 4), task_experts=1, dtype=torch.float64, **options)
    randomise(module)
    return module


def _mlp(state: dict[str, Tensor], prefix: str, e: int, x: Tensor) -> Tensor:
    """Expert ``e`` of one block: linear, batch norm over the batch, Swish, per layer."""
    i = 0
    while f"{prefix}.layers.{i}.weight" in state:
        at = f"{prefix}.layers.{i}"
        z = x @ state[f"{at}.weight"][e].t() + state[f"{at}.bias"][e]
        units = z.shape[1]
        own = slice(e * units, (e + 1) * units)
        z = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()
        z = z * state[f"{at}.norm.weight"][own] + state[f"{at}.norm.bias"][own]
        x = z * torch.sigmoid(z)
        i += 1
    return x


def _feature_gate(state: dict[str, Tensor], level: int, reader: int, v: Tensor) -> Tensor:
    at = f"feature_gates.{level}.network"
    rows = slice(2 * reader, 2 * reader + 2)
    g = (v @ state[f"{at}.gate.weight"][rows].t() + state[f"{at}.gate.bias"][rows]).softmax(1)
    total = torch.zeros_like(v)
    for i in range(2):
        a, b = (state[f"{at}.blocks.0.layers.{n}.weight"][2 * reader + i] for n in range(2))
        total = total + g[:, i : i + 1] * 2 * torch.sigmoid(v @ a.t() @ b.t())
    return v * total


def test_the_formula_written_out(backend: str, device: torch.device) -> None:
    """Two groups of one task each, one expert everywhere: nothing of topologies and tables."""
    torch.manual_seed(1)
    module = HoME(
        5, 2, groups=[[1], [0]], task_experts=1, group_experts=1, shared_experts=1, expert_units=(6, 4),
        feature_gate_rank=2, dtype=torch.float64, device=device,
    )  # fmt: skip
    randomise(module)
    state: dict[str, Tensor] = dict(module.state_dict(keep_vars=True))
    x = torch.randn(11, 5, dtype=torch.float64, device=device)

    def logits(level: int, rows: slice, v: Tensor) -> Any:
        return v @ state[f"levels.{level}.gate.weight"][rows].t() + state[f"levels.{level}.gate.bias"][rows]

    # The meta level: experts of group 0, of group 1, shared. Logits: 2 and 1 of group 0, as many of group 1, 3 and 1.
    h = [_mlp(state, "levels.0.blocks.0", e, _feature_gate(state, 0, e, x)) for e in range(3)]
    z, first = [], 0
    for own, weighed in ((0, (0, 2)), (1, (1, 2)), (2, (0, 1, 2))):
        weights = logits(0, slice(first, first + len(weighed)), x).softmax(1)
        first += len(weighed)
        mixed = sum((weights[:, i : i + 1] * h[e] for i, e in enumerate(weighed)), torch.zeros_like(h[0]))
        z.append(mixed + torch.sigmoid(logits(0, slice(first, first + 1), x)) * h[own])
        first += 1
    # The task level: experts of task 1, group 0, task 0, group 1, shared.
    reads = [z[0], z[0], z[1], z[1], z[2]]
    h = [_mlp(state, "levels.1.blocks.0", e, _feature_gate(state, 1, e, reads[e])) for e in range(5)]
    expected, first = [], 0
    for group, weighed in ((1, (2, 3, 4)), (0, (0, 1, 4))):
        read = torch.cat((z[group], z[2]), 1)
        weights = logits(1, slice(first, first + 3), read).softmax(1)
        mixed = sum((weights[:, i : i + 1] * h[e] for i, e in enumerate(weighed)), torch.zeros_like(h[0]))
        expected.append(mixed + torch.sigmoid(logits(1, slice(first + 3, first + 4), read)) * h[weighed[0]])
        first += 4
    torch.testing.assert_close(module(x), torch.stack(expected, 1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one(rows: int, backend: str, device: torch.device) -> None:
    module = home().to(device).eval()
    y = module(torch.randn(rows, 7, dtype=torch.float64, device=device))
    assert y.shape == (rows, 3, 4)
    if rows:
        compare(module, [leaf.to(device) for leaf in draw("one", 1, 1, 7)], train=False)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(dtype: torch.dtype, autocast: bool, backend: str, device: torch.device) -> None:
    if (autocast and dtype == torch.float32) or (backend == "triton" and (autocast or dtype != torch.bfloat16)):
        return
    module = home(norm=None, activation="tanh").to(device)
    x = draw("one", 64, 1, 7)[0].to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compare_low_precision(module, [x[:20] if backend == "triton" else x], dtype=dtype, autocast=autocast)


def test_what_overflows_in_a_tasks_expert_stays_there(backend: str, device: torch.device) -> None:
    module = home(torch.float32, norm=None).to(device)
    task: Any = module.levels[1]
    with torch.no_grad():
        task.blocks[0].layers[-1].bias[0] = INF  # task 0's own expert
    y = module(torch.randn(6, 7, device=device))
    assert not y[:, 0].isfinite().any()
    assert y[:, 1:].isfinite().all()


@pytest.mark.parametrize("name", ["as published", "no feature gates"])
def test_derivatives_of_derivatives(name: str, device: torch.device) -> None:
    module = home(**{"norm": None, "activation": "tanh", **VARIANTS[name]}).to(device)
    assert_derivatives_agree(module, draw("one", 5, 1, 7)[0].to(device), 1e-10)


@pytest.mark.parametrize("route", ["by hand", "operator", "differentiable"])
def test_every_route(route: str, device: torch.device) -> None:
    with by_route(route), use_backend("torch"):
        compare(home().to(device), [leaf.to(device) for leaf in draw("one", 9, 1, 7)])


@pytest.mark.parametrize("name", ["as published", "no feature gates", "a feature gate per expert"])
def test_compiled_exported_traced_and_served(name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    module = home(torch.float32, **VARIANTS[name]).eval()
    x = torch.randn(6, 7)
    expected = module(x)
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
    served = module.for_inference()
    torch.testing.assert_close(served(x), expected, **close)
    assert not any(p.requires_grad for p in served.parameters())
    assert not any("norm" in key and key.startswith("levels.0") for key in served.state_dict()), "folded away"
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, **close)
    exported = torch.export.export(served, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
    torch.testing.assert_close(exported(torch.cat((x, x))), torch.cat((expected, expected)), **close)
    file: Any = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module.for_inference(plain=True), (x,))
        torch.onnx.export(
            module.for_inference(plain=True), (x,), file, input_names=["x"], dynamic_axes={"x": {0: "batch"}},
            dynamo=False,
        )  # fmt: skip
    torch.testing.assert_close(traced(torch.cat((x, x))), torch.cat((expected, expected)), **close)
    (found,) = onnxruntime.InferenceSession(file.getvalue()).run(None, {"x": torch.cat((x, x)).numpy()})
    torch.testing.assert_close(torch.from_numpy(found), torch.cat((expected, expected)), **close)


def test_it_is_traced_symbolically_within_a_model() -> None:
    module = home(torch.float32).eval()
    graph = torch.fx.symbolic_trace(nn.Sequential(module))
    x = torch.randn(6, 7)
    torch.testing.assert_close(graph(x), module(x))


def test_plain_serving_takes_no_kernel() -> None:
    kernels = pytest.importorskip("ple_fast_kernels")
    module, x = home(torch.float32).eval(), torch.randn(6, 7)
    with use_backend("triton"), torch.no_grad():
        before = kernels.launches()
        plain = module.for_inference(plain=True)
        torch.testing.assert_close(plain(x), module.for_inference()(x))
        started = kernels.launches()
        plain(x)
        assert kernels.launches() == started > before


def test_launches_are_counted() -> None:
    """Feature gates cost a level and a scale step per level; self gates nothing."""
    kernels = pytest.importorskip("ple_fast_kernels")

    def launched(**options: Any) -> int:
        module, x = home(torch.float32, **options).train(), torch.randn(2, 7, requires_grad=True)
        with use_backend("triton"):
            before: int = kernels.launches()
            module(x).sum().backward()
            after: int = kernels.launches()
            return after - before

    assert launched(feature_gate_experts=0) == launched(feature_gate_experts=0, self_gates=False)
    assert launched() == launched(self_gates=False) > launched(feature_gate_experts=0)


def test_weights_of_gates_and_self_gates(device: torch.device) -> None:
    module = home().to(device)
    _, gates = module(torch.randn(9, 7, dtype=torch.float64, device=device), return_gates=True)
    meta, task = gates
    assert [w.shape[1] for w in meta] == [4, 2, 3, 1, 5, 2]
    assert [w.shape[1] for w in task] == [1 + 2 + 2, 1, 2 + 1 + 2, 2, 1 + 2 + 2, 1]
    for weights in (*meta, *task):
        is_sigmoid = weights.shape[1] == 1
        assert bool(((weights > 0) & (weights < 1)).all()) or not is_sigmoid
        if not is_sigmoid:
            torch.testing.assert_close(weights.sum(1), torch.ones(9, dtype=weights.dtype, device=device))


def test_state_is_saved_loaded_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    module, other = home(torch.float32), home(torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_state_dict(module.state_dict())
    x = torch.randn(6, 7)
    assert torch.equal(other.eval()(x), module.eval()(x))
    names = [report.name for report in explain(module, x)]
    assert names == ["feature_gates.0.network", "levels.0", "feature_gates.1.network", "levels.1"]
    capsys.readouterr()
    before = copy.deepcopy(module.state_dict())
    module.reset_parameters()
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.rpartition(".")[0] for name in changed} >= {
        "levels.0.gate", "levels.1.gate", "feature_gates.0.network.gate", "feature_gates.1.network.gate"
    }  # fmt: skip


def test_experts_end_in_batch_norm_and_swish() -> None:
    task: Any = HoME(4, 2, groups=[[0], [1]]).levels[1]
    specs = task.expert_specs
    assert {layer.activation.name for spec in specs for layer in spec.layers} == {"silu"}
    assert {layer.norm for spec in specs for layer in spec.layers} == {"batch"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"groups": [[0, 1]]}, ValueError, "groups: expected each of the 3 tasks in one group, got 2 tasks"),
        ({"groups": [[0, 1], [1]]}, ValueError, "groups: expected the tasks 0 to 2"),
        ({"groups": 3}, TypeError, "groups: expected a sequence of groups"),
        ({"task_experts": [1, 1]}, ValueError, r"task_experts: expected one count per task \(3\)"),
        ({"feature_gate_experts": -1}, ValueError, "feature_gate_experts: expected 0 or more"),
        ({"feature_gate_scope": "level"}, ValueError, "feature_gate_scope: expected .owner. or .expert., got 'level'"),
        ({"feature_gate_rank": 0}, ValueError, "feature_gate_rank: expected 1 or more"),
        ({"self_gates": "no"}, TypeError, "self_gates"),
        ({"gate_top_k": 2, "gate_joint_k": 1}, ValueError, "gate_joint_k: expected 0 with self gates"),
        ({"expert_units": ((4,),)}, ValueError, r"expert_units: expected one per level \(2\), got 1"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HoME(7, 3, **{"groups": GROUPS, **options})


@pytest.mark.parametrize("x", [torch.zeros(3, 2, 7), torch.zeros(7), [torch.zeros(3, 7)] * 2])
def test_an_input_of_another_form_is_refused(x: Any) -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 7\)"):
        HoME(7, 3, groups=GROUPS)(x)


def test_one_slot_is_read_in_every_form() -> None:
    module, x = home().eval(), torch.randn(5, 7, dtype=torch.float64)
    for form in (x.unsqueeze(1), [x], (x,)):
        assert torch.equal(module(form), module(x))


def test_a_model_takes_names_of_tasks_and_keeps_numbers(tmp_path: Path) -> None:
    tasks = [TaskLoss("click"), TaskLoss("like"), TaskLoss("watch")]
    how: dict[str, Any] = {"expert_units": (6, 4)}
    named = MultiTaskModel(COLUMNS, tasks, trunk="home", trunk_options={**how, "groups": [["click", "watch"], [1]]})
    assert named.trunk.groups == ((0, 2), (1,))
    named.save(tmp_path)
    loaded = MultiTaskModel.load(tmp_path)
    assert loaded.trunk.groups == ((0, 2), (1,))
    sources = [["click"], ["click", "like"], [2]]
    other = MultiTaskModel(COLUMNS, tasks, trunk="asymmetric_sharing", trunk_options={**how, "sources": sources})
    level: Any = other.trunk.get_submodule("levels.0")
    assert level.topology.mixture_experts == ((0,), (0, 1), (2,))
    with pytest.raises(
        ValueError, match=r"trunk_options\['groups'\]\[0\]\[1\]: expected one of the tasks \['click', 'like'"
    ):
        MultiTaskModel(COLUMNS, tasks, trunk="home", trunk_options={**how, "groups": [["click", "buy"], ["like"]]})
    with pytest.raises(TypeError, match="groups: expected a sequence of groups"):
        MultiTaskModel(COLUMNS, tasks, trunk="home", trunk_options={**how, "groups": ["click", "like", "watch"]})


def test_the_wiring_of_levels() -> None:
    def wirings(**options: Any) -> list[Topology]:
        levels: Any = home(**options).levels
        return [level.topology for level in levels]

    meta, task = Topology.home(GROUPS, [2, 1], 2), Topology.home(GROUPS, [2, 1], 2, task_experts=[1, 2, 1])
    assert wirings(feature_gate_experts=0) == [meta, task]
    scaled = wirings()
    assert [t.num_slots for t in scaled] == [3, 3 + 2 + 1]
    assert [t.mixture_experts for t in scaled] == [meta.mixture_experts, task.mixture_experts]
    assert [t.num_slots for t in wirings(feature_gate_scope="expert")] == [5, 4 + 3 + 2]
    assert "groups=((0, 2), (1,))" in repr(home())

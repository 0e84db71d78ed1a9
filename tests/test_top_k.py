"""Gates that choose: ties, NaN, all experts, gradients, counts, what is exported, and kernels beside PyTorch."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from ple_fast import PLE, GateSpec, MLPSpec, MMoE, Topology, use_backend
from ple_fast.convert import TopK, pack
from ple_fast.losses import TaskLoss
from ple_fast.model import Categorical, MultiTaskModel
from ple_fast.torch_backend.top_k import keep_top_k
from tests.helpers import TOPOLOGIES, level

BACKENDS = ["torch", "triton"]
INF, NAN = float("inf"), float("nan")


def kept(values: list[float], k: int) -> list[int]:
    logits = torch.tensor(values, dtype=torch.float64).view(1, 1, -1)
    found = keep_top_k(logits, k).flatten().tolist()
    traced = keep_top_k(logits, k, is_traced=True).flatten()
    assert torch.equal(traced.nan_to_num(7.0), torch.tensor(found, dtype=torch.float64).nan_to_num(7.0))
    return [place for place, value in enumerate(found) if value != -INF]


@pytest.mark.parametrize(
    ("values", "k", "expected"),
    [
        ([3.0, 1.0, 2.0], 1, [0]),
        ([3.0, 1.0, 2.0], 2, [0, 2]),
        ([1.0, 1.0, 1.0], 2, [0, 1]),
        ([0.0, -0.0, 0.0], 1, [0]),
        ([1.0, 2.0, 2.0, 2.0], 2, [1, 2]),
        ([NAN, 1.0, 2.0], 1, [0]),
        ([1.0, NAN, INF], 2, [1, 2]),
        ([1.0, NAN, NAN, NAN], 2, [1, 2]),
        ([-INF, 5.0, -INF], 2, [1]),
    ],
)
def test_the_largest_stay_and_of_equal_ones_the_first(values: list[float], k: int, expected: list[int]) -> None:
    assert kept(values, k) == expected


@pytest.mark.parametrize("k", [4, 5, 100])
def test_all_experts_are_the_plain_gate_to_the_bit(k: int, backend: str, device: torch.device) -> None:
    spec, wide = MLPSpec((6, 4)), TOPOLOGIES["ple-even"]
    most = max(map(len, wide.mixture_experts))
    plain, chosen = (level(wide, spec, GateSpec(top_k=top)).to(device) for top in (None, most + k - 4))
    x = torch.randn(5, wide.num_slots or 1, 7, device=device, dtype=next(plain.parameters()).dtype)
    results = []
    for module in (plain, chosen):
        own = x.clone().requires_grad_()
        y = module(own)
        y.square().sum().backward()
        results.append([y, own.grad, *(p.grad for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_reach_the_chosen_ones_alone(backend: str, device: torch.device) -> None:
    torch.manual_seed(0)
    module = MMoE(8, 2, experts=4, expert_units=(6,), gate_top_k=1, device=device)
    x = torch.randn(1, 8, device=device)
    y, gates = module(x, return_gates=True)
    y.sum().backward()
    weights = torch.cat([own for per_level in gates for own in per_level])
    assert weights.count_nonzero(1).tolist() == [1, 1] and weights.sum(1).tolist() == [1.0, 1.0]
    chosen = set(weights.argmax(1).tolist())
    bias = next(p.grad for name, p in module.named_parameters() if name.endswith("blocks.0.layers.0.bias"))
    assert bias is not None
    assert {e for e in range(4) if bias[e].abs().sum() > 0} <= chosen


def test_counts_and_sums_of_a_whole_trunk(backend: str, device: torch.device) -> None:
    torch.manual_seed(0)
    module = PLE(8, 3, num_levels=2, task_experts=2, shared_experts=2, expert_units=(6, 4), gate_top_k=2, device=device)
    y, gates = module(torch.randn(9, 8, device=device), return_gates=True)
    assert y.shape == (9, 3, 4)
    for weights in (one for per_level in gates for one in per_level):
        assert (weights.count_nonzero(1) == 2).all()
        torch.testing.assert_close(weights.sum(1), torch.ones(9, device=device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_backends_agree(dtype: torch.dtype, rows: int, device: torch.device) -> None:
    pytest.importorskip("triton")
    torch.manual_seed(0)
    module = PLE(8, 2, task_experts=2, shared_experts=1, expert_units=(6, 4), gate_top_k=1, device=device, dtype=dtype)
    x = torch.randn(rows, 8, device=device).to(dtype)
    found = []
    for name in BACKENDS:
        with use_backend(name):  # type: ignore[arg-type]  # one of them
            module.zero_grad()
            own = x.clone().requires_grad_()
            y = module(own)
            y.float().square().sum().backward()
            found.append([y, own.grad])
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 2e-2
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_a_level_that_chooses_is_exported_compiled_packed_and_saved(tmp_path: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    module = PLE(8, 2, expert_units=(6, 4), gate_top_k=2).eval()
    x = torch.randn(6, 8)
    expected = module(x)
    rows = ({0: torch.export.Dim("rows", min=1)},)
    exported = torch.export.export(module, (x,), dynamic_shapes=rows).module()
    torch.testing.assert_close(exported(x[:3]), expected[:3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about checks of sizes
        torch.testing.assert_close(torch.jit.trace(module, (x,))(x[:1]), expected[:1])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    file = tmp_path / "model.onnx"
    torch.onnx.export(module, (x,), file, dynamo=True, dynamic_shapes=({0: "rows"},), verbose=False)
    session = onnxruntime.InferenceSession(file)
    (found,) = session.run(None, {session.get_inputs()[0].name: x[:4].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected[:4].detach(), rtol=1e-4, atol=1e-5)
    _, gates = module.levels[0].unpack()  # type: ignore[operator]  # a module's method
    assert any(isinstance(part, TopK) for part in gates[0].modules())
    net = MultiTaskModel(
        [Categorical("c", size=5)],
        [TaskLoss("a"), TaskLoss("b")],
        trunk_options={"expert_units": (4,), "gate_top_k": 1},
    )
    net.save(tmp_path)
    table = {"c": list(range(5))}
    again = MultiTaskModel.load(tmp_path)
    assert (again.predict(table)["a"] == net.predict(table)["a"]).all()
    assert again.topologies and again.trunk.levels[0].gate_spec.top_k == 1  # type: ignore[union-attr, index]


def test_derivatives_of_second_order_are_those_of_the_chosen_softmax() -> None:
    torch.manual_seed(0)
    module = level(TOPOLOGIES["ple-even"], MLPSpec((3,), "tanh"), GateSpec(top_k=1), in_features=4)
    slots = module.topology.num_slots
    assert slots is not None
    x = torch.randn(2, slots, 4, dtype=torch.float64, requires_grad=True)

    def run(own: Tensor) -> Tensor:
        found: Tensor = module(own)
        return found

    assert torch.autograd.gradgradcheck(run, (x,))


@pytest.mark.parametrize(("k", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("two", TypeError)])
def test_a_number_that_is_none_is_refused(k: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="top_k"):
        GateSpec(top_k=k)
    with pytest.raises(error, match="top_k"):
        PLE(8, 2, gate_top_k=k)


def test_a_gate_of_plain_modules_chooses_once_and_before_its_softmax() -> None:
    def gate(*after: torch.nn.Module) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(4, 2), *after)

    experts = [torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()) for _ in range(2)]
    one = Topology((0, 0), (0,), ((0, 1),))
    packed = pack(experts, [gate(TopK(1))], one)
    assert packed.gate_spec.top_k == 1
    x = torch.randn(5, 4)
    weights = torch.softmax(gate_logits := TopK(1)(packed.unpack()[1][0][0](x)), dim=1)  # type: ignore[index]
    assert gate_logits.isinf().sum() == 5
    h = torch.stack([expert(x) for expert in experts], 1)
    torch.testing.assert_close(packed(x)[:, 0], (weights.unsqueeze(2) * h).sum(1))
    for after, message in (
        ((TopK(1), TopK(1)), "once in a gate"),
        ((torch.nn.Softmax(1), TopK(1)), "after the softmax"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(experts, [gate(*after)], one)

"""Gates that choose some experts together: what is chosen, gradients, both backends, what is exported and refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ple_fast import PLE, AdaTT, GateSpec, MLPSpec, MMoE, SingleTask, Topology, use_backend
from ple_fast.losses import TaskLoss
from ple_fast.model import Categorical, MultiTaskModel
from ple_fast.torch_backend.top_k import keep_joint, keep_top_k
from tests.helpers import TOPOLOGIES, compare, level

BACKENDS = ["torch", "triton"]
INF, NAN = float("inf"), float("nan")
TRUNKS: dict[str, Any] = {
    "mmoe": lambda **more: MMoE(8, 3, experts=6, expert_units=(6, 4), gate_top_k=3, gate_joint_k=2, **more),
    "all-joint": lambda **more: MMoE(8, 2, experts=5, expert_units=(6,), gate_top_k=2, gate_joint_k=2, **more),
    "hidden": lambda **more: MMoE(
        8, 3, experts=6, expert_units=(6, 4), gate_units=(5,), gate_top_k=2, gate_joint_k=1, **more
    ),
    "ple": lambda **more: PLE(
        8, 3, task_experts=[2, 0, 1], shared_experts=3, expert_units=(6, 4), gate_top_k=2, gate_joint_k=1, **more
    ),
    "adatt": lambda **more: AdaTT(8, 2, expert_units=(5,), gate_top_k=3, gate_joint_k=1, **more),
}


def kept(rows: list[list[float]], k: int, joint_k: int, experts: list[int] | None = None) -> list[list[int]]:
    """Per gate of one row of the batch, the places that stay; by both forms."""
    logits = torch.tensor(rows, dtype=torch.float64).unsqueeze(0)
    index = None if experts is None else torch.tensor(experts)
    found = keep_joint(logits, k, joint_k, index)
    traced = keep_joint(logits, k, joint_k, index, is_traced=True)
    torch.testing.assert_close(found, traced, rtol=0, atol=0, equal_nan=True)
    return [[place for place, value in enumerate(row) if value != -INF] for row in found[0].tolist()]


@pytest.mark.parametrize(
    ("rows", "k", "joint_k", "experts", "expected"),
    [
        # By itself each would take its first; the third has the largest sum.
        ([[3.0, 0.0, 2.9], [0.0, 3.0, 2.9]], 1, 1, None, [[2], [2]]),
        ([[3.0, 0.0, 2.9], [0.0, 3.0, 2.9]], 2, 1, None, [[0, 2], [1, 2]]),
        ([[3.0, 0.0, 2.9], [0.0, 3.0, 2.9]], 1, 1, [0, 1], [[0], [0]]),  # equal sums: the first
        ([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], 2, 1, None, [[0, 1], [0, 1]]),
        ([[0.0, 9.0, -INF], [0.0, -INF, 9.0]], 2, 1, [0], [[0, 1], [0, 2]]),  # as a gate without the expert has it
        ([[NAN, 1.0, 2.0], [1.0, 2.0, 3.0]], 1, 1, None, [[0], [0]]),  # every sum is NaN, and what is NaN is chosen
        ([[5.0, 1.0, 2.0], [1.0, 2.0, NAN]], 1, 1, [0], [[0], [2]]),  # NaN is seen, whatever is chosen together
    ],
)
def test_the_largest_sums_are_chosen_together(
    rows: list[list[float]], k: int, joint_k: int, experts: list[int] | None, expected: list[list[int]]
) -> None:
    assert kept(rows, k, joint_k, experts) == expected


def test_none_together_is_the_choice_of_each() -> None:
    torch.manual_seed(0)
    logits = torch.randn(20, 3, 6)
    assert torch.equal(keep_joint(logits, 2, 0, None), keep_top_k(logits, 2))
    plain = MMoE(8, 2, expert_units=(4,), gate_top_k=2)
    assert "joint_k" not in plain.levels[0].gate_spec.to_config()  # type: ignore[operator, union-attr]
    assert plain.levels[0]._plan.joint == ()  # type: ignore[union-attr]


@pytest.mark.parametrize("rows", [0, 1, 9])
@pytest.mark.parametrize("name", TRUNKS)
def test_a_trunk_equals_its_reference(name: str, rows: int, backend: str, device: torch.device) -> None:
    torch.manual_seed(0)
    module = TRUNKS[name](dtype=torch.float64, device=device)
    compare(module, [torch.randn(rows, 8, dtype=torch.float64, device=device)], form="one")


@pytest.mark.parametrize("temperature", [0.25, 4.0])
@pytest.mark.parametrize("name", ["ple-even", "unordered", "mmoe"])
def test_a_level_equals_its_reference(name: str, temperature: float, backend: str) -> None:
    topology = TOPOLOGIES[name]
    module = level(topology, MLPSpec((6, 4)), GateSpec((5,), "tanh", top_k=2, joint_k=1, temperature=temperature))
    x = torch.randn(6, topology.num_slots or 1, 7, dtype=torch.float64)
    compare(module, [x], form="stacked")


def test_a_row_reads_no_more_experts_than_it_should() -> None:
    torch.manual_seed(0)
    for joint in (0, 2):
        module = MMoE(8, 6, experts=16, expert_units=(4,), gate_top_k=3, gate_joint_k=joint)
        _, ((*gates,),) = module(torch.randn(200, 8), return_gates=True)
        weights = torch.stack(gates, 1)
        assert (weights.count_nonzero(2) == 3).all()
        most = int((weights.amax(1) > 0).sum(1).max())
        by_all = (weights > 0).all(1).sum(1)
        if joint:
            assert most <= 2 + 6 * 1 and (by_all >= 2).all()
        else:
            assert most > 8  # each alone: the union of many gates is large


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backends_agree(dtype: torch.dtype, device: torch.device) -> None:
    pytest.importorskip("triton")
    torch.manual_seed(0)
    module = TRUNKS["ple"](device=device, dtype=dtype)
    x = torch.randn(7, 8, device=device).to(dtype)
    found = []
    for name in BACKENDS:
        with use_backend(name):  # type: ignore[arg-type]  # one of them
            module.zero_grad()
            own = x.clone().requires_grad_()
            y = module(own)
            y.float().square().sum().backward()
            found.append([y, own.grad])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_second_derivatives_recompute_and_autocast() -> None:
    torch.manual_seed(0)
    module = level(Topology.mmoe(2, 4), MLPSpec((3,), "tanh"), GateSpec(top_k=2, joint_k=1), in_features=4)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def run(own: Tensor) -> Tensor:
        found: Tensor = module(own)
        return found

    assert torch.autograd.gradgradcheck(run, (x,))
    steps = []
    for recompute in (False, True):
        torch.manual_seed(0)
        trunk = TRUNKS["mmoe"](recompute=recompute)
        with torch.autocast("cpu", torch.bfloat16):
            y = trunk(x[:1].float().repeat(5, 2))
        y.float().sum().backward()
        steps.append([y, *(p.grad for p in trunk.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))


def test_it_is_exported_compiled_and_saved(tmp_path: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    module: PLE = TRUNKS["ple"]().eval()
    x = torch.randn(6, 8)
    expected = module(x)
    rows = ({0: torch.export.Dim("rows", min=1)},)
    exported = torch.export.export(module, (x,), dynamic_shapes=rows).module()
    torch.testing.assert_close(exported(x[:3]), expected[:3])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(module.for_inference()(x), expected)
    file = tmp_path / "model.onnx"
    torch.onnx.export(module, (x,), file, dynamo=True, dynamic_shapes=({0: "rows"},), verbose=False)
    session = onnxruntime.InferenceSession(file)
    (found,) = session.run(None, {session.get_inputs()[0].name: x[:4].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected[:4].detach(), rtol=1e-4, atol=1e-5)
    options = {"expert_units": (4,), "gate_top_k": 2, "gate_joint_k": 1}
    net = MultiTaskModel([Categorical("c", size=5)], [TaskLoss("a"), TaskLoss("b")], trunk_options=options)
    net.save(tmp_path)
    table = {"c": list(range(5))}
    again = MultiTaskModel.load(tmp_path)
    assert (again.predict(table)["a"] == net.predict(table)["a"]).all()
    assert again.trunk.levels[0].gate_spec.joint_k == 1  # type: ignore[union-attr, index]


def test_what_cannot_be_chosen_together_is_refused() -> None:
    with pytest.raises(ValueError, match="joint_k: expected at most top_k"):
        GateSpec(top_k=2, joint_k=3)
    with pytest.raises(ValueError, match=r"joint_k: expected at most top_k.*top_k=None"):
        MMoE(8, 2, expert_units=(4,), gate_joint_k=1)
    with pytest.raises(ValueError, match="joint_k: expected at most 1, the experts that every gate"):
        PLE(8, 2, expert_units=(4,), shared_experts=1, gate_top_k=2, gate_joint_k=2)
    with pytest.raises(ValueError, match="joint_k"):
        GateSpec(top_k=2, joint_k=-1)
    with pytest.raises(TypeError, match="gate_joint_k"):
        SingleTask(8, 2, expert_units=(4,), gate_joint_k=1)  # type: ignore[call-arg]  # it has no gates
    with pytest.raises(ValueError, match="choose 1 experts together"):
        PLE(8, 2, expert_units=(4,), gate_top_k=2, gate_joint_k=1).levels[0].unpack()  # type: ignore[operator]

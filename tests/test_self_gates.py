"""Gates that are sigmoids, and mixtures that are added into one output: on both backends, by hand and composed."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ple_fast import PLE, ExtractionNetwork, GateSpec, MLPSpec, Topology, pack, use_backend
from ple_fast.plan import LevelPlan
from tests.helpers import GATES, TOPOLOGIES, assert_derivatives_agree, compare, draw, level

NAMES = ["home-meta", "home-task", "sigmoids-and-sums"]
INF = float("inf")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("gate", ["plain", "hidden", "everything", "top-1", "top-2"])
@pytest.mark.parametrize("name", NAMES)
def test_every_gate_agrees_with_the_reference(
    name: str, gate: str, recompute: bool, backend: str, device: torch.device
) -> None:
    module = level(TOPOLOGIES[name], MLPSpec((5, 4), "silu", norm="batch"), GATES[gate], recompute=recompute)
    slots = module.topology.num_slots or 1
    leaves = [leaf.to(device) for leaf in draw("stacked", 9, slots, 7)]
    compare(module.to(device), leaves, form="stacked", slots=slots)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [0, 1, 700])
def test_few_and_many_rows(name: str, rows: int, backend: str, device: torch.device) -> None:
    """Many: more than one block of rows, and more elements than the narrow softmax takes."""
    module = level(TOPOLOGIES[name], MLPSpec((5, 4), "silu")).to(device)
    if rows == 0:
        y = module(torch.zeros(0, 7, dtype=torch.float64, device=device))
        assert y.shape == (0, module.topology.num_outputs, 4)
        return
    leaves = [leaf.to(device) for leaf in draw("one", rows, 1, 7)]
    compare(module, leaves, slots=module.topology.num_slots or 1, ask_gates=rows > 1)


def test_a_sigmoid_beside_a_softmax_written_out(backend: str, device: torch.device) -> None:
    torch.manual_seed(0)
    topology = Topology((0, 0), (0, 0), ((0, 1), (1,)), ("softmax", "sigmoid"), mixture_output=(0, 0))
    module = ExtractionNetwork(3, topology, experts=MLPSpec((4,), "tanh"), gate=GateSpec(), device=device)
    x = torch.randn(5, 3, device=device)
    y, weights = module(x, return_gates=True)
    block: Any = module.blocks[0]
    layer, gate = block.layers[0], module.gate
    h = torch.stack([torch.tanh(x @ layer.weight[e].t() + layer.bias[e]) for e in range(2)], 1)
    assert gate.weight is not None and gate.bias is not None
    logits = x @ gate.weight.t() + gate.bias
    p, s = logits[:, :2].softmax(1), logits[:, 2:].sigmoid()
    torch.testing.assert_close(weights[0], p)
    torch.testing.assert_close(weights[1], s)
    torch.testing.assert_close(y, (p[:, :1] * h[:, 0] + (p[:, 1:] + s) * h[:, 1]).unsqueeze(1))


@pytest.mark.parametrize("name", NAMES)
def test_what_overflows_stays_with_the_outputs_that_weigh_it(name: str, backend: str, device: torch.device) -> None:
    module = level(TOPOLOGIES[name], MLPSpec((4,), "identity"), dtype=torch.float32).to(device)
    topology, bad = module.topology, 2 if name == "sigmoids-and-sums" else 0
    slots = topology.num_slots or 1
    x = torch.randn(6, slots, 7, device=device)
    block: Any = module.blocks[0]
    with torch.no_grad():
        block.layers[0].bias[bad] = INF
    y = module(x)
    reached = [bad in experts for experts in topology.output_experts]
    assert not all(reached)
    for output, is_reached in enumerate(reached):
        assert bool(y[:, output].isfinite().all()) != is_reached


def test_a_gate_that_is_nan_stays_with_its_output(backend: str, device: torch.device) -> None:
    """Sums of weights are sums of what belongs to the output, and no product with zeros."""
    for name in ("home-task", "sigmoids-and-sums"):
        module = level(TOPOLOGIES[name], MLPSpec((4,)), dtype=torch.float32).to(device)
        topology = module.topology
        last = topology.gated_mixtures[-1]
        assert module.gate.bias is not None
        with torch.no_grad():
            module.gate.bias[topology.logit_offset[last]] = float("nan")
        y = module(torch.randn(6, topology.num_slots or 1, 7, device=device))
        assert topology.mixture_output is not None
        for output in range(topology.num_outputs):
            assert bool(y[:, output].isnan().any()) == (output == topology.mixture_output[last])


def test_a_gate_that_is_nan_does_not_reach_experts_that_it_does_not_weigh(backend: str, device: torch.device) -> None:
    """Another mixture of the same output weighs expert 0, whose gradient is its own."""
    topology = Topology((0, 0, 0), (0, 0), ((2, 1), (1, 2, 0)), mixture_output=(0, 0))
    module = level(topology, MLPSpec((4,)), dtype=torch.float32).to(device)
    assert module.gate.bias is not None
    with torch.no_grad():
        module.gate.bias[1] = float("nan")
    module(torch.randn(6, 7, device=device)).sum().backward()
    block: Any = module.blocks[0]
    found = block.layers[0].weight.grad.isfinite().flatten(1).all(1)
    assert found.tolist() == [True, False, False]


def test_weights_of_one_output_are_added_up_before_they_weigh(backend: str, device: torch.device) -> None:
    """Weights of 2 and -1 of an infinity are one of 1, and no NaN."""
    topology = Topology(
        (0,), (0, 0), ((0,), (0,)), ("static", "static"), ((True,), (True,)), mixture_output=(0, 0)
    )  # fmt: skip
    module = level(topology, MLPSpec((4,), "identity"), dtype=torch.float32).to(device)
    block: Any = module.blocks[0]
    with torch.no_grad():
        assert module.gate.offset is not None
        module.gate.offset.copy_(torch.tensor([1.0, -2.0]))
        block.layers[0].bias.fill_(INF)
    assert (module(torch.randn(6, 7, device=device)) == INF).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    module = level(TOPOLOGIES["home-task"], MLPSpec((8, 4), "silu"), dtype=torch.float32).to(device)
    x = torch.randn(9, 3, 7, device=device)
    expected = module(x)
    with torch.autocast(device.type, dtype):
        torch.testing.assert_close(module(x).float(), expected, rtol=3e-2, atol=3e-2)
    low = module.to(dtype)
    torch.testing.assert_close(low(x.to(dtype)).float(), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_of_derivatives(name: str, device: torch.device) -> None:
    module = level(TOPOLOGIES[name], MLPSpec((5, 4), "tanh")).to(device)
    x = draw("stacked", 5, module.topology.num_slots or 1, 7)[0].to(device)
    assert_derivatives_agree(module, x, 1e-10)


def test_plans_tell_such_levels_apart_and_read_older_texts() -> None:
    kinds = ("softmax", "sigmoid")
    apart = [
        Topology((0, 0), (0, 0), ((0, 1), (1,))),
        Topology((0, 0), (0, 0), ((0, 1), (1,)), kinds),  # type: ignore[arg-type]  # two of the kinds
        Topology((0, 0), (0, 0), ((0, 1), (1,)), kinds, mixture_output=(0, 0)),  # type: ignore[arg-type]  # the same
    ]
    plans = [LevelPlan.build(t, [(0, 2, MLPSpec((4,)))], GateSpec()) for t in apart]
    assert len({plan.text for plan in plans}) == len(plans)
    assert [LevelPlan.from_text(plan.text) for plan in plans] == plans
    text = '[[[0,0],[0,0],[[0,1],[1]],["softmax","softmax"],[[false,false],[false]],1],'
    assert plans[0].text.startswith(text), "a plan without sums is written as ever"


@pytest.mark.parametrize("outputs", [(0, 1), [0, 1], None])
def test_an_output_for_each_mixture_is_the_default(outputs: Any) -> None:
    topology = Topology((0, 0), (0, 0), ((0, 1), (1,)), mixture_output=outputs)
    assert topology.mixture_output is None and topology.num_outputs == 2
    assert topology == Topology((0, 0), (0, 0), ((0, 1), (1,)))
    assert topology.output_experts == topology.mixture_experts


@pytest.mark.parametrize(
    ("outputs", "error", "message"),
    [
        (0, TypeError, "mixture_output: expected a sequence of ints, got 0"),
        ((0, 0.5, 1), TypeError, r"mixture_output\[1\]: expected an int, got 0.5"),
        ((0, 0), ValueError, r"mixture_output: expected one per mixture \(3\), got 2"),
        ((1, 1, 2), ValueError, r"from 0 on, in order and none left out, such as \(0, 0, 1\); got \(1, 1, 2\)"),
        ((0, 2, 2), ValueError, "in order and none left out"),
        ((0, 1, 0), ValueError, "in order and none left out"),
    ],
)
def test_outputs_that_cannot_be_are_refused(outputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Topology((0,), (0, 0, 0), ((0,),) * 3, mixture_output=outputs)


def test_sums_of_mixtures_that_stop_are_refused() -> None:
    with pytest.raises(ValueError, match="mixture_output: expected None with mixture_stop"):
        Topology((0, 0), (0, 0), ((0, 1), (0,)), mixture_stop=((True, False), (False,)), mixture_output=(0, 0))


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_sums_cost_one_operator_each_way_and_the_usual_level_none(device: torch.device) -> None:
    """Of two mixtures over the same experts that are added up, beside the two alone."""

    def names(outputs: tuple[int, ...] | None, rows: int = 300) -> tuple[int, int]:
        topology = Topology((0,) * 3, (0,) * 4, ((0, 1, 2),) * 4, mixture_output=outputs)
        module = ExtractionNetwork(8, topology, experts=MLPSpec((4,)), gate=GateSpec(), device=device)
        with use_backend("torch"):
            module(torch.randn(rows, 8, device=device)).sum().backward()
            x = torch.randn(rows, 8, device=device)
            with Operators() as forward:
                y = module(x)
            dy = torch.ones_like(y)
            with Operators() as backward:
                y.backward(dy)
        made = "aten::lift_fresh"  # an index, which is kept where no mode looks on
        return len(forward.names), len([name for name in backward.names if name != made])

    plain, summed = names(None), names((0, 0, 1, 1))
    assert (summed[0] - plain[0], summed[1] - plain[1]) == (2, 1), "a view and a sum; a selection"


def test_kernels_launch_no_more_for_sigmoids_and_sums() -> None:
    kernels = pytest.importorskip("ple_fast_kernels")

    def launched(topology: Topology) -> int:
        module = level(topology, MLPSpec((5, 4), "silu", norm="batch"))
        x = draw("stacked", 9, topology.num_slots or 1, 7)[0].requires_grad_()
        with use_backend("triton"):
            before: int = kernels.launches()
            module(x).sum().backward()
            after: int = kernels.launches()
            return after - before

    gates = TOPOLOGIES["home-task"]
    assert launched(gates) == launched(Topology.home([[0, 2], [1]], 1, 2, task_experts=[1, 2, 1], self_gates=False))


def test_such_levels_are_compiled_exported_and_packed(device: torch.device) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    for name in NAMES:
        module = level(TOPOLOGIES[name], MLPSpec((5, 4), "silu"), dtype=torch.float32).eval()
        x = torch.randn(6, module.topology.num_slots or 1, 7)
        expected = module(x)
        exported = torch.export.export(module.for_inference(), (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-5, atol=1e-5)
        file: Any = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(module.for_inference(plain=True), (x,), file, input_names=["x"], dynamo=False)
        (found,) = onnxruntime.InferenceSession(file.getvalue()).run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)
        experts, gates = module.unpack()
        again = pack(experts, gates, module.topology)
        assert torch.equal(again(x), expected)


def test_gates_of_modules_end_as_the_topology_says() -> None:
    topology = Topology((0, 0), (0, 0), ((0, 1), (1,)), ("softmax", "sigmoid"), mixture_output=(0, 0))
    experts, softmax = [nn.Linear(3, 4), nn.Linear(3, 4)], nn.Sequential(nn.Linear(3, 2), nn.Softmax(1))
    x = torch.randn(5, 3)
    own = nn.Linear(3, 1)
    plain, ended = (pack(experts, [softmax, gate], topology)(x) for gate in (own, nn.Sequential(own, nn.Sigmoid())))
    assert torch.equal(plain, ended)
    with pytest.raises(ValueError, match=r"gates\[1\]: expected a gate that ends in its logits or their Sigmoid"):
        pack(experts, [softmax, nn.Sequential(own, nn.Softmax(1))], topology)
    with pytest.raises(ValueError, match="Sigmoid"):
        pack(experts, [nn.Sequential(nn.Linear(3, 2), nn.Sigmoid()), own], topology)


def test_levels_of_outputs_are_stacked() -> None:
    meta, task = TOPOLOGIES["home-meta"], TOPOLOGIES["home-task"]
    levels = [
        ExtractionNetwork(7, meta, experts=MLPSpec((4,)), gate=GateSpec()),
        ExtractionNetwork(4, task, experts=MLPSpec((5,)), gate=GateSpec()),
    ]
    trunk = PLE.from_levels(levels)
    assert trunk.num_tasks == 3
    y: Tensor = trunk(torch.randn(6, 7))
    assert y.shape == (6, 3, 5)
    assert "mixtures=6, outputs=3" in repr(levels[0])

"""Levels in Triton kernels: what is saved, launches, fusion, recomputation, dropout, second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from ple_fast import ExtractionNetwork, GateSpec, MLPSpec, Topology, use_backend
from ple_fast.triton_backend import fused
from ple_fast.triton_backend.fused import Fusion
from ple_fast_kernels import launches
from tests.helpers import EXPERTS, GATES, TOPOLOGIES, assert_close, level, saved_bytes
from tests.test_both_backends import STEPS, everything

PLE, EVEN = TOPOLOGIES["ple"], TOPOLOGIES["ple-even"]


@pytest.fixture(autouse=True)
def _in_kernels() -> Iterator[None]:
    with use_backend("triton"):
        yield


def outcome(module: ExtractionNetwork, x: Tensor, loss: Callable[[Tensor, list[Tensor]], Tensor]) -> dict[str, Any]:
    """Output, gates, every gradient and every buffer of one step."""
    module.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    torch.manual_seed(7)
    y, gates = module(x, return_gates=True)
    loss(y, gates).backward()
    found = {"y": y, "x.grad": x.grad, **{f"gate {o}": g for o, g in enumerate(gates)}}
    found |= {f"{name}.grad": p.grad for name, p in module.named_parameters()}
    return found | {name: b.clone() for name, b in module.named_buffers()}


def assert_equal_outcomes(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float = 1e-12) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert_close(name, ours[name], expected, tolerance)


def gates_alone(y: Tensor, gates: list[Tensor]) -> Tensor:
    """A loss that the output does not enter."""
    return torch.cat([g.sin() * (o + 1) for o, g in enumerate(gates)], 1).sum()


def input_of(module: ExtractionNetwork, device: torch.device, rows: int = 9) -> Tensor:
    x = torch.randn(rows, module.in_features, dtype=torch.float64)
    return x.to(device=device, dtype=next(module.parameters()).dtype)


@pytest.mark.parametrize("loss", [everything, gates_alone])
@pytest.mark.parametrize("case", STEPS)
def test_a_step_equals_that_of_the_torch_backend(case: str, loss: Any, device: torch.device) -> None:
    """In train mode: the same dropout masks and running statistics."""
    outcomes = []
    for backend in ("triton", "torch"):
        module = level(EVEN, *STEPS[case]).to(device).train()
        with use_backend(backend):
            outcomes.append(outcome(module, input_of(module, device), loss))
        torch.manual_seed(0)
    assert_equal_outcomes(outcomes[0], outcomes[1], 1e-10)


@pytest.mark.parametrize("name", ["static-offsets", "adatt", "hard-sharing"])
@pytest.mark.parametrize("frozen", ["", "blocks", "gate.weight gate.bias", "blocks gate.weight gate.bias"])
def test_learned_scalars(name: str, frozen: str, device: torch.device) -> None:
    """Their gradient alone, beside that of the gates, and of what is a constant 1; input without a gradient."""
    for loss in (everything, gates_alone):
        grads = []
        for backend in ("triton", "torch"):
            module = level(TOPOLOGIES[name], EXPERTS["2-layers"]).to(device)
            for key, parameter in module.named_parameters():
                parameter.requires_grad_(not key.startswith(tuple(frozen.split())) if frozen else True)
            torch.manual_seed(0)
            with use_backend(backend):
                y, gates = module(input_of(module, device), return_gates=True)
                total = loss(y, gates)
                if not total.requires_grad:
                    continue
                total.backward()
            grads.append({key: parameter.grad for key, parameter in module.named_parameters()})
        if grads:
            assert_equal_outcomes(grads[0], grads[1])


def test_constant_gates_send_no_gradient(device: torch.device) -> None:
    """A loss of static weights alone: the gradient of the input is 0, not what lay in memory."""
    module = level(TOPOLOGIES["hard-sharing"], EXPERTS["2-layers"]).to(device)
    x = input_of(module, device).requires_grad_()
    gates_alone(*module(x, return_gates=True)).backward()
    assert x.grad is not None and not bool(x.grad.any())
    assert all(p.grad is None or not bool(p.grad.any()) for p in module.parameters())


@pytest.mark.parametrize("case", STEPS)
def test_second_derivatives(case: str, device: torch.device) -> None:
    """Of a penalty on gradients, as the torch backend has them."""
    found = []
    for backend in ("triton", "torch"):
        module = level(EVEN, *STEPS[case]).to(device).eval()
        torch.manual_seed(0)
        x = input_of(module, device).requires_grad_()
        with use_backend(backend):
            y, gates = module(x, return_gates=True)
            (dx,) = torch.autograd.grad(everything(y, gates), x, create_graph=True)
            dx.square().sum().backward()
        found.append({"dx": dx, "x.grad": x.grad, **{name: p.grad for name, p in module.named_parameters()}})
    assert_equal_outcomes(found[0], found[1], 1e-10)


def test_recompute_equals_saving_with_blocks(device: torch.device) -> None:
    specs = (MLPSpec((6, 4)),) * 4 + (MLPSpec((5, 3, 4), "gelu"),) * 2
    outcomes = []
    for recompute in (False, True):
        module = level(EVEN, specs, GATES["hidden"], recompute=recompute).to(device)
        torch.manual_seed(0)
        outcomes.append(outcome(module, input_of(module, device), everything))
    assert_equal_outcomes(outcomes[1], outcomes[0])


ROWS, HIDDEN, OUT = 16, 24, 8
UNIT = 8
"""Bytes of a number."""


def step_bytes(module: ExtractionNetwork, device: torch.device, *, input_grad: bool) -> int:
    """What a forward pass saves besides parameters and input."""
    module.to(device)
    return saved_bytes(module, input_of(module, device, ROWS).requires_grad_(input_grad))


def two_layers(activation: Any, topology: Topology = PLE, **how: Any) -> ExtractionNetwork:
    return level(topology, MLPSpec((HIDDEN, OUT), activation), **how)


@pytest.mark.parametrize(
    ("activation", "frozen", "input_grad", "hidden", "out", "weights"),
    [
        ("relu", "", False, 1, 1, 1),
        ("relu", "", True, 1, 1, 1),
        ("tanh", "gate", False, 1, 1, 1),
        ("gelu", "", False, 2, 2, 1),  # inputs of both activations, the hidden output, the experts' output
        ("gelu", "", True, 2, 2, 1),
        ("gelu", "gate", False, 2, 1, 1),
        (("relu", "identity"), "", False, 1, 1, 1),
        (("relu", "identity"), "gate", False, 1, 0, 1),
        ("gelu", "blocks", False, 0, 1, 1),
        ("gelu", "blocks gate", True, 1, 2, 1),
        ("relu", "blocks.0.layers.0", False, 1, 1, 1),
        ("gelu", "blocks.0.layers.0", False, 1, 2, 1),  # no activation below the second layer is passed
        ("gelu", "blocks.0.layers.1", False, 1, 2, 1),
    ],
)
def test_saved_bytes_are_those_that_backward_reads(
    activation: Any, frozen: str, input_grad: bool, hidden: int, out: int, weights: int, device: torch.device
) -> None:
    module = two_layers(activation)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not (frozen and name.startswith(tuple(frozen.split()))))
    numbers = PLE.num_experts * (hidden * HIDDEN + out * OUT) + PLE.num_weights * weights
    assert step_bytes(module, device, input_grad=input_grad) == ROWS * numbers * UNIT


@pytest.mark.parametrize(("activation", "out"), [("relu", 1), ("gelu", 2), ("identity", 1)])
def test_saved_bytes_of_a_fused_level(activation: str, out: int, device: torch.device) -> None:
    module = level(PLE, MLPSpec((OUT,), activation))
    numbers = PLE.num_experts * out * OUT + PLE.num_weights
    assert step_bytes(module, device, input_grad=False) == ROWS * numbers * UNIT


def test_recomputing_saves_nothing_however_many_experts(device: torch.device) -> None:
    for experts in (1, 4):
        wiring = Topology.ple(2, experts, experts, last=False)
        module = two_layers("gelu", wiring, recompute=True)
        assert step_bytes(module, device, input_grad=True) == 0


def counted(module: nn.Module, x: Tensor) -> tuple[int, int]:
    """Launches of a forward and a backward pass that reaches everything."""
    x = x.clone().requires_grad_()
    start = launches()
    y = module(x)
    middle = launches()
    y.sum().backward()
    assert x.grad is not None and all(p.grad is not None for p in module.parameters())
    return middle - start, launches() - middle


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_launches_of_a_training_step(layers: int, device: torch.device) -> None:
    """Forward: a layer each, and the mixtures; backward: those, two per further layer, one that adds up the parts."""
    module = level(PLE, MLPSpec((6,) * layers), dtype=torch.float32).to(device)
    forward, backward = counted(module, input_of(module, device))
    assert forward <= (1 if layers == 1 else 1 + layers)
    assert backward <= 2 + 2 * layers


@pytest.mark.parametrize(("layers", "most"), [(1, 1), (2, 1), (3, 3)])
def test_launches_of_inference(layers: int, most: int, device: torch.device) -> None:
    module = level(PLE, MLPSpec((6,) * layers), dtype=torch.float32).to(device)
    start = launches()
    with torch.inference_mode():
        module(input_of(module, device))
    assert 0 < launches() - start <= most


LAYERS = {Fusion.LEVEL: 1, Fusion.LAST_LAYER: 3, Fusion.TWO_LAYERS: 2}


@pytest.mark.parametrize("chosen", Fusion)
@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("ple-even", "relu"),
        ("ple-even", "gelu"),
        ("mixed-kinds", "tanh"),
        ("static-offsets", "relu"),
        ("hard-sharing", "silu"),
        ("unordered", "relu"),
    ],
)
def test_fused_equals_not_fused(
    name: str, activation: str, chosen: Fusion, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inference; of one layer the step too, which reads what the fused launch has kept."""
    monkeypatch.setattr("ple_fast.triton_backend.level.choose_fusion", lambda *_, **how: forced(**how))
    gate = GateSpec(temperature=0.5)
    module = level(TOPOLOGIES[name], MLPSpec((6, 5, 4)[-LAYERS[chosen] :], activation), gate, dtype=torch.float32).to(
        device
    )
    x = input_of(module, device, 33)
    results = []
    for fuses in (True, False):

        def forced(*, keeps: bool, fuses: bool = fuses) -> Fusion | None:
            return chosen if fuses and (chosen is Fusion.LEVEL or not keeps) else None

        start = launches()
        with torch.no_grad():
            y, gates = module(x, return_gates=True)
        taken = launches() - start
        assert taken == (LAYERS[chosen] if chosen is Fusion.LAST_LAYER else 1) if fuses else taken > 1
        results.append({"inference": y, **{f"inference {o}": g for o, g in enumerate(gates)}})
        if chosen is Fusion.LEVEL:
            results[-1] |= outcome(module, x, everything)
    assert_equal_outcomes(results[0], results[1], 1e-5)


@pytest.mark.parametrize(
    ("experts", "gate", "fuses"),
    [
        (MLPSpec((4,)), GateSpec(), True),
        (MLPSpec((4,), "prelu"), GateSpec(), False),
        (MLPSpec((4,), norm="layer"), GateSpec(), False),
        (MLPSpec((4,)), GateSpec((5,)), False),
        (MLPSpec((4,)), GateSpec(logits_norm="batch"), False),
        ((MLPSpec((4,)),) * 4 + (MLPSpec((4,), "tanh"),) * 4, GateSpec(), False),
    ],
)
def test_only_what_the_kernel_serves_is_fused(experts: Any, gate: GateSpec, fuses: bool, device: torch.device) -> None:
    seen: list[Fusion | None] = []
    with pytest.MonkeyPatch.context() as patch:

        def spy(*args: Any, **how: Any) -> Fusion | None:
            seen.append(fused.choose_fusion(*args, **how))
            return seen[-1]

        patch.setattr("ple_fast.triton_backend.level.choose_fusion", spy)
        module = level(PLE, experts, gate, dtype=torch.float32).to(device)
        module(input_of(module, device))
    assert seen == [Fusion.LEVEL if fuses else None]

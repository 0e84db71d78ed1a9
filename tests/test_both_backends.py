"""What holds for a level on each backend: numbers against the reference, and what a step saves and leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ple_fast import ExtractionNetwork, GateSpec, MLPSpec, last_backend, use_backend
from ple_fast.specs import ACTIVATIONS
from tests.helpers import (
    EXPERTS,
    FORMS,
    GATES,
    TOPOLOGIES,
    assert_close,
    compare,
    compare_low_precision,
    draw,
    level,
    saved,
)

Cases = Iterable[tuple[Any, ...]]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend of the whole test."""
    name: str = request.param
    if name == "triton":
        pytest.importorskip("triton")
    with use_backend(name):  # type: ignore[arg-type]  # one of its names
        yield name


def on_both(names: str, torch_cases: Cases, triton_cases: Cases) -> Callable[[Any], Any]:
    """A test's cases on each backend; kernels are interpreted, and have fewer."""
    cases = [("torch", *case) for case in torch_cases] + [("triton", *case) for case in triton_cases]
    return pytest.mark.parametrize(("backend", *names.split()), cases, indirect=["backend"])


def assert_ran_on(backend: str) -> None:
    choice = last_backend()
    assert choice is not None and choice.name == backend


def leaves_of(module: ExtractionNetwork, device: torch.device, form: str = "stacked", batch: int = 9) -> list[Tensor]:
    return [leaf.to(device) for leaf in draw(form, batch, slots_of(module), module.in_features)]


def slots_of(module: ExtractionNetwork) -> int:
    assert module.topology.num_slots is not None
    return module.topology.num_slots


def check(module: ExtractionNetwork, device: torch.device, form: str = "stacked", batch: int = 9, **how: Any) -> None:
    """Against the reference."""
    module.to(device)
    compare(module, leaves_of(module, device, form, batch), form=form, slots=slots_of(module), **how)


@on_both(
    "form topology experts gate",
    [(form, t, "2-layers", "hidden") for form in FORMS for t in ("ple", "adatt", "unordered", "mmoe")],
    [
        (form, *case)
        for form in FORMS
        for case in (("unordered", "2-layers", "plain"), ("ple-even", "1-layer", "hidden"))
    ],
)
def test_forms_of_the_input(
    backend: str, form: str, topology: str, experts: str, gate: str, device: torch.device
) -> None:
    check(level(TOPOLOGIES[topology], EXPERTS[experts], GATES[gate]), device, form)
    assert_ran_on(backend)


@on_both(
    "experts form batch",
    [
        (experts, form, batch)
        for experts in ("1-layer", "2-layers", "layer-norm", "prelu", "no-bias")
        for form in ("one", "stacked")
        for batch in (0, 1, 2, 3, 33)
    ],
    [
        (experts, form, batch)
        for experts in ("1-layer", "3-layers")
        for form in ("one", "list", "slots-first")
        for batch in (1, 33)
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_batch_sizes(backend: str, experts: str, form: str, batch: int, train: bool, device: torch.device) -> None:
    topology = TOPOLOGIES["ple" if backend == "torch" else "ple-even"]
    check(level(topology, EXPERTS[experts]), device, form, batch, train=train)
    assert_ran_on(backend)


@on_both(
    "topology form gate_form",
    [
        (topology, *forms)
        for topology in ("ple", "mixed-kinds")
        for forms in (("stacked", "one"), ("list", "stacked"), ("one", "list"))
    ],
    [("ple-even", "stacked", "one"), ("mixed-kinds", "list", "slots-first"), ("unordered", "one", "list")],
)
@pytest.mark.parametrize("gate", ["plain", "hidden", "everything"])
def test_gates_may_read_an_input_of_their_own(
    backend: str, topology: str, form: str, gate_form: str, gate: str, device: torch.device
) -> None:
    spec = GATES[gate]
    raw = GateSpec(**{**{f: getattr(spec, f) for f in spec.__dataclass_fields__}, "input": "raw"})
    module = level(TOPOLOGIES[topology], EXPERTS["2-layers"], raw, gate_features=3)
    gate_leaves = [leaf.to(device) for leaf in draw(gate_form, 9, slots_of(module), 3, seed=5)]
    check(module, device, form, gate_leaves=gate_leaves, gate_form=gate_form)
    assert_ran_on(backend)


FROZEN: dict[str, Callable[[str], bool]] = {
    "experts": lambda name: name.startswith("blocks"),
    "gates": lambda name: name.startswith("gate"),
    "first-layer": lambda name: ".layers.0." in name,
    "last-layer": lambda name: ".layers.1." in name,
    "biases": lambda name: name.endswith("bias"),
    "weights": lambda name: name.endswith("weight"),
    "everything": lambda name: True,
}


@on_both(
    "topology experts gate",
    [("ple", experts, "hidden-prelu-dice") for experts in ("2-layers", "prelu-norms", "per-layer")],
    [("ple-even", "2-layers", "plain"), ("ple-even", "prelu-norms", "hidden")],
)
@pytest.mark.parametrize("input_grad", [True, False])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters_get_no_gradient_and_the_others_the_same(
    backend: str, topology: str, experts: str, gate: str, frozen: str, input_grad: bool, device: torch.device
) -> None:
    module = level(TOPOLOGIES[topology], EXPERTS[experts], GATES[gate]).to(device)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not FROZEN[frozen](name))
    if frozen == "everything" and not input_grad:
        assert not module(leaves_of(module, device)[0]).requires_grad
    else:
        check(module, device, input_grad=input_grad, common_scale=True)
    assert_ran_on(backend)
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == FROZEN[frozen](name), name


@on_both(
    "topology",
    [("ple",), ("static-offsets",), ("hard-sharing",)],
    [("adatt",), ("static-offsets",), ("hard-sharing",)],
)
@pytest.mark.parametrize("gates_enter_loss", [True, False])
def test_gates_as_a_second_output(backend: str, topology: str, gates_enter_loss: bool, device: torch.device) -> None:
    module = level(TOPOLOGIES[topology], EXPERTS["2-layers"], GATES["hidden"])
    check(module, device, gates_enter_loss=gates_enter_loss)
    assert_ran_on(backend)


@on_both("topology steps", [("ple", 3)], [("ple-even", 2)])
@pytest.mark.parametrize("train", [True, False])
def test_several_steps_move_the_running_statistics_as_pytorch_does(
    backend: str, topology: str, steps: int, train: bool, device: torch.device
) -> None:
    module = level(TOPOLOGIES[topology], EXPERTS["per-layer"], GATES["everything"]).to(device)
    slots = slots_of(module)
    for step in range(steps):
        leaves = [leaf.to(device) for leaf in draw("stacked", 9, slots, module.in_features, seed=step)]
        compare(module, leaves, form="stacked", slots=slots, train=train, common_scale=True)
    assert_ran_on(backend)


@on_both("", [()], [()])
def test_one_input_of_a_list_may_need_no_gradient(backend: str, device: torch.device) -> None:
    module = level(TOPOLOGIES["ple"], EXPERTS["2-layers"]).to(device)
    leaves = leaves_of(module, device, "list")
    some = [leaf.clone().requires_grad_(i % 2 == 0) for i, leaf in enumerate(leaves)]
    every = [leaf.clone().requires_grad_() for leaf in leaves]
    module(some).square().sum().backward()
    module(every).square().sum().backward()
    assert_ran_on(backend)
    for i, (a, b) in enumerate(zip(some, every, strict=True)):
        if i % 2:
            assert a.grad is None
        else:
            assert_close(f"x[{i}].grad", a.grad, b.grad, 1e-12)


@on_both(
    "topology activation",
    [
        *((topology, "relu") for topology in ("ple", "mmoe", "adatt", "mixed-kinds", "no-shared")),
        *(("ple", activation) for activation in ACTIVATIONS if activation != "relu"),
    ],
    [(topology, activation) for topology in ("ple-even", "adatt") for activation in ("relu", "gelu")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(backend: str, topology: str, activation: str, dtype: torch.dtype, device: torch.device) -> None:
    module = level(TOPOLOGIES[topology], MLPSpec((48, 32), activation), in_features=40).to(device)
    leaves = leaves_of(module, device, batch=64)
    compare_low_precision(module, leaves, dtype=dtype, form="stacked", slots=slots_of(module))
    assert_ran_on(backend)


STEPS: dict[str, tuple[MLPSpec, GateSpec]] = {
    "relu": (EXPERTS["2-layers"], GATES["plain"]),
    "gelu": (EXPERTS["gelu"], GATES["two-hidden"]),
    "per-layer": (EXPERTS["per-layer"], GATES["everything"]),
    "norms-after": (EXPERTS["prelu-norms"], GATES["hidden-layer-norm"]),
    "dropout": (MLPSpec((6, 4), "silu", norm=("batch", "layer"), dropout=(0.5, 0.25)), GateSpec((5,), dropout=0.5)),
}
"""Make-ups that save different things."""


def stepping(backend: str, case: str, device: torch.device, **how: Any) -> ExtractionNetwork:
    return level(TOPOLOGIES["ple" if backend == "torch" else "ple-even"], *STEPS[case], **how).to(device)


def everything(y: Tensor, gates: list[Tensor]) -> Tensor:
    """A loss of all outputs."""
    return y.square().sum() + torch.cat(gates, 1).square().sum()


@on_both(
    "case recompute",
    [(case, recompute) for case in STEPS for recompute in (False, True)],
    [*((case, False) for case in STEPS), ("dropout", True)],
)
def test_backward_twice_gives_equal_gradients_and_writes_into_nothing_saved(
    backend: str, case: str, recompute: bool, device: torch.device
) -> None:
    module = stepping(backend, case, device, recompute=recompute).train()
    x = leaves_of(module, device, "one")[0].requires_grad_()
    inputs = [x, *module.parameters()]
    with saved() as tensors:
        y, gates = module(x, return_gates=True)
    assert_ran_on(backend)
    loss = everything(y, gates)
    kept = [(t, t.detach().clone()) for t in [*tensors, *inputs, y, *gates]]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs, retain_graph=True)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    for tensor, before in kept:
        assert torch.equal(tensor, before)


@on_both(
    "case train",
    [(case, train) for case in STEPS for train in (True, False)],
    [("relu", True), ("per-layer", True), ("per-layer", False), ("norms-after", True), ("dropout", True)],
)
def test_recompute_equals_saving(backend: str, case: str, train: bool, device: torch.device) -> None:
    """Same output, gates, gradients and running statistics, hence the same dropout mask and one update of the norms."""
    outcomes = []
    for recompute in (False, True):
        module = stepping(backend, case, device, recompute=recompute).train(train)
        x = leaves_of(module, device, "one")[0].requires_grad_()
        torch.manual_seed(7)
        y, gates = module(x, return_gates=True)
        torch.manual_seed(11)  # a mask drawn again in backward would differ
        everything(y, gates).backward()
        assert_ran_on(backend)
        named = {"y": y, "x.grad": x.grad, **{f"gate {o}": g for o, g in enumerate(gates)}}
        named |= {f"{name}.grad": p.grad for name, p in module.named_parameters()}
        outcomes.append(named | dict(module.named_buffers()))
    for name, expected in outcomes[0].items():
        assert_close(name, outcomes[1][name], expected, 1e-12)


@on_both("case", [("relu",)], [("gelu",)])
def test_nothing_is_saved_without_gradients(backend: str, case: str, device: torch.device) -> None:
    module = stepping(backend, case, device).eval()
    x = leaves_of(module, device, "one")[0]
    with saved() as tensors, torch.no_grad():
        module(x)
    assert tensors == []
    module.requires_grad_(False)
    with saved() as tensors:
        module(x)
    assert tensors == []
    assert_ran_on(backend)


@on_both("", [()], [()])
def test_the_output_may_be_changed_in_place(backend: str, device: torch.device) -> None:
    """What the user does to the output must not reach what was saved."""
    module = stepping(backend, "relu", device)
    x = leaves_of(module, device, "one")[0].requires_grad_()
    (expected,) = torch.autograd.grad((module(x) * 2).sum(), x)
    y = module(x)
    y.mul_(2.0)
    assert_close("x.grad", torch.autograd.grad(y.sum(), x)[0], expected, 1e-12)
    assert_ran_on(backend)


@pytest.mark.usefixtures("two_threads")
@on_both(
    "topology experts gate batch",
    [("ple", MLPSpec((96, 64), norm="layer"), GateSpec((24,)), 1501)],
    [("ple-even", MLPSpec((24, 8), "gelu"), GateSpec((6,)), 40)],
)
def test_the_same_step_twice_is_bit_for_bit_the_same(
    backend: str, topology: str, experts: MLPSpec, gate: GateSpec, batch: int, device: torch.device
) -> None:
    module = level(TOPOLOGIES[topology], experts, gate, in_features=96, dtype=torch.float32).to(device)
    x = draw("one", batch, 1, 96, dtype=torch.float32)[0].to(device)
    grads = []
    for _ in range(2):
        module.zero_grad(set_to_none=True)
        leaf = x.clone().requires_grad_()
        y, gates = module(leaf, return_gates=True)
        everything(y, gates).backward()
        grads.append([y, *gates, leaf.grad, *(p.grad for p in module.parameters())])
    for first, second in zip(*grads, strict=True):
        assert first is not None and second is not None and torch.equal(first, second)
    assert_ran_on(backend)

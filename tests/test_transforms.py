"""The modules under what transforms them: torch.func, compilation, tracing, hooks, threads."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from ple_fast import PLE, ExtractionNetwork, GateSpec, MLPSpec, Topology
from tests.helpers import EXPERTS, GATES, TOPOLOGIES, assert_close, draw, level

LEVEL = TOPOLOGIES["ple"]
SPECS: dict[str, tuple[MLPSpec, GateSpec]] = {
    "plain": (EXPERTS["2-layers"], GATES["plain"]),
    "per-layer": (EXPERTS["per-layer"], GATES["everything"]),
    "layer-norm": (EXPERTS["layer-norm-after"], GATES["hidden-layer-norm"]),
    "prelu-norms": (EXPERTS["prelu-norms"], GATES["hidden-prelu-dice"]),
}


@pytest.mark.parametrize("case", SPECS)
def test_functional_call_reads_the_parameters_it_is_given(case: str) -> None:
    module, other = level(LEVEL, *SPECS[case]).eval(), level(LEVEL, *SPECS[case], seed=1).eval()
    (x,) = draw("stacked", 9, 4, 7)
    state = {name: t.detach().clone().requires_grad_(t.is_floating_point()) for name, t in other.state_dict().items()}
    y = torch.func.functional_call(module, state, (x,))
    expected = other(x)
    assert torch.equal(y, expected)
    names = [name for name, _ in other.named_parameters()]
    ours = torch.autograd.grad(y.square().sum(), [state[name] for name in names])
    theirs = torch.autograd.grad(expected.square().sum(), list(other.parameters()))
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert_close(name, a, b, 1e-12)


@pytest.mark.parametrize("case", SPECS)
def test_func_grad_and_per_sample_gradients(case: str) -> None:
    """``torch.func``: a gradient, and with ``vmap`` one per sample, equal to those of a loop."""
    module = level(LEVEL, *SPECS[case]).eval()
    (x,) = draw("stacked", 5, 4, 7)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(module, parameters, (row[None],)).square().sum()
        return out

    whole = torch.func.grad(lambda p: torch.func.functional_call(module, p, (x,)).square().sum())(parameters)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert_close(f"{name} whole", whole[name], parameter.grad, 1e-10)
        assert_close(f"{name} summed", each[name].sum(0), parameter.grad, 1e-10)


def test_ensembles_by_vmap() -> None:
    """One call for several members with their parameters stacked."""
    members = [level(LEVEL, *SPECS["plain"], seed=seed).eval() for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(members)
    (x,) = draw("stacked", 5, 4, 7)

    def one(parameters: Any, buffers: Any) -> Any:
        return torch.func.functional_call(members[0], (parameters, buffers), (x,))

    together = torch.func.vmap(one)(parameters, buffers)
    for y, member in zip(together, members, strict=True):
        assert_close("y", y, member(x), 1e-12)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("case", SPECS)
def test_compiled_whole_equals_eager(case: str, train: bool) -> None:
    eager = PLE.from_levels([level(LEVEL, *SPECS[case])]).train(train)
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in draw("one", 9, 1, 7) * 2]
    leaves[1] = leaves[0].detach().clone().requires_grad_()
    for module, x in ((eager, leaves[0]), (run, leaves[1])):
        y, gates = module(x, return_gates=True)
        (y.square().sum() + sum(g.square().sum() for g in gates[0])).backward()
    assert_close("x.grad", leaves[1].grad, leaves[0].grad, 1e-10)
    for (name, p), q in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        assert_close(name, p.grad, q.grad, 1e-10)
    for (name, b), c in zip(compiled.named_buffers(), eager.buffers(), strict=True):
        assert_close(name, b, c, 1e-10)


def test_compiled_with_views_of_one_tensor_as_slots() -> None:
    """The mixtures of the level below, taken apart: views whose place in memory a graph cannot ask for."""
    module = level(LEVEL, *SPECS["plain"])

    def through(x: Tensor) -> Tensor:
        y: Tensor = module(list(x.unbind(1)))
        return y

    (x,) = draw("stacked", 9, 4, 7)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    compiled: Any = torch.compile(through, fullgraph=True, backend="aot_eager")
    outputs = through(leaves[0]), compiled(leaves[1])
    assert_close("output", *outputs, 1e-12)
    for y in outputs:
        y.square().sum().backward()
    assert_close("input", leaves[0].grad, leaves[1].grad, 1e-12)


def test_compiled_dropout_drops() -> None:
    module = ExtractionNetwork(3, Topology.single_task(2), experts=MLPSpec((50,), "identity", dropout=0.5),
                               gate=GateSpec())  # fmt: skip
    run = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(40, 3)
    y = run(x)
    assert abs((y == 0).double().mean().item() - 0.5) < 0.05
    assert not torch.equal(y, run(x))


def test_two_threads_run_one_module() -> None:
    module = level(LEVEL, *SPECS["layer-norm"])
    inputs = [draw("stacked", 64, 4, 7, seed=seed)[0] for seed in range(2)]
    expected = [(module(x), torch.autograd.grad(module(x).square().sum(), list(module.parameters()))) for x in inputs]
    wrong: list[str] = []

    def work(x: Tensor, y: Tensor, grads: tuple[Tensor, ...]) -> None:
        for _ in range(20):
            out = module(x)
            found = torch.autograd.grad(out.square().sum(), list(module.parameters()))
            if not torch.equal(out, y) or not all(torch.equal(a, b) for a, b in zip(found, grads, strict=True)):
                wrong.append(threading.current_thread().name)

    threads = [threading.Thread(target=work, args=(x, *row)) for x, row in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", ["blocks.0.layers.1", "gate"])
def test_weight_norm_on_a_stacked_weight(name: str) -> None:
    """A parametrised weight is the one that is used, and what stands behind it gets the gradient."""
    module = level(LEVEL, *SPECS["per-layer"]).eval()
    (x,) = draw("stacked", 9, 4, 7)
    before = module(x)
    owner = module.get_submodule(name)
    parametrizations.weight_norm(owner)
    assert_close("y", module(x), before, 1e-12)
    scale = owner.get_parameter("parametrizations.weight.original0")
    module(x).square().sum().backward()
    assert scale.grad is not None and bool(scale.grad.any())
    with torch.no_grad():
        scale.mul_(2.0)
    after = module(x)
    assert not torch.allclose(after, before)
    parametrize.remove_parametrizations(owner, "weight")
    assert_close("y", module(x), after, 1e-12)


@pytest.mark.parametrize("name", ["blocks.0.layers.1", "gate.layers.0", "gate"])
def test_hooks_that_compute_a_weight(name: str) -> None:
    """Pruning and the older weight norm set the weight before the forward of its owner, which no one calls here."""
    module = level(LEVEL, *SPECS["prelu-norms"]).eval()
    (x,) = draw("stacked", 9, 4, 7)
    before, owner = module(x), module.get_submodule(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is deprecated, and still used
        nn.utils.weight_norm(owner, "weight", dim=0)
    assert_close("y", module(x), before, 1e-12)
    scale = owner.get_parameter("weight_g")
    module(x).square().sum().backward()
    assert scale.grad is not None and bool(scale.grad.any())
    with torch.no_grad():
        scale.mul_(2.0)
    after = module(x)
    assert not torch.allclose(after, before)
    nn.utils.remove_weight_norm(owner, "weight")
    assert_close("y", module(x), after, 1e-12)
    prune.l1_unstructured(owner, "weight", amount=0.5)
    original = owner.get_parameter("weight_orig")
    y = module(x)
    y.square().sum().backward()
    assert original.grad is not None and not original.grad[owner.get_buffer("weight_mask") == 0].any()
    with torch.no_grad():
        original.mul_(2.0)
    assert not torch.allclose(module(x), y)


def test_a_trace_by_torch_jit() -> None:
    module = level(LEVEL, *SPECS["per-layer"]).eval()
    (x,) = draw("stacked", 9, 4, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and it warns of the shapes that it makes constant
        traced = torch.jit.trace(module, (x,), check_trace=False)
    assert_close("y", traced(x), module(x), 1e-12)


def test_dropout_under_vmap_follows_its_randomness() -> None:
    module = ExtractionNetwork(
        3, Topology.single_task(1), experts=MLPSpec((50,), "identity", dropout=0.5), gate=GateSpec()
    )
    x = torch.randn(40, 3).expand(2, 40, 3)
    first, second = torch.func.vmap(module, randomness="different")(x)
    assert not torch.equal(first == 0, second == 0)
    first, second = torch.func.vmap(module, randomness="same")(x)
    assert torch.equal(first, second)
    assert abs((first == 0).double().mean().item() - 0.5) < 0.05
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(module)(x)


def test_forward_mode_and_hessian() -> None:
    module = level(LEVEL, EXPERTS["gelu"], GATES["everything"]).eval()
    (x,) = draw("stacked", 3, 4, 7)
    (direction,) = draw("stacked", 3, 4, 7, seed=5)

    def loss(x: Tensor) -> Tensor:
        out: Tensor = module(x).square().sum()
        return out

    slope = torch.func.jvp(loss, (x,), (direction,))[1]
    gradient = torch.autograd.grad(loss(leaf := x.clone().requires_grad_()), leaf)[0]
    assert_close("jvp", slope, (gradient * direction).sum(), 1e-10)
    step = 1e-5
    curve = torch.func.jvp(torch.func.grad(loss), (x,), (direction,))[1]
    ahead, behind = (torch.func.grad(loss)(x + sign * step * direction) for sign in (1, -1))
    assert_close("hessian product", curve, (ahead - behind) / (2 * step), 1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_inside_a_checkpoint(recompute: bool) -> None:
    """``torch.utils.checkpoint`` repeats the forward: same output and gradients, dropout included."""
    outcomes = []
    ways: list[Any] = [lambda m, x: m(x), lambda m, x: checkpoint(m, x, use_reentrant=False)]
    for run in ways:
        module = PLE.from_levels([level(LEVEL, MLPSpec((6, 4), dropout=0.5), recompute=recompute)])
        x = torch.randn(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        torch.manual_seed(7)
        y = run(module, x)
        y.square().sum().backward()
        outcomes.append([y, x.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*outcomes, strict=True):
        assert_close("checkpoint", a, b, 1e-12)

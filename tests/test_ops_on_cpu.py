"""A compiled level on the CPU is one operator, forward and backward, which computes what an eager call does."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from ple_fast import ExtractionNetwork, GateSpec, MLPSpec, use_backend
from tests.helpers import EXPERTS, FORMS, GATES, TOPOLOGIES, assert_close, by_route, draw, has_dropout, level
from tests.operator_checks import check_operators
from tests.product_helpers import blocks_of

TWO_BLOCKS = [MLPSpec((6, 4), "gelu", norm="batch")] * 4 + [MLPSpec((5, 3, 4), dropout=0.5)] * 2
DROPS = MLPSpec((6, 5, 4), ("relu", "gelu", "identity"), norm=(None, "layer", "batch"), dropout=(0.5, 0.25, 0.0))
CASES: dict[str, tuple[str, Any, GateSpec]] = {
    **{f"{name} experts": ("ple-even", spec, GateSpec()) for name, spec in EXPERTS.items()},
    **{f"{name} gates": ("ple", EXPERTS["2-layers"], gate) for name, gate in GATES.items()},
    **{f"{name} wiring": (name, EXPERTS["batch-norm"], GateSpec()) for name in TOPOLOGIES},
    "two blocks": ("ple-even", TWO_BLOCKS, GATES["everything"]),
    "dropout": ("ple-even", DROPS, GateSpec((5, 3), dropout=0.5)),
}


def outcome(module: nn.Module, x: Any, leaves: list[Tensor]) -> dict[str, Tensor]:
    """Output, weights, gradients and buffers of a training step."""
    for leaf in leaves:
        leaf.grad = None
    module.zero_grad()
    y, gates = module(x, return_gates=True)
    generator = torch.Generator().manual_seed(3)
    outs = [y, *(g for g in gates if g.requires_grad)]
    torch.autograd.backward(outs, [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outs])
    found = {"y": y} | {f"weights {i}": g for i, g in enumerate(gates)} | dict(module.named_buffers())
    found |= {f"{name}.grad": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | {f"x {i}.grad": leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None}


def assert_same(module: ExtractionNetwork, form: str, rows: int, dtype: torch.dtype = torch.float64) -> None:
    slots = module.topology.num_slots
    assert slots is not None
    leaves = [t.to(dtype).requires_grad_() for t in draw(form, rows, slots, 7)]
    seed = torch.tensor(5)
    with (
        mock.patch("ple_fast.modules.network.draw_seed", return_value=seed),
        mock.patch("ple_fast.ops.operators.draw_seed", return_value=seed),
    ):
        other = copy.deepcopy(module)
        expected = outcome(module, FORMS[form].build(leaves, slots), leaves)
        with by_route("operator"):
            found = outcome(other, FORMS[form].build(leaves, slots), leaves)
    # A gradient that is nowhere else is zero in one flat result.
    for name in expected | found:
        theirs = expected.get(name, torch.zeros_like(found[name]) if name in found else None)
        assert theirs is not None
        assert_close(name, found[name], theirs, 1e-12 if dtype == torch.float64 else 1e-2)
    assert expected.keys() <= found.keys()


@pytest.mark.parametrize("blocks", ["one block", "many blocks"])
@pytest.mark.parametrize("case", CASES)
def test_the_operator_computes_what_an_eager_call_does(case: str, blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if blocks == "many blocks":
        blocks_of(4, monkeypatch)
    topology, experts, gate = CASES[case]
    module = level(TOPOLOGIES[topology], experts, gate)
    assert_same(module.train(), "stacked", 11)
    assert_same(module.eval(), "list", 6)


@pytest.mark.parametrize("case", ["two blocks", "dropout", "plain gates"])
def test_the_operator_recomputes(case: str) -> None:
    topology, experts, gate = CASES[case]
    assert_same(level(TOPOLOGIES[topology], experts, gate, recompute=True).train(), "list-of-views", 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["plain gates", "layer-norm experts", "batch-norm-after experts"])
def test_the_operator_takes_other_dtypes(case: str, dtype: torch.dtype) -> None:
    topology, experts, gate = CASES[case]
    assert_same(level(TOPOLOGIES[topology], experts, gate).to(dtype).train(), "column-slice", 9, dtype)


@pytest.mark.parametrize("rows", [0, 1, 5, 40])
@pytest.mark.parametrize("form", ["one", "stacked", "list"])
@pytest.mark.parametrize("case", ["plain gates", "batch-norm experts", "dice experts", "dropout-in-eval experts"])
def test_the_operator_infers(case: str, form: str, rows: int) -> None:
    topology, experts, gate = CASES[case]
    module = level(TOPOLOGIES[topology], experts, gate).eval()
    slots = module.topology.num_slots
    assert slots is not None
    x = FORMS[form].build(draw(form, rows, slots, 7), slots)
    with torch.no_grad():
        expected, gates = module(x, return_gates=True)
        with by_route("operator"):
            assert_close("y", module(x), expected, 1e-12)
            y, found = module(x, return_gates=True)
        for ours, theirs in zip([y, *found], [expected, *gates], strict=True):
            assert_close("y and weights", ours, theirs, 1e-12)
        if has_dropout(experts, gate):  # in train mode it drops, gradients or not
            with by_route("operator"):
                first, second = module.train()(x), module(x)
            assert rows == 0 or not torch.equal(first, second)


def test_no_rows_give_gradients_of_zero() -> None:
    module = level(TOPOLOGIES["ple"], EXPERTS["2-layers"])
    x = torch.empty(0, 7, dtype=torch.float64, requires_grad=True)
    with by_route("operator"):
        module(x).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 7)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("case", ["batch-norm experts", "dice experts", "everything gates"])
def test_no_rows_leave_running_statistics_as_they_are(case: str, momentum: float | None) -> None:
    topology, experts, gate = CASES[case]
    module = level(TOPOLOGIES[topology], experts, gate).train()
    for child in module.modules():
        if isinstance(child, nn.BatchNorm1d):
            child.momentum = momentum
    before = copy.deepcopy(dict(module.named_buffers()))
    for x in (torch.empty(0, 7, dtype=torch.float64), torch.empty(0, 7, dtype=torch.float64, requires_grad=True)):
        with by_route("operator"):
            module(x)
    for name, buffer in module.named_buffers():
        if "running" in name:  # they take up themselves, which may round
            torch.testing.assert_close(buffer, before[name], rtol=1e-15, atol=0.0)


@pytest.mark.parametrize("case", ["plain gates", pytest.param("two blocks", marks=pytest.mark.slow)])
def test_opcheck(case: str) -> None:
    topology, experts, gate = CASES[case]
    module = level(TOPOLOGIES[topology], experts, gate).train()
    slots = module.topology.num_slots
    assert slots is not None
    check_operators(module, FORMS["stacked"].build(draw("stacked", 5, slots, 7), slots), listed=True)


def targets(counter: CompileCounterWithBackend) -> list[str]:
    return [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]


@pytest.mark.parametrize("case", ["two blocks", "dropout"])
def test_a_compiled_step_draws_and_counts_as_an_eager_one(case: str) -> None:
    """Masks come out of PyTorch's generator, one seed per step; running statistics take up every batch once."""
    torch.compiler.reset()
    topology, experts, gate = CASES[case]
    eager = level(TOPOLOGIES[topology], experts, gate).train()
    compiled = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    program = torch.compile(compiled, fullgraph=True, backend=counter)
    for rows in (5, 8, 3):
        leaves = [t.requires_grad_() for t in draw("stacked", rows, eager.topology.num_slots or 1, 7, seed=rows)]
        torch._dynamo.mark_dynamic(leaves[0], 0)
        found: list[list[Tensor]] = []
        for module, call in ((eager, eager), (compiled, program)):
            torch.manual_seed(rows)
            leaves[0].grad = None
            module.zero_grad()
            y = call(leaves[0])
            y.square().sum().backward()
            assert leaves[0].grad is not None
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            found.append([y, leaves[0].grad, *grads, *(b.clone() for b in module.buffers())])
        for i, (theirs, ours) in enumerate(zip(*found, strict=True)):
            assert_close(f"{rows} rows, {i}", ours, theirs, 1e-12)
    assert counter.frame_count == 1
    assert any("autograd_function_apply" in target or "CompiledLevel" in target for target in targets(counter))


@pytest.mark.parametrize(("plain", "operators"), [(False, 1), (True, 0)])
def test_inference_is_one_operator_unless_plain(plain: bool, operators: int) -> None:
    torch.compiler.reset()
    module = level(TOPOLOGIES["ple"], EXPERTS["batch-norm"]).eval().for_inference(plain=plain)
    x = draw("stacked", 4, module.topology.num_slots or 1, 7)[0]
    counter = CompileCounterWithBackend("aot_eager")
    with torch.no_grad(), use_backend("torch"):
        assert_close("y", torch.compile(module, fullgraph=True, backend=counter)(x), module(x), 1e-12)
    assert targets(counter).count("ple_fast.level_forward.default") == operators

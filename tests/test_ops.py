"""The level as operators: what tracers see equals what eager calls compute, in one graph for every batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from ple_fast import PLE, ExtractionNetwork, MLPSpec, last_backend, use_backend
from tests.helpers import EXPERTS, FORMS, GATES, TOPOLOGIES, draw, level
from tests.operator_checks import check_operators

pytest.importorskip("triton")

TWO_BLOCKS = [MLPSpec((6, 4), "gelu")] * 4 + [MLPSpec((5, 3, 4))] * 2
CASES: dict[str, tuple[str, Any, str]] = {
    "ple": ("ple", EXPERTS["2-layers"], "plain"),
    "last": ("ple-last", EXPERTS["3-layers"], "no-bias"),
    "one-layer": ("adatt", EXPERTS["1-layer"], "plain"),
    "hidden-gates": ("mixed-kinds", EXPERTS["gelu"], "two-hidden"),
    "learned-slopes": ("ple-even", EXPERTS["prelu"], "temperature"),
    "row-dice": ("ple-even", EXPERTS["row-dice"], "hidden-row-dice"),
    "static": ("single-task", EXPERTS["identity"], "plain"),
    "two-blocks": ("ple-even", TWO_BLOCKS, "plain"),
}


def build(case: str, device: torch.device, **kwargs: Any) -> ExtractionNetwork:
    topology, experts, gate = CASES[case]
    return level(TOPOLOGIES[topology], experts, GATES[gate], **kwargs).to(device)


def step(run: Any, module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, weights and every gradient of a training step."""
    module.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    torch._dynamo.mark_dynamic(leaf, 0)
    with use_backend("triton"):
        y, gates = run(leaf, return_gates=True)
    choice = last_backend()
    assert choice is not None
    assert choice.name == "triton"
    torch.autograd.backward([y.square().sum(), *(g.square().sum() for g in gates if g.requires_grad)])
    assert leaf.grad is not None
    return [y, *gates, leaf.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("case", "recompute"),
    [
        ("ple", False),
        ("ple", True),
        ("one-layer", False),
        ("two-blocks", False),
        *(pytest.param(case, False, marks=pytest.mark.slow) for case in ("last", "learned-slopes", "static")),
        *(pytest.param("hidden-gates", recompute, marks=pytest.mark.slow) for recompute in (False, True)),
    ],
)
def test_a_compiled_step_is_one_graph_that_serves_every_batch(case: str, recompute: bool, device: torch.device) -> None:
    torch.compiler.reset()
    eager = build(case, device, recompute=recompute)
    compiled = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(compiled, fullgraph=True, backend=counter)
    slots = eager.topology.num_slots
    for batch in (5, 8, 3):
        x = torch.randn(batch, slots or 1, 7, dtype=torch.float64, device=device)
        for ours, theirs in zip(step(run, compiled, x), step(eager, eager, x), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == 1
    assert any("CompiledLevelFunction" in str(n) or "autograd_function_apply" in str(n) for n in _nodes(counter))


def _nodes(counter: CompileCounterWithBackend) -> list[Any]:
    return [node.target for graph in counter.graphs for node in graph.graph.nodes]


@pytest.mark.parametrize("form", ["one", "stacked", "list", "list-of-views"])
def test_compiled_inference_is_one_operator_per_level(form: str, device: torch.device) -> None:
    torch.compiler.reset()
    module = build("ple", device).eval()
    slots = module.topology.num_slots
    assert slots is not None
    x = FORMS[form].build([leaf.to(device) for leaf in draw(form, 4, slots, 7)], slots)
    counter = CompileCounterWithBackend("aot_eager")
    with torch.no_grad(), use_backend("triton"):
        y = torch.compile(module, fullgraph=True, backend=counter)(x)
        torch.testing.assert_close(y, module(x))
    assert [str(target) for target in _nodes(counter)].count("ple_fast.level_forward.default") == 1


def test_the_inductor_runs_the_operators(device: torch.device) -> None:
    torch.compiler.reset()
    eager = PLE(7, 2, expert_units=(6, 4)).to(device)
    compiled = copy.deepcopy(eager)
    x = torch.randn(5, 7, device=device)
    run = torch.compile(compiled, fullgraph=True)
    for ours, theirs in zip(_plain_step(run, compiled, x), _plain_step(eager, eager, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def _plain_step(run: Any, module: nn.Module, x: Tensor) -> list[Tensor]:
    with use_backend("triton"):
        y = run(x)
    y.square().sum().backward()
    return [y, *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_serves_any_batch_after_loading(strict: bool, device: torch.device, tmp_path: Any) -> None:
    module = PLE(7, 2, expert_units=(6, 4)).to(device).eval()
    x = torch.randn(4, 7, device=device)
    batch = torch.export.Dim("batch", min=2)
    with use_backend("triton"), torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("ple_fast.level_forward.default") == 2
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for rows in (4, 9):
        x = torch.randn(rows, 7, device=device)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), module(x))


@pytest.mark.parametrize(
    ("case", "form", "dtype", "listed"),
    [
        ("ple", "one", torch.float64, False),
        ("ple", "list-of-views", torch.bfloat16, True),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                ("ple", "stacked", torch.float32, False),
                ("ple", "list", torch.float32, True),
                ("ple", "column-slice", torch.float32, False),
                ("hidden-gates", "slots-first", torch.float64, True),
                ("two-blocks", "stacked", torch.float32, False),
                ("two-blocks", "list", torch.float64, True),
            )
        ),
    ],
)
def test_opcheck(case: str, form: str, dtype: torch.dtype, listed: bool, device: torch.device) -> None:
    module = build(case, device).to(dtype)
    slots = module.topology.num_slots
    assert slots is not None
    x = FORMS[form].build([leaf.to(device, dtype) for leaf in draw(form, 4, slots, 7)], slots)
    with use_backend("triton"):
        check_operators(module, x, listed=listed)

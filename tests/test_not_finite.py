"""NaN and infinity go where PyTorch sends them and nowhere else: none is swallowed, none reaches a task that shares
nothing with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ple_fast import CGC, PLE, SingleTask, use_backend
from ple_fast.reference import PLEReference
from soak import places
from soak.make_ups import Trial, draw_trial
from tests.conftest import HAS_TRITON
from tests.product_helpers import ways

__all__ = ["ways"]

NAN = float("nan")
CHUNK = 40


@pytest.mark.parametrize("first", range(0, 400, CHUNK))
def test_places_in_random_levels_are_the_references(first: int) -> None:
    for number in range(first, first + CHUNK):
        places.check(draw_trial(number), number)


@pytest.mark.slow
def test_places_in_thousands_of_random_levels_are_the_references() -> None:
    assert not [failure for failure in places.run(1000, 3000, {}) if failure is not None]


@pytest.fixture
def _rounded_as_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "TOLERANCE", 1e-3)


@pytest.mark.usefixtures("ways", "_rounded_as_float32")
@pytest.mark.parametrize("first", range(400, 600, CHUNK))
def test_places_by_each_way_of_the_products_are_the_references(first: int) -> None:
    for number in range(first, first + CHUNK):
        trial = replace(draw_trial(number), dtype=torch.float32, autocast=None)
        if trial.way != "double":
            places.check(trial, number)


def _suits_kernels(trial: Trial) -> bool:
    """Small enough for the interpreter."""
    return len(trial.levels) == 1 and 0 < trial.rows < 9


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("number", [n for n in range(300) if _suits_kernels(draw_trial(n))][:24])
def test_places_in_kernels_are_the_references(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN; infinities times the two signs of a norm's scale and shift are PyTorch's on a GPU, not those on a CPU."""
    monkeypatch.setattr(places, "VALUES", (NAN,))
    with use_backend("triton"):
        places.check(replace(draw_trial(number), autocast=None, dtype=torch.float64, way="step"), number)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("rows", [1, 20, 200, 5000])
def test_a_nan_in_a_weight_is_swallowed_by_no_relu(rows: int, trains: bool) -> None:
    torch.manual_seed(0)
    ple = PLE(64, num_tasks=2, expert_units=(32, 16))
    with torch.no_grad():
        ple.levels[0].blocks[0].layers[0].weight[1, 2, 3] = NAN  # type: ignore[union-attr, index]
    x = torch.randn(rows, 64)
    with torch.set_grad_enabled(trains):
        y = ple(x)
    assert torch.equal(y.isnan(), PLEReference.like(ple)(x).isnan())
    assert y.isnan().any(dim=2).all()


def _apart(module: nn.Module, expert: Tensor, rows: int, *, compiled: bool = False) -> None:
    """A NaN in the first task's expert, and a gradient of its that is not finite, leave the second task alone."""
    torch.manual_seed(0)
    x = torch.randn(rows, 6, requires_grad=True)
    call = torch.compile(module, backend="eager") if compiled else module
    clean = call(x)[:, 1]
    (clean * torch.arange(1.0, 5)).sum().backward()
    known = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    with torch.no_grad():
        expert[0, 1, 2] = NAN
    y = call(x)
    assert not y[:, 0].isfinite().all()
    assert torch.equal(y[:, 1], clean), "the other task's prediction is what it was"
    d = torch.zeros_like(y)
    d[:, 0], d[:, 1] = NAN, torch.arange(1.0, 5)
    y.backward(d)
    first = 0
    for name, parameter in module.named_parameters():
        if name in known and parameter.grad is not None and parameter.dim() == 3 and "blocks" in name:
            assert parameter.grad[0].isnan().any(), name
            assert torch.allclose(parameter.grad[1], known[name][1]), f"{name}: the other task's expert"
            first += 1
    assert first == 1


@pytest.mark.parametrize("way", ["eager", "differentiable", "compiled"])
@pytest.mark.parametrize("rows", [1, 5, 100, 700])
@pytest.mark.parametrize("kind", ["single task", "cgc"])
def test_tasks_that_share_nothing_see_nothing_of_each_other(
    kind: str, rows: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    if kind == "cgc":
        module: nn.Module = CGC(6, 2, task_experts=1, shared_experts=0, expert_units=(4,))
    else:
        module = SingleTask(6, 2, expert_units=(4,))
    if way == "differentiable":
        monkeypatch.setattr("ple_fast.functional.must_see_operators", lambda weight: True)
    level = module.levels[0] if hasattr(module, "levels") else module  # type: ignore[index]
    _apart(module, level.blocks[0].layers[0].weight, rows, compiled=way == "compiled")  # type: ignore[union-attr, index]


def test_tasks_stay_apart_in_an_exported_program() -> None:
    torch.manual_seed(1)
    module = CGC(6, 3, task_experts=2, shared_experts=1, expert_units=(4,)).for_inference(plain=True)
    with torch.no_grad():
        module.levels[0].blocks[0].layers[0].weight[0, 1, 2] = NAN  # type: ignore[union-attr, index]
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(module, (torch.randn(5, 6),), dynamic_shapes=({0: rows},)).module()
    y = program(torch.randn(9, 6))
    assert y[:, 0].isnan().any()
    assert y[:, 1:].isfinite().all()

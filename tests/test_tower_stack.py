"""Towers that run as one level: the numbers of towers one after the other, and what a user may do to them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ple_fast import use_backend
from ple_fast.functional import extraction_level
from ple_fast.losses import TaskLoss
from ple_fast.model import MultiTaskModel, tower_stack
from ple_fast.model.tower_stack import run_towers
from ple_fast.model.towers import TOWER_ACTIVATIONS, build_tower
from tests.helpers import assert_close
from tests.model_helpers import model, table

OUTPUTS = {"alike": (1, 1, 1), "runs": (1, 1, 3), "mixed": (1, 3, 1, 3), "alone": (2, 1, 1)}


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Whatever the number of rows, the towers are stacked."""
    if request.param == "triton":
        pytest.importorskip("triton")
    with use_backend(request.param), mock.patch.object(tower_stack, "STACKED_PRODUCTS", 0):
        yield request.param


def towers_of(
    outputs: Sequence[int] = (1, 1, 1), activation: str = "relu", units: Sequence[int] = (6, 5), dropout: float = 0.0,
    dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu",
) -> Any:  # fmt: skip
    torch.manual_seed(0)
    made = nn.ModuleList(build_tower([7, *units], count, activation, dropout) for count in outputs)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made.to(device=device, dtype=dtype)


def input_of(rows: int, towers: Any) -> Tensor:
    like = next(towers.parameters())
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, len(towers), 7, generator=generator, dtype=torch.float64).to(like.device, like.dtype)
    return x.requires_grad_()


def one_by_one(towers: nn.ModuleList, x: Tensor) -> list[Tensor]:
    return [tower(x[:, k]) for k, tower in enumerate(towers)]


def levels(call: Callable[[], Any]) -> int:
    """How many levels a call runs."""
    with mock.patch.object(tower_stack, "extraction_level", wraps=extraction_level) as run:
        call()
    return run.call_count


def hold(towers: nn.ModuleList, x: Tensor, tolerance: float = 1e-10) -> None:
    """Outputs and every gradient are those of towers one after the other."""
    outputs, expected = run_towers(towers, x), one_by_one(towers, x)
    given = [torch.randn(y.shape, generator=torch.Generator().manual_seed(k)).to(y) for k, y in enumerate(expected)]
    leaves = [x, *(parameter for parameter in towers.parameters() if parameter.requires_grad)]
    ours, theirs = (torch.autograd.grad(list(y), leaves, given) for y in (outputs, expected))
    for k, (own, other) in enumerate(zip((*outputs, *ours), (*expected, *theirs), strict=True)):
        assert own.dtype == other.dtype
        assert_close(f"result {k}", own, other, tolerance)


@pytest.mark.parametrize("activation", TOWER_ACTIVATIONS)
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_numbers(outputs: str, activation: str, backend: str, device: torch.device) -> None:
    towers = towers_of(OUTPUTS[outputs], activation, device=device)
    x = input_of(9, towers)
    assert levels(lambda: hold(towers, x)) == (2 if outputs == "mixed" else 1)


@pytest.mark.parametrize("units", [(), (6,), (6, 5, 4)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 300])
def test_depths_and_rows(rows: int, units: Sequence[int], backend: str, device: torch.device) -> None:
    towers = towers_of(units=units, device=device)
    x = input_of(rows, towers)
    assert levels(lambda: hold(towers, x)) == 1
    with torch.inference_mode():
        for own, other in zip(run_towers(towers, x), one_by_one(towers, x), strict=True):
            assert_close("y", own, other, 1e-10)


def test_no_rows(backend: str, device: torch.device) -> None:
    towers = towers_of(device=device)
    hold(towers, input_of(0, towers))


def test_low_precision_and_autocast(backend: str, device: torch.device) -> None:
    towers = towers_of(dtype=torch.float32, device=device)
    x = input_of(40, towers)
    with torch.autocast(device.type, torch.bfloat16):
        assert levels(lambda: run_towers(towers, x)) == 1
        outputs, expected = run_towers(towers, x), one_by_one(towers, x)
    exact = one_by_one(towers, x)
    for own, other, true in zip(outputs, expected, exact, strict=True):
        assert own.dtype == other.dtype == torch.bfloat16
        assert (own - true).abs().max() <= 2 * (other - true).abs().max() + 0.01
    torch.stack([y.float().sum() for y in outputs]).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    half = towers.to(torch.bfloat16)
    assert run_towers(half, input_of(40, half))[0].dtype == torch.bfloat16


def test_few_rows_on_a_cpu_and_what_is_traced_run_one_by_one() -> None:
    towers = towers_of(dtype=torch.float32)
    x = input_of(64, towers)
    assert levels(lambda: run_towers(towers, x)) == 0

    def first(x: Tensor) -> Tensor:
        return run_towers(towers, x)[0]

    with mock.patch.object(tower_stack, "STACKED_PRODUCTS", 64 * 3 * (42 + 30 + 5)):
        assert levels(lambda: run_towers(towers, x)) == 1
        assert levels(lambda: run_towers(towers, x[:63])) == 0
        compiled: Any = torch.compile(first, backend="eager", fullgraph=True)
        assert levels(partial(compiled, x)) == 0
        by_row: Any = torch.func.vmap(first)
        assert levels(partial(by_row, x.unsqueeze(1))) == 0
    with mock.patch.object(tower_stack, "STACKED_PRODUCTS", 64 * 3 * (42 + 30 + 5) + 1):
        assert levels(lambda: run_towers(towers, x)) == 0


def test_what_no_loss_reads_has_no_gradient(backend: str, device: torch.device) -> None:
    towers = towers_of(device=device)
    x = input_of(9, towers)
    outputs = run_towers(towers, x)
    outputs[1].sum().backward(retain_graph=True)
    for k, tower in enumerate(towers):
        assert all((parameter.grad is None) == (k != 1) for parameter in tower.parameters())
    (outputs[0].sum() + outputs[2].sum()).backward()
    theirs = towers_of(device=device)
    torch.stack([y.sum() for y in one_by_one(theirs, input_of(9, theirs))]).sum().backward()
    for own, other in zip(towers.parameters(), theirs.parameters(), strict=True):
        assert own.grad is not None and other.grad is not None
        assert_close("gradient", own.grad, other.grad, 1e-10)


def test_frozen_parts_have_no_gradient(backend: str, device: torch.device) -> None:
    towers = towers_of(device=device)
    towers[1].requires_grad_(False)
    for tower in towers:
        tower[0].weight.requires_grad_(False)
    x = input_of(9, towers)
    assert levels(lambda: hold(towers, x)) == 1
    hold(towers, x.detach().requires_grad_())
    torch.cat(list(run_towers(towers, x.detach()))).sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in towers.parameters())
    towers.requires_grad_(False)
    assert not any(y.requires_grad for y in run_towers(towers, x.detach()))


def test_outputs_may_be_written_to(backend: str, device: torch.device) -> None:
    towers = towers_of(device=device)
    x = input_of(9, towers)
    expected = torch.autograd.grad(torch.cat(one_by_one(towers, x)).sigmoid().sum(), x)[0]
    outputs = run_towers(towers, x)
    for y in outputs:
        y.squeeze(1).sigmoid_()
    found = torch.autograd.grad(torch.cat(list(outputs)).sum(), x)[0]
    assert_close("gradient", found, expected, 1e-10)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "equal slots": lambda x: x[:, :1].expand(-1, 3, -1),
    "columns first": lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "slots first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other slot": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("layout", STRIDES)
def test_any_layout_is_read_and_outputs_are_contiguous(layout: str, backend: str, device: torch.device) -> None:
    towers = towers_of((2, 2, 2), device=device)
    x = STRIDES[layout](input_of(9, towers).detach()).detach().requires_grad_()
    hold(towers, x)
    for y in run_towers(towers, x):
        assert y.is_contiguous() and not y._is_view()
    with torch.no_grad():
        assert all(y.is_contiguous() for y in run_towers(towers, x))


def test_derivatives_of_derivatives(backend: str, device: torch.device) -> None:
    towers = towers_of((1, 1), "tanh", (2,), device=device)
    x = input_of(2, towers)

    def call(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(run_towers(towers, x))

    leaves = (x, *towers.parameters())
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)
    y = torch.cat(list(run_towers(towers, x)))
    rows = torch.eye(len(y), dtype=torch.float64, device=device).unsqueeze(2)
    batched = torch.autograd.grad(y, leaves, rows, is_grads_batched=True)
    for k, row in enumerate(rows):
        again = torch.cat(list(run_towers(towers, x)))
        for own, other in zip(batched, torch.autograd.grad(again, leaves, row), strict=True):
            assert_close("gradient", own[k], other, 1e-10)


def test_dropout_is_drawn_from_pytorchs_generator(backend: str, device: torch.device) -> None:
    towers = towers_of(dropout=0.5, units=(64,), device=device).train()
    x = input_of(300, towers)
    torch.manual_seed(1)
    first = run_towers(towers, x)
    again = run_towers(towers, x)
    torch.manual_seed(1)
    same = run_towers(towers, x)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], again[0])
    if backend == "torch":
        kept = torch.stack([torch.stack(list(run_towers(towers, x))) for _ in range(30)]).mean(0)
        whole = torch.stack(one_by_one(towers.eval(), x))
        assert (kept - whole).mean().abs() < 0.1 * whole.std()
    towers.eval()
    hold(towers, x)  # in eval mode nothing is dropped
    towers.train()
    towers[1].eval()
    assert levels(lambda: run_towers(towers, x)) == 1  # of the two that drop
    assert_close("in eval mode", run_towers(towers, x)[1], towers[1](x[:, 1]), 1e-10)


def test_all_may_be_dropped(backend: str, device: torch.device) -> None:
    towers = towers_of(dropout=1.0, device=device).train()
    x = input_of(9, towers)
    assert levels(lambda: hold(towers, x)) == 0


def _hook(towers: Any) -> None:
    towers[0][1].register_forward_hook(lambda module, inputs, output: 2 * output)


def _double(towers: Any) -> None:
    first = towers[0]
    first.forward = lambda x: 2 * type(first).forward(first, x)


def _backward_hook(towers: Any) -> None:
    towers[0].register_full_backward_hook(lambda module, given, grads: (3 * given[0],))


def _parametrised(towers: Any) -> None:
    first: Any = towers[0]
    parametrize.register_parametrization(first[0], "weight", nn.Tanh(), unsafe=True)


def _sigmoid(towers: Any) -> None:
    first: Any = towers[0]
    first.append(nn.Sigmoid())


def _no_bias(towers: Any) -> None:
    first: Any = towers[0]
    first[4] = nn.Linear(5, 1, bias=False, dtype=torch.float64)


def _other(towers: Any) -> None:
    first: Any = towers[0]
    first[1] = nn.Tanh()


CHANGES: dict[str, Callable[[Any], None]] = {
    "hook": _hook, "forward": _double, "backward hook": _backward_hook, "parametrised": _parametrised,
    "sigmoid": _sigmoid, "no bias": _no_bias, "other activation": _other,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_tower_that_somebody_changed_runs_as_it_is(change: str, backend: str) -> None:
    towers = towers_of()
    CHANGES[change](towers)
    x = input_of(9, towers)
    assert levels(lambda: hold(towers, x)) == 1  # of the two others
    hold(nn.ModuleList([towers[0], towers[1]]), x[:, :2].detach().requires_grad_())


def test_a_tower_of_torchscript_runs_as_it_is(backend: str) -> None:
    for nested in (False, True):
        towers = towers_of()
        scripted: Any = torch.jit.script(towers[0])
        towers[0] = nn.Sequential(scripted) if nested else scripted
        hold(towers, input_of(9, towers))


def test_tied_towers_and_hooks_of_tensors(backend: str) -> None:
    towers = towers_of()
    towers[2] = towers[0]
    x = input_of(9, towers)
    assert levels(lambda: hold(towers, x)) == 1
    weight: Any = towers[1][0].weight
    with torch.no_grad():
        handle = weight.register_hook(lambda grad: 2 * grad)
    hold(towers, x)
    handle.remove()


def test_a_step_of_an_optimizer_and_data_written_to_are_seen(backend: str) -> None:
    towers = towers_of()
    x = input_of(9, towers)
    run_towers(towers, x)
    for parameter in towers.parameters():
        parameter.data.add_(1.0)
    hold(towers, x)


def test_an_input_that_does_not_fit_raises_as_pytorch_does(backend: str) -> None:
    towers = towers_of()
    x = input_of(9, towers)
    for wrong in (x[:, :, :5], x.float()):
        with pytest.raises(RuntimeError):
            run_towers(towers, wrong)
    with pytest.raises(ValueError, match="argument"):
        run_towers(towers, x[:, :2])


CHAIN = (TaskLoss("view"), TaskLoss("click"), TaskLoss("buy"))


def data_of(rows: int) -> tuple[dict[str, Any], dict[str, Any]]:
    data, labels = table(rows)
    return data, {task.name: labels["click"] for task in CHAIN}


def test_a_model_trains_to_the_same_weights(backend: str) -> None:
    def trained(stacks: bool) -> MultiTaskModel:
        made = model(tasks=CHAIN, tower_activation="prelu", tower_units=(6, 5)).double()
        data, labels = data_of(40)
        with mock.patch.object(tower_stack, "STACKED_PRODUCTS", 0 if stacks else 1 << 60):
            run = levels(lambda: made.fit(data, labels, epochs=3, batch_size=16, progress=False))
        assert run == (9 if stacks else 0)
        return made

    with use_backend("torch"):
        ours, theirs = trained(True), trained(False)
    for (name, own), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert_close(name, own, other, 1e-9)


def test_predictions_of_several_threads_while_it_trains(backend: str) -> None:
    made = model(tasks=CHAIN, tower_dropout=0.5)
    data, labels = data_of(40)
    rows, found = made.encode(data), list[Any]()
    with use_backend("torch"):
        expected = model(tasks=CHAIN, tower_dropout=0.5).predict(data)["click"]

    def serve() -> None:
        with use_backend("torch"):
            found.extend(made.predict(rows)["click"] for _ in range(5))

    with use_backend("torch"):
        threads = [threading.Thread(target=serve) for _ in range(2)]
        for thread in threads:
            thread.start()
        made.fit(data, labels, epochs=2, batch_size=20, lr=0.0, progress=False)
        for thread in threads:
            thread.join()
    assert len(found) == 10 and all(np.allclose(row, expected, atol=1e-6) for row in found)


@pytest.mark.parametrize("count", [2, 6])
def test_launches_do_not_grow_with_the_number_of_towers(count: int, device: torch.device) -> None:
    """Two layers: forward two launches; backward two for each layer, and one that adds up the weights' gradients."""
    pytest.importorskip("triton")
    from ple_fast_kernels import launches

    towers = towers_of((1,) * count, units=(6,), dtype=torch.float32, device=device)
    x = input_of(9, towers)
    with use_backend("triton"):
        before = launches()
        outputs = run_towers(towers, x)
        assert launches() - before == 2
        before = launches()
        torch.cat(list(outputs)).sum().backward()
        assert launches() - before == 5

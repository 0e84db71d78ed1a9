"""What is as it was after a swap and the way back: modes of every module, what an optimizer has of its parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ple_fast import accelerate, restore
from tests import test_convert_deepctr_torch as deepctr
from tests.test_accelerate import make, step


def dropouts_alone(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()


def layers_alone(model: Any) -> None:
    for module in model.cgc_layers.modules():
        if isinstance(module, nn.Linear | nn.ReLU | nn.ModuleList):
            module.eval()


def one_container(model: Any) -> None:
    model.cgc_layers[0].experts_shared.training = False


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("meanwhile", [None, "train", "eval"])
@pytest.mark.parametrize("change", [dropouts_alone, layers_alone, one_container])
def test_modes_that_nothing_reads_come_back_too(change: Callable[[Any], None], meanwhile: str | None) -> None:
    model = make()
    change(model)
    original = copy.deepcopy(model)
    assert len(accelerate(model).replaced) == 2
    for own in (model, original):
        if meanwhile is not None:
            own.cgc_layers.train(meanwhile == "train")
    restore(model)
    assert modes(model) == modes(original)


def test_modes_of_fused_layers_that_were_set_alone_come_back() -> None:
    model = make()
    accelerate(model)
    level = model.cgc_layers[0].ple_fast.levels[0]
    level.blocks[0].layers[1].training = level.gate.training = False
    restore(model)
    still = {name for name, training in modes(model).items() if not training}
    experts = [f"cgc_layers.0.experts_{kind}" for kind in ("specific.0", "specific.3", "shared.0")]
    assert {f"{expert}.mlp.{i}" for expert in experts for i in (4, 6)} <= still  # linear, ReLU
    assert not any(name.endswith(("mlp.0", "mlp.5")) for name in still if "expert" in name)


@pytest.mark.parametrize("named", [False, True])
def test_an_optimizer_keeps_its_order_where_a_part_of_its_model_is_accelerated(named: bool) -> None:
    """Its state dict would give the state of one parameter to another one."""
    model = make()
    rows: Any = list(model.named_parameters() if named else model.parameters())
    optimizer = torch.optim.Adam(rows)
    step(model, optimizer, 0)
    for swap in (accelerate, restore):
        for part in model.cgc_layers:
            swap(part, optimizers=optimizer)
            assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
            new = torch.optim.Adam(model.parameters())
            new.load_state_dict(optimizer.state_dict())
            for parameter, state in new.state.items():
                assert torch.equal(state["exp_avg"], optimizer.state[parameter]["exp_avg"])
            del new, state, parameter


def test_what_nothing_reads_comes_back_among_its_own_part_of_the_optimizer() -> None:
    whole = nn.ModuleList([nn.Linear(2, 2), deepctr.CASES[0].make(), nn.Linear(2, 2)])
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    assert accelerate(whole[1], optimizers=optimizer).replaced[0].unread
    restore(whole[1], optimizers=optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in whole.parameters()]


def test_what_nothing_reads_comes_back_into_the_group_of_its_kind() -> None:
    """It was in none where there are several, and the optimizer's state dict fitted into no new one."""
    model: Any = deepctr.CASES[5].make()

    def optimizer() -> torch.optim.Optimizer:
        parameters = list(model.parameters())
        groups = [[p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() == 1]]
        rows: list[dict[str, Any]] = [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1]}]
        return torch.optim.SGD(rows, lr=0.1)

    own = optimizer()
    assert accelerate(model, optimizers=own).replaced[0].unread
    restore(model, optimizers=own)
    for group, expected in zip(own.param_groups, optimizer().param_groups, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in expected["params"]]


def test_state_lies_in_memory_as_its_parameter_does() -> None:
    """Fused optimizers go by memory: a parameter that nothing reads, and a penalty trains, was trained by the state of
    other elements."""
    model: Any = deepctr.CASES[4].make()  # three experts that nothing reads, all under a penalty
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.t().contiguous().t()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def penalised(own: Any, its: torch.optim.Optimizer) -> None:
        its.zero_grad()
        own.get_regularization_loss().backward()
        its.step()

    penalised(model, optimizer)
    original, others = copy.deepcopy((model, optimizer))
    optimizer.zero_grad()
    accelerate(model, optimizers=optimizer)
    strides = [(state["exp_avg"].stride(), parameter.stride()) for parameter, state in optimizer.state.items()]
    penalised(model, optimizer)
    penalised(original, others)
    for name, value in original.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert all(ours == theirs for ours, theirs in strides)

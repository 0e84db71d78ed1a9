"""What fused levels hand out in the place of a library's own tensors can be used as those are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_rechub.models.multi_task.ple import CGC

from ple_fast import ExtractionNetwork, GateSpec, MLPSpec, Topology, accelerate, restore
from ple_fast.convert import mixtures
from ple_fast.slots import Place, Slots
from tests import test_convert_deepctr_torch as deepctr
from tests.peers import fuxictr, mtreclib, torcheasyrec
from tests.swap_proof import assert_near, flat, grads, shaken

WIDTH = 7


def lists(rows: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) for _ in range(3)]


def rechub_level() -> tuple[nn.Module, Callable[[Any], list[Tensor]]]:
    return CGC(1, 2, 2, 2, 1, WIDTH, {"dims": [6]}), lambda level: level(lists())


def deepctr_level() -> tuple[nn.Module, Callable[[Any], list[Tensor]]]:
    model: Any = deepctr.CASES[0].make()
    width = model.specific_experts[0][0][0].linears[0].in_features
    return model, lambda m: m.cgc_net([x[:, :1].expand(-1, width) for x in lists()], 0)


def easyrec_level() -> tuple[nn.Module, Callable[[Any], list[Tensor]]]:
    model: Any = torcheasyrec.CASES[0].make()
    level = model._extraction_nets[0]
    width = level._task_gates[0].in_features
    inputs = [x[:, :1].expand(-1, width) for x in lists()]
    tasks = len(level._task_gates)
    return level, lambda m: flat(m(inputs[:1] * tasks, inputs[2]))


def fuxictr_level() -> tuple[nn.Module, Callable[[Any], list[Tensor]]]:
    options: dict[str, Any] = {"expert_hidden_units": [5], "gate_hidden_units": []}
    return fuxictr.CGC_Layer(1, 2, 2, WIDTH, **options), lambda m: flat(m(lists(), require_gate=True))


def easyrec_mmoe() -> tuple[nn.Module, Callable[[Any], list[Tensor]]]:
    return torcheasyrec.MMoE(WIDTH, {"hidden_units": [5]}, 2, 3), lambda mmoe: flat(mmoe(input=lists()[0]))


def fuxictr_mmoe() -> tuple[nn.Module, Callable[[Any], list[Tensor]]]:
    return fuxictr.MMoE_Layer(2, 3, WIDTH, [5], [], "ReLU", 0.0, False), lambda mmoe: flat(mmoe(x=lists()[0]))


LEVELS = [rechub_level, deepctr_level, easyrec_level, fuxictr_level, easyrec_mmoe, fuxictr_mmoe]


@pytest.mark.parametrize("make", LEVELS)
def test_separate_outputs_may_be_changed_in_place_in_training(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    original, call = make()
    original = shaken(original).double()
    fused = copy.deepcopy(original)
    accelerate(fused, strict=True)
    found = []
    for model in (original, fused):
        first, second, *others = call(model)
        product = second.square()  # autograd saves it before another one is written to
        first += 1.0
        others = [other.mul_(2).relu_() for other in others if other.dim() == 2]
        sum(((y * y).sum() for y in (first, *others)), product.sum()).backward()
        found.append(first.detach())
    restore(fused)
    torch.testing.assert_close(found[1], found[0])
    assert_near(grads(fused), grads(original), 1e-10)


@pytest.mark.parametrize("make", LEVELS)
def test_separate_outputs_made_without_gradients_may_be_changed_with_them(make: Callable[[], Any]) -> None:
    model, call = make()
    model.double()
    accelerate(model, strict=True)
    with torch.no_grad():
        outputs = call(model)
    learned = torch.ones(1, dtype=torch.float64, requires_grad=True)
    outputs[0].mul_(learned).sum().backward()
    assert learned.grad is not None


def test_a_tower_that_begins_in_place_trains() -> None:
    model: Any = mtreclib.CASES[0].make()
    accelerate(model, strict=True)
    model.tower[0] = nn.Sequential(nn.ReLU(inplace=True), model.tower[0])
    sum(y.sum() for y in model(*mtreclib.CASES[0].arguments(torch.float32))).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_next_level_reads_the_outputs_of_the_one_before_where_they_lie() -> None:
    level = ExtractionNetwork(WIDTH, Topology.mmoe(3, 2), experts=MLPSpec((4,)), gate=GateSpec())
    rows = mixtures(level, torch.randn(4, WIDTH))
    stacked = Slots(rows, tuple(Place(i, -1) for i in range(3))).stacked
    assert stacked is not None
    assert stacked.data_ptr() == rows[0].data_ptr()
    torch.testing.assert_close(stacked, torch.stack(rows, 1))
    for others in ([rows[0], rows[1].clone(), rows[2]], [rows[0], rows[2], rows[1]]):
        assert Slots(others, tuple(Place(i, -1) for i in range(3))).stacked is None

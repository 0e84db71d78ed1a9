"""What is as it was after a swap and the way back: modes of every module."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import nn

from ple_fast import accelerate, restore
from tests.test_accelerate import make


@pytest.fixture(scope="module", autouse=True)
def _what_was_imported_holds_no_parameters() -> Iterator[None]:
    """Every swap looks for optimizers among all objects; those of the imports are most of them."""
    gc.freeze()
    yield
    gc.unfreeze()


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

"""Models on the meta device: whatever is in no state dict comes right, by every way of filling them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ple_fast.losses import TaskLoss
from ple_fast.model import Categorical, MultiTaskModel, Numeric
from ple_fast.model.trunks import TRUNKS

OPTIONS: dict[str, dict[str, Any]] = {
    "asymmetric_sharing": {"sources": ((0,), (1, 0))},
    "home": {"groups": ((1,), (0,))},
}
COLUMNS = (
    Categorical("a", values=(1, 2, 3), width=4),
    Categorical("b", values=(5, 6), width=4),
    Categorical("c", values=(7,), width=2),
    Numeric("x"),
    Numeric("y", width=3),
)
ROWS = {
    "a": np.array([1, 2, 9, 3]),
    "b": np.array([5, 6, 5, 0]),
    "c": np.array([7, 7, 1, 7]),
    "x": np.array([1.0, 2.0, 3.0, -1.0]),
    "y": np.array([0.5, 2.0, 3.0, -2.0]),
}


def build(trunk: str) -> MultiTaskModel:
    return MultiTaskModel(
        COLUMNS, [TaskLoss("t"), TaskLoss("u")], trunk=trunk, trunk_options=OPTIONS.get(trunk), tower_units=(4,)
    )


def _to_empty(model: nn.Module, source: nn.Module) -> None:
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *(b for name, b in model.named_buffers() if name in source.state_dict())):
        tensor.detach().fill_(-9)
    model.load_state_dict(source.state_dict())


def _assign(model: nn.Module, source: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)


@torch.no_grad()
def _by_hand(model: nn.Module, source: nn.Module) -> None:
    """As loaders do that know names and tensors only."""
    model.to_empty(device="cpu")
    own, state = model.state_dict(keep_vars=True), source.state_dict()
    for name, tensor in own.items():
        tensor.copy_(state[name])


def _in_place_then_moved(model: nn.Module, source: nn.Module) -> None:
    _assign(model, source)
    model.double().float()


WAYS = [_to_empty, _assign, _by_hand, _in_place_then_moved]


@pytest.mark.parametrize("fill", WAYS, ids=lambda fill: fill.__name__)
@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_model_that_was_on_meta_predicts_the_same(trunk: str, fill: Callable[[nn.Module, nn.Module], None]) -> None:
    model = build(trunk).eval()
    expected = model.predict(ROWS)
    other = build(trunk).to("meta")
    tensors = [*other.named_parameters(), *other.named_buffers()]
    assert [name for name, tensor in tensors if not tensor.is_meta] == []
    fill(other, model)
    found = other.predict(ROWS)
    for task, values in expected.items():
        np.testing.assert_array_equal(found[task], values)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, dict(other.named_buffers())[name]), name


@pytest.mark.parametrize("trunk", TRUNKS)
def test_no_buffer_of_a_trunk_is_missing_in_its_state(trunk: str) -> None:
    """What is not persistent is that of the embedding, and the test above holds it."""
    model = build(trunk)
    missing = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    assert all(name.startswith("embedding.") for name in missing)

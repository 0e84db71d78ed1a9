"""A swap from torch-rechub's own classes keeps every result, and its checkpoints load both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch_rechub.basic.features import DenseFeature, SparseFeature
from torch_rechub.models.multi_task import PLE

import ple_fast
from ple_fast.convert import from_torch_rechub, to_torch_rechub
from tests.swap_proof import ROWS, Case, assert_same_state, prove_checkpoints, prove_results, prove_training, shaken


def case(name: str, tasks: int, levels: int, specific: int, shared: int, **expert: Any) -> Case:
    features = [DenseFeature("age"), SparseFeature("item", vocab_size=11, embed_dim=6)]

    def make() -> nn.Module:
        towers = [{"dims": [5]} for _ in range(tasks)]
        model: nn.Module = PLE(features, ["classification"] * tasks, levels, specific, shared, expert, towers)
        return model

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        return ({"age": torch.randn(ROWS, dtype=dtype), "item": torch.randint(0, 11, (ROWS,))},)

    return Case(name, make, arguments)


CASES = [
    case("two levels", 2, 2, 2, 1, dims=[9, 6], activation="relu"),
    case("three tasks, more shared than own", 3, 2, 1, 3, dims=[7], activation="sigmoid"),
    case("nothing shared", 2, 3, 2, 0, dims=[6], activation="prelu"),
    case("one level", 4, 1, 1, 1, dims=[8, 5, 4], activation="leakyrelu"),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_results(case: Case, dtype: torch.dtype) -> None:
    prove_results(case, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_checkpoints(case: Case) -> None:
    prove_checkpoints(case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_same_loss_curve(dtype: torch.dtype) -> None:
    prove_training(CASES[0], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_same_loss_curve_of_others(case: Case, dtype: torch.dtype) -> None:
    prove_training(case, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_modules_and_checkpoints_go_both_ways_bit_for_bit(case: Case) -> None:
    model = shaken(case.make())
    ple = from_torch_rechub(model)
    theirs = {name: value for name, value in model.state_dict().items() if name.startswith("cgc_layers")}
    ours = to_torch_rechub(ple).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    target = case.make()
    assert to_torch_rechub(ple, target) is target
    assert all(torch.equal(target.state_dict()[name], value) for name, value in theirs.items())
    blank = from_torch_rechub(case.make())
    prefixed = {f"model.{name}": value for name, value in model.state_dict().items()}
    assert_same_state(from_torch_rechub(prefixed, like=blank, prefix="model."), ple)


def test_what_torch_rechub_cannot_represent_is_refused() -> None:
    with pytest.raises(ValueError, match="torch-rechub cannot represent this trunk: its gates"):
        to_torch_rechub(ple_fast.PLE(7, 2))

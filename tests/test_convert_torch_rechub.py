"""A swap in torch-rechub's own classes keeps every result, and its checkpoints load both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature
from torch_rechub.basic.loss_func import RegularizationLoss
from torch_rechub.models.multi_task import MMOE, PLE
from torch_rechub.trainers import MTLTrainer
from torch_rechub.utils.data import DataGenerator

import ple_fast
from ple_fast.convert import from_torch_rechub, to_torch_rechub
from tests.swap_proof import (
    ROWS,
    Case,
    accelerated,
    prove_both_ways,
    prove_checkpoints,
    prove_results,
    prove_training,
    shaken,
)


def case(name: str, tasks: int, levels: int, specific: int, shared: int, **expert: Any) -> Case:
    def make() -> nn.Module:
        model: nn.Module = PLE(
            features(), ["classification"] * tasks, levels, specific, shared, expert, [{"dims": [5]}] * tasks
        )
        return model

    return Case(name, make, arguments)


def features() -> list[Any]:
    return [
        DenseFeature("age"),
        DenseFeature("place", 2),
        SparseFeature("item", vocab_size=11, embed_dim=6),
    ]


def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
    numbers = {"age": torch.randn(ROWS, dtype=dtype), "place": torch.randn(ROWS, 2, dtype=dtype)}
    return (numbers | {"item": torch.randint(0, 11, (ROWS,))},)


def mmoe(name: str, tasks: int, experts: int, *more: Any, **expert: Any) -> Case:
    def make() -> nn.Module:
        model: nn.Module = MMOE(
            [*features(), *more], ["classification"] * tasks, experts, expert, [{"dims": [5]}] * tasks
        )
        return model

    return Case(name, make, arguments)


CASES = [
    case("two levels", 2, 2, 2, 1, dims=[9, 6], activation="relu"),
    case("three tasks, more shared than own", 3, 2, 1, 3, dims=[7], activation="sigmoid"),
    case("nothing shared", 2, 3, 2, 0, dims=[6], activation="prelu"),
    case("dice", 2, 2, 1, 1, dims=[7, 5], activation="dice"),
    case("one level", 4, 1, 1, 1, dims=[8, 5, 4], activation="leakyrelu"),
]
MMOES = [
    mmoe("MMOE", 2, 3, dims=[8, 5], activation="relu"),
    mmoe("MMOE of three tasks", 3, 2, dims=[6], activation=nn.Tanh),
    mmoe("MMOE with dice and one expert", 2, 1, dims=[6, 4], activation="dice", dropout=0.0),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*CASES, *MMOES], ids=str)
def test_same_results(case: Case, dtype: torch.dtype) -> None:
    prove_results(case, dtype)


@pytest.mark.parametrize("case", [*CASES, *MMOES], ids=str)
def test_same_checkpoints(case: Case) -> None:
    prove_checkpoints(case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*CASES, *MMOES], ids=str)
def test_same_loss_curve(case: Case, dtype: torch.dtype) -> None:
    prove_training(case, dtype)


@pytest.mark.parametrize("case", [*CASES, MMOES[0], MMOES[2]], ids=str)
def test_modules_and_checkpoints_go_both_ways_bit_for_bit(case: Case) -> None:
    prove_both_ways(case, from_torch_rechub, to_torch_rechub, ("cgc_layers", "experts.", "gates."))


def test_a_trunk_goes_into_a_model_of_its_class() -> None:
    mixing, layered = MMOES[0].make(), CASES[0].make()
    with pytest.raises(TypeError, match="levels like MMOE, got PLE"):
        to_torch_rechub(from_torch_rechub(mixing), layered)
    with pytest.raises(TypeError, match="levels like CGC, got MMOE"):
        to_torch_rechub(from_torch_rechub(layered), mixing)
    with pytest.raises(TypeError, match="levels like CGC or MMOE, got Linear"):
        from_torch_rechub(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "its gates are one linear layer with a batch norm"),
        ({"expert_units": [(5, 4), (4,)]}, "the same widths, activation and dropout, at every level"),
    ],
)
def test_what_torch_rechub_cannot_represent_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=f"torch-rechub cannot represent this trunk: .*{why}"):
        to_torch_rechub(ple_fast.PLE(7, 2, **options))


def test_an_mmoe_that_torch_rechub_cannot_represent_is_refused() -> None:
    with pytest.raises(ValueError, match="torch-rechub cannot represent this trunk: its experts and gates have a bias"):
        to_torch_rechub(ple_fast.MMoE(7, 2, experts=2))


class Cube(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x**3


@pytest.mark.parametrize(
    ("activation", "why"),
    [("softmax", "Softmax: only a gate ends in a softmax"), (Cube, "Cube: cannot be packed")],
)
def test_what_cannot_be_replaced_is_left_with_the_reason(activation: Any, why: str) -> None:
    for make in (
        mmoe("MMOE", 2, 2, dims=[4], activation=activation).make,
        case("PLE", 2, 1, 1, 1, dims=[4], activation=activation).make,
    ):
        (left,) = ple_fast.accelerate(make()).left
        assert why in left.why


def test_features_of_every_kind_reach_the_trial_run() -> None:
    """The library pools in float32 alone."""
    tags = [SequenceFeature(f"tags{i}", 7, embed_dim=6, pooling=kind) for i, kind in enumerate(("mean", "sum"))]
    sequences = mmoe("MMOE", 2, 3, *tags, dims=[5])
    model = shaken(sequences.make()).eval()
    fused, _ = accelerated(model)
    (inputs,) = arguments(torch.float32)
    inputs |= {tag.name: torch.randint(0, 7, (ROWS, 4)) for tag in tags}
    torch.testing.assert_close(fused(inputs), model(inputs))


@pytest.mark.parametrize("case", [CASES[2], MMOES[0]], ids=str)
def test_the_trainer_of_the_library_gives_the_same_losses(case: Case, tmp_path: Path) -> None:
    """With its learned weights of the losses, a child that it adds to the model, and its penalty."""
    model = shaken(case.make())
    fused, _ = accelerated(model)
    penalties = {"embedding_l1": 1e-3, "embedding_l2": 1e-3, "dense_l1": 1e-3, "dense_l2": 1e-3}
    torch.testing.assert_close(RegularizationLoss(**penalties)(fused), RegularizationLoss(**penalties)(model))
    x = {"age": torch.randn(60).numpy(), "place": torch.randn(60, 2).numpy(), "item": torch.arange(60).numpy() % 11}
    loader, *_ = DataGenerator(x, torch.randint(0, 2, (60, 2)).numpy()).generate_dataloader((0.8, 0.1), batch_size=12)
    losses = []
    for own in (model, fused):
        trainer = MTLTrainer(
            own, ["classification"] * 2, regularization_params=penalties, adaptive_params={"method": "uwl"},
            model_path=str(tmp_path),
        )  # fmt: skip
        torch.manual_seed(1)
        losses.append([trainer.train_one_epoch(loader) for _ in range(3)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-4)
    assert list(fused.state_dict()) == list(model.state_dict())

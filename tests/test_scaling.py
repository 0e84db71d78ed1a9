"""The benchmarks of whole models, on one rank and on several."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ple_fast
from benchmarks import scaling, whole_model
from benchmarks.configs import (
    KUAIRAND,
    TrunkConfig,
)
from benchmarks.contestants import build
from benchmarks.steps import WrongResultError
from tests.ranks import run_ranks

TINY_MODEL = replace(KUAIRAND, fields=(("user", 7), ("item", 9)), width=4, units=(6, 5), tower_units=(3,))


@pytest.mark.slow
def test_ranks_are_timed_together() -> None:
    paired = scaling.measure(TINY_MODEL, (8, 5), (1, 2), rounds=2)
    cases = [
        scaling.case(trunk, batch, ranks, apart=apart)
        for batch in (8, 5)
        for ranks, apart in ((1, False), (2, False), (2, True))
        for trunk in scaling.TRUNKS
    ]
    assert list(paired.samples) == cases
    for samples in paired.samples.values():
        assert len(samples) == 2
        assert min(samples) > 1e-4  # a step, and not the wait of a rank that has none


def losses_of_rank(batch: int) -> dict[str, torch.Tensor]:
    group = dist.group.WORLD
    assert group is not None
    steps = {trunk: scaling.make_step(trunk, TINY_MODEL, batch, group) for trunk in scaling.TRUNKS}
    return {trunk: torch.stack([step() for _ in range(3)]) for trunk, step in steps.items()}


def wrong_rank() -> None:
    def build_wrong(name: str, config: TrunkConfig) -> nn.Module:
        trunk = build(name, config)
        if name == "fast":
            with torch.no_grad():
                for parameter in trunk.parameters():
                    parameter.add_(0.5)
        return trunk

    with mock.patch.object(scaling, "build", build_wrong):
        scaling.time_ranks(TINY_MODEL, (8,), (1, 2), 1)


@pytest.mark.slow
def test_both_trunks_of_the_scaling_train_alike() -> None:
    first, second = run_ranks(2, losses_of_rank, 8)
    for losses in (first, second):
        torch.testing.assert_close(losses["fast"], losses["loop"], rtol=1e-5, atol=0)
    assert not torch.allclose(first["fast"], second["fast"])  # rows of its own on each rank
    with pytest.raises(RuntimeError, match="WrongResultError: 8 rows on each of 1 ranks: expected the same losses"):
        run_ranks(2, wrong_rank)


@pytest.mark.parametrize("library", whole_model.LIBRARIES)
def test_whole_models_agree_before_they_are_timed(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("train", "inference"):
        steps = whole_model.make_steps(library, mode, 8, whole_model.QUICK_VARIANTS, TINY_MODEL)
        results = {name: step() for name, step in steps.items()}
        torch.testing.assert_close(results["accelerated"], results["original"], rtol=1e-4, atol=1e-6)
    accelerate = ple_fast.accelerate

    def wrong(model: nn.Module, **options: Any) -> None:
        accelerate(model, **options)
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if name.endswith("bias") and "tower" in name).add_(1)

    monkeypatch.setattr(ple_fast, "accelerate", wrong)
    with pytest.raises(WrongResultError, match="accelerated, inference at 8"):
        whole_model.make_steps(library, "inference", 8, whole_model.QUICK_VARIANTS, TINY_MODEL)

"""The benchmark of embeddings: what it draws, what it compares, and what its files hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import embeddings, report
from benchmarks.configs import EMBEDDINGS
from benchmarks.result_files import read, write
from benchmarks.steps import WrongResultError
from ple_fast.model import MultiTaskModel

TINY = replace(EMBEDDINGS, width=2, units=(6, 4), tower_units=(3,))
ROWS = (10, 40)


@pytest.fixture
def few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "BATCHES", 2)


@pytest.mark.parametrize("ids", embeddings.IDS)
def test_codes_are_those_of_the_column(ids: str) -> None:
    codes = embeddings.draw(ids, 100, 10_000, torch.Generator().manual_seed(0))
    assert codes.dtype is torch.int32
    assert (codes.min().item(), codes.max().item()) == (1, 100)
    most = codes.bincount().max().item() / 10_000
    assert most == pytest.approx(0.01 if ids == "uniform" else 1 / sum(1 / k for k in range(1, 101)), rel=0.5)


@pytest.mark.usefixtures("few_batches")
def test_every_case_is_timed_and_written(tmp_path: Path) -> None:
    paired = embeddings.measure(TINY, ROWS, 8, rounds=2, sample_s=0.0)
    assert set(paired.samples) == {
        embeddings.case(gradients, ids, rows)
        for gradients in embeddings.GRADIENTS
        for ids in embeddings.IDS
        for rows in ROWS
    }
    entries = embeddings.entries(paired, ROWS, 8)
    assert [(entry["ids"], entry["rows"]) for entry in entries] == [(i, r) for i in embeddings.IDS for r in ROWS]
    assert all(entry["contestants"][name]["growth"] == 1.0 for entry in entries[::2] for name in embeddings.GRADIENTS)
    write(tmp_path / "embeddings.json", "embeddings", {"results": entries})
    content = read(tmp_path / "embeddings.json", "embeddings")
    lines = report.block("embeddings", "some", content).splitlines()
    assert lines[2].startswith("| uniform | 10 |")
    assert len([line for line in lines if line.startswith("| ")]) == 2 + 4


@pytest.mark.usefixtures("few_batches")
def test_sparse_steps_have_sparse_gradients_and_a_batch_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[MultiTaskModel] = []
    build = embeddings.make_model

    def keep(config: Any, gradients: str) -> MultiTaskModel:
        made.append(build(config, gradients))
        return made[-1]

    monkeypatch.setattr(embeddings, "make_model", keep)
    step = embeddings.make_steps(TINY, "sparse", 8)["uniform"]
    (weight,) = made[0].embedding.tables.parameters()
    rows = []
    for _ in range(3):
        step()
        assert weight.grad is not None
        rows.append(set(weight.grad._indices()[0].tolist()))
    assert rows[0] == rows[2] != rows[1]


@pytest.mark.usefixtures("few_batches")
def test_nothing_is_timed_where_the_losses_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    build = embeddings.make_model

    def wrong(config: Any, gradients: str) -> MultiTaskModel:
        model = build(config, gradients)
        if gradients == "sparse":
            with torch.no_grad():
                next(model.towers.parameters()).add_(1.0)
        return model

    monkeypatch.setattr(embeddings, "make_model", wrong)
    with pytest.raises(WrongResultError, match="10 ids: expected the same first loss"):
        embeddings.measure(TINY, ROWS, 8, rounds=1, sample_s=0.0)

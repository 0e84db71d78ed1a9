"""fit is for one process: what it says where there are several."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ple_fast.model import MultiTaskModel
from tests.fit_helpers import COLUMNS, OPTIONS, TASKS, are_equal, model, state, table


@pytest.fixture
def two_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("two_ranks")
def test_each_of_several_ranks_is_told_that_it_trains_a_model_of_its_own() -> None:
    with pytest.warns(UserWarning, match=r"fit: .*a process group of 2 ranks.*docs/training_at_scale\.md") as caught:
        model().fit(*table(), progress=False)
    assert [each.filename for each in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model().evaluate(*table())
        model().predict(table()[0])


@pytest.mark.usefixtures("two_ranks")
def test_a_loss_that_counts_over_ranks_is_refused_because_nothing_averages_gradients() -> None:
    shared = MultiTaskModel(COLUMNS, TASKS, trunk_options=OPTIONS, process_group=dist.group.WORLD)
    before = state(shared)
    with pytest.raises(ValueError, match=r"fit: .*process_group of 2 ranks.*examples/train_distributed\.py"):
        shared.fit(*table(), progress=False)
    assert are_equal(state(shared), before)


def test_a_group_of_one_process_is_one_process(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        alone = MultiTaskModel(COLUMNS, TASKS, trunk_options=OPTIONS, process_group=dist.group.WORLD)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            alone.fit(*table(), progress=False)
    finally:
        dist.destroy_process_group()

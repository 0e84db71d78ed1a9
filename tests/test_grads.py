"""Gradients by name: their order is that of the tensors, and sums stand in the memory of the first summand."""

from __future__ import annotations

from typing import get_type_hints

import torch

from ple_fast.grads import GateGrads, LayerGrads, LevelGrads, plus
from ple_fast.tensors import GateTensors, LayerTensors, flatten


def test_gradients_have_the_names_and_the_order_of_the_tensors() -> None:
    assert tuple(get_type_hints(LayerGrads)) == LayerTensors._fields
    assert tuple(get_type_hints(GateGrads)) == GateTensors._fields
    grads = LevelGrads(3)
    assert grads.flat() == [None] * 20
    numbers = [torch.tensor(float(i)) for i in range(20)]
    for i, row in enumerate([*grads.layers, grads.gate]):
        for j, name in enumerate(get_type_hints(type(row))):
            setattr(row, name, numbers[5 * i + j])
    assert grads.flat() == numbers
    rows = [tuple(numbers[i : i + 5]) for i in (0, 5, 10, 15)]
    assert [*flatten([LayerTensors(*row) for row in rows[:3]], GateTensors(*rows[3]))] == numbers


def test_nothing_is_zero_and_a_sum_stands_in_the_memory_of_the_first_summand() -> None:
    one, row = torch.ones(3), torch.tensor([[1.0, 2.0, 3.0]])
    assert plus(None, None) is None
    assert plus(one, None) is one and plus(None, one) is one
    total = plus(one, row)
    assert total is one and total.tolist() == [2.0, 3.0, 4.0], "of any shape of as many elements"

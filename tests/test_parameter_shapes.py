"""A tensor of another shape in the place of a level's: refused at every number of rows, and nothing computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ple_fast import PLE, MMoE

ROWS = (1, 2, 8, 40, 130, 300)
"""Of the short way, of PyTorch's products and of oneDNN's, where this processor has them."""
MAKE_UPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer norm": {"norm": "layer"},
    "batch norm": {"norm": "batch"},
    "prelu": {"activation": "prelu"},
    "dice": {"activation": "dice"},
    "gates": {"gate_units": (5,)},
}


def others(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Shapes that are near: one size off, the same number of elements, or one that would be broadcast."""
    for place, size in enumerate(shape):
        for changed in (size - 1, size + 1):
            if changed:
                yield (*shape[:place], changed, *shape[place + 1 :])
    yield shape[::-1]
    yield (int(torch.Size(shape).numel()),)
    yield (1, *shape)
    yield (*shape, 1)
    yield (1,) * len(shape)


def trunk(make_up: str) -> nn.Module:
    torch.manual_seed(0)
    options = MAKE_UPS[make_up]
    if "gate_units" in options:
        return MMoE(8, 2, experts=3, expert_units=(6, 4), **options)
    return PLE(8, 2, num_levels=2, task_experts=1, shared_experts=1, expert_units=(6, 4), **options)


def replaced(net: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = net.get_submodule(path)
    setattr(module, leaf, nn.Parameter(value) if leaf in module._parameters else value)


@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("make_up", MAKE_UPS)
def test_a_tensor_of_another_shape_is_refused_at_every_number_of_rows(make_up: str, trains: bool) -> None:
    net = trunk(make_up)
    tensors = {name: value for name, value in net.state_dict(keep_vars=True).items() if value.dim()}
    computed = []
    for name, value in tensors.items():
        net.train(trains)
        for shape in set(others(tuple(value.shape))) - {tuple(value.shape)}:
            replaced(net, name, torch.ones(shape))
            for rows in ROWS:
                x = torch.randn(rows, 8)
                try:
                    with torch.set_grad_enabled(trains):
                        net(x)
                except ValueError as error:
                    if "size mismatch" in str(error) or (rows == 1 and trains):
                        continue
                    computed.append((name, shape, rows, str(error)))
                except RuntimeError:  # the products' own size mismatch
                    continue
                else:
                    computed.append((name, shape, rows, "no error"))
        replaced(net, name, value.detach())
    assert computed == []


def test_the_error_names_the_tensor_and_both_shapes() -> None:
    net = trunk("gates")
    for name, shape in {
        "blocks.0.layers.1.bias": (4, 3),
        "gate.layers.0.weight": (2, 5, 7),
        "gate.bias": (1, 6),
    }.items():
        value = net.state_dict()[f"levels.0.{name}"].clone()
        replaced(net, f"levels.0.{name}", torch.ones(shape))
        with pytest.raises(ValueError, match=rf"^{name}: size mismatch, expected shape \(.*got \({shape[0]}, "):
            net(torch.randn(300, 8))
        replaced(net, f"levels.0.{name}", value)
    assert net(torch.randn(300, 8)).shape == (300, 2, 4)


def test_the_data_of_a_parameter_is_looked_at_too() -> None:
    net = trunk("plain")
    weight = net.get_parameter("levels.0.blocks.0.layers.1.weight")
    weight.data = torch.ones(3, 4, 5)
    with pytest.raises(ValueError, match=r"blocks\.0\.layers\.1\.weight: size mismatch.*\(3, 4, 6\).*\(3, 4, 5\)"):
        net(torch.randn(300, 8))

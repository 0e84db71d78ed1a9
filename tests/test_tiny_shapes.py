"""No rows, one row, and widths of 1 to 5, where views by strides or by another dtype meet their edges: every trunk and
every wiring, on every way that a call can take."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from ple_fast import GateSpec, MLPSpec
from ple_fast.model.trunks import TRUNKS
from ple_fast.modules.stack import Stack
from ple_fast.torch_backend.dropout import keep_mask
from tests.helpers import (
    FORMS,
    TOPOLOGIES,
    assert_close,
    assert_derivatives_agree,
    by_route,
    compare,
    draw,
    level,
    randomise,
)

ROWS = (0, 1, 2)
WIDTHS = (1, 2, 3, 4, 5)
OPTIONS: dict[str, dict[str, Any]] = {
    "asymmetric_sharing": {"sources": [(0,), (0, 1)]},
    "mmoe": {"experts": 3},
    "home": {"groups": ((0,), (1,)), "task_experts": (1, 2), "norm": None},  # by default batch, which wants two rows
}


def trunk(name: str, width: int, **options: Any) -> nn.Module:
    """A trunk of 2 tasks whose widths are all ``width``."""
    options = {"expert_units": (width, width), **OPTIONS.get(name, {}), **options}
    module = TRUNKS[name](width, 2, dtype=torch.float64, **options)
    randomise(module)
    return module


def step(module: nn.Module, x: Tensor, *, gates: bool = False) -> list[Tensor]:
    """Output and gradients of one call, its dropout of one seed."""
    leaf = x.clone().requires_grad_()
    seed = torch.tensor(5)
    with (
        mock.patch("ple_fast.modules.network.draw_seed", return_value=seed),
        mock.patch("ple_fast.ops.operators.draw_seed", return_value=seed),
    ):
        y = module(leaf, return_gates=True)[0] if gates else module(leaf)
    leaves = [leaf, *module.parameters()]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves, materialize_grads=True)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_mask_of_no_rows_or_narrow_ones_has_the_shape_of_what_it_drops(width: int, rows: int) -> None:
    for shape in ((rows, width), (rows, 1, width), (rows, width, 1), (rows, width, width)):
        for seed in (3, torch.tensor(3)):
            like = torch.empty(shape)
            mask = keep_mask(seed, 1, 0, like, 0.5)
            assert (mask.shape, mask.dtype) == (like.shape, torch.int16)
            assert torch.equal(mask, keep_mask(3, 1, 0, torch.empty(7, *shape[1:]), 0.5)[:rows])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_trunk_of_tiny_shapes_equals_the_reference(width: int, rows: int) -> None:
    for name in TRUNKS:
        x = [torch.randn(rows, width, dtype=torch.float64)]
        for ask_gates in (False, True):
            compare(trunk(name, width), x, ask_gates=ask_gates)
        compare(trunk(name, width, norm="layer"), x)
        compare(trunk(name, width, norm="batch"), x, train=rows != 1)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_way_drops_the_same_of_tiny_shapes(width: int, rows: int) -> None:
    for name in TRUNKS:
        module, x = trunk(name, width, dropout=0.5), torch.randn(rows, width, dtype=torch.float64)
        assert isinstance(module, Stack)
        expected = step(module, x)
        found = {"gates": step(module, x, gates=True)}
        with by_route("operator"):
            found["operator"] = step(module, x)
        for one in module.levels:
            one.recompute = True  # type: ignore[assignment]  # a bool of ExtractionNetwork
        found["recompute"] = step(module, x)
        for way, tensors in found.items():
            for i, (a, b) in enumerate(zip(tensors, expected, strict=True)):
                assert_close(f"{name}, {way}, {i}", a, b, 1e-12)
        assert_derivatives_agree(module, x, 1e-10)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_wiring_of_tiny_shapes_trains_in_several_forms_of_the_input(width: int, rows: int) -> None:
    spec, gate = MLPSpec((width,), dropout=0.5), GateSpec((width,), dropout=0.5)
    for topology in TOPOLOGIES.values():
        module, slots = level(topology, spec, gate, in_features=width), topology.num_slots
        assert slots is not None
        for form in ("list", "list-of-views", "slots-first"):
            leaves = draw(form, rows, slots, width)
            compare(module, leaves, form=form, slots=slots, train=False)
            module.train()
            torch.manual_seed(0)
            x = FORMS[form].build(leaves, slots)
            y = module(x)
            parts = x if isinstance(x, list) else [x] * slots if x.dim() == 2 else x.unbind(1)
            torch.manual_seed(0)
            assert_close(form, y, module(torch.stack(list(parts), dim=1)), 1e-12)


def test_a_dropping_level_of_no_rows_runs_under_autocast_and_transforms() -> None:
    for name in TRUNKS:
        for width in WIDTHS:
            module = trunk(name, width, dropout=0.5).float()
            x = torch.zeros(0, width)
            with torch.autocast("cpu", torch.bfloat16):
                y = module(x)
            y.sum().backward()
            assert y.shape[0] == 0 and all(p.grad is None or not p.grad.any() for p in module.parameters())
            torch.func.vmap(module, randomness="different")(torch.zeros(3, 0, width))

"""A swap from libraries that are no packages, proved on stand-ins with their classes, names and published results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import ple_fast
from ple_fast import convert
from tests.peers import adatt, fuxictr, libmtl, mtreclib, torcheasyrec
from tests.swap_proof import (
    Case,
    assert_same_state,
    prove_both_ways,
    prove_checkpoints,
    prove_results,
    prove_training,
    shaken,
)


class Library(NamedTuple):
    """How its trunks go to ours and back."""

    from_theirs: Callable[..., Any]
    to_theirs: Callable[..., Any]
    cases: list[Case]
    roots: tuple[str, ...]
    """What the names of a trunk begin with."""
    prefix: str = ""
    """What stands before them in the model."""
    unread: Callable[[Any], str | tuple[()]] = lambda model: ()
    """What the names of a shared gate that nothing reads begin with."""


LIBRARIES = (
    Library(convert.from_torcheasyrec, convert.to_torcheasyrec, torcheasyrec.CASES, ("_extraction_nets",)),
    Library(
        convert.from_torcheasyrec,
        convert.to_torcheasyrec,
        torcheasyrec.MMOES,
        ("expert_mlps", "gate_"),
        "mmoe.",
    ),
    Library(
        convert.from_fuxictr,
        convert.to_fuxictr,
        fuxictr.CASES,
        ("cgc_layers",),
        unread=lambda model: f"cgc_layers.{len(model.cgc_layers) - 1}.gate.{len(model.tower)}.",
    ),
    Library(convert.from_fuxictr, convert.to_fuxictr, fuxictr.MMOES, ("experts", "gate"), "mmoe_layer."),
    Library(
        convert.from_mtreclib,
        convert.to_mtreclib,
        mtreclib.CASES,
        ("task_", "share_"),
        unread=lambda model: f"share_gates.{len(model.share_gates) - 1}.",
    ),
    Library(convert.from_mtreclib, convert.to_mtreclib, mtreclib.MMOES[:2], ("expert.", "gate.")),
    Library(convert.from_libmtl, convert.to_libmtl, libmtl.CASES, ("experts_", "gate_")),
    Library(convert.from_libmtl, convert.to_libmtl, libmtl.MMOES, ("experts_", "gate_")),
    Library(convert.from_adatt, convert.to_adatt, adatt.CASES, ("experts", "gate", "self_exp"), "mtl_arch."),
)
ONE_GATE = mtreclib.MMOES[2]
"""Without a target its trunk becomes an MMoE of one task."""
CASES = [*(case for library in LIBRARIES for case in library.cases), ONE_GATE, *adatt.STITCHED, *torcheasyrec.PEPNETS]
FIRST = [library.cases[0] for library in LIBRARIES]
OTHERS = [case for case in CASES if case not in FIRST]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
EACH = pytest.mark.parametrize("case", CASES, ids=str)


@EACH
def test_same_results(case: Case) -> None:
    prove_results(case, torch.float64)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_same_results_in_float32(case: Case) -> None:
    prove_results(case, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_same_results_of_others_in_float32(case: Case) -> None:
    prove_results(case, torch.float32)


@EACH
def test_same_checkpoints(case: Case) -> None:
    prove_checkpoints(case)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_same_loss_curve(case: Case) -> None:
    prove_training(case, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_same_loss_curve_in_float32(case: Case) -> None:
    prove_training(case, torch.float32)


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_same_loss_curve_of_others(case: Case, dtype: torch.dtype) -> None:
    prove_training(case, dtype)


@pytest.mark.parametrize(
    ("library", "case"),
    [(library, case) for library in LIBRARIES for case in library.cases],
    ids=lambda x: x.name if isinstance(x, Case) else x.from_theirs.__name__,
)
def test_modules_and_checkpoints_go_both_ways_bit_for_bit(library: Library, case: Case) -> None:
    roots = library.unread(model := case.make())
    names = [name.removeprefix(library.prefix) for name in model.state_dict()]
    unread = {name for name in names if name.startswith(roots)}
    assert bool(unread) == (roots != ())
    prove_both_ways(case, library.from_theirs, library.to_theirs, library.roots, prefix=library.prefix, unread=unread)


def test_a_model_of_one_gate_goes_both_ways_bit_for_bit() -> None:
    torch.manual_seed(0)
    model, target, blank = shaken(ONE_GATE.make()), ONE_GATE.make(), convert.from_mtreclib(ONE_GATE.make())
    ours = convert.from_mtreclib(model)
    convert.to_mtreclib(ours, target)
    theirs = {name: value for name, value in model.state_dict().items() if name.startswith(("expert.", "gate."))}
    assert len(theirs) == 3 * 2 * 7 + 2
    assert all(torch.equal(target.state_dict()[name], value) for name, value in theirs.items())
    assert_same_state(convert.from_mtreclib(model.state_dict(), like=blank), ours)
    one_task = convert.to_mtreclib(ours).state_dict()
    assert {name.replace("gate.0.0.", "gate.0.") for name in one_task} == theirs.keys()
    assert_same_state(convert.from_mtreclib(one_task, like=blank), ours)
    del theirs["expert.1.mlp.0.bias"]
    with pytest.raises(ValueError, match=r"is not '':\n  expert.1.mlp.0.bias: missing, expected \(8,\)$"):
        convert.from_mtreclib(theirs, like=blank)


@pytest.mark.parametrize("case", adatt.STITCHED, ids=str)
def test_a_cross_stitch_network_goes_both_ways_up_to_the_rounding_of_its_matrices(case: Case) -> None:
    torch.manual_seed(0)
    model: Any = shaken(case.make())
    trunk, target = convert.from_adatt(model), case.make()
    (x,) = case.arguments(torch.float32)
    torch.testing.assert_close(trunk(x), model.mtl_arch(x), rtol=1e-4, atol=1e-5)
    convert.to_adatt(trunk, target)
    blank = convert.from_adatt(case.make())
    state = model.state_dict()
    assert_same_state(convert.from_adatt(state, like=blank, prefix="mtl_arch."), trunk)
    assert [f"mtl_arch.{name}" for name in convert.to_adatt(trunk).state_dict()] == list(state)[
        : -2 * len(model.task_modules)
    ]
    for name, value in target.state_dict().items():
        if "stitchs" in name:
            torch.testing.assert_close(value, state[name], rtol=0, atol=2e-7)
        elif "task_modules" not in name:
            assert torch.equal(value, state[name])


def test_a_cross_stitch_network_of_ours_is_one_of_adatts() -> None:
    ours = ple_fast.CrossStitch(7, 3, expert_units=[(6, 5), (4,)])
    theirs = adatt.CrossStitch(7, [[6, 5], [4]], 3)
    convert.to_adatt(ours, theirs)
    x = torch.randn(5, 3, 7)
    torch.testing.assert_close(theirs(x), ours(x))

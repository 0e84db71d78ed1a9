"""``explain``, and the table of routes behind it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import ple_fast.functional
from ple_fast import PLE, ExtractionNetwork, GateSpec, MLPSpec, explain, use_backend
from ple_fast.routes import ROUTES, Asked, route_of
from tests.helpers import TOPOLOGIES, level, saved_bytes


def _trunk(**options: Any) -> PLE:
    torch.manual_seed(0)
    return PLE(7, 2, expert_units=(6, 4), **options)


def _eager(rows: int, **options: Any) -> None:
    _trunk(**options)(torch.randn(rows, 7))


def _inference(rows: int, **options: Any) -> None:
    with torch.no_grad():
        _trunk(**options).eval()(torch.randn(rows, 7))


def _compiled() -> None:
    with mock.patch("torch.compiler.is_compiling", return_value=True):
        _trunk()(torch.randn(5, 7))


def _vmapped() -> None:
    trunk = _trunk()
    torch.vmap(trunk)(torch.randn(3, 5, 7))


def _with_a_norm_of_another_kind() -> None:
    trunk = _trunk(norm="batch")
    layer: Any = trunk.levels[0].blocks[0].layers[0]  # type: ignore[index, union-attr]
    layer.norm = nn.SyncBatchNorm(layer.norm.num_features)
    with torch.no_grad():
        trunk.eval()(torch.randn(5, 7))


CASES: dict[str, tuple[str, Callable[[], None]]] = {
    "compiled": ("operator", _compiled),
    "vmap": ("differentiable", _vmapped),
    "no row": ("differentiable", lambda: _eager(0)),
    "a norm of another kind": ("differentiable", _with_a_norm_of_another_kind),
    "a few rows in training": ("few rows", lambda: _eager(95)),
    "a few rows in inference": ("few rows", lambda: _inference(31, norm="batch", dropout=0.1)),
    "more rows in training": ("by hand", lambda: _eager(96)),
    "more rows in inference": ("by hand", lambda: _inference(32)),
    "norms in training": ("by hand", lambda: _eager(5, norm="batch")),
    "recomputation": ("few rows", lambda: _eager(5, recompute=True)),
    "recomputation of more rows": ("by hand", lambda: _eager(96, recompute=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_each_route_is_taken_when_it_says_so(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def spy(asked: Asked) -> Any:
        route = route_of(asked)
        taken.append(route.name)
        return route

    monkeypatch.setattr(ple_fast.functional, "route_of", spy)
    expected, call = CASES[case]
    call()
    assert taken
    assert taken[0] == expected


def test_the_cases_have_every_route_and_each_says_when_and_why() -> None:
    assert {route.name for route in ROUTES} == {expected for expected, _ in CASES.values()}
    for route in ROUTES:
        assert (route.condition.__doc__ or "").endswith(".")
        assert route.reason


def test_what_is_printed_is_what_is_returned() -> None:
    file = io.StringIO()
    reports = explain(_trunk(), torch.randn(200, 7), file=file)
    assert file.getvalue() == "".join(f"{report}\n" for report in reports)
    assert [report.name for report in reports] == ["levels.0", "levels.1"]
    first = reports[0]
    assert (first.rows, first.route, first.launches) == (200, "by hand", (0, 0))
    assert first.backend == ("torch", "cpu tensors")
    assert [product.split(";")[0] for product in first.products] == [
        "experts, layer 0: 6 x (7 -> 6), relu",
        "experts, layer 1: 6 x (6 -> 4), relu",
        "gates' logits: 7 -> 14",
    ]


@pytest.mark.parametrize("rows", [5, 200])
@pytest.mark.parametrize("options", [{}, {"norm": "batch"}, {"norm": "layer", "dropout": 0.2}, {"recompute": True}])
def test_saved_bytes_are_those_that_autograd_holds(rows: int, options: dict[str, Any]) -> None:
    module = level(TOPOLOGIES["ple"], MLPSpec((6, 4), **{k: v for k, v in options.items() if k != "recompute"}))
    module.recompute = bool(options.get("recompute"))
    x = torch.randn(rows, 7, dtype=torch.float64, requires_grad=True)
    (report,) = explain(module.train(), x, file=io.StringIO())
    assert report.saved_bytes == saved_bytes(module, x)
    with torch.no_grad():
        (report,) = explain(module, x, file=io.StringIO())
    assert report.saved_bytes == 0


def test_launches_are_those_of_kernels(device: torch.device) -> None:
    module = ExtractionNetwork(7, TOPOLOGIES["ple"], experts=MLPSpec((6, 4)), gate=GateSpec()).to(device)
    x = torch.randn(9, 7, device=device, requires_grad=True)
    with use_backend("triton"):
        (report,) = explain(module, x, file=io.StringIO())
    assert (report.backend.name, report.launches) == ("triton", (3, 6))
    assert sum(int(product.partition(" x ")[2] or 1) for product in report.products) == 3


def test_nothing_is_left_behind() -> None:
    trunk = _trunk(norm="batch", dropout=0.5)
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    generator = torch.random.get_rng_state()
    explain(trunk, torch.randn(9, 7), file=io.StringIO())
    assert all(torch.equal(tensor, before[name]) for name, tensor in trunk.state_dict().items())
    torch.randn(9, 7)  # the input's own
    state = torch.random.get_rng_state()
    torch.random.set_rng_state(generator)
    torch.randn(9, 7), torch.randn(9, 7)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in trunk.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trunk.levels)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = _trunk()

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        y: Tensor = self.trunk(torch.cat([features["a"], features["b"]], dim=1))
        return y


def test_levels_of_a_model_have_its_names_also_behind_a_compiler() -> None:
    features = {"a": torch.randn(5, 3), "b": torch.randn(5, 4)}
    for model in (_Model(), torch.compile(_Model(), backend="eager")):
        names = [report.name for report in explain(model, features, file=io.StringIO())]  # type: ignore[arg-type]
        assert names == ["trunk.levels.0", "trunk.levels.1"]


def test_what_cannot_be_explained_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a trunk or a model, got 3"):
        explain(3, torch.randn(2, 7))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no level of ple_fast was called by Linear"):
        explain(nn.Linear(7, 2), torch.randn(2, 7))

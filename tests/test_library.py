"""Products that PyTorch's own library takes: the three of them, and levels that are routed to it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ple_fast import PLE, ExtractionNetwork, GateSpec, MLPSpec, Topology, use_backend
from tests.helpers import EXPERTS, GATES, TOPOLOGIES, compare, compare_low_precision, draw, has_dropout, level
from tests.kernel_helpers import DTYPES, LAYOUTS, guarded, hold, values
from tests.test_both_backends import FROZEN
from tests.test_level import BLOCKS

pytest.importorskip("triton")

from ple_fast_kernels import (
    LayerEnd,
    Library,
    column_sums_merge,
    grouped_data_grad,
    launches,
    library_input_grad,
    library_linear_fwd,
    library_weight_grad,
    set_table,
)

OPERANDS = importlib.import_module("ple_fast_kernels._tile_tables").OPERANDS
library: Any = importlib.import_module("ple_fast_kernels.library")
tiles: Any = importlib.import_module("ple_fast_kernels._tiles")
ONE = ("1-layer", "2-layers", "3-layers", "identity", "prelu", "dice", "no-last-activation", "no-bias", "batch-norm")


@pytest.fixture(autouse=True)
def _in_kernels() -> Iterator[None]:
    with use_backend("triton"):
        yield


def route(device: torch.device, least: int | None) -> None:
    """The library takes all that it may from so many billions of operations on, float64 too, which no shipped table
    and no file can say; None: nothing."""
    row = Library(least, least, least)
    set_table(tiles.architecture(device)[0], {f"library/{operands}": row for operands in OPERANDS})


@pytest.fixture
def routed(device: torch.device) -> Iterator[None]:
    """The library takes all that it may."""
    route(device, 0)
    yield
    set_table(tiles.architecture(device)[0], None)


@pytest.fixture
def taken(routed: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Rows, columns and depth of what it takes."""
    products: list[tuple[int, ...]] = []
    run = library._product

    def product(a: Tensor, b: Tensor, out: Tensor, summand: Tensor | None) -> None:
        products.append((*out.shape, a.shape[1]))
        run(a, b, out, summand)

    monkeypatch.setattr(library, "_product", product)
    return products


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "members", "units", "depth"), [(1, 1, 1, 1), (33, 3, 20, 24)])
def test_products_equal_the_sums_over_members(
    rows: int, members: int, units: int, depth: int, dtype: torch.dtype, layout: str, device: torch.device
) -> None:
    def drawn(*shape: int, scale: int = 1, seed: int = 0) -> Tensor:
        return values(*shape, dtype=dtype, device=device, seed=seed).div(scale**0.5)

    a = LAYOUTS[layout](drawn(rows, 1, depth))
    d, weight, bias = drawn(rows, members, units), drawn(members, units, depth, scale=depth), drawn(members, units)
    wide = LAYOUTS["gaps-between-rows"](d)

    def linear(a: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        y = torch.stack([a[:, 0] @ w.t() for w in weight], 1)
        return y if bias is None else y + bias

    for given in (bias, None):
        hold("linear", library_linear_fwd(a, weight, given), linear, a, weight, given)
        out = guarded(torch.empty_like(d), 3)
        hold("linear into rows apart", library_linear_fwd(a, weight, given, out), linear, a, weight, given)
    before = drawn(rows, 1, depth, seed=5)

    def input_grad(d: Tensor, weight: Tensor, before: Tensor) -> Tensor:
        return before + torch.einsum("bnh,nhk->bk", d, weight).unsqueeze(1)

    fresh = torch.empty(rows, 1, depth, dtype=dtype, device=device)
    hold("input", library_input_grad(wide, weight, fresh), input_grad, d, weight, torch.zeros_like(before))
    hold("input, added", library_input_grad(wide, weight, before.clone(), adds=True), input_grad, d, weight, before)

    def weight_grad(a: Tensor, d: Tensor) -> Tensor:
        return torch.einsum("bnh,bk->nhk", d, a[:, 0])

    hold("weight", library_weight_grad(a, wide), weight_grad, a, d)


def one_input(topology: str, experts: Any, gate: str = "plain", **kwargs: Any) -> ExtractionNetwork:
    return level(TOPOLOGIES[topology], experts, GATES[gate], **kwargs)


def leaves_of(module: ExtractionNetwork, batch: int, device: torch.device) -> list[Tensor]:
    return [leaf.to(device) for leaf in draw("one", batch, 1, module.in_features)]


def slots_of(module: ExtractionNetwork) -> int:
    return module.topology.num_slots or 1


@pytest.mark.parametrize("topology", ["ple-even", "adatt", "hard-sharing", "unordered"])
@pytest.mark.parametrize("experts", ONE)
def test_a_level_equals_the_reference(topology: str, experts: str, device: torch.device, taken: list[Any]) -> None:
    module = one_input(topology, EXPERTS[experts]).to(device)
    train = not has_dropout(EXPERTS[experts], GATES["plain"])
    compare(module, leaves_of(module, 5, device), slots=slots_of(module), train=train)
    depth, units = module.in_features, EXPERTS[experts].units[0] * module.topology.num_experts
    assert (units, depth, 5) in taken, "its weights"
    assert (5, depth, units) in taken, "its input"
    assert ((5, units, depth) in taken) == (experts in ("identity", "prelu", "dice")), "only without an activation"


@pytest.mark.parametrize("gate", GATES)
def test_gates_of_every_kind_beside_the_library(gate: str, device: torch.device, taken: list[Any]) -> None:
    module = one_input("ple-even", EXPERTS["identity"], gate).to(device)
    compare(module, leaves_of(module, 5, device), slots=3, train=not has_dropout(EXPERTS["identity"], GATES[gate]))
    assert taken


@pytest.mark.parametrize("input_grad", [True, False])
@pytest.mark.parametrize("experts", ["2-layers", "prelu", "no-bias"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters_get_no_gradient_and_the_others_the_same(
    frozen: str, experts: str, input_grad: bool, device: torch.device, taken: list[Any]
) -> None:
    module = one_input("ple-even", EXPERTS[experts]).to(device)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not FROZEN[frozen](name))
    if frozen == "everything" and not input_grad:
        return
    compare(module, leaves_of(module, 9, device), slots=3, input_grad=input_grad)
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == FROZEN[frozen](name), name
    depth, units = module.in_features, EXPERTS[experts].units[0] * module.topology.num_experts
    is_frozen = frozen in ("experts", "first-layer", "weights", "everything")
    assert ((units, depth, 9) in taken) != is_frozen
    assert ((9, depth, units) in taken) == input_grad


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_other_specs(name: str, device: torch.device, taken: list[Any]) -> None:
    module = level(TOPOLOGIES["ple"], BLOCKS[name]).to(device)
    compare(module, leaves_of(module, 9, device), slots=slots_of(module), common_scale=True)
    assert taken


def test_slots_of_their_own_keep_the_kernels(device: torch.device, taken: list[Any]) -> None:
    module = one_input("ple-even", EXPERTS["identity"]).to(device)
    leaves = [leaf.to(device) for leaf in draw("stacked", 5, 3, module.in_features)]
    compare(module, leaves, form="stacked", slots=3)
    assert not taken


def test_a_norm_and_dropout_keep_the_kernels_in_forward(device: torch.device, taken: list[Any]) -> None:
    for spec in (MLPSpec((5, 4), "identity", norm="batch"), MLPSpec((5, 4), "identity", dropout=0.5)):
        module = one_input("ple-even", spec, dtype=torch.float32).to(device)
        module(leaves_of(module, 5, device)[0].float())
    assert not taken


def test_nan_is_not_hidden_and_stays_in_its_row(device: torch.device, taken: list[Any]) -> None:
    """The library's own ReLU would give 0: it has no part in the forward pass."""
    for activation in ("relu", "identity", "prelu"):
        module = one_input("hard-sharing", MLPSpec((5, 4), activation)).to(device)
        x = leaves_of(module, 4, device)[0]
        x[1, 2] = float("nan")
        taken.clear()
        y = module(x)
        assert (len(taken) == 0) == (activation == "relu")
        assert y.isnan().flatten(1).any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("experts", ["relu", "prelu"])
def test_low_precision(
    experts: str, dtype: torch.dtype, device: torch.device, taken: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ple_fast.triton_backend.inputs.matmul_precision", lambda: "tf32")
    module = level(TOPOLOGIES["ple-even"], MLPSpec((48, 32), experts), in_features=40).to(device)
    leaves = [leaf.to(device) for leaf in draw("one", 64, 1, 40)]
    compare_low_precision(module, leaves, dtype=dtype, slots=3)
    assert len(taken) == (3 if experts == "prelu" else 2)


@pytest.mark.parametrize("autocast", [False, True])
def test_blocks_whose_input_gradients_are_wide_sums_keep_the_kernels_for_them(
    autocast: bool, device: torch.device, routed: None
) -> None:
    specs = (MLPSpec((48, 32)),) * 2 + (MLPSpec((24, 32)),) * 4
    module = level(TOPOLOGIES["ple-even"], specs, in_features=40).to(device)
    leaves = [leaf.to(device) for leaf in draw("one", 64, 1, 40)]
    compare_low_precision(module, leaves, dtype=torch.bfloat16, autocast=autocast, slots=3)


def counted(module: ExtractionNetwork, x: Tensor) -> tuple[int, int]:
    """Launches of forward and backward."""
    start = launches()
    y = module(x.requires_grad_())
    middle = launches()
    y.sum().backward()
    return middle - start, launches() - middle


@pytest.mark.parametrize("rows", [1, 33, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_a_bias_is_added_up_where_its_rows_are_made(
    rows: int, dtype: torch.dtype, device: torch.device
) -> None:
    d, weight = values(rows, 2, 20, dtype=dtype, device=device), values(2, 20, 24, dtype=dtype, device=device) / 4
    kept = values(rows, 2, 24, dtype=dtype, device=device, seed=1).relu()
    end = LayerEnd(("relu", 0.0))
    out, parts = grouped_data_grad(d, weight, kept=kept, end=end, sums=True)
    plain, nothing = grouped_data_grad(d, weight, kept=kept, end=end)
    assert nothing is None
    assert parts is not None
    assert torch.equal(out, plain)

    def total(d: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
        return (torch.einsum("bnh,nhk->bnk", d, weight) * (kept > 0)).sum(0)

    hold("bias", column_sums_merge(parts, torch.empty(2, 24, dtype=dtype, device=device)), total, d, weight, kept)


def test_nothing_reads_a_hidden_gradient_again_for_its_bias(
    device: torch.device, routed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients: Any = importlib.import_module("ple_fast.triton_backend.gradients")
    asked: list[tuple[bool, bool]] = []
    compute = gradients.grouped_weight_grads

    def watched(layers: Any, *rest: Any, **options: Any) -> Any:
        asked.extend((layer.weight, layer.bias) for layer in layers)
        return compute(layers, *rest, **options)

    kernel: Any = importlib.import_module("ple_fast_kernels.weight_grad")
    launch = kernel._launch_weight_grad
    read: list[bool] = []

    def watched_launch(layer: Any, *rest: Any) -> None:
        read.append(layer.d is not None)
        launch(layer, *rest)

    monkeypatch.setattr(kernel, "_launch_weight_grad", watched_launch)
    monkeypatch.setattr(gradients, "grouped_weight_grads", watched)
    module = ExtractionNetwork(12, Topology.ple(2, 1, 1, last=True), experts=MLPSpec((20, 16)), gate=GateSpec()).to(
        device
    )
    module(torch.randn(9, 12, device=device)).sum().backward()
    assert asked == [(True, True), (True, False)]
    assert read == [True, False]  # the second layer as a whole; the first one's gates, where the library has its weight


@pytest.mark.parametrize("activation", ["relu", "prelu"])
def test_products_of_the_library_are_launches(activation: str, device: torch.device, routed: None) -> None:
    """One more where the gates' part of a product becomes a launch of its own, and one that adds up a bias whose parts
    another launch left; the same at each call."""
    module = level(TOPOLOGIES["ple-even"], MLPSpec((6, 5), activation), dtype=torch.float32).to(device)
    x = torch.randn(9, 7, device=device)
    route(device, None)
    forward, backward = counted(module, x)
    route(device, 0)
    # Logits; their part of the input's gradient, and the weights'; what ReLU's data gradient left of the bias.
    more = (1, 2) if activation == "prelu" else (0, 3)
    for _ in range(4):
        assert counted(module, x) == (forward + more[0], backward + more[1])


def test_deterministic_algorithms_keep_the_kernels(device: torch.device, routed: None) -> None:
    module = one_input("ple-even", EXPERTS["2-layers"], dtype=torch.float32).to(device)
    x = torch.randn(9, 7, device=device)
    route(device, None)
    in_kernels = counted(module, x)
    route(device, 0)
    for _ in range(3):
        assert counted(module, x) != in_kernels
    torch.use_deterministic_algorithms(True)
    try:
        assert counted(module, x) == in_kernels
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("recompute", [False, True])
def test_two_levels(recompute: bool, device: torch.device, taken: list[Any]) -> None:
    """The second level reads slots of its own: only the first one is routed."""
    with torch.random.fork_rng(devices=[]):
        ple = PLE(7, 2, expert_units=(6, 4), recompute=recompute, dtype=torch.float64).to(device)
    compare(ple, [torch.randn(9, 7, dtype=torch.float64, device=device)])
    experts = Topology.ple(2, 2, 2, last=False).num_experts
    assert {depth for _, depth, rows in taken if rows == 9} == {7} and (9, 7, 6 * experts) in taken


def test_an_empty_batch_and_inference(device: torch.device, taken: list[Any]) -> None:
    module = one_input("ple-even", EXPERTS["prelu"]).to(device)
    assert module(torch.empty(0, 7, dtype=torch.float64, device=device)).shape[0] == 0
    x = leaves_of(module, 5, device)[0]
    with torch.inference_mode():
        y = module.eval()(x)
    assert (5, 5 * module.topology.num_experts, 7) in taken
    torch.testing.assert_close(y, module(x).detach(), rtol=1e-12, atol=1e-12)
    module.requires_grad_(False)
    torch.testing.assert_close(module(x), y, rtol=1e-12, atol=1e-12)

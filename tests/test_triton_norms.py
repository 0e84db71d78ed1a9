"""Levels with norms and dropout in Triton kernels: launches, what is saved, folding, masks, and odd states of norms."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from ple_fast import ExtractionNetwork, GateSpec, MLPSpec, use_backend
from ple_fast.torch_backend.dropout import draw_seed
from ple_fast_kernels import launches
from tests.helpers import TOPOLOGIES, assert_derivatives_agree, level, saved_bytes
from tests.test_both_backends import everything
from tests.test_triton_autograd import assert_equal_outcomes, counted, input_of, outcome

SMALL = TOPOLOGIES["no-own-expert"]


@pytest.fixture(autouse=True)
def _in_kernels() -> Iterator[None]:
    with use_backend("triton"):
        yield


@pytest.fixture
def no_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, activations and dropout do not run as PyTorch's operators."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a layer left the kernels")

    monkeypatch.setattr("ple_fast.triton_backend.inputs.Run.in_operators", refuse)


def both(module: ExtractionNetwork, device: torch.device, rows: int = 9) -> list[dict[str, Any]]:
    """A step on either backend: the seed of both is the same number."""
    found = []
    for backend in ("triton", "torch"):
        own = copy.deepcopy(module).to(device)
        torch.manual_seed(0)
        x = input_of(own, device, rows)
        with use_backend(backend):
            found.append(outcome(own, x, everything))
    return found


@pytest.mark.usefixtures("no_operators")
@pytest.mark.parametrize(
    ("experts", "gate", "forward", "backward"),
    [
        ({}, GateSpec(), 3, 6),
        ({"dropout": 0.3}, GateSpec(), 3, 6),
        # Hidden: moments are merged, then applied; in backward the data gradient leaves sums, merged, then applied.
        # Last: the mixtures apply it; in backward its sums have a launch of their own.
        ({"norm": "batch"}, GateSpec(), 6, 11),
        ({"norm": "batch", "norm_position": "after", "dropout": 0.3}, GateSpec(), 6, 11),
        # A tile has all units: nothing is added; in backward two launches each.
        ({"norm": "layer", "dropout": 0.3}, GateSpec(), 3, 10),
        ({}, GateSpec(logits_norm="batch"), 5, 9),
    ],
)
def test_launches_of_a_training_step(
    experts: dict[str, Any], gate: GateSpec, forward: int, backward: int, device: torch.device
) -> None:
    module = level(SMALL, MLPSpec((6, 4), **experts), gate, dtype=torch.float32).to(device).train()
    assert counted(module, input_of(module, device)) == (forward, backward)


@pytest.mark.usefixtures("no_operators")
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("logits_norm", [None, "batch"])
@pytest.mark.parametrize(("units", "gate_units"), [((4,), ()), ((6, 4), ()), ((5, 6, 4), ()), ((6, 4), (3,))])
def test_batch_norm_folds_away_in_inference(
    units: tuple[int, ...], gate_units: tuple[int, ...], logits_norm: Any, after: bool, device: torch.device
) -> None:
    """As many launches as without norms, the fused ones among them."""
    position = "after" if after else "before"
    gate = GateSpec(gate_units, "silu", "batch", logits_norm=logits_norm)
    module = level(SMALL, MLPSpec(units, "silu", norm="batch", norm_position=position, dropout=0.2), gate)
    plain = level(SMALL, MLPSpec(units, "silu"), GateSpec(gate_units, "silu"))
    taken, results = [], []
    for network, backend in ((module, "triton"), (plain, "triton"), (module, "torch")):
        network.to(device).eval()
        torch.manual_seed(3)
        x = input_of(network, device)
        start = launches()
        with use_backend(backend), torch.no_grad():  # type: ignore[arg-type]  # a literal
            y, gates = network(x, return_gates=True)
        taken.append(launches() - start)
        results.append({"y": y, **{f"gate {o}": g for o, g in enumerate(gates)}})
    assert taken[0] == taken[1] > 0
    assert_equal_outcomes(results[0], results[2], 1e-11)


SPECS: dict[str, Any] = {
    "batch": MLPSpec((6, 4), "silu", norm="batch", dropout=0.3),
    "batch-after": MLPSpec((6, 4), "tanh", norm="batch", norm_position="after", dropout=0.3),
    "layer-beyond-a-tile": MLPSpec((37, 33), "gelu", norm="layer", dropout=(0.3, 0.0)),
    "layer-after": MLPSpec((6, 4), "relu", norm="layer", norm_position="after", dropout=0.3),
    "dropout": MLPSpec((6, 4), "sigmoid", dropout=0.3),
    "mixed": MLPSpec((6, 5, 4), "relu", norm=("layer", None, "batch"), dropout=(0.0, 0.3, 0.3)),
    "learned": MLPSpec((6, 5, 4), ("prelu", "relu", "dice"), norm=("batch", "layer", None), dropout=0.3),
    "blocks": (MLPSpec((6, 4), norm="batch", dropout=0.3),) * 2 + (MLPSpec((6, 4), "silu", norm="layer", dropout=0.1),),
}


HIDDEN = GateSpec((5,), norm="batch", dropout=0.4, logits_norm="batch")


@pytest.mark.parametrize(
    ("name", "gate"), [*((name, GateSpec()) for name in SPECS), ("batch", HIDDEN), ("layer-after", HIDDEN)]
)
def test_a_step_equals_that_of_the_torch_backend(name: str, gate: GateSpec, device: torch.device) -> None:
    """Outputs, every gradient, running statistics: with the very masks of the other backend."""
    outcomes = both(level(SMALL, SPECS[name], gate).train(), device)
    assert_equal_outcomes(outcomes[0], outcomes[1], 1e-9)


def _no_statistics(norm: nn.BatchNorm1d) -> None:
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    norm.track_running_stats = False


def _apart(norm: nn.BatchNorm1d) -> None:
    """Every second element of something larger, as a view may be."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(norm, name)
        wide = torch.stack([tensor.detach(), torch.full_like(tensor, float("nan"))], 1)
        tensor.data = wide[:, 0]


STATES: dict[str, Any] = {
    "frozen statistics": lambda norm: norm.eval(),
    "no statistics": _no_statistics,
    "average of all batches": lambda norm: setattr(norm, "momentum", None),
    "frozen parameters": lambda norm: norm.requires_grad_(False),
    "memory with gaps": _apart,
}


@pytest.mark.parametrize("state", STATES)
def test_states_of_a_batch_norm(state: str, device: torch.device) -> None:
    """Training with norms that are not as new, of hidden and last layers, gates and logits."""
    gate = GateSpec((5,), "tanh", "batch", logits_norm="batch")
    module = level(SMALL, MLPSpec((6, 4), "silu", norm="batch"), gate).train()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d):
            STATES[state](norm)
    outcomes = both(module, device)
    assert_equal_outcomes(outcomes[0], outcomes[1], 1e-9)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["batch", "layer-after", "dropout"])
def test_second_derivatives_see_the_same_mask(name: str, recompute: bool, device: torch.device) -> None:
    """They go through the composed level, which draws the mask from the kernels' seed with PyTorch's operators."""
    module = level(SMALL, SPECS[name], recompute=recompute).to(device).train()
    assert_derivatives_agree(module, input_of(module, device), 1e-9)


def test_masks_differ_from_step_to_step_and_follow_the_generator(device: torch.device) -> None:
    assert isinstance(draw_seed(device), Tensor), "a CUDA graph would replay a number"
    module = level(SMALL, MLPSpec((6, 4), "identity", dropout=0.5)).to(device).train()
    x = input_of(module, device)
    torch.manual_seed(1)
    first, second = module(x), module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), first) and not torch.equal(first, second)


@pytest.mark.parametrize(
    ("norm", "hidden", "out"),
    [
        (None, 1, 1),  # ReLU's outputs, which are 0 where dropout is
        ("batch", 2, 1),  # the products, and the output that the last layer reads
        ("layer", 2, 2),
    ],
)
def test_no_mask_is_saved(norm: Any, hidden: int, out: int, device: torch.device) -> None:
    rows, experts = 16, SMALL.num_experts
    module = level(SMALL, MLPSpec((24, 8), norm=norm, dropout=0.3)).to(device).train()
    statistics = {None: 0, "batch": 2 * experts * (24 + 8), "layer": 2 * 2 * rows * experts}[norm]
    numbers = rows * (experts * (hidden * 24 + out * 8) + SMALL.num_weights) + statistics
    assert saved_bytes(module, input_of(module, device, rows)) == 8 * (numbers + 1)  # and the seed


@pytest.mark.parametrize("name", ["batch", "layer-after", "mixed"])
def test_the_same_step_twice_is_bit_for_bit_the_same(name: str, device: torch.device) -> None:
    module = level(SMALL, SPECS[name], dtype=torch.float32).to(device).train()
    x = input_of(module, device)
    state = copy.deepcopy(module.state_dict())
    first = {k: t.clone() for k, t in outcome(module, x, everything).items()}
    module.load_state_dict(state)
    second = outcome(module, x, everything)
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("position", ["before", "after"])
def test_gates_learn_beside_experts_that_are_frozen(norm: Any, position: Any, device: torch.device) -> None:
    """What the mixtures' weights read of the experts is there, although no gradient reaches the experts."""
    module = level(SMALL, MLPSpec((6, 4), norm=norm, norm_position=position), GateSpec()).train()
    module.blocks.requires_grad_(False)
    module.to(device)
    outcomes = both(module, device)
    assert_equal_outcomes(outcomes[0], outcomes[1], 1e-9)

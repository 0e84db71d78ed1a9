"""What cannot be packed: an error that names the layer by its path, and says why, or what can be."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ple_fast import Topology, pack
from ple_fast.convert import Dice, Temperature, WeightOffset
from tests.helpers import TOPOLOGIES
from tests.test_pack import FuxiDice, OtherDice

LAST_LEVEL = Topology.ple(2, 1, 1, last=True)
PACKABLE = "pack takes Linear"


class NoisyLinear(nn.Linear):
    """A Linear whose forward may do anything."""


class Wrapper(nn.Module):
    """A stack behind a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(x)
        return out


class Scaled(nn.Sequential):
    """A Sequential with a tensor of its own."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.scale = nn.Parameter(torch.ones(1))


def _expert(*modules: nn.Module, units: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, units), *modules)


def _with(change: Callable[[Any], Any]) -> nn.Sequential:
    """An expert that something was done to."""
    expert = _expert(nn.BatchNorm1d(4), nn.ReLU())
    change(expert)
    return expert


def _hooked(name: str) -> nn.Sequential:
    def register(expert: Any) -> None:
        getattr(expert[1], name)(lambda *args: None)

    return _with(register)


def _affine_dice() -> Any:
    dice = FuxiDice(4)
    dice.bn = nn.BatchNorm1d(4)
    return dice


class OtherRowDice(nn.Module):
    """The attributes of torch-rechub's, another formula."""

    def __init__(self) -> None:
        super().__init__()
        self.epsilon = 1e-3
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = ((x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + self.epsilon).sqrt()).sigmoid()
        return p * x + (1 - p) * self.alpha * x


OtherRowDice.__name__ = "Dice"


EXPERTS: list[tuple[Callable[[], Any], str, tuple[str, ...]]] = [
    (lambda: _expert(nn.Sequential(nn.ReLU(), nn.Conv1d(4, 4, 1))), "experts[1].1.1: Conv1d", (PACKABLE,)),
    (lambda: _expert(nn.Softplus()), "experts[1].1: Softplus", (PACKABLE, "ReLU")),
    (lambda: _expert(nn.ReLU6()), "experts[1].1: ReLU6", (PACKABLE,)),
    (lambda: _expert(nn.Softmax(dim=1)), "experts[1].1: Softmax", ("gate",)),
    (lambda: _expert(Temperature(2.0)), "experts[1].1: Temperature", (PACKABLE,)),
    (lambda: _expert(WeightOffset((True, False))), "experts[1].1: WeightOffset", ("gate",)),
    (lambda: nn.Sequential(NoisyLinear(5, 4)), "experts[1].0: NoisyLinear", ("subclass of Linear", "forward")),
    (lambda: nn.Sequential(nn.LazyLinear(4)), "experts[1].0: LazyLinear", ("run the model once",)),
    (Wrapper, "experts[1]: Wrapper", ("forward of its own", "pass the stack")),
    (lambda: Scaled(nn.Linear(5, 4)), "experts[1]: Scaled", ("scale",)),
    (lambda: nn.Sequential(nn.ReLU(), nn.Linear(5, 4)), "experts[1].0: ReLU", ("before the first Linear",)),
    (lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4)), "experts[1].0: BatchNorm1d", ("first Linear",)),
    (lambda: _expert(nn.Linear(3, 4)), "experts[1].1: Linear", ("in_features=4", "3")),
    (lambda: _expert(nn.ReLU(), nn.Tanh()), "experts[1].2: Tanh", ("ReLU", "each layer is")),
    (lambda: _expert(nn.Dropout(0.1), nn.ReLU()), "experts[1].2: ReLU", ("Dropout", "each layer is")),
    (lambda: _expert(nn.Dropout(0.1), nn.BatchNorm1d(4)), "experts[1].2: BatchNorm1d", ("Dropout",)),
    (lambda: _expert(nn.Dropout(0.1), nn.Dropout(0.2)), "experts[1].2: Dropout", ("Dropout",)),
    (lambda: _expert(nn.BatchNorm1d(4), nn.LayerNorm(4)), "experts[1].2: LayerNorm", ("one norm at most",)),
    (lambda: _expert(nn.Dropout(1.0)), "experts[1].1: Dropout", ("below 1",)),
    (lambda: _expert(nn.AlphaDropout(0.1)), "experts[1].1: AlphaDropout", (PACKABLE,)),
    (lambda: _expert(nn.BatchNorm1d(3)), "experts[1].1: BatchNorm1d", ("num_features=4", "3")),
    (lambda: _expert(nn.BatchNorm1d(4, affine=False)), "experts[1].1: BatchNorm1d", ("weight 1", "frozen")),
    (
        lambda: _expert(nn.BatchNorm1d(4, track_running_stats=False)),
        "experts[1].1: BatchNorm1d",
        ("track_running_stats=True",),
    ),
    (lambda: _expert(nn.SyncBatchNorm(4)), "experts[1].1: SyncBatchNorm", ("convert_sync_batchnorm",)),
    (lambda: _expert(nn.BatchNorm2d(4)), "experts[1].1: BatchNorm2d", (PACKABLE,)),
    (lambda: _expert(nn.LayerNorm((2, 4))), "experts[1].1: LayerNorm", ("(4,)", "(2, 4)")),
    (lambda: _expert(nn.LayerNorm(4, elementwise_affine=False)), "experts[1].1: LayerNorm", ("weight 1", "frozen")),
    (lambda: _expert(nn.LayerNorm(4, bias=False)), "experts[1].1: LayerNorm", ("bias 0", "frozen")),
    (lambda: _expert(nn.RMSNorm(4)), "experts[1].1: RMSNorm", (PACKABLE,)),
    (lambda: _expert(nn.PReLU(4)), "experts[1].1: PReLU", ("num_parameters=4",)),
    (lambda: _expert(OtherDice(4)), "experts[1].1: Dice", ("something else",)),
    (lambda: _expert(OtherRowDice()), "experts[1].1: Dice", ("each row's own mean",)),
    (lambda: _expert(_affine_dice()), "experts[1].1: Dice", ("affine=False",)),
    (lambda: _expert(Dice(3)), "experts[1].1: Dice", ("4 features",)),
    (lambda: _with(lambda e: parametrizations.weight_norm(e[0])), "experts[1].0: ", ("remove_parametrizations",)),
    (lambda: _hooked("register_forward_hook"), "experts[1].1: BatchNorm1d", ("forward_hooks",)),
    (lambda: _hooked("register_forward_pre_hook"), "experts[1].1: BatchNorm1d", ("forward_pre_hooks",)),
    (lambda: _hooked("register_full_backward_hook"), "experts[1].1: BatchNorm1d", ("backward_hooks",)),
    (lambda: _with(lambda e: e.register_forward_hook(print)), "experts[1]: Sequential", ("forward_hooks",)),
    (lambda: _with(lambda e: e[0].weight.register_hook(print)), "experts[1].0: Linear", ("weight", "hooks")),
    (lambda: _with(lambda e: setattr(e[0], "forward", print)), "experts[1].0: Linear", ("replaced",)),
    (lambda: _expert(units=3), "experts[1].0: Linear", ("out_features=4", "experts[0]", "3")),
    (lambda: nn.Sequential(nn.Linear(6, 4)), "experts[1].0: Linear", ("in_features=5", "experts[0]", "6")),
    (lambda: _expert().double(), "experts[1].0: Linear", ("float32", "float64")),
    (lambda: _expert().to("meta"), "experts[1].0: Linear", ("cpu", "meta")),
    (lambda: nn.Sequential(), "experts[1]", ("at least one Linear",)),
    (lambda: nn.ReLU(), "experts[1]: ReLU", ("before the first Linear",)),
]


@pytest.mark.parametrize(("make", "path", "words"), EXPERTS, ids=[f"{i}-{row[1]}" for i, row in enumerate(EXPERTS)])
def test_an_expert_that_cannot_be_packed(make: Callable[[], Any], path: str, words: tuple[str, ...]) -> None:
    gates = [nn.Linear(5, 2), nn.Linear(5, 2)]
    with pytest.raises(ValueError, match=re.escape(path)) as caught:
        pack([_expert(), make(), _expert()], gates, LAST_LEVEL)
    assert str(caught.value).startswith(path), caught.value
    assert all(word in str(caught.value) for word in words), caught.value


def _gate(*modules: nn.Module, hidden: tuple[nn.Module, ...] = ()) -> nn.Sequential:
    return nn.Sequential(*hidden, nn.Linear(5, 2), *modules)


GATES: list[tuple[Callable[[], Any], str, tuple[str, ...]]] = [
    (lambda: _gate(hidden=(nn.Linear(5, 5), nn.ReLU())), "gates[1]", ("gates[0]", "number of Linear layers")),
    (lambda: nn.Linear(6, 2), "gates[1]", ("in_features=5", "gates[0]")),
    (lambda: nn.Linear(5, 3), "gates[1]: Linear", ("out_features=2", "3")),
    (lambda: nn.Linear(5, 2, bias=False), "gates[1]", ("bias=True", "gates[0]")),
    (lambda: _gate(nn.BatchNorm1d(2)), "gates[1].0", ("norm=None", "gates[0]")),
    (lambda: _gate(Temperature(2.0)), "gates[1]", ("temperature=1.0", "2.0")),
    (lambda: _gate(nn.ReLU()), "gates[1].1: ReLU", ("after which",)),
    (lambda: _gate(nn.Dropout(0.5)), "gates[1].1: Dropout", ("after which",)),
    (lambda: _gate(nn.LayerNorm(2)), "gates[1].1: LayerNorm", ("BatchNorm1d",)),
    (lambda: _gate(nn.Softmax(dim=0)), "gates[1].1: Softmax", ("dim=1",)),
    (lambda: _gate(nn.Softmax()), "gates[1].1: Softmax", ("dim=None",)),
    (lambda: _gate(nn.Softmax(dim=1), nn.Linear(2, 2)), "gates[1].2: Linear", ("after the softmax",)),
    (lambda: _gate(nn.Softmax(dim=1), nn.Softmax(dim=1)), "gates[1].2: Softmax", ("after the softmax",)),
    (lambda: _gate(Temperature(2.0), nn.Linear(2, 2)), "gates[1].2: Linear", ("temperature",)),
    (lambda: _gate(WeightOffset((True, False))), "gates[1].1: WeightOffset", ("after its Softmax",)),
    (
        lambda: _gate(nn.Softmax(dim=1), WeightOffset((True, False))),
        "gates[1]",
        ("(False, False)", "(True, False)", "mixture_offset"),
    ),
    (lambda: None, "gates[1]", ("softmax", "NoneType")),
    (lambda: nn.Identity(), "gates[1]", ("Linear", "Identity")),
    (lambda: nn.Linear(5, 2).requires_grad_(False), "gates[1]", ("requires_grad=True", "gates[0]")),
    (
        lambda: _gate(hidden=(nn.Linear(5, 5, bias=False), nn.ReLU())),
        "gates[1].0: Linear",
        ("bias", "frozen"),
    ),
    (
        lambda: _gate(hidden=(nn.Linear(5, 5), nn.ReLU(), nn.LayerNorm(5))),
        "gates[1].2: LayerNorm",
        ("before the activation",),
    ),
    (lambda: "gate", "gates[1]", ("str",)),
]


@pytest.mark.parametrize(("make", "path", "words"), GATES, ids=[f"{i}-{row[1]}" for i, row in enumerate(GATES)])
def test_a_gate_that_cannot_be_packed(make: Callable[[], Any], path: str, words: tuple[str, ...]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        pack([_expert() for _ in range(3)], [nn.Linear(5, 2), make()], LAST_LEVEL)
    assert str(caught.value).startswith(path), caught.value
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda norm: setattr(norm, "eps", 1e-3), "norm.eps=1e-05"),
        (lambda norm: setattr(norm, "momentum", None), "norm.momentum=0.1"),
        (lambda norm: norm.eval(), "norm.training=True"),
        (lambda norm: norm.num_batches_tracked.add_(1), "norm.num_batches_tracked=0"),
        (lambda norm: norm.bias.requires_grad_(False), "norm.bias.requires_grad=True"),
    ],
)
@pytest.mark.parametrize("layer", [1, 3])
def test_gates_whose_norms_differ(layer: int, change: Callable[[Any], Any], word: str) -> None:
    gates = [nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(2)]
    pack([_expert() for _ in range(3)], gates, LAST_LEVEL)
    change(gates[1][layer])
    with pytest.raises(ValueError, match=re.escape(word)) as caught:
        pack([_expert() for _ in range(3)], gates, LAST_LEVEL)
    assert str(caught.value).startswith(f"gates[1].{layer - 1}")


def test_tied_parameters_are_named_with_both_places() -> None:
    gates = [nn.Linear(5, 2), nn.Linear(5, 2)]
    one = _expert(nn.PReLU())
    with pytest.raises(ValueError, match=r"experts\[1\]\.0: Linear.*experts\[0\]\.0.*deepcopy"):
        pack([one, one, _expert(nn.PReLU())], gates, LAST_LEVEL)
    other = copy.deepcopy(one)
    other[0].weight = one[0].weight
    with pytest.raises(ValueError, match=r"experts\[2\]\.0: Linear: weight.*experts\[0\]\.0"):
        pack([one, copy.deepcopy(one), other], gates, LAST_LEVEL)
    other[0].weight = nn.Parameter(one.get_parameter("0.weight").detach())
    with pytest.raises(ValueError, match=r"experts\[2\]\.0: Linear: weight.*experts\[0\]\.0"):
        pack([one, copy.deepcopy(one), other], gates, LAST_LEVEL)
    slope = nn.PReLU()
    twice = nn.Sequential(nn.Linear(5, 4), slope, nn.Linear(4, 4), slope)
    with pytest.raises(ValueError, match=r"experts\[1\]\.3: PReLU.*experts\[1\]\.1"):
        pack([one, twice, copy.deepcopy(one)], gates, LAST_LEVEL)
    with pytest.raises(ValueError, match=r"gates\[1\].*gates\[0\]"):
        pack([copy.deepcopy(one) for _ in range(3)], [gates[0], gates[0]], LAST_LEVEL)


def test_lists_that_do_not_fit_the_topology() -> None:
    experts, gates = [_expert() for _ in range(3)], [nn.Linear(5, 2), nn.Linear(5, 2)]
    with pytest.raises(ValueError, match=r"experts.*3.*2"):
        pack(experts[:2], gates, LAST_LEVEL)
    with pytest.raises(ValueError, match=r"gates.*2.*3"):
        pack(experts, [*gates, None], LAST_LEVEL)
    with pytest.raises(TypeError, match=r"experts.*Linear"):
        pack(experts[0].get_submodule("0"), gates, LAST_LEVEL)  # type: ignore[arg-type]  # that is the test
    with pytest.raises(TypeError, match=r"experts\[1\]\[0\].*int"):
        pack([experts[0], [3], experts[2]], gates, LAST_LEVEL)
    with pytest.raises(TypeError, match=r"topology.*Topology.*tuple"):
        pack(experts, gates, ((0,), (0,)))  # type: ignore[arg-type]  # that is the test
    with pytest.raises(ValueError, match=r"gates\[1\].*static"):
        pack(
            [nn.Linear(5, 4) for _ in range(4)],
            [nn.Linear(5, 3), nn.Linear(5, 2), nn.Linear(5, 4)],
            TOPOLOGIES["mixed-kinds"],
        )


def test_offsets_that_are_frozen_for_one_gate_alone() -> None:
    marks = TOPOLOGIES["adatt"].mixture_offset
    assert marks is not None
    gates = [nn.Sequential(nn.Linear(5, 4), nn.Softmax(1), WeightOffset(columns)) for columns in marks]
    gates[1][2].requires_grad_(False)
    with pytest.raises(ValueError, match=r"WeightOffset.*agree"):
        pack([nn.Linear(5, 4) for _ in range(4)], gates, TOPOLOGIES["adatt"])

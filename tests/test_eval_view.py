"""A view in eval mode computes what the model in eval mode does, and leaves the model's own modes and state alone."""

from __future__ import annotations

import copy
import functools
import gc
import types
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from ple_fast import PLE, accelerate
from ple_fast.model.eval_view import eval_view, is_training
from ple_fast.model.trunks import trunk_width
from tests.peers import adatt, fuxictr, libmtl, mtreclib, torcheasyrec
from tests.swap_proof import Case, flat, shaken

PEERS = [library.CASES[0] for library in (adatt, fuxictr, libmtl, mtreclib, torcheasyrec)]


class Net(nn.Module):
    """A trunk with all that has a mode, and two ordinary layers that ``change`` of the tests works on."""

    trunk: Any
    layer: Any
    drop: Any
    last: Any

    def __init__(self) -> None:
        super().__init__()
        self.trunk = PLE(6, num_tasks=2, expert_units=((8,), (4,)), activation="dice", norm="batch", dropout=0.5)
        self.layer = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Sequential(nn.BatchNorm1d(4), self.drop, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.drop(self.layer(self.trunk(x).sum(1))))
        return y


class Pair(NamedTuple):
    number: int
    drop: tuple[nn.Module, ...]


class Doubled(nn.Module):
    """A module that is bound to others in ways that registration does not show."""

    def __init__(self, owner: Net) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.owner = weakref.ref(owner)
        self.others: dict[str, Any] = {"drop": [owner.drop, "text"], "call": functools.partial(owner.last, input=None)}
        self.pair = Pair(1, (owner.drop,))
        self.method = owner.last.forward
        self.named = types.SimpleNamespace(size=3)

    def forward(self, x: Tensor) -> Tensor:
        owner = self.owner()
        assert owner is not None
        y: Tensor = self.others["drop"][0](self.drop(x)) + owner.drop(x) + self.method(x) + self.others["call"](input=x)
        y = y + self.pair.drop[0](y)
        return y

    def hooked(self, _module: nn.Module, _inputs: Any, y: Tensor) -> Tensor:
        """As a forward hook of another module."""
        dropped: Tensor = self.drop(y)
        return y + dropped


class Switched(nn.Linear):
    """Whose mode is more than a flag: noise, and weights that are merged in eval mode."""

    noise = True

    def train(self, mode: bool = True) -> Switched:
        if self.noise and not mode:
            self.weight.data += 1.0
        self.noise = mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + torch.randn(y.shape) if self.noise else y


class Frozen(nn.Sequential):
    """That keeps its norm in eval mode."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self[0].eval()
        return self


def net() -> Net:
    torch.manual_seed(0)
    made = Net()
    made.forward(torch.randn(64, 6))  # statistics move
    return made


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


# What a user may do to a model; the view must serve each.


def _nothing(model: Net) -> None:
    pass


def _partly_in_eval_mode(model: Net) -> None:
    model.trunk.eval()
    model.trunk.levels[0].train()


def _compiled(model: Net) -> None:
    model.layer = torch.compile(model.last, backend="eager")
    model.trunk.compile(backend="eager")


def _scripted(model: Net) -> None:
    model.last = torch.jit.script(model.last)


def _traced_by_fx(model: Net) -> None:
    model.last = torch.fx.symbolic_trace(model.last)


def _parametrised(model: Net) -> None:
    parametrizations.spectral_norm(model.layer)
    parametrizations.weight_norm(model.last[2])


def _pruned(model: Net) -> None:
    prune.l1_unstructured(model.layer, "weight", 0.5)
    prune.l1_unstructured(model.trunk.levels[0].blocks[0].layers[0], "weight", 0.5)


def _wrapped(model: Net) -> None:
    model.layer = nn.DataParallel(nn.Sequential(model.layer, nn.Dropout(0.5)))


def _forward_of_the_instance(model: Net) -> None:
    def forward(self: nn.Sequential, x: Tensor) -> Tensor:
        y: Tensor = self[2](self[1](self[0](x)))
        return y * 2

    model.last.forward = types.MethodType(forward, model.last)
    model.drop.forward = functools.partial(nn.Dropout.forward, model.drop)


def _forward_without_modules(model: Net) -> None:
    model.layer.forward = lambda x: x.tanh()


def _references(model: Net) -> None:
    model.layer = Doubled(model)


def _bound_hook(model: Net) -> None:
    other = Doubled(model)
    model.other = other
    model.layer.register_forward_hook(other.hooked)


def _tied(model: Net) -> None:
    model.last.append(model.drop).append(model.last[0])


def _modes_of_a_class(model: Net) -> None:
    model.last = Frozen(*model.last).train()
    model.layer = nn.Sequential(Switched(4, 4), Doubled(model))


SERVED = [value for name, value in list(globals().items()) if name.startswith("_") and hasattr(value, "__code__")]


@pytest.mark.parametrize("change", SERVED, ids=lambda change: change.__name__[1:])
def test_a_view_computes_in_eval_mode_and_leaves_modes_and_state(change: Callable[[Net], None]) -> None:
    model = net()
    change(model)
    before, kept = modes(model), copy.deepcopy({name: value.clone() for name, value in model.state_dict().items()})
    assert any(before.values())
    x = torch.randn(32, 6)
    with torch.no_grad():
        view = eval_view(model)
        got, again = view(x), eval_view(model)(x)
    assert not is_training(view)
    assert view.trunk.levels[0].gate.weight is model.trunk.levels[0].gate.weight
    assert modes(model) == before
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        expected = model.eval()(x)
    assert torch.equal(got, expected)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("is_accelerated", [False, True], ids=["original", "accelerated"])
@pytest.mark.parametrize("case", PEERS, ids=str)
def test_a_view_of_a_model_of_another_library_is_in_eval_mode(case: Case, is_accelerated: bool) -> None:
    model = shaken(case.make()).train()
    if is_accelerated:
        accelerate(model)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = case.arguments(torch.float32)
    with torch.no_grad():
        got = flat(eval_view(model)(*arguments))
        assert all(module.training for module in model.modules())
        assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
        expected = flat(model.eval()(*arguments))
    assert len(got) == len(expected) > 0
    assert all(map(torch.equal, got, expected))


def test_a_model_in_eval_mode_is_its_own_view() -> None:
    model = net().eval()
    assert eval_view(model) is model


def test_a_view_sees_weights_and_buffers_that_are_replaced_in_the_model() -> None:
    model = net()
    view, x = eval_view(model), torch.randn(4, 6)
    with torch.no_grad():
        model.layer.weight = nn.Parameter(torch.zeros(4, 4))
        model.layer.bias.zero_()
        model.last[0].running_mean = torch.full((4,), 3.0)
        got = view(x)
        assert torch.equal(got, model.eval()(x))


def test_views_are_gone_with_their_last_reference_without_waiting_for_the_collector() -> None:
    model = net()
    gc.collect()
    gc.disable()
    try:
        views = [weakref.ref(eval_view(model)) for _ in range(3)]
        inner = weakref.ref(eval_view(model).trunk.levels[0])
    finally:
        gc.enable()
    assert [view() for view in views] == [None] * 3
    assert inner() is None


def test_modules_held_twice_are_one_in_the_view() -> None:
    model = net()
    _tied(model)
    view = eval_view(model)
    assert view.drop is view.last[1] is view.last[3]
    assert view.last[0] is view.last[4] is not model.last[0]


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_view_of_a_distributed_module_is_in_eval_mode() -> None:
    model = net()
    model.trunk = nn.parallel.DistributedDataParallel(model.trunk)
    x = torch.randn(8, 6)
    with torch.no_grad():
        got = eval_view(model)(x)
        assert modes(model) == dict.fromkeys(modes(model), True)
        assert torch.equal(got, model.eval()(x))


# What it cannot serve, it says.


class Uncopied(Switched):
    """Which no view and no copy serves."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("no")


class Slotted:
    """A holder without a dict."""

    __slots__ = ("module",)

    def __init__(self, module: nn.Module) -> None:
        self.module = module


def _set(name: str, make: Callable[[Net], Any]) -> Callable[[Net], None]:
    return lambda model: object.__setattr__(model.layer, name, make(model))


def _closure(model: Net) -> Callable[[Tensor], Tensor]:
    forward = model.layer.forward
    return lambda x: forward(x) * 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set("forward", _closure), r"layer \(Linear\).*its forward refers to a module of the model itself"),
        (_set("held", lambda model: weakref.proxy(model.drop)), r"its held refers"),
        (_set("held", lambda model: types.SimpleNamespace(drop=model.drop)), r"its held refers"),
        (_set("held", lambda model: [Slotted(model.drop)]), r"its held refers"),
        (_set("held", lambda model: nn.Sequential(model.drop)), r"its held refers"),
        (_set("held", lambda model: defaultdict(int, drop=model.drop)), r"its held refers"),
        (
            lambda model: model.layer.register_forward_hook(lambda m, x, y: model.drop(y)),
            r"its _forward_hooks refers",
        ),
        (
            lambda model: setattr(model, "layer", Uncopied(4, 4)),
            r"layer \(Uncopied\).*copied.*fails \(no\)",
        ),
        (lambda model: model.last.append(nn.LazyLinear(2)), r"last\.3 \(LazyLinear\).*not initialised"),
    ],
)
def test_a_mode_that_only_the_model_has_is_refused_with_the_way_out(change: Any, says: str) -> None:
    model = net()
    change(model)
    before = modes(model)
    with pytest.raises(ValueError, match=says + r".*call model\.eval\(\) first"):
        eval_view(model)
    assert modes(model) == before
    assert eval_view(model.eval()) is model


def test_cached_parametrisations_are_refused_because_they_are_kept_by_module() -> None:
    model = net()
    parametrizations.weight_norm(model.layer)
    with nn.utils.parametrize.cached(), pytest.raises(ValueError, match=r"cached\(\)"):
        eval_view(model)


def test_modules_whose_weights_are_gathered_into_them_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gathered(nn.Linear):
        """In the place of a class that needs an accelerator."""

    import torch.distributed.fsdp

    monkeypatch.setattr(torch.distributed.fsdp, "FullyShardedDataParallel", Gathered)
    model = net()
    model.layer = Gathered(4, 4)
    with pytest.raises(ValueError, match=r"layer \(Gathered\).*FullyShardedDataParallel.*call model\.eval\(\) first"):
        eval_view(model)


# A trunk's trial call


def test_the_trial_call_of_a_trunk_flips_no_mode() -> None:
    flipped: list[bool] = []

    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))

        def forward(self, x: Tensor) -> Tensor:
            flipped.append(not trunk.training or not trunk.inner[1].training or self.inner.training)
            y: Tensor = self.inner(x)
            return y.unsqueeze(1).expand(-1, 2, -1)

    trunk: Any = Trunk()
    assert trunk_width(trunk, 3, 2, torch.empty(0)) == 4
    assert flipped == [False]


def test_the_trial_call_initialises_a_lazy_trunk() -> None:
    trunk: Any = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(6), nn.Dropout(0.5), nn.Unflatten(1, (2, 3)))
    assert trunk_width(trunk, 3, 2, trunk[0].weight) == 3
    assert type(trunk[1]) is nn.Linear
    assert is_training(trunk) and trunk[2].training


class BuiltModule(nn.Module):
    """That makes a layer at its first call."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "layer"):
            self.layer = nn.Linear(x.shape[1], 6)
        y: Tensor = self.layer(x)
        return y.view(-1, 2, 3)


class BuiltParameter(nn.Module):
    """That makes a parameter at its first call, and notes that it has."""

    is_built = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_built:
            self.weight = nn.Parameter(torch.randn(x.shape[1], 6))
            self.is_built = True
        return (x @ self.weight).view(-1, 2, 3)


@pytest.mark.parametrize("kind", [BuiltModule, BuiltParameter])
@pytest.mark.parametrize("mode", [True, False])
def test_the_trial_call_builds_a_trunk_that_is_built_at_its_first_call(kind: type[nn.Module], mode: bool) -> None:
    trunk = kind().train(mode)
    assert trunk_width(trunk, 4, 2, torch.empty(0)) == 3
    built = list(trunk.parameters())
    assert built
    trunk(torch.zeros(2, 4))
    assert [id(parameter) for parameter in trunk.parameters()] == [id(parameter) for parameter in built]
    assert trunk.training is mode

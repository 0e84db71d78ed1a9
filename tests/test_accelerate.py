"""``accelerate`` and ``restore`` around a swap: optimizers, who holds parameters, what is left, clean refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch_rechub.basic.features import DenseFeature, SparseFeature
from torch_rechub.models.multi_task import PLE
from torch_rechub.models.multi_task.ple import CGC

from ple_fast import accelerate, restore
from ple_fast.convert import Converter, LevelSource, register
from ple_fast.convert import swap as swaps
from ple_fast.convert.converter import _CONVERTERS
from tests.swap_proof import assert_same_state, shaken

WIDTH, ROWS = 5, 16
FEATURES = [SparseFeature("item", vocab_size=9, embed_dim=3), DenseFeature("age"), DenseFeature("price")]
TOWERS = [{"dims": [4]}, {"dims": [3]}]


def make(levels: int = 2, activation: str = "relu") -> Any:
    torch.manual_seed(0)
    experts = {"dims": [7, 6], "activation": activation}
    return shaken(PLE(FEATURES, ["classification"] * 2, levels, 2, 1, experts, TOWERS)).double()


def batch(seed: int = 0, rows: int = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dense = {name: torch.randn(rows, generator=generator) for name in ("age", "price")}
    return {"item": torch.randint(0, 9, (rows,), generator=generator), **dense}


def step(model: nn.Module, optimizer: Optimizer, seed: int) -> float:
    optimizer.zero_grad()
    loss = (model(batch(seed)) - 0.2).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def is_fused(model: nn.Module) -> bool:
    return any("ple_fast" in name for name, _ in model.named_modules())


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "Adam, amsgrad, foreach": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02, initial_accumulator_value=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.003, momentum=0.5, centered=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.005),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_nothing_had_been_swapped(name: str) -> None:
    original = make()
    model = copy.deepcopy(original)
    theirs, ours = OPTIMIZERS[name](original.parameters()), OPTIMIZERS[name](model.parameters())
    expected = [step(original, theirs, seed) for seed in range(9)]
    got = [step(model, ours, seed) for seed in range(3)]
    accelerate(model, optimizers=[ours])
    got += [step(model, ours, seed) for seed in range(3, 6)]
    assert is_fused(model)
    restore(model, optimizers=ours)
    got += [step(model, ours, seed) for seed in range(6, 9)]
    assert not is_fused(model)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-5, atol=0)
    assert [len(group["params"]) for group in ours.param_groups] == [len(list(original.parameters()))]
    assert [len(ours.state[p]) for p in model.parameters()] == [len(theirs.state[p]) for p in original.parameters()]


def test_state_is_moved_and_not_begun_anew() -> None:
    model = make()
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer, 0)
    squares = sum(float(state["exp_avg_sq"].sum()) for state in optimizer.state.values())
    report = accelerate(model, optimizers=optimizer)
    assert sum(float(state["exp_avg_sq"].sum()) for state in optimizer.state.values()) == pytest.approx(squares)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    new = model.get_parameter(next(name for name in report.parameters if "blocks" in name))
    assert optimizer.state[new]["exp_avg"].shape == new.shape
    assert float(optimizer.state[new]["step"]) == 1


def test_groups_and_schedules_keep_their_parameters() -> None:
    model = make()
    trunk = list(model.cgc_layers.parameters())
    rest = [p for p in model.parameters() if not any(p is own for own in trunk)]
    optimizer = torch.optim.Adam([{"params": rest, "lr": 0.1}, {"params": trunk, "lr": 0.2, "weight_decay": 0.3}])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    accelerate(model, optimizers=optimizer)
    ours = list(model.cgc_layers.parameters())
    assert len(ours) < len(trunk)
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [id(p) for p in ours]
    assert optimizer.param_groups[1]["weight_decay"] == 0.3
    step(model, optimizer, 0)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]


def assert_untouched(model: nn.Module, call: Callable[[], object], says: str) -> None:
    """A call that is refused in a sentence, and leaves everything as it was."""
    before = copy.deepcopy(model)
    parameters = [id(p) for p in model.parameters()]
    with pytest.raises(ValueError, match=says):
        call()
    assert [id(p) for p in model.parameters()] == parameters
    assert [type(module) for module in model.modules()] == [type(module) for module in before.modules()]
    assert_same_state(model, before)


def test_an_optimizer_that_was_not_passed_is_an_error_in_both_directions() -> None:
    model = make()
    optimizer = torch.optim.Adam(model.parameters())
    assert_untouched(model, lambda: accelerate(model), r"1 optimizer \(Adam\) holds parameters .* pass it")
    accelerate(model, optimizers=optimizer)
    assert_untouched(model, lambda: restore(model), r"1 optimizer \(Adam\) holds parameters")
    del optimizer
    restore(model)


def per_tensor(model: nn.Module) -> Optimizer:
    return torch.optim.Adafactor(model.parameters())


def split_groups(model: Any) -> Optimizer:
    first, *others = model.cgc_layers.parameters()
    return torch.optim.SGD([{"params": [first]}, {"params": others}], lr=0.1)


def some_only(model: Any) -> Optimizer:
    return torch.optim.SGD([next(model.cgc_layers.parameters())], lr=0.1)


def stepped_in_part(model: Any) -> Optimizer:
    optimizer = torch.optim.Adam(model.parameters())
    first = next(model.cgc_layers.parameters())
    first.grad = torch.ones_like(first)
    optimizer.step()
    first.grad = None
    return optimizer


def stepped_unequally(model: Any) -> Optimizer:
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer, 0)
    optimizer.state[next(model.cgc_layers.parameters())]["step"] += 1
    optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        (per_tensor, "Adafactor is not known to treat every element on its own"),
        (split_groups, r"different groups \(0, 1\) that become one stacked parameter of shape \(5, 7, 5\)"),
        (some_only, r"different groups \(none, 0\)"),
        (stepped_in_part, "of some parameters and not of others"),
        (stepped_unequally, "different 'step' of parameters that become one"),
    ],
)
def test_optimizers_that_cannot_take_stacked_parameters(optimizer: Any, says: str) -> None:
    model = make()
    own = optimizer(model)
    assert_untouched(model, lambda: accelerate(model, optimizers=own), says)


def test_whoever_else_holds_parameters_is_named() -> None:
    model = make()
    model.towers[0].penalties = {"l2": [(model.cgc_layers[0].experts_shared[0].mlp[0].weight, 0.1)]}
    assert_untouched(model, lambda: accelerate(model), r"the attribute towers\.0\.penalties holds parameters")
    del model.towers[0].penalties
    accelerate(model)


def test_a_wrapped_model_is_an_error() -> None:
    distributed.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    try:
        model = make()
        wrapped = DistributedDataParallel(model)
        for given in (wrapped, model):
            with pytest.raises(ValueError, match="wrapped in DistributedDataParallel"):
                accelerate(given)
    finally:
        distributed.destroy_process_group()


def test_gradients_are_carried_over() -> None:
    model = make()
    (model(batch()) - 0.2).square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    accelerate(model)
    assert all(p.grad is not None for p in model.parameters())
    restore(model)
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters())
    next(model.cgc_layers.parameters()).grad = None
    assert_untouched(model, lambda: accelerate(model), "some parameters that become one have a gradient")


def test_every_new_parameter_gets_a_gradient_and_is_named() -> None:
    model = make(levels=3)
    names = [name for name, _ in model.named_parameters()]
    report = accelerate(model)
    model(batch()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())  # or DistributedDataParallel would wait for it
    ours = [name for name, _ in model.named_parameters() if ".ple_fast." in name]
    assert list(report.parameters) == ours
    old = [name for olds in report.parameters.values() for name in olds]
    assert sorted(old) == sorted(name for name in names if name.startswith("cgc_layers"))
    assert "replaced cgc_layers.2 (torch-rechub CGC)" in str(report)
    assert report.replaced[0].path == "cgc_layers.0"
    assert set(report.replaced[0].parameters) == {name for name in ours if name.startswith("cgc_layers.0.")}


def test_the_users_random_stream_and_modes_stay() -> None:
    model = make().eval()
    model.cgc_layers[0].experts_specific[1].mlp[1].train()
    state = torch.get_rng_state()
    accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.cgc_layers[1].ple_fast.levels[0].training
    restore(model)
    training = [name for name, module in model.named_modules() if module.training]
    assert training == ["cgc_layers.0.experts_specific.1.mlp.1"]


def test_hooks_around_the_trunk_and_its_class_stay() -> None:
    model, seen = make(), []
    model.cgc_layers[0].register_forward_hook(lambda module, args, out: seen.append(len(out)))
    accelerate(model)
    model(batch())
    assert seen == [3]
    assert isinstance(model.cgc_layers[0], CGC)
    assert model.cgc_layers[0].n_task == 2
    with pytest.raises(AttributeError, match=r"'experts_shared' was replaced .*restore\(model\)"):
        _ = model.cgc_layers[0].experts_shared
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.cgc_layers[0].nothing


def test_a_level_on_its_own_is_replaced_in_place() -> None:
    torch.manual_seed(0)
    level = CGC(1, 1, 2, 1, 1, WIDTH, {"dims": [6]}).double().eval()
    x = [torch.randn(ROWS, WIDTH, dtype=torch.float64) for _ in range(3)]
    expected = level(x)
    report = accelerate(level)
    assert report.replaced[0].path == ""
    assert "replaced the model" in str(report)
    for ours, theirs in zip(level(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert restore(level) == ("",)
    assert type(level) is CGC


def test_accelerating_twice_and_restoring_twice_does_nothing_more() -> None:
    model = make()
    accelerate(model)
    again = accelerate(model, strict=True)  # what is known is fused, so that nothing is missing
    assert (again.replaced, again.left, again.already) == ((), (), ("cgc_layers.0", "cgc_layers.1"))
    assert str(again) == "cgc_layers.0 runs fused already\ncgc_layers.1 runs fused already"
    assert restore(model) == ("cgc_layers.0", "cgc_layers.1")
    assert restore(model) == ()
    assert accelerate(model).already == ()
    assert "nothing in this model" in str(accelerate(nn.Linear(2, 2)))


def test_strict_where_nothing_is_known_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"strict=True\): nothing in this model is of a class"):
        accelerate(nn.Linear(2, 2), strict=True)


def test_a_swap_is_one_form_or_the_other_at_every_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().eval()
    expected, seen = model(batch()), []
    emptied = swaps._emptied

    def watched(child: nn.Module) -> None:
        seen.append(model(batch()))  # as another thread may, while the tensors of the other form go
        emptied(child)
        seen.append(model(batch()))

    monkeypatch.setattr(swaps, "_emptied", watched)
    accelerate(model)
    assert len(seen) > 4
    for y in seen:
        torch.testing.assert_close(y, expected)


class Doubled(CGC):  # type: ignore[misc]  # torch-rechub has no types
    """A subclass, whose forward may compute something else."""

    def forward(self, x_list: list[Tensor]) -> list[Tensor]:
        """Twice the mixtures."""
        return [2 * y for y in super().forward(x_list)]


def same_name(levels: Any) -> None:
    def forward(self: Any, x_list: list[Tensor]) -> list[Tensor]:
        return [2 * y for y in CGC.forward(self, x_list)]

    levels[0].__class__ = type("CGC", (nn.Module,), {"forward": forward})


def subclass(levels: Any) -> None:
    levels[0].__class__ = Doubled


def hooked(levels: Any) -> None:
    levels[0].experts_shared[0].register_forward_hook(lambda module, args, out: None)


def another_version(levels: Any) -> None:
    levels[0].experts_shared[0].scale = nn.Parameter(torch.ones(1))


def unpackable(levels: Any) -> None:
    levels[0].experts_shared[0].mlp[2] = nn.Softplus()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (same_name, "on random input its output 0 differs"),
        (subclass, "is a subclass of CGC"),
        (hooked, r"experts_shared\.0: MLP: has hooks"),
        (another_version, r"unknown \['experts_shared\.0\.scale'\]"),
        (unpackable, "Softplus: cannot be packed"),
    ],
)
def test_what_cannot_be_replaced_is_left_and_said(change: Callable[[Any], None], why: str) -> None:
    model = make()
    change(model.cgc_layers)
    assert_untouched(model, lambda: accelerate(model, strict=True), f"cgc_layers.0 .*{why}")
    before = model.eval()(batch())
    report = accelerate(model)
    (left,) = report.left
    assert left.path == "cgc_layers.0"
    assert str(report).count("\n") == 1
    assert [site.path for site in report.replaced] == ["cgc_layers.1"]
    torch.testing.assert_close(model(batch()), before)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"optimizers": [3]}, TypeError, "optimizers: expected torch.optim.Optimizer objects"),
        ({"state_dict": "ours"}, ValueError, 'state_dict: expected "original" or "fused"'),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        accelerate(make(), **arguments)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
        accelerate([make()])  # type: ignore[arg-type]


def test_loading_says_what_does_not_fit_in_the_librarys_names() -> None:
    model = make()
    state = {name: value.clone() for name, value in make().state_dict().items()}
    accelerate(model)
    name = "cgc_layers.1.gates_specific.0.mlp.0.weight"
    short = {k: v for k, v in state.items() if k != name}
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{name}"\.'):
        model.load_state_dict(short)
    before = model.state_dict()[name].clone()
    assert model.load_state_dict(short, strict=False).missing_keys == [name]
    assert torch.equal(model.state_dict()[name], before)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "cgc_layers\.0\.experts_shared\.7\.x"'):
        model.load_state_dict({**state, "cgc_layers.0.experts_shared.7.x": before})
    with pytest.raises(RuntimeError, match=r"size mismatch for cgc_layers\.1\.gates.*expected \(3, 6\), got \(1, 6\)"):
        model.load_state_dict({**state, name: before[:1]})
    counted = "cgc_layers.0.experts_shared.0.mlp.1.num_batches_tracked"
    with pytest.raises(RuntimeError, match=rf"{counted}: expected 0, as in the experts that share"):
        model.load_state_dict({**state, counted: torch.tensor(5)})
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    model.load_state_dict(half, assign=True)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert_same_state(model, make().half())


def test_moving_to_another_dtype_moves_what_comes_back() -> None:
    model, other = make(), make()
    accelerate(model)
    model.float()
    assert_same_state(model, other.float())
    restore(model)
    assert_same_state(model, other)


def test_frozen_experts_stay_frozen() -> None:
    model = make()
    frozen = model.cgc_layers[0].experts_specific[1]
    frozen.requires_grad_(False)
    accelerate(model)
    assert len(model.cgc_layers[0].ple_fast.levels[0].blocks) == 3
    restore(model)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in model.cgc_layers[1].parameters())


def as_buffer(linear: Any) -> None:
    weight = linear.weight.detach().clone()
    del linear.weight
    linear.register_buffer("weight", weight)


@pytest.mark.parametrize("which", [0, 1])
def test_a_weight_that_is_a_buffer_of_one_gate_alone_is_left(which: int) -> None:
    """Stacked with the others it was trained."""
    model = make()
    as_buffer(model.cgc_layers[1].gates_specific[which].mlp[0])
    report = accelerate(model)
    assert [site.path for site in report.replaced] == ["cgc_layers.0"]
    assert "expected linear.weight.requires_grad=" in report.left[0].why


def test_weights_that_are_buffers_stay_as_they_are() -> None:
    model = make()
    as_buffer(model.cgc_layers[0].experts_shared[0].mlp[4])
    for gate in model.cgc_layers[1].gates_specific:
        as_buffer(gate.mlp[0])
    original = copy.deepcopy(model)
    assert len(accelerate(model).replaced) == 2
    for own in (model, original):
        step(own, torch.optim.Adam(own.parameters()), 0)
    restore(model)
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in original.named_buffers()]
    for name, value in original.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


def test_a_compiled_model_is_one_graph() -> None:
    model = make().eval()
    expected = model(batch())
    accelerate(model)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch()), expected)


class Own(nn.Module):
    """A user's level: two experts that one gate mixes."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh()) for _ in range(2))
        self.gate = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 5)`` to ``(B, 4)``."""
        weights = self.gate(x).softmax(1)
        return torch.stack([weights[:, e, None] * expert(x) for e, expert in enumerate(self.experts)]).sum(0)


def _own_forward(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.ple_fast.levels[0](x)
    return y.squeeze(1)


class OwnConverter(Converter):
    """Reads ``Own``."""

    library = "ours"
    class_name = "Own"
    children = ("experts", "gate")
    methods = (("forward", _own_forward),)

    def recognises(self, module: nn.Module) -> bool:
        return hasattr(module, "gate")

    def read(self, site: Any) -> list[LevelSource]:
        from ple_fast import Topology

        return [LevelSource(Topology.mmoe(1, 2), list(site.experts), [site.gate])]

    def trial(self, site: Any, draw: Callable[[int], Tensor]) -> tuple[Any, ...]:
        return (draw(WIDTH),)


def test_a_class_of_the_users_own_can_be_registered() -> None:
    with pytest.raises(TypeError, match=r"expected a ple_fast\.convert\.Converter"):
        register(OwnConverter)  # type: ignore[arg-type]  # the class, not an object
    register(OwnConverter())
    try:
        model = nn.Sequential(Own(), nn.Linear(4, 1))
        original, x = copy.deepcopy(model), torch.randn(ROWS, WIDTH)
        assert accelerate(model, strict=True).replaced[0].library == "ours Own"
        torch.testing.assert_close(model(x), original(x))
        assert_same_state(model, original)
        assert restore(model) == ("0",)
    finally:
        del _CONVERTERS[0]


@pytest.mark.parametrize("activation", ["relu", "dice"])
def test_statistics_that_stand_still_stand_still_when_fused(activation: str) -> None:
    model = make(activation=activation)
    norms = [m for m in model.cgc_layers.modules() if isinstance(m, nn.BatchNorm1d)]
    experts = [m for name, m in model.cgc_layers.named_modules() if isinstance(m, nn.BatchNorm1d) and "experts" in name]
    for norm in experts[::2]:
        norm.track_running_stats = False
    original = copy.deepcopy(model)
    assert len(accelerate(model).replaced) == 2
    for m in (model, original):
        m.train()(batch())
    ours, theirs = model.state_dict(), original.state_dict()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.track_running_stats, module.momentum = True, 0.3
    restore(model)
    assert all(norm.track_running_stats and norm.momentum == 0.3 for norm in norms)


def test_attributes_on_parameters_go_with_them_both_ways() -> None:
    model = make()
    for name, parameter in model.named_parameters():
        parameter.no_decay = parameter.dim() < 2
        if "gate" in name:
            parameter.lr_scale = torch.tensor(0.5)
    assert len(accelerate(model).replaced) == 2
    for name, parameter in model.named_parameters():
        if ".blocks." in name:
            assert parameter.no_decay == (not name.endswith("layers.0.weight") and not name.endswith("layers.1.weight"))
        assert hasattr(parameter, "lr_scale") == ("gate" in name)
    restore(model)
    for name, parameter in model.named_parameters():
        assert parameter.no_decay == (parameter.dim() < 2), name
        assert hasattr(parameter, "lr_scale") == ("gate" in name)


def test_parameters_with_different_attributes_are_left() -> None:
    model = make()
    model.cgc_layers[1].experts_specific[2].mlp[0].weight.lr_scale = 0.1
    report = accelerate(model)
    assert [site.path for site in report.replaced] == ["cgc_layers.0"]
    assert "have different attributes lr_scale" in report.left[0].why


@pytest.mark.parametrize("prefix", ["", "net."])
def test_an_optimizer_of_named_parameters_has_the_new_names(prefix: str) -> None:
    model = make()
    named = [(prefix + name, parameter) for name, parameter in model.named_parameters()]
    towers = [row for row in named if "tower" in row[0]]
    rest = [row for row in named if "tower" not in row[0]]
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": towers, "lr": 0.1}]
    optimizer = torch.optim.Adam(groups)
    step(model, optimizer, 0)
    for swap in (accelerate, restore):
        swap(model, optimizers=optimizer)
        names = {id(parameter): prefix + name for name, parameter in model.named_parameters()}
        for group in optimizer.param_groups:
            assert group["param_names"] == [names[id(parameter)] for parameter in group["params"]]
        step(model, optimizer, 1)
    assert [group["param_names"] for group in optimizer.param_groups] == [[name for name, _ in rest], [
        name for name, _ in towers
    ]]  # fmt: skip

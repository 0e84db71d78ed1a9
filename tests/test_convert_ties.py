"""What is shared stays shared, what cannot be swapped is left: ties, other holders, replaced forwards, odd experts."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch_rechub.models.multi_task import PLE

from ple_fast import accelerate, restore
from tests import test_convert_deepctr_torch as deepctr
from tests.test_accelerate import FEATURES, TOWERS, batch, is_fused, step


def make() -> Any:
    """Two levels of equal widths, so that anything in one can stand in the other."""
    torch.manual_seed(0)
    width = sum(feature.embed_dim for feature in FEATURES)
    experts = {"dims": [7, width]}
    return PLE(FEATURES, ["classification"] * 2, 2, 2, 1, experts, TOWERS).double()


def expert(model: Any, level: int, number: int = 0) -> Any:
    return model.cgc_layers[level].experts_specific[number]


def an_expert_in_two_levels(model: Any) -> None:
    model.cgc_layers[1].experts_specific[2] = expert(model, 0)


def a_weight_in_two_levels(model: Any) -> None:
    expert(model, 1).mlp[0].weight = expert(model, 0).mlp[0].weight


def one_memory(model: Any) -> None:
    first, second = expert(model, 0).mlp[0], expert(model, 1).mlp[0]
    second.weight = nn.Parameter(first.weight.data[:])


def overlapping_memory(model: Any) -> None:
    flat = torch.randn(100, dtype=torch.float64)
    shape = expert(model, 0).mlp[0].weight.shape
    size = shape.numel()
    expert(model, 0).mlp[0].weight = nn.Parameter(flat[:size].view(shape))
    expert(model, 1).mlp[0].weight = nn.Parameter(flat[size - 1 : 2 * size - 1].view(shape))


def a_gate(model: Any) -> None:
    model.cgc_layers[1].gates_specific[0].mlp[0].weight = model.cgc_layers[0].gates_specific[0].mlp[0].weight


def a_batch_norm(model: Any) -> None:
    expert(model, 1).mlp[1] = expert(model, 0).mlp[1]


def a_statistic(model: Any) -> None:
    expert(model, 1).mlp[1].running_mean = expert(model, 0).mlp[1].running_mean


BETWEEN_LEVELS = [
    an_expert_in_two_levels,
    a_weight_in_two_levels,
    one_memory,
    overlapping_memory,
    a_gate,
    a_batch_norm,
    a_statistic,
]


def assert_trains_like(model: Any, original: Any) -> None:
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, original))
    for seed in range(3):
        step(model, ours, seed)
        step(original, theirs, seed)
    torch.testing.assert_close(model.eval()(batch()), original.eval()(batch()))


@pytest.mark.parametrize("tie", BETWEEN_LEVELS)
def test_ties_between_levels_are_left_with_both_names(tie: Callable[[Any], None]) -> None:
    model = make()
    tie(model)
    original = copy.deepcopy(model)
    if tie not in (one_memory, overlapping_memory):  # a copy has parted those
        report = accelerate(model)
        assert_trains_like(model, original)
    else:
        report = accelerate(model)
    assert not report.replaced
    for site in report.left:
        assert "cgc_layers.0." in site.why and "cgc_layers.1." in site.why, site.why


def test_a_tie_between_levels_of_one_site_is_left() -> None:
    model: Any = deepctr.CASES[0].make()
    first, second = model.specific_experts[0][0], model.specific_experts[1][0]
    second[0].linears[1].weight = first[0].linears[1].weight
    (left,) = accelerate(model).left
    assert "specific_experts.0.0.0.linears.1.weight" in left.why and "specific_experts.1.0.0.linears.1" in left.why
    second[0] = copy.deepcopy(second[0])
    second[1].linears[1] = first[1].linears[1]
    (left,) = accelerate(model).left
    assert "specific_experts.0.0.1.linears.1" in left.why and "specific_experts.1.0.1.linears.1" in left.why


class Other(nn.Module):
    """Somebody's module."""


def decoder(model: Any) -> None:
    model.decoder = Other()
    model.decoder.weight = expert(model, 0).mlp[0].weight


def auxiliary(model: Any) -> None:
    model.aux = expert(model, 0)


def a_list(model: Any) -> None:
    model.penalised = [expert(model, 0), expert(model, 1, 3)]


def a_dict_in_an_object(model: Any) -> None:
    model.towers[0].penalty = SimpleNamespace(of={"first": expert(model, 0).mlp})


def a_closure(model: Any) -> None:
    one = expert(model, 0)
    model.penalty = lambda: one.mlp[0].weight.square().sum()


def a_partial(model: Any) -> None:
    model.penalty = functools.partial(lambda module: module, expert(model, 0))


def a_bound_method(model: Any) -> None:
    model.encode = expert(model, 0).forward


def a_hook(model: Any) -> None:
    one = expert(model, 0)
    model.register_forward_hook(lambda *_: one.mlp[0].weight.sum())


def an_unregistered_module(model: Any) -> None:
    other = Other()
    other.inner = nn.ModuleList([expert(model, 0)])
    model.others = [other]


HELD: dict[Callable[[Any], None], str] = {
    decoder: "decoder.weight",
    auxiliary: "aux",
    a_list: "penalised",
    a_dict_in_an_object: r"towers\.0\.penalty",
    a_closure: "penalty",
    a_partial: "penalty",
    a_bound_method: "encode",
    a_hook: "_forward_hooks",
    an_unregistered_module: "(others|inner.0|0 of a ModuleList)",
}


@pytest.mark.parametrize("hold", HELD)
def test_what_is_also_used_elsewhere_is_left_with_both_names(hold: Callable[[Any], None]) -> None:
    model = make()
    hold(model)
    report = accelerate(model)
    left = {site.path: site.why for site in report.left}
    assert "cgc_layers.0" in left
    with pytest.raises(AssertionError, match=rf"cgc_layers\.0\.experts_specific\.0.* also .*{HELD[hold]}"):
        raise AssertionError(left["cgc_layers.0"])
    assert not any(tensor.is_meta for tensor in model.parameters())


@pytest.mark.parametrize("hold", HELD)
def test_what_the_rest_of_the_model_holds_is_left_where_a_part_of_it_is_accelerated(
    hold: Callable[[Any], None],
) -> None:
    model = make()
    hold(model)
    whole = nn.Sequential(nn.ModuleList([model]))
    assert "0" in {site.path for site in accelerate(model.cgc_layers).left}
    assert not any(tensor.is_meta for tensor in model.parameters())
    assert len(accelerate(make().cgc_layers).replaced) == 2
    del whole


def test_parameters_that_the_rest_of_the_model_holds_are_an_error_where_a_part_of_it_is_accelerated() -> None:
    model = make()
    model.towers[0].penalised = [expert(model, 0).mlp[0].weight]
    with pytest.raises(ValueError, match="the attribute penalised of a MLP outside of the model holds parameters"):
        accelerate(model.cgc_layers)
    del model.towers[0].penalised
    assert len(accelerate(model.cgc_layers).replaced) == 2


def test_what_other_models_share_is_left_as_long_as_they_live() -> None:
    model = make()
    other = nn.ModuleList([expert(model, 0)])
    tied = Other()
    tied.weight = expert(model, 1).mlp[0].weight
    tied.circle = [tied]  # type: ignore[assignment]  # an ordinary attribute, which keeps it until it is collected
    assert "0 of a ModuleList outside of the model" in accelerate(model).left[0].why
    del other
    (left,) = accelerate(model).left
    assert left.path == "cgc_layers.1" and "weight of a Other outside of the model" in left.why
    del tied
    assert len(accelerate(model).already) == 1
    assert is_fused(model.cgc_layers[1])


def test_tensors_of_one_file_and_modules_without_tensors_are_no_ties() -> None:
    model = make()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = 0
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    relu = expert(model, 0).mlp[2]
    expert(model, 1).mlp[2] = model.towers[0].mlp[2] = model.act = relu
    model.activations = [relu]
    assert len(accelerate(model).replaced) == 2


def test_memory_that_processes_share_stays_such_memory() -> None:
    """Workers that are started afterwards trained copies of their own."""
    levels = make().cgc_layers.share_memory()
    for swap in (accelerate, restore):
        swap(levels)
        assert all(tensor.is_shared() for tensor in [*levels.parameters(), *levels.buffers()])
    levels = make().cgc_layers
    for swap in (accelerate, restore):
        swap(levels)
        assert not any(tensor.is_shared() for tensor in [*levels.parameters(), *levels.buffers()])


@pytest.mark.parametrize("change", ["a module", "a tensor"])
def test_restore_refuses_what_would_part_new_ties(change: str) -> None:
    model = make()
    accelerate(model)
    level = model.cgc_layers[1].ple_fast.levels[0]
    if change == "a module":
        model.aux = level.blocks[0]
    else:
        model.decoder = Other()
        model.decoder.weight = level.gate.weight
    with pytest.raises(ValueError, match=r"nothing was restored, because cgc_layers\.1\.ple_fast.* is also "):
        restore(model)
    assert is_fused(model.cgc_layers[0]) and is_fused(model.cgc_layers[1])
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), 0)


class Wrap(nn.Module):
    """What a library of wrappers does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """What the inner one gives."""
        y: Tensor = self.inner(x)
        return y


def wrapped(model: Any) -> None:
    model.cgc_layers[0].experts_specific[0] = Wrap(expert(model, 0))


def missing(model: Any) -> None:
    model.cgc_layers[0].experts_specific[0] = None


def no_gates(model: Any) -> None:
    model.cgc_layers[0].gates_specific = nn.ModuleList()


def replaced_forward(model: Any) -> None:
    level = model.cgc_layers[0]
    level.forward = functools.wraps(type(level).forward)(functools.partial(type(level).forward, level))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (wrapped, "cannot be read, .*AttributeError.*'mlp'"),
        (missing, "cannot be read, .*AttributeError"),
        (no_gates, "cannot be read, .*ZeroDivisionError"),
        (replaced_forward, "its forward was replaced on the instance"),
    ],
)
def test_what_a_converter_cannot_read_is_left_and_the_rest_replaced(change: Callable[[Any], None], why: str) -> None:
    model = make()
    change(model)
    report = accelerate(model)
    (left,) = report.left
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(left.why)
    assert [site.path for site in report.replaced] == ["cgc_layers.1"]
    assert left.path == "cgc_layers.0"
    if change in (wrapped, replaced_forward):
        step(model, torch.optim.SGD(model.parameters(), lr=0.1), 0)


def test_a_converter_that_fails_to_recognise_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from ple_fast.convert.torch_rechub import CGCConverter

    monkeypatch.setattr(CGCConverter, "recognises", lambda self, module: module.nothing)
    report = accelerate(make())
    assert [site.path for site in report.left] == ["cgc_layers.0", "cgc_layers.1"]
    assert "recognises failed with AttributeError" in report.left[0].why


def test_a_part_of_a_wrapped_model_is_an_error() -> None:
    distributed.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    try:
        model = make()
        whole = DistributedDataParallel(nn.ModuleList([model, nn.Linear(2, 2)]))
        for part in (model, model.cgc_layers, model.cgc_layers[0]):
            with pytest.raises(ValueError, match=r"part of it is wrapped in DistributedDataParallel"):
                accelerate(part)
        del whole  # a wrapper is a circle: it is gone once garbage is collected, which accelerate does
        accelerate(model, strict=True)
    finally:
        distributed.destroy_process_group()

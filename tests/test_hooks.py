"""Tools that reach into a module: parametrizations, pruning, hooks on calls, gradients and state dicts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from ple_fast.reference import PLEReference, correspondence
from tests.helpers import assert_close
from tests.test_module_tools import WIDTH, batch, first_weight_grads, layer_of, trunk

# Parametrizations


class UnitSpectralNorm(nn.Module):
    """Each expert's weight divided by its largest singular value."""

    def forward(self, weight: Tensor) -> Tensor:
        size: Tensor = torch.linalg.matrix_norm(weight, 2, keepdim=True)
        return weight / size


PARAMETRIZATIONS: dict[str, Callable[[nn.Module], Any]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", UnitSpectralNorm()),
}


@pytest.mark.parametrize(
    ("backend", "compiles"), [("torch", False), ("torch", True), ("triton", False)], indirect=["backend"]
)
@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_a_parametrized_weight_is_the_one_that_is_used(kind: str, compiles: bool, backend: str) -> None:
    """Output and the gradient behind the parametrization are the reference's, also after a step behind it."""
    module, x = trunk().eval(), batch()  # in train mode each call of spectral norm moves its vectors
    layer = layer_of(module)
    PARAMETRIZATIONS[kind](layer)
    run: Any = torch.compile(module, fullgraph=True, backend="aot_eager") if compiles else module
    originals = [p for name, p in layer.named_parameters() if name.startswith("parametrizations.")]
    before = torch.zeros(9, 2, 4, dtype=torch.float64)
    for _ in range(2):
        reference = PLEReference.like(module)
        y, expected = run(x), reference(x)
        assert_close("y", y, expected, 1e-11)
        assert not torch.allclose(y, before)
        module.zero_grad()
        y.square().sum().backward()
        expected.square().sum().backward()
        behind = torch.autograd.grad(layer.weight, originals, first_weight_grads(reference))
        for original, gradient in zip(originals, behind, strict=True):
            assert_close("gradient", original.grad, gradient, 1e-10)
        with torch.no_grad():
            for original in originals:
                original.add_(torch.randn_like(original))
        before = y.detach()


class Positive(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value.exp()


@pytest.mark.parametrize("train", [True, False])
def test_every_kind_of_parameter_can_be_parametrized(train: bool) -> None:
    """Norms, slopes, biases and gates; serving takes what the parametrization gives."""
    module, x = trunk(norm="batch", activation="prelu", gate_units=(5,)).train(train), batch(100)
    plain = copy.deepcopy(module)
    for path in ("blocks.0.layers.0.norm", "blocks.0.layers.1.activation", "gate", "gate.layers.0"):
        owner = module.get_submodule(f"levels.0.{path}")
        parametrize.register_parametrization(owner, "weight", Positive())
        with torch.no_grad():
            plain.get_parameter(f"levels.0.{path}.weight").exp_()
    parametrize.register_parametrization(module.get_submodule("levels.0.gate"), "bias", Positive())
    with torch.no_grad():
        plain.get_parameter("levels.0.gate.bias").exp_()
    reference = PLEReference.like(plain)
    y = module(x)
    assert_close("y", y, reference(x), 1e-11)
    y.sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
    assert_close("serving", module.eval().for_inference()(x), reference.eval()(x), 1e-11)


def test_autocast_keeps_no_cast_of_a_parametrized_weight() -> None:
    """What stands behind it may be written to in ways that leave no trace on the weight."""
    module, x = trunk(torch.float32), batch(dtype=torch.float32)
    layer = layer_of(module)
    parametrizations.weight_norm(layer)
    with torch.autocast("cpu", torch.bfloat16):
        before = module(x)
        layer.get_parameter("parametrizations.weight.original0").data.mul_(3.0)
        after = module(x)
        fresh = copy.deepcopy(module)(x)
    assert torch.equal(after, fresh) and not torch.equal(after, before)


def test_pruned_weights_when_compiled() -> None:
    module, x = trunk(), batch()
    prune.l1_unstructured(layer_of(module), "weight", amount=0.5)
    prune.random_structured(module.get_submodule("levels.1.gate"), "weight", amount=0.5, dim=0)
    run: Any = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_close("y", run(x), PLEReference.like(module)(x), 1e-11)
        with torch.no_grad():
            layer_of(module).get_parameter("weight_orig").mul_(2.0)


# Hooks


class Levels(nn.Module):
    """The levels of a trunk or of its reference, one after the other."""

    def __init__(self, levels: nn.ModuleList) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        for level in self.levels:
            x = level(x)
        return x


def part(gradients: tuple[Tensor, ...] | Tensor) -> Tensor:
    """Of the only tensor that goes in, or out."""
    return gradients[0]


def hook_everything(model: Levels, seen: list[tuple[int, ...]]) -> None:
    first, second = model.levels
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    first.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    first.register_forward_hook(lambda module, inputs, y: y * 3)
    model.register_forward_hook(lambda module, inputs, y: y + 1)
    second.register_full_backward_hook(lambda module, dx, dy: (part(dx) * 5,))
    first.register_full_backward_pre_hook(lambda module, dy: (part(dy) * 7,))
    model.register_full_backward_hook(lambda module, dx, dy: seen.append((*part(dx).shape, *part(dy).shape)))
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient * 11)


@pytest.mark.parametrize(("backend", "rows"), [("torch", 6), ("torch", 100), ("triton", 6)], indirect=["backend"])
@pytest.mark.parametrize("recompute", [False, True])
def test_hooks_on_trunks_levels_and_parameters(recompute: bool, rows: int, backend: str) -> None:
    """Those that change what passes change the same as on the reference."""
    fused = trunk(recompute=recompute)
    reference, found = PLEReference.like(fused), []
    for levels in (fused.levels, reference.levels):
        model = Levels(levels)
        seen: list[tuple[int, ...]] = []
        hook_everything(model, seen)
        x = batch(rows).requires_grad_()
        y = model(x)
        y.register_hook(lambda gradient: gradient.cos())
        y.square().sum().backward()
        found.append((y, x.grad, seen))
    (y, dx, shapes), (expected_y, expected_dx, expected_shapes) = found
    assert shapes == expected_shapes == [(rows, WIDTH, rows, 2, 4)]
    assert_close("y", y, expected_y, 1e-11)
    assert_close("x.grad", dx, expected_dx, 1e-10)
    for pair in correspondence(fused, reference):
        assert pair.fused.grad is not None
        assert_close(f"{pair.name}.grad", pair.fused.grad[pair.part], pair.reference.grad, 1e-10)


@pytest.mark.parametrize(
    "path", ["blocks.0", "blocks.0.layers.0", "blocks.0.layers.0.norm", "blocks.0.layers.0.activation", "gate"]
)
@pytest.mark.parametrize(
    ("register", "kind"),
    [
        ("register_forward_hook", "forward "),
        ("register_forward_pre_hook", "forward pre-"),
        ("register_full_backward_hook", "backward "),
        ("register_full_backward_pre_hook", "backward pre-"),
    ],
)
def test_a_hook_inside_a_level_says_that_it_never_runs(path: str, register: str, kind: str) -> None:
    for norm, activation in (("layer", "prelu"), ("batch", "dice")):
        module = trunk(norm=norm, activation=activation)
        inside = module.levels[0].get_submodule(path)
        with pytest.warns(
            UserWarning, match=rf"^{kind}hook on {type(inside).__name__}: .* never runs\. Hook the level"
        ):
            getattr(inside, register)(lambda *_: pytest.fail("it has run"))
        module(batch()).sum().backward()


def test_hooks_that_run_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = trunk()
        hook_everything(Levels(module.levels), [])
        prune.l1_unstructured(layer_of(module), "weight", amount=0.5)  # a pre-hook that the level runs
        nn.utils.spectral_norm(layer_of(module, 1))
        module(batch())


# State dicts


def add_version(module: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
    state["version"] = torch.tensor(3)


def test_hooks_of_state_dicts() -> None:
    module, order = trunk(), list[str]()
    module.register_state_dict_pre_hook(lambda *_: order.append("before"))  # type: ignore[no-untyped-call]  # untyped in torch
    module.register_state_dict_post_hook(add_version)  # type: ignore[no-untyped-call]  # untyped in torch
    state = module.state_dict()
    assert order == ["before"] and int(state["version"]) == 3


def renamed(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith("old.")]:
        state[name.removeprefix("old.")] = state.pop(name)


def test_hooks_of_loading_come_before_the_check_of_names() -> None:
    """One that renames entries, and one that forgives missing ones; PyTorch's own check follows."""
    module, source = trunk(), trunk(seed=1)
    state = {f"old.{name}": value for name, value in source.state_dict().items()}
    with pytest.raises(ValueError, match="nothing was loaded"):
        module.load_state_dict(state)
    module.register_load_state_dict_pre_hook(renamed)  # type: ignore[no-untyped-call]  # untyped in torch
    module.load_state_dict(state)
    assert torch.equal(module(batch()), source(batch()))
    del state["old.levels.0.gate.bias"]
    with pytest.raises(RuntimeError, match=r"levels\.0\.gate\.bias"):
        module.load_state_dict(state)
    module.levels[0].register_load_state_dict_post_hook(lambda module, keys: keys.missing_keys.clear())
    module.load_state_dict(state)


def test_a_checkpoint_of_the_older_weight_norm_loads_into_the_newer_one() -> None:
    """PyTorch's own hook of loading translates its names."""
    older, newer = trunk(), trunk(seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is deprecated, and still in checkpoints
        nn.utils.weight_norm(layer_of(older), "weight")
    parametrizations.weight_norm(layer_of(newer))
    newer.load_state_dict(older.state_dict())
    assert_close("y", newer(batch()), older(batch()), 1e-12)

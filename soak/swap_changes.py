"""What people do to a model before they accelerate it, drawn at random: wraps, hooks, frozen parts, modes, and more."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from soak.swap_models import tensors_in
from soak.swap_places import Place, Subject, inside, outside, sites_of, tensors_of
from soak.swap_ties import TIES


class Wrap(nn.Module):
    """What a library of wrappers does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """What the inner one gives."""
        return self.inner(*arguments, **named)


def _runs(place: Place) -> bool:
    return not isinstance(place.module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList))


def a_wrap(s: Subject, dice: random.Random) -> None:
    """A module runs within another one, or is gone."""
    rows = inside(s.model) if dice.random() < 0.6 else outside(s.model)
    if rows := [place for place in rows if _runs(place)]:
        place = dice.choice(rows)
        kinds: list[Callable[[nn.Module], nn.Module | None]] = [nn.Sequential, Wrap, nn.Sequential, lambda _: None]
        place.put(dice.choice(kinds)(place.module))


def _note(s: Subject, what: str, value: Any) -> None:
    for tensor in tensors_in(value):
        s.log.append((what, tensor.detach().double().sum()))


def a_hook(s: Subject, dice: random.Random) -> None:
    """A hook that looks, or doubles, at a site, a tower or a module within."""
    sites = [(path, site) for path, site, _ in sites_of(s.model)]
    outer = [(p.path, p.module) for p in outside(s.model)] + [("", s.model)]
    inner = [(p.path, p.module) for p in inside(s.model)]
    path, module = dice.choice(dice.choices([sites, outer, inner], [4, 3, 1])[0] or outer)
    factor = dice.choice((None, None, 1.5))

    def seen(what: str, value: Any) -> Any:
        _note(s, f"{what} at {path or 'the model'}", value)
        if factor is None or not isinstance(value, Tensor):
            return None
        return value * factor

    kind = dice.choice(("forward", "pre", "backward", "backward_pre", "state"))
    if kind == "forward":
        module.register_forward_hook(lambda _, args, out: seen("forward", out))
    elif kind == "pre":
        module.register_forward_pre_hook(lambda _, args: _note(s, f"input of {path}", args))
    elif kind == "backward":
        module.register_full_backward_hook(lambda _, given, out: _note(s, f"backward at {path}", (given, out)))
    elif kind == "backward_pre":
        module.register_full_backward_pre_hook(lambda _, out: _note(s, f"before backward at {path}", out))
    else:
        _renaming(module)


def _renaming(module: nn.Module) -> None:
    """Hooks of a checkpoint format of one's own."""

    def saved(_: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in [name for name in state if name.startswith(prefix) and "gate" in name]:
            state[f"{prefix}v2_{name.removeprefix(prefix)}"] = state.pop(name)

    def loaded(_: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}v2_")]:
            state[prefix + name.removeprefix(f"{prefix}v2_")] = state.pop(name)

    module.register_state_dict_post_hook(saved)
    module.register_load_state_dict_pre_hook(loaded)


def a_tensor_hook(s: Subject, dice: random.Random) -> None:
    """A hook on the gradient of one parameter."""
    rows = inside(s.model) if dice.random() < 0.3 else outside(s.model)
    trained = [one for place in rows for one in tensors_of(place.module) if one.tensor.requires_grad]
    if trained:
        one = dice.choice(trained)
        one.tensor.register_hook(lambda grad: _note(s, f"gradient of {one.path}", grad))


def a_forward(s: Subject, dice: random.Random) -> None:
    """A forward is replaced on the instance, by one that calls the class's or doubles what it gives."""
    every = [("", s.model), *((path, site) for path, site, _ in sites_of(s.model))]
    inner = [(p.path, p.module) for p in inside(s.model) if _runs(p)]
    outer = [(p.path, p.module) for p in outside(s.model) if _runs(p)]
    path, module = dice.choice(dice.choices([every, outer, inner], [2, 3, 1])[0] or every)
    name = "cgc_net" if hasattr(module, "cgc_net") and dice.random() < 0.5 else "forward"
    factor = dice.choice((1, 1, 2))

    @functools.wraps(getattr(type(module), name))
    def run(*arguments: Any, **named: Any) -> Any:
        _note(s, f"{name} of {path}", arguments)
        given = getattr(type(module), name)(module, *arguments, **named)
        return given * factor if isinstance(given, Tensor) else given

    setattr(module, name, run)


def _some(dice: random.Random, s: Subject) -> nn.Module:
    """A module to be frozen, or set to another mode: of any kind, from a layer to the whole model."""
    everywhere = [place.module for place in dice.choice((inside, inside, outside))(s.model)]
    return dice.choice([*everywhere, s.model])


def frozen(s: Subject, dice: random.Random) -> None:
    """Some parameters are frozen."""
    if dice.random() < 0.7:
        _some(dice, s).requires_grad_(False)
    else:
        for parameter in s.model.parameters():
            parameter.requires_grad_(dice.random() < 0.6)
    if not any(p.requires_grad for place in outside(s.model) for p in place.module.parameters()):
        dice.choice(outside(s.model)).module.requires_grad_(True)


def modes(s: Subject, dice: random.Random) -> None:
    """Some modules are in eval mode, or nearly all of them are."""
    if dice.random() < 0.3:
        s.model.eval()
        _some(dice, s).train()
    elif dice.random() < 0.5:
        _some(dice, s).eval()
    else:
        kind: Any = dice.choice((nn.Dropout, nn.BatchNorm1d, nn.Linear))
        for module in s.model.modules():
            if isinstance(module, kind):
                module.eval()


def attributes(s: Subject, dice: random.Random) -> None:
    """Something stands on parameters."""
    kind = dice.choice(("all", "by dimensions", "by name", "one"))
    chosen = dice.choice([place.module for place in inside(s.model)])
    for name, parameter in s.model.named_parameters():
        own: Any = {"all": 1, "by dimensions": parameter.dim(), "by name": "gate" in name, "one": 0}[kind]
        if kind != "one" or any(parameter is p for p in chosen.parameters()):
            parameter.note = own  # type: ignore[attr-defined]


def buffers(s: Subject, dice: random.Random) -> None:
    """Tensors of a user's own, or none where they could be."""
    sites = [site for _, site, _ in sites_of(s.model)]
    rows = [s.model, *sites, *sites, *(place.module for place in [*outside(s.model)[:3], *inside(s.model)[:1]])]
    owner = dice.choice(rows)
    value = torch.arange(3.0) if dice.random() < 0.8 else None
    owner.register_buffer("counted", value, persistent=dice.random() < 0.6)
    if dice.random() < 0.3:
        owner.register_parameter("nothing", None)
        owner.register_module("nobody", None)


def norm_settings(s: Subject, dice: random.Random) -> None:
    """Batch norms have other settings, all of them or some; dropouts another rate."""
    chosen, rate = dice.choice((1.0, 0.3)), dice.choice((0.0, 0.2))
    setting = dice.choice(("momentum", "eps", "track_running_stats", "unsaved", "dropout"))
    value: Any = {"momentum": dice.choice((None, 0.3)), "eps": 0.02, "track_running_stats": False}.get(setting)
    for module in s.model.modules():
        if isinstance(module, nn.BatchNorm1d) and dice.random() < chosen:
            if setting == "unsaved":
                module._non_persistent_buffers_set.add("running_mean")
            elif setting != "dropout":
                setattr(module, setting, value)
        elif isinstance(module, nn.Dropout) and setting == "dropout" and dice.random() < chosen:
            module.p = rate


def layouts(s: Subject, dice: random.Random) -> None:
    """Weights lie transposed in memory, or all in one flat buffer."""
    if dice.random() < 0.5:
        for parameter in s.model.parameters():
            if parameter.dim() > 1 and dice.random() < 0.7:
                parameter.data = parameter.data.t().contiguous().t()
        return
    flat, start = torch.cat([p.detach().flatten() for p in s.model.parameters()]), 0
    for parameter in s.model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()


def other_layers(s: Subject, dice: random.Random) -> None:
    """Another activation, or none; a layer without bias; experts that differ from each other."""
    kinds: Any = (nn.Tanh, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Identity, nn.Softplus, lambda: nn.Dropout(0.0))
    for _, site, converter in sites_of(s.model):
        owners = [m for name in converter.children if (c := site._modules.get(name)) is not None for m in c.modules()]
        rows = [(m, name) for m in owners for name, child in m._modules.items() if isinstance(child, nn.ReLU | nn.SiLU)]
        linears: list[Any] = [m for m in owners if type(m) is nn.Linear]
        if rows and dice.random() < 0.7:
            make = dice.choice(kinds)
            for owner, name in rows if dice.random() < 0.3 else [dice.choice(rows)]:
                owner._modules[name] = make()
        elif linears:
            dice.choice(linears).bias = None


def frozen_as_buffers(s: Subject, dice: random.Random) -> None:
    """A weight is a buffer, or a tensor that the module knows nothing of."""
    linears = [place.module for place in inside(s.model) if type(place.module) is nn.Linear]
    if linears:
        linear = dice.choice(linears)
        if isinstance(linear.weight, nn.Parameter):
            value = linear.weight.detach().clone()
            del linear.weight
            if dice.random() < 0.7:
                linear.register_buffer("weight", value)
            else:
                linear.weight = value


class Scaled(nn.Module):
    """A parametrisation."""

    def forward(self, x: Tensor) -> Tensor:
        """Half of it."""
        return x / 2


def parametrised(s: Subject, dice: random.Random) -> None:
    """The weight of a layer is computed."""
    rows = inside(s.model) if dice.random() < 0.3 else outside(s.model)
    linears = [place.module for place in rows if type(place.module) is nn.Linear]
    if linears:
        parametrize.register_parametrization(dice.choice(linears), "weight", Scaled())


CHANGES: dict[Callable[[Subject, random.Random], None], float] = {
    **TIES,
    a_wrap: 1.5,
    a_hook: 5,
    a_tensor_hook: 1.5,
    a_forward: 2.5,
    frozen: 4,
    modes: 4,
    attributes: 2,
    buffers: 2,
    norm_settings: 3,
    layouts: 1.5,
    other_layers: 2,
    frozen_as_buffers: 1,
    parametrised: 1,
}
"""How often each is drawn."""


def change(s: Subject, dice: random.Random, kinds: list[str]) -> None:
    """Make the changes of these kinds."""
    named = {kind.__name__: kind for kind in CHANGES}
    with torch.no_grad():
        for kind in kinds:
            if inside(s.model) and outside(s.model):
                named[kind](s, dice)

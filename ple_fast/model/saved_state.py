"""What of a model is written, under which names, so that the model which ``load`` builds has all of it.

That model is built of the configuration. One that was changed since it was built may have other names (a pruned or
parametrised layer, a compiled part) or other parts; the first are written under the names that are looked for, too, and
the second are refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .eval_view import eval_view
from .tensor_file import DTYPES

Sources = Mapping[str, list[str]]
"""By the name of a value that is computed: the names of what it is computed from."""

COMPILED = "_orig_mod"
"""The name of what ``torch.compile`` wraps in its wrapper."""


def plain_name(name: str) -> str:
    """The name that an entry or a module has where nothing is compiled."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside a compiled one."""
    return uncompiled(module._modules[COMPILED]) if module._modules.get(COMPILED) is not None else module  # type: ignore[arg-type]  # not None


def class_name(module: nn.Module) -> str:
    """The name of a module's class, before it was compiled or parametrised."""
    own = uncompiled(module)
    kind = type(own)
    return (kind.__bases__[0] if parametrize.is_parametrized(own) else kind).__qualname__


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Every entry of the state dict, and every value that is computed from some of them, as in eval mode.

    Raises:
        ValueError: an entry that a file of tensors cannot hold.
    """
    state = {plain_name(name): value for name, value in model.state_dict().items()}
    sources: dict[str, list[str]] = {}
    if any(True for _, module in model.named_modules() for _ in _computed(module)):
        with torch.no_grad():
            for path, module in eval_view(model).named_modules(remove_duplicate=False):
                prefix = f"{plain_name(path)}." if path else ""
                for name, compute, begins in _computed(module):
                    begin = tuple(prefix + own for own in begins)
                    sources[prefix + name] = [entry for entry in state if entry.startswith(begin)]
                    state[prefix + name] = compute()
    for name, value in state.items():
        _check_entry(name, value)
    return state, sources


def _computed(module: nn.Module) -> Iterator[tuple[str, Callable[[], Tensor], tuple[str, ...]]]:
    """Tensors that a module computes anew at every call: name, how, and how the names of their sources begin."""
    if parametrize.is_parametrized(module):
        for name in module.parametrizations:  # type: ignore[union-attr]  # a ModuleDict
            yield name, lambda name=name: getattr(module, name), (f"parametrizations.{name}.",)  # type: ignore[misc]
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            name = hook._tensor_name
            yield name, lambda hook=hook: hook.apply_mask(module), (f"{name}_orig", f"{name}_mask")  # type: ignore[misc]
        elif isinstance(hook, WeightNorm):
            yield hook.name, lambda hook=hook: hook.compute_weight(module), (f"{hook.name}_g", f"{hook.name}_v")  # type: ignore[misc]
        elif isinstance(hook, SpectralNorm):
            begins = tuple(f"{hook.name}_{part}" for part in ("orig", "u", "v"))
            yield hook.name, lambda hook=hook: hook.compute_weight(module, do_power_iteration=False), begins  # type: ignore[misc]


def _check_entry(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected tensors in the state, got {type(value).__name__}; pickle the model instead")
    if value.is_meta:
        raise ValueError(f"{name}: expected values, got a tensor on meta; load or initialise the model first")
    if value.layout is not torch.strided or is_traceable_wrapper_subclass(value):
        kind = type(value).__name__ if value.layout is torch.strided else str(value.layout)
        raise ValueError(f"{name}: expected an ordinary tensor, got {kind}; gather or convert the model first")
    if value.dtype not in DTYPES.values():
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
        raise ValueError(f"{name}: expected one of {known}, got {value.dtype}; convert the model first")


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every entry that a model looks for."""
    entries = model.state_dict(keep_vars=True).items()
    return {plain_name(name): tuple(value.shape) for name, value in entries if isinstance(value, Tensor)}


def select(state: Mapping[str, Tensor], sources: Sources, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The entries that a model of these shapes looks for.

    A value that is computed, and what it is computed from, stand for each other: the model looks for one of them.

    Raises:
        ValueError: one is missing or of another shape, or one is left over.
    """
    found = {name: state[name] for name in shapes if name in state}
    left = state.keys() - found.keys()
    for name, entries in sources.items():
        if name in found:
            left -= set(entries)
        elif found.keys() >= set(entries):
            left.discard(name)
    missing = [name for name in shapes if name not in found]
    wrong = [name for name, value in found.items() if tuple(value.shape) != shapes[name]]
    if missing or left:
        raise ValueError(f"missing: {_few(missing) or 'none'}, unexpected: {_few(sorted(left)) or 'none'}")
    if wrong:
        name = wrong[0]
        raise ValueError(f"{name}: shape {tuple(state[name].shape)}, expected {shapes[name]}")
    return found


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more


@torch.no_grad()
def fill(model: nn.Module, state: Mapping[str, Tensor], sources: Sources) -> None:
    """Gives a model every entry of a state, each in the dtype that it has there.

    Raises:
        ValueError: the state does not fit.
    """
    chosen = select(state, sources, shapes_of(model))
    own = model.state_dict(keep_vars=True)
    for full, tensor in own.items():
        name = plain_name(full)
        if name in chosen and tensor.dtype != chosen[name].dtype:
            if not (tensor.is_floating_point() and chosen[name].is_floating_point()):
                raise ValueError(f"{name}: {chosen[name].dtype}, expected {tensor.dtype}")
            tensor.data = tensor.data.to(chosen[name].dtype)
    model.load_state_dict({full: chosen[plain_name(full)] for full in own if plain_name(full) in chosen})

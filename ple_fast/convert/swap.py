"""One site in its two forms: with the library's modules, and with the fused levels in their place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..modules.unpack import Move, tensor_named
from .converter import Converter, converter_named
from .fused_trunk import CHILD, FusedTrunk, replaced_by, tensors_of
from .optimizers import attributes_of
from .state_dict import to_fused, to_original

SETTINGS = ("eps", "momentum", "track_running_stats")
"""Of norms, that may be changed while they are fused."""


def moves_in(site: nn.Module, trunk: FusedTrunk) -> list[Move[nn.Parameter]]:
    """What becomes of the site's parameters when the trunk takes their place."""
    return _of_parameters(trunk, lambda name: tensor_named(site, name))


def _of_parameters(trunk: FusedTrunk, original: Callable[[str], Any]) -> list[Move[nn.Parameter]]:
    """The moves of what is a parameter in both forms; ``original`` finds the library's by name."""
    found = [(move, original(move.old), trunk.tensor(move.new)) for move in trunk.moves]
    return [
        Move(theirs, move.old_place, ours, move.new_place)
        for move, theirs, ours in found
        if isinstance(theirs, nn.Parameter) and isinstance(ours, nn.Parameter)
    ]


def swap_in(site: nn.Module, trunk: FusedTrunk, converter: Converter) -> None:
    """Put the trunk in the place of the site's children."""
    trunk.order = tuple(site._modules)
    replaced = replaced_by(converter, site)
    kept = {name: child for name, child in site._modules.items() if name not in replaced}
    # What runs the site next runs one form or the other: the class decides, and both have their children until then.
    trunk.skeleton.update(replaced)
    if any(map(_is_shared, replaced.values())):
        trunk.share_memory()
    site._modules[CHILD] = trunk
    site.__class__ = accelerated_class(type(site), converter)
    site._modules = {**kept, CHILD: trunk}
    for child in replaced.values():
        # The modules stay the user's own, with hooks on containers, modes and attributes; their tensors go.
        _emptied(child)


def materialise(site: Accelerated) -> list[Move[nn.Parameter]]:
    """Give the replaced children their tensors back, with the values of the fused ones; they stay aside for now."""
    trunk = site.trunk()
    with torch.no_grad():
        for moves in trunk.by_original().values():
            _fill(trunk, moves)
    if _is_shared(trunk):
        for child in trunk.skeleton.values():
            child.share_memory()
    return [move.back for move in _of_parameters(trunk, trunk.original)]


def _is_shared(module: nn.Module) -> bool:
    """Whether something of it lies in memory that processes share; what is on a GPU always says so."""
    return any(tensor.is_cpu and tensor.is_shared() for _, tensor in tensors_of(module))


def dematerialise(site: Accelerated) -> None:
    """Undo ``materialise``."""
    for child in site.trunk().skeleton.values():
        _emptied(child)


def _emptied(child: nn.Module) -> None:
    """Move a replaced child to the meta device; what somebody has put on its parameters stays on them."""
    # Not by to(), which fails half-way where PyTorch is set to swap tensors and a graph or a weak reference is alive.
    for module in child.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
                vars(made).update(attributes_of(parameter))
                module._parameters[name] = made
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to("meta")


def swap_out(site: Accelerated) -> None:
    """Put the library's modules, materialised before, back in their places."""
    trunk = site.trunk()
    for name, originals in trunk.modes.items():
        _set_modes(trunk.get_submodule(name), [trunk.original(original) for original in originals])
    modules = {**site._modules, **trunk.skeleton}
    del modules[CHILD]
    ordered = {name: modules.pop(name) for name in trunk.order if name in modules}
    site._modules.update(trunk.skeleton)  # both forms have their children until the class decides, as in swap_in
    site.__class__ = site._original_class  # type: ignore[assignment]  # which it had before
    site._modules = {**ordered, **modules}


def _set_modes(ours: nn.Module, theirs: list[nn.Module]) -> None:
    """Settings and train or eval mode of modules: their own mode, but where the fused one was set on its own."""
    for module in theirs:
        for name in SETTINGS:
            if hasattr(module, name) and hasattr(ours, name):
                setattr(module, name, getattr(ours, name))
    # Where there is a dropout, the mode of the fused layer is its mode: nothing else in a layer reads one.
    dropouts = [module for module in theirs if isinstance(module, nn.Dropout)]
    if any(module.training != ours.training for module in dropouts or theirs[:1]):
        for module in theirs:
            module.training = ours.training


def stand_in(site: nn.Module, trunk: FusedTrunk, converter: Converter) -> nn.Module:
    """What the site would be with the trunk in place, sharing everything else with it."""
    cls = accelerated_class(type(site), converter)
    made = cls.__new__(cls)
    made.__dict__.update(site.__dict__)
    kept = {name: child for name, child in site._modules.items() if name not in converter.children}
    made.__dict__["_modules"] = {**kept, CHILD: trunk}
    return made


def _fill(trunk: FusedTrunk, moves: list[Move[str]]) -> None:
    """Give one tensor of a replaced child its value; these are all its moves."""
    owner, _, last = moves[0].old.rpartition(".")
    module, value = trunk.original(owner), trunk.assembled(moves)
    if last in module._buffers:
        module._buffers[last] = value
        return
    # What nothing reads is kept as a buffer, which has forgotten whether it was trained; the skeleton has not.
    source, like = trunk.tensor(moves[0].new), module._parameters[last]
    trained = source.requires_grad if isinstance(source, nn.Parameter) else like.requires_grad
    made = module._parameters[last] = nn.Parameter(value, requires_grad=trained)
    vars(made).update(attributes_of(like))


class Accelerated:
    """Mixed into the class of a site: its state dict keeps the library's names, and copies and pickles work."""

    _modules: dict[str, nn.Module]
    training: bool
    _original_class: type[nn.Module]
    _converter: str

    def trunk(self) -> FusedTrunk:
        """The fused levels, and what the way back needs."""
        trunk = self._modules[CHILD]
        assert isinstance(trunk, FusedTrunk)
        return trunk

    def train(self, mode: bool = True) -> Any:
        """Sets the mode of the replaced modules, too, which have it when they come back."""
        given = super().train(mode)  # type: ignore[misc]
        for child in self.trunk().skeleton.values():
            child.train(mode)
        return given

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As the library's own module has it, entry by entry, or with the fused names, as ``accelerate`` was told."""

        def rename(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
            to_original(self.trunk(), state, prefix)

        given: dict[str, Any] = {"destination": destination, "prefix": prefix, "keep_vars": keep_vars}
        if self.trunk().style == "fused":
            return super().state_dict(*args, **given)  # type: ignore[misc]
        # The first of the hooks: those of the user, and what a class does besides, are made for the library's names.
        with _twin(self, "_state_dict_hooks", first=rename) as twin:
            return super(Accelerated, twin).state_dict(*args, **given)  # type: ignore[misc]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:

        def rename(state: dict[str, Any], prefix: str, *_: Any) -> None:
            if not any(name.startswith(f"{prefix}{CHILD}.") for name in state):
                assign = bool(local_metadata.get("assign_to_params_buffers", False))
                to_fused(self.trunk(), state, prefix, assign, missing_keys if strict else [], error_msgs)

        # The last of the hooks: those of the user may bring entries into the library's names.
        with _twin(self, "_load_state_dict_pre_hooks", last=rename) as twin:
            super(Accelerated, twin)._load_from_state_dict(  # type: ignore[misc]
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    def __getattr__(self, name: str) -> Any:
        trunk = self.__dict__.get("_modules", {}).get(CHILD)
        if isinstance(trunk, FusedTrunk) and name in trunk.skeleton:
            raise AttributeError(
                f"{name!r} was replaced by the fused levels in {CHILD!r} (ple_fast.accelerate); "
                "ple_fast.restore(model) brings it back"
            )
        return super().__getattr__(name)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._original_class, self._converter), self.__dict__.copy()


@contextmanager
def _twin(
    site: Accelerated, hooks: str, *, first: Callable[..., Any] | None = None, last: Callable[..., Any] | None = None
) -> Iterator[Accelerated]:
    """The site with one more hook: an object of its own, because other threads may be saving the site."""
    twin = type(site).__new__(type(site))
    own = vars(twin)
    own.update(vars(site))
    rows = [*vars(site)[hooks].items()]
    own[hooks] = OrderedDict([*([(-1, first)] if first else []), *rows, *([(-2, last)] if last else [])])
    yield twin
    vars(site).update({k: v for k, v in own.items() if k != hooks and vars(site).get(k) is not v})


def _rebuild(original: type[nn.Module], converter: str) -> nn.Module:
    cls = accelerated_class(original, converter_named(converter))
    return cls.__new__(cls)


_CLASSES: dict[tuple[type, str], type] = {}


def accelerated_class(original: type[nn.Module], converter: Converter) -> type[nn.Module]:
    """The class of an accelerated site: a subclass of its own class, made once."""
    key = (original, converter.name)
    if key not in _CLASSES:
        namespace = {
            **dict(converter.methods),
            "_original_class": original,
            "_converter": converter.name,
            "__module__": original.__module__,
            "__doc__": f"{original.__name__} with fused levels (ple_fast.accelerate).",
        }
        # Where users have subclasses, the library may look for a name among the bases of one (LibMTL's MoDo does).
        bases = original.__bases__ if converter.subclasses else ()
        _CLASSES[key] = type(f"Accelerated{original.__name__}", (Accelerated, original, *bases), namespace)
    return _CLASSES[key]

"""One site in its two forms: with the library's modules, and with the fused levels in their place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .moves import Move, attributes_of
from .pieces import Constant, Piece, Twin, pieces_of
from .registry import Converter, converter_named
from .stacks import check_bare
from .states import to_fused, to_original
from .trunk import (
    CHILD,
    FusedTrunk,
    Record,
    StateStyle,
    all_pieces,
    assembled,
    by_original,
    entries_of,
    record_of,
    skeleton_module,
    skeleton_tensor,
    tensor_named,
    tensors_of,
)


def build(site: nn.Module, converter: Converter, style: StateStyle) -> FusedTrunk:
    """The fused trunk of a site, which is left as it is.

    Raises:
        TypeError, ValueError: something in it cannot be packed or represented.
    """
    for name, _ in converter.methods:
        if name in vars(site):
            raise ValueError(
                f"its {name} was replaced on the instance, so the fused levels would not run; restore it first"
            )
    sources = converter.read(site)
    for name, child in replaced_by(converter, site).items():
        for inner, module in child.named_modules():
            check_bare(f"{name}.{inner}".removesuffix("."), module)
    made = [source.pack() for source in sources]
    trunk = FusedTrunk([found.level for found in made])
    pieces: list[Piece] = []
    twins: list[Twin] = []
    constants: list[Constant] = []
    for i, (source, found) in enumerate(zip(sources, made, strict=True)):
        own, modes, fixed = pieces_of(site, source, found, f"levels.{i}.")
        pieces, twins, constants = pieces + own, twins + modes, constants + fixed
    replaced = [name for name in converter.children if name in site._modules]
    tensors = {name: tensor for name, tensor in tensors_of(site) if name.partition(".")[0] in replaced}
    unread = _hold_unread(site, trunk, converter, [t for source in sources for t in source.unread_tensors()], tensors)
    lost = sorted(tensors.keys() - {piece.original for piece in pieces} - unread.keys())
    foreign = sorted({piece.original for piece in pieces} - tensors.keys())
    if lost or foreign:
        raise ValueError(
            f"{converter.name}: expected the tensors that this version of ple_fast knows; unknown {lost}, missing "
            f"{foreign}: the module is of another version or was changed"
        )
    trunk.record = Record(
        converter.name,
        tuple(pieces),
        unread,
        tuple(twins),
        {},
        (),
        tuple(entries_of(site)),
        style,
        constants=tuple(constants),
    )
    trunk.training = site.training
    return trunk


SETTINGS = ("eps", "momentum", "track_running_stats")
"""Of norms, that may be changed while they are fused."""


def _hold_unread(
    site: nn.Module, trunk: FusedTrunk, converter: Converter, unread: list[Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """Keep what nothing reads: a buffer, unless something still trains it; a parameter without gradient breaks DDP."""
    wanted = {id(tensor) for tensor in unread}
    trained = {id(p) for p in converter.trained_unread(site)}
    names: dict[str, str] = {}
    for name, tensor in tensors.items():
        if id(tensor) in wanted:
            own = str(len(names))
            if id(tensor) in trained:
                trunk.unread.register_parameter(
                    own, nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
                )
            else:
                trunk.unread.register_buffer(own, tensor.detach().clone())
            names[name] = f"unread.{own}"
    return names


def moves_in(site: nn.Module, trunk: FusedTrunk) -> list[Move]:
    """What becomes of the site's parameters when the trunk takes their place."""
    pairs = _parameters(trunk, lambda name: tensor_named(site, name))
    return [Move(original, piece.inside, fused, piece.place) for piece, original, fused in pairs]


def _parameters(
    trunk: FusedTrunk, original: Callable[[str], Any]
) -> Iterator[tuple[Piece, nn.Parameter, nn.Parameter]]:
    """The pieces that are parameters in both forms, with them; ``original`` finds the library's by name."""
    for piece in all_pieces(record_of(trunk)):
        theirs, ours = original(piece.original), trunk.tensor(piece.fused)
        if isinstance(theirs, nn.Parameter) and isinstance(ours, nn.Parameter):
            yield piece, theirs, ours


def replaced_by(converter: Converter, site: nn.Module) -> dict[str, nn.Module]:
    """The children of a site that a swap replaces."""
    children = {name: site._modules.get(name) for name in converter.children}
    return {name: child for name, child in children.items() if child is not None}


def swap_in(site: nn.Module, trunk: FusedTrunk, converter: Converter) -> None:
    """Put the trunk in the place of the site's children."""
    record = record_of(trunk)
    record.children = tuple(site._modules)
    replaced = replaced_by(converter, site)
    kept = {name: child for name, child in site._modules.items() if name not in replaced}
    # What runs the site next runs one form or the other: the class decides, and both have their children until then.
    record.skeleton.update(replaced)
    if any(map(_is_shared, replaced.values())):
        trunk.share_memory()
    site._modules[CHILD] = trunk
    site.__class__ = accelerated_class(type(site), converter)
    site._modules = {**kept, CHILD: trunk}
    for child in replaced.values():
        # The modules stay the user's own, with hooks on containers, modes and attributes; their tensors go.
        _emptied(child)


def materialise(site: Accelerated) -> list[Move]:
    """Give the replaced children their tensors back, with the values of the fused ones; they stay aside for now."""
    trunk = site.trunk()
    record = record_of(trunk)
    parts = by_original(record)
    with torch.no_grad():
        for name in parts:
            _fill(record, trunk, name, parts[name])
    if _is_shared(trunk):
        for child in record.skeleton.values():
            child.share_memory()
    pairs = _parameters(trunk, lambda name: skeleton_tensor(record, name))
    return [Move(fused, piece.place, original, piece.inside) for piece, original, fused in pairs]


def _is_shared(module: nn.Module) -> bool:
    """Whether something of it lies in memory that processes share; what is on a GPU always says so."""
    return any(tensor.is_cpu and tensor.is_shared() for _, tensor in tensors_of(module))


def dematerialise(site: Accelerated) -> None:
    """Undo ``materialise``."""
    for child in record_of(site.trunk()).skeleton.values():
        _emptied(child)


def _emptied(child: nn.Module) -> None:
    """Move a replaced child to the meta device; what somebody has put on its parameters stays on them."""
    kept = {name: attributes_of(parameter) for name, parameter in child.named_parameters()}
    child.to("meta")
    for name, parameter in child.named_parameters():
        vars(parameter).update(kept[name])


def swap_out(site: Accelerated) -> None:
    """Put the library's modules, materialised before, back in their places."""
    trunk = site.trunk()
    record = record_of(trunk)
    _set_modes(record, trunk)
    for twin in record.twins:
        theirs, ours = skeleton_module(record, twin.original), trunk.get_submodule(twin.fused)
        for name in SETTINGS:
            if hasattr(theirs, name) and hasattr(ours, name):
                setattr(theirs, name, getattr(ours, name))
    modules = {**site._modules, **record.skeleton}
    del modules[CHILD]
    ordered = {name: modules.pop(name) for name in record.children if name in modules}
    site._modules.update(record.skeleton)  # both forms have their children until the class decides, as in swap_in
    site.__class__ = site._original_class  # type: ignore[assignment]  # which it had before
    site._modules = {**ordered, **modules}


def _set_modes(record: Record, trunk: FusedTrunk) -> None:
    """Train or eval mode of the replaced modules: their own, but where a fused one was set on its own."""
    twins: dict[str, list[nn.Module]] = {}
    for twin in record.twins:
        twins.setdefault(twin.fused, []).append(skeleton_module(record, twin.original))
    for name, theirs in twins.items():
        training = trunk.get_submodule(name).training
        # Where there is a dropout, the mode of the fused layer is its mode: nothing else in a layer reads one.
        dropouts = [module for module in theirs if isinstance(module, nn.Dropout)]
        if any(module.training != training for module in dropouts or theirs[:1]):
            for module in theirs:
                module.training = training


def stand_in(site: nn.Module, trunk: FusedTrunk, converter: Converter) -> nn.Module:
    """What the site would be with the trunk in place, sharing everything else with it."""
    cls = accelerated_class(type(site), converter)
    made = cls.__new__(cls)
    made.__dict__.update(site.__dict__)
    kept = {name: child for name, child in site._modules.items() if name not in converter.children}
    made.__dict__["_modules"] = {**kept, CHILD: trunk}
    return made


def _fill(record: Record, trunk: FusedTrunk, name: str, parts: list[Piece]) -> None:
    owner, _, last = name.rpartition(".")
    module, value = skeleton_module(record, owner), assembled(record, trunk, name, parts)
    if last in module._buffers:
        module._buffers[last] = value
        return
    # What nothing reads is kept as a buffer, which has forgotten whether it was trained; the skeleton has not.
    source = trunk.tensor(parts[0].fused)
    like = module._parameters[last]
    assert like is not None
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
        for child in record_of(self.trunk()).skeleton.values():
            child.train(mode)
        return given

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As the library's own module has it, entry by entry, or with the fused names, as ``accelerate`` was told."""

        def rename(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
            to_original(self.trunk(), state, prefix)

        given: dict[str, Any] = {"destination": destination, "prefix": prefix, "keep_vars": keep_vars}
        if record_of(self.trunk()).style == "fused":
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
        if isinstance(trunk, FusedTrunk) and name in record_of(trunk).skeleton:
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
        _CLASSES[key] = type(f"Accelerated{original.__name__}", (Accelerated, original), namespace)
    return _CLASSES[key]

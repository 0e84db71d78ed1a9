"""A model in eval mode for one call, none of its own flags touched: other threads may serve or train it meanwhile."""

from __future__ import annotations

import copy
import functools
import operator
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from ..references import attributes, remembered

M = TypeVar("M", bound=nn.Module)

PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, range, type, types.BuiltinFunctionType})
"""Types that refer to no module; ``_is_plain`` knows more."""
OUR_MODULES = frozenset(("torch", "numpy", "ple_fast", "ple_fast_encoder"))
OWN = vars(nn.Module()).keys()
"""What every module has. Parameters and buffers are shared as dicts: a view sees what FSDP, say, puts into them."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
DEPTH = 4
"""How far references are followed; a closure, a method, a partial or a container is one step."""
OBJECT_STEPS = 3
"""For an object of a class that we do not know, whose attributes may lead anywhere."""


def is_training(model: nn.Module) -> bool:
    """Whether any module of the model is in train mode."""
    return any(module.training for module in _modules(model))


def eval_view(model: M) -> M:
    """The model itself where all of it is in eval mode; otherwise a view of it that is.

    A view has module objects of its own, in eval mode, which share parameters, buffers and hooks with the model's; a
    module that the model holds twice is one in the view too, and references between modules lead to those of the view.
    A compiled module runs uncompiled there (its program is bound to the module). A module of TorchScript, whose mode is
    inside it, and one of a class with a ``train()`` of its own, which may do more than set modes, are copied with their
    weights. What ``forward`` sets as an attribute of its module is gone with the view.

    Raises:
        ValueError: a module that only ``eval()`` can bring into eval mode; the message names it.
    """
    return _View(model).built if is_training(model) else model


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """Every module once; faster than ``model.modules()``, which joins names."""
    found, rest = {id(model)}, [model]
    while rest:
        module = rest.pop()
        yield module
        for child in module._modules.values():
            if child is not None and id(child) not in found:
                found.add(id(child))
                rest.append(child)


def _needs_copy(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return True
    kind = type(module)
    if kind.train is nn.Module.train and kind.eval is nn.Module.eval:
        return False
    owners = [next(base for base in kind.__mro__ if name in vars(base)) for name in ("train", "eval")]
    return any(owner.__module__.partition(".")[0] != "torch" for owner in owners)  # PyTorch's own set modes only


class _Bound(Exception):
    """Something refers to a module of the model in a way that cannot be led to the view."""


class _View:
    """The view of one model while it is built: blanks first, because modules may refer to each other in a circle."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sharded = _loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
        self.compiled = _loaded("torch._dynamo.eval_frame", "OptimizedModule")
        self.twins: dict[int, Any] = {}
        modules = list(_modules(model))
        for module in modules:
            if id(module) not in self.twins and _needs_copy(module):
                self._copy(module)
        blank = [module for module in modules if id(module) not in self.twins]
        self.twins |= {id(module): self._blank(module) for module in blank}
        for module in blank:
            self._fill(module)
        self.built: Any = self.twins[id(model)]

    def _copy(self, module: nn.Module) -> None:
        if not is_training(module):
            copied = module
        else:
            try:
                copied = copy.deepcopy(module).eval()
            except Exception as error:
                self._refuse(module, f"it has to be copied for that, which fails ({error});")
        # Those below are led to the copy too, unless the copy of one above was first.
        for original, twin in zip(_modules(module), _modules(copied), strict=False):
            self.twins.setdefault(id(original), twin)

    def _blank(self, module: nn.Module) -> nn.Module:
        kind = type(module)
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            self._refuse(module, "its parameters are not initialised; run a first batch through the model, or")
        if isinstance(module, self.sharded):
            self._refuse(module, "FullyShardedDataParallel gathers its weights into the module itself;")
        if parametrize._cache_enabled and "parametrizations" in module._modules:
            self._refuse(module, "torch.nn.utils.parametrize.cached() keeps weights module by module; leave it, or")
        try:
            return object.__new__(kind)
        except TypeError:
            self._refuse(module, "its class is built in;")

    def _fill(self, module: nn.Module) -> None:
        state = module.__dict__.copy()
        children = state["_modules"].items()
        state["_modules"] = {name: None if child is None else self.twins[id(child)] for name, child in children}
        state["training"] = False
        state.pop("_compiled_call_impl", None)  # of module.compile()
        if isinstance(module, self.compiled):
            state["forward"] = state["_modules"]["_orig_mod"].__call__
        else:
            for name in (*(state.keys() - OWN), *HOOKS):
                value = state[name]
                if type(value) in PLAIN or (name in HOOKS and not value):
                    continue
                try:
                    state[name] = self._led(value, DEPTH)
                except _Bound:
                    self._refuse(module, f"its {name} refers to a module of the model itself;")
        self.twins[id(module)].__dict__.update(state)

    def _refuse(self, module: nn.Module, why: str) -> NoReturn:
        path = next(path for path, found in self.model.named_modules() if found is module)
        where = f"{path} ({type(module).__name__})" if path else type(module).__name__
        raise ValueError(
            f"{where}: expected a module that can be read in eval mode while the model is in train mode; {why} call "
            "model.eval() first"
        )

    def _led(self, value: Any, steps: int) -> Any:
        """``value`` itself, or, where it refers to modules of the model, the same with those of the view."""
        kind = type(value)
        if kind in PLAIN:
            return value
        if kind in weakref.ProxyTypes:  # which says to be of its referent's class
            return self._led_proxy(value)
        if isinstance(value, nn.Module):
            if id(value) not in self.twins and any(id(part) in self.twins for part in _modules(value)):
                raise _Bound
            return self.twins.get(id(value), value)
        if steps <= 0 or _is_plain(kind):
            return value
        if isinstance(value, (list, tuple, dict, set, frozenset)):
            return self._led_container(value, steps - 1)
        if isinstance(value, types.MethodType):
            owner = self._led(value.__self__, steps - 1)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if isinstance(value, weakref.ref):
            target = value()
            led = self._led(target, steps - 1)
            return value if led is target else weakref.ref(led)
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            func, args, keywords = self._led(parts, steps)
            unchanged = all(map(operator.is_, parts, (func, args, keywords)))
            return value if unchanged else functools.partial(func, *args, **keywords)
        for held in _held(value):
            if self._led(held, steps - (1 if isinstance(value, types.FunctionType) else OBJECT_STEPS)) is not held:
                raise _Bound
        return value

    def _led_proxy(self, value: Any) -> Any:
        try:
            is_module = isinstance(value, nn.Module)
        except ReferenceError:  # of something that is gone
            return value
        if is_module:
            raise _Bound
        return value

    def _led_container(self, value: Any, steps: int) -> Any:
        entries = list(value.values() if isinstance(value, dict) else value)
        if all(map(_is_plain, set(map(type, entries)))):
            return value
        led = [self._led(entry, steps) for entry in entries]
        if all(map(operator.is_, entries, led)):
            return value
        kind = type(value)
        if kind in (dict, OrderedDict):
            return kind(zip(value, led, strict=True))
        if kind in (list, tuple, set, frozenset):
            return kind(led)
        if hasattr(value, "_make"):  # a named tuple
            return value._make(led)
        raise _Bound


def _is_plain(kind: type) -> bool:
    """Whether what is of a type refers to no module, or calls none: all of ours and PyTorch's that are no modules."""
    return kind in PLAIN or (kind.__module__.partition(".")[0] in OUR_MODULES and not issubclass(kind, nn.Module))


def _held(value: Any) -> Iterable[Any]:
    """What a function closes over, or the attributes of an object."""
    if isinstance(value, types.FunctionType):
        return remembered(value)
    return () if isinstance(value, (type, types.ModuleType)) else attributes(value)


def _loaded(where: str, name: str) -> tuple[type, ...]:
    """A class of PyTorch, unless it was never imported: then nothing is of it, and the import would take a second."""
    kind = getattr(sys.modules.get(where), name, None)
    return (kind,) if isinstance(kind, type) else ()

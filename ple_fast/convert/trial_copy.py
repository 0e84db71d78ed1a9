"""A private copy of a site for a trial run: in eval mode, without hooks, and with nothing in it that is the user's."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .plain_layers import HOOKS

EMPTIED = (*HOOKS, "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
"""Hooks of a module, and what PyTorch notes of each."""
CONTAINERS = (list, tuple, set, frozenset, dict, OrderedDict)


@contextmanager
def private(site: nn.Module, dtype: torch.dtype, device: torch.device) -> Iterator[nn.Module]:
    """A copy of a module to run once, without gradients: floating tensors are of ``dtype``, and all of them finite.

    A table of embeddings is not copied, only read: it may be larger than everything else together.
    """
    copier = _Copier(dtype, device)
    try:
        yield copier.module(site)
    finally:
        copier.clear()


def calls(module: nn.Module, function: Callable[..., Any]) -> None:
    """Make a call of a private module one of ``function``, past the hooks of modules, those of the process too."""
    vars(module)["_compiled_call_impl"] = function


class _Copier:
    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.made: dict[int, Any] = {}
        self.originals: list[Any] = []  # an id is that of an object as long as it lives

    def clear(self) -> None:
        """Let go of all copies, which hold each other in circles."""
        for made in self.made.values():
            if isinstance(made, nn.Module) and not isinstance(made, torch.jit.ScriptModule):
                vars(made).clear()
        self.made.clear()

    def _keep(self, original: Any, made: Any) -> Any:
        self.originals.append(original)
        self.made[id(original)] = made
        return made

    def value(self, value: Any) -> Any:
        """Of an attribute: copies of modules and tensors, also in containers; everything else is shared."""
        if id(value) in self.made:
            return self.made[id(value)]
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, Tensor):
            return self._keep(value, self._tensor(value))
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            return MethodType(value.__func__, self.module(value.__self__))
        if type(value) is functools.partial:
            return functools.partial(
                self.value(value.func), *map(self.value, value.args), **self.value(dict(value.keywords))
            )
        if type(value) in (dict, OrderedDict):
            made = self._keep(value, type(value)())
            made.update((self.value(key), self.value(item)) for key, item in value.items())
            return made
        if type(value) is list:
            row = self._keep(value, [])
            row.extend(map(self.value, value))
            return row
        return type(value)(map(self.value, value)) if type(value) in CONTAINERS else value

    def _tensor(self, tensor: Tensor) -> Tensor:
        value = self._finite(tensor.detach().clone())
        return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value

    def _finite(self, value: Tensor) -> Tensor:
        """What has diverged would hide a difference: NaN and infinity are equal to everything, or to nothing."""
        return value.to(self.dtype).nan_to_num(0.5, 1.5, -1.5) if value.is_floating_point() else value

    def module(self, module: nn.Module) -> nn.Module:
        """A copy; of a compiled module one of what was compiled."""
        if id(module) in self.made:
            found: nn.Module = self.made[id(module)]
            return found
        if isinstance(module, torch.jit.ScriptModule):
            scripted: nn.Module = copy.deepcopy(module).to(self.dtype).eval()
            return self._keep(module, scripted)  # type: ignore[no-any-return]  # what was given
        if type(module).__name__ == "OptimizedModule":  # to ask for the class imports the compiler
            return self.module(module.get_submodule("_orig_mod"))
        made: nn.Module = type(module).__new__(type(module))
        self._keep(module, made)
        own = vars(made)
        # A forward that stands on the instance is bound to the original.
        own.update({name: value for name, value in vars(module).items() if name != "forward"})
        own.update({name: OrderedDict() for name in EMPTIED if name in own}, training=False)
        if isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
            calls(made, functools.partial(self._looked_up, module))
            return made
        own.update({name: self.value(value) for name, value in own.items() if name not in EMPTIED})
        calls(made, made.forward)
        return made

    def _looked_up(self, table: nn.Embedding, ids: Tensor) -> Tensor:
        rows = self._finite(table.weight.detach()[ids.flatten()])
        if table.max_norm is not None:  # the library's own call would shorten the rows of the user's table
            rows = rows.renorm(table.norm_type, 0, table.max_norm)
        return rows.view(*ids.shape, table.weight.shape[1])

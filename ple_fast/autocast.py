"""What autocast asks of a level: a dtype, and casts of the parameters that one region makes once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from threading import get_ident
from typing import NamedTuple

import torch
from torch import Tensor


class _Cast(NamedTuple):
    result: Tensor
    version: int
    """Of the parameter when it was cast."""


class _Casts(dict[tuple[int, torch.dtype, int], _Cast]):
    """By parameter, dtype and thread. A cast's graph holds its parameter, so that no other one can have its ``id``."""

    has_ended = False


class _End:
    """Ends the casts when it goes itself. It belongs to a node of PyTorch's, and nothing else refers to it."""

    def __init__(self, casts: _Casts) -> None:
        self._casts = casts

    def __del__(self) -> None:
        self._casts.has_ended = True  # another thread may be looking at them
        self._casts.clear()


# PyTorch's own cache of casts serves the operators that autocast knows, gives none away, and ends with the region; it
# tells nobody when. So ours are tied to a cast that this cache holds, and end with it.
_casts = _Casts()
_casts.has_ended = True


def autocast_dtype(like: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on the device of ``like``; None where it does not apply."""
    kind = like.device.type
    # The meta device has no autocast, and asking for it raises.
    if like.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Autocast is off for an operator that may run in any region, and whose tensors have their dtypes."""
    kind = like.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def cast_once(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """``parameter.to(dtype)``; of a parameter that trains, the one that an earlier call in this region made.

    A cast is made anew after the parameter was written to, after a backward through a level, and where PyTorch's cache
    makes its own anew: when a region of autocast has ended, or with ``cache_enabled=False``. Tensors that are no
    parameters are cast at each call.
    """
    if (
        parameter.dtype == dtype
        or not torch.is_grad_enabled()
        or not (parameter.requires_grad and parameter.is_leaf)
        or not torch.is_autocast_cache_enabled()
    ):
        return parameter.to(dtype)
    casts = _casts
    if casts.has_ended:
        casts = _begin(parameter.device)
    # Of this thread: another one may be in a region that began long before, and has not ended.
    key = id(parameter), dtype, get_ident()
    known = casts.get(key)
    if known is not None and known.version == parameter._version:
        return known.result
    result = parameter.to(dtype)
    casts[key] = _Cast(result, parameter._version)
    return result


def _begin(device: torch.device) -> _Casts:
    """No casts yet; they are kept for as long as PyTorch's cache keeps what it holds now."""
    global _casts
    # An operator that autocast knows, on nothing, makes the cache cast a tensor of ours. The first operand here is
    # not saved for backward: hooks of saved tensors must not see what only some of the calls do.
    nothing = torch.empty((0, 0), dtype=torch.float32, device=device, requires_grad=True)
    fixed = nothing.detach()
    node = torch.addmm(nothing, fixed, fixed).grad_fn
    cast = None if node is None else node.next_functions[0][0]
    casts = _Casts()
    if cast is not None and cast.name().startswith("ToCopyBackward"):  # where autocast does not know it, it is no cast
        cast.metadata["ple_fast"] = _End(casts)  # type: ignore[index]  # a property, which the stub calls a method
        del node, cast  # they would outlive the cache, and the casts with them
        _casts = casts
    return casts


def end_step() -> None:
    """Forget the casts: from here on an optimizer may write to parameters in ways that leave no trace."""
    if _casts:
        _casts.clear()

"""What autocast asks of a level: a dtype, and casts of the parameters that one step makes once."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class _Cast(NamedTuple):
    result: weakref.ref[Tensor]
    """Weak: what no graph has saved any more is of no use, and takes no memory."""
    version: int
    """Of the parameter when it was cast."""


# PyTorch's own cache of casts serves the operators that autocast knows, and gives none away.
_casts: WeakIdKeyDictionary = WeakIdKeyDictionary()


def autocast_dtype(like: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on the device of ``like``; None where it does not apply."""
    kind = like.device.type
    # The meta device has no autocast, and asking for it raises.
    if like.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def cast_once(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """``parameter.to(dtype)``; of a parameter that trains, the one that an earlier call of this step saved.

    A step ends with the first backward through a level. As in PyTorch's cache, ``cache_enabled=False`` of
    ``torch.autocast`` asks for a cast at each call, and tensors that are no parameters are cast at each call.
    """
    if (
        parameter.dtype == dtype
        or not torch.is_grad_enabled()
        or not (parameter.requires_grad and parameter.is_leaf)
        or not torch.is_autocast_cache_enabled()
    ):
        return parameter.to(dtype)
    entry: _Cast | None = _casts.get(parameter)
    if entry is not None and entry.version == parameter._version:
        known = entry.result()
        if known is not None and known.dtype == dtype:
            return known
    result = parameter.to(dtype)
    _casts[parameter] = _Cast(weakref.ref(result), parameter._version)
    return result


def end_step() -> None:
    """Forget the casts: from here on an optimizer may write to parameters in ways that leave no trace."""
    if _casts:
        _casts.clear()

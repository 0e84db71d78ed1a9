"""Modules inside a level hold its tensors and are never called: whoever hooks or wraps their call is told so."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn


def computed_tensor(hook: Any) -> str | None:
    """The attribute that a forward pre-hook sets: those of pruning and of the older weight and spectral norm do."""
    name: str | None = getattr(hook, "_tensor_name", None) or getattr(hook, "name", None)
    return name


def _warn(module: nn.Module, kind: str) -> None:
    warnings.warn(
        f"{kind}hook on {type(module).__name__}: a level of ple_fast runs as a whole and calls no module inside it, "
        "so this hook never runs. Hook the level (ExtractionNetwork) or the trunk; level.unpack() gives modules that "
        "are called one by one",
        stacklevel=3,
    )


_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")
_UNIT = "a level of ple_fast runs as a whole and calls no module inside it, so levels are the unit: "


class Holder(nn.Module):
    """Base of a level, and of what is inside it: takes no child that works by being called on its own."""

    def __setattr__(self, name: str, value: Any) -> None:
        if type(value).__name__ in _WRAPPERS and not isinstance(value.module, nn.BatchNorm1d):
            raise TypeError(
                f"{type(value).__name__} around {type(value.module).__name__}: {_UNIT}use "
                "auto_wrap_policy=ModuleWrapPolicy({ExtractionNetwork}), or give a policy by size "
                "force_leaf_modules={ExtractionNetwork}, which keeps each level within one unit"
            )
        super().__setattr__(name, value)


class Uncalled(Holder):
    """Base of the modules that a level does not call."""

    def register_forward_pre_hook(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        """As in PyTorch, and a warning unless the hook computes a tensor, which the level lets it do.

        Raises:
            TypeError: the hook is that of ``fully_shard`` or ``replicate``, which could not work.
        """
        owner = type(getattr(hook, "__self__", None))
        if owner.__module__.startswith("torch.distributed.") and not isinstance(self, nn.BatchNorm1d):
            raise TypeError(
                f"{owner.__name__} on {type(self).__name__}: {_UNIT}call fully_shard, or replicate, on each level of "
                "trunk.levels"
            )
        if computed_tensor(hook) is None:
            _warn(self, "forward pre-")
        return super().register_forward_pre_hook(hook, *args, **kwargs)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """As in PyTorch, and a warning."""
        _warn(self, "forward ")
        return super().register_forward_hook(*args, **kwargs)

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """As in PyTorch, and a warning."""
        _warn(self, "backward pre-")
        return super().register_full_backward_pre_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """As in PyTorch, and a warning."""
        _warn(self, "backward ")
        return super().register_full_backward_hook(*args, **kwargs)


class StackedModules(Uncalled, nn.ModuleList):
    """The blocks of a level, or the layers of stacked MLPs."""

"""What the modules are to tracers that run forward with stand-ins: to ``torch.fx.symbolic_trace`` a level is one node,
``torch.jit.trace`` and the older exporter to ONNX see PyTorch's operators."""

from __future__ import annotations

import operator
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy


def is_symbolic(x: object) -> bool:
    """Whether a symbolic trace stands in the place of a tensor, or of a tensor in a list."""
    return isinstance(x, Proxy) or (isinstance(x, (list, tuple)) and any(isinstance(entry, Proxy) for entry in x))


def call_module(module: nn.Module, *args: Any, **options: Any) -> Any:
    """The node that calls ``module`` in the graph that is being traced.

    Raises:
        ValueError: the module is what is traced, and a graph cannot call its own module.
    """
    proxy = next(entry for arg in args for entry in (arg, *_entries(arg)) if isinstance(entry, Proxy))
    path = proxy.tracer.path_of_module(module)  # type: ignore[attr-defined]  # a Tracer, since it calls a module
    if not path:
        raise ValueError(
            "torch.fx: expected a module that holds this level, because a level is one call of its module in a graph; "
            "trace PLE.from_levels([level]), torch.nn.Sequential(level) or your model"
        )
    return proxy.tracer.create_proxy("call_module", path, args, options)


def fixed(name: str, flag: Any, value: bool) -> bool:
    """``flag`` itself; in a symbolic trace ``value``, and the graph refuses any other.

    Raises:
        TypeError: a tensor that is no flag.
    """
    if flag is True or flag is False:
        return bool(flag)
    if isinstance(flag, Tensor):
        if torch._C._get_tracing_state() is None or flag.dtype != torch.bool or flag.dim() > 0:
            raise TypeError(f"{name}: expected True or False, got a tensor of shape {tuple(flag.shape)}")
        with warnings.catch_warnings():  # the older exporter to ONNX hands over every argument as a tensor
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]  # public, without a stub
            return bool(flag)
    if isinstance(flag, Proxy):
        why = f"{name}: this graph was traced for {value}; trace again with concrete_args={{{name!r}: {not value}}}"
        flag.tracer.create_proxy("call_function", torch._assert, (operator.eq(flag, value), why), {})
        return value
    return bool(flag)


def _entries(x: Any) -> tuple[Any, ...]:
    return tuple(x) if isinstance(x, (list, tuple)) else ()

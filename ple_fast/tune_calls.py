"""Part of ``ple_fast.tune``: the launches of a trunk's training step and inference call, recorded to be repeated."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .backend import use_backend

if TYPE_CHECKING:
    from ple_fast_kernels import Tile

LAUNCHERS = (
    "fused_level_fwd", "fused_two_layers_fwd", "gate_combine_bwd", "gate_combine_fwd", "grouped_data_grad",
    "grouped_input_grad", "grouped_linear_fwd", "grouped_weight_grads",
)  # fmt: skip


class Call(NamedTuple):
    """A launcher and its arguments."""

    launcher: Callable[..., Any]
    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def launch(self) -> str:
        """The same text for every launch of this launcher on tensors of this make, in any process."""
        about = [self.name, _described(self.arguments), _described(sorted(self.options.items()))]
        return f"{self.name} {hashlib.sha256(repr(about).encode()).hexdigest()[:12]}"

    def run(self, tile: Tile | None = None) -> Any:
        with torch.no_grad():  # as in the level: products of the library write into given memory
            return self.launcher(*self.arguments, **self.options, tile=tile)

    def result(self, tile: Tile | None = None) -> list[Tensor]:
        """What one launch on fresh memory makes, copied."""
        if self.name == "grouped_input_grad":  # it may add to what is there
            self.arguments[3].zero_()
        return [tensor.detach().clone() for tensor in tensors_in(self.run(tile))]


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def _described(value: Any) -> Any:
    """An argument without its numbers and without addresses: what tells launches apart that take different times."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.stride()
    if isinstance(value, (tuple, list)):
        return [type(value).__name__, *map(_described, value)]
    return repr(value)


@contextmanager
def _recording(calls: list[Call]) -> Iterator[None]:
    """Keep every call of a launcher that a level makes, layers of weight gradients one by one."""
    modules = [importlib.import_module(f"ple_fast.triton_backend.{name}") for name in backend_modules()]
    before = [
        (module, name, getattr(module, name)) for module in modules for name in LAUNCHERS if hasattr(module, name)
    ]
    assert {name for _, name, _ in before} == set(LAUNCHERS)

    def keeping(name: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
        def keep(*arguments: Any, **options: Any) -> Any:
            tile = options.pop("tile", None)
            if tile is not None:  # what it writes into was cut for this tile
                return launcher(*arguments, **options, tile=tile)
            if name == "grouped_weight_grads":
                layers, *rest = arguments
                calls.extend(Call(launcher, name, ([layer], *rest), options) for layer in layers)
            else:
                calls.append(Call(launcher, name, arguments, options))
            return launcher(*arguments, **options)

        return keep

    for module, name, launcher in before:
        setattr(module, name, keeping(name, launcher))
    try:
        yield
    finally:
        for module, name, launcher in before:
            setattr(module, name, launcher)


def backend_modules() -> list[str]:
    package = importlib.import_module("ple_fast.triton_backend")
    return [module.name for module in pkgutil.iter_modules(package.__path__)]


def recorded(trunk: nn.Module, x: Tensor) -> list[Call]:
    """What a training step and an inference call launch."""
    from ple_fast_kernels import without_replay

    calls: list[Call] = []
    with _recording(calls), use_backend("triton"), without_replay():
        y = trunk(x)
        y.backward(torch.randn_like(y))
        with torch.inference_mode():
            trunk(x)
    return calls

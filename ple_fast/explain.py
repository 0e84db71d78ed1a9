"""What the levels of a trunk do with a batch: which route each takes and why, by which products, keeping how much."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor, nn

from .backend import Choice, last_backend
from .modules import ExtractionNetwork
from .routes import Asked, Route, watching
from .scalars import shown
from .slots import first_of
from .tensors import flatten
from .torch_backend.few_rows import uses_wide_product
from .torch_backend.products import said_of


class LevelReport(NamedTuple):
    """What one level did."""

    name: str
    """Of the module within the trunk; empty if it is the level itself."""
    rows: int
    route: str
    """A name of ``ROUTES``."""
    reason: str
    """When a call takes the route, and what it is for."""
    backend: Choice
    products: tuple[str, ...]
    """The products of forward in order, each with the library that computes it; on Triton the kernels launched."""
    launches: tuple[int, int]
    """Of kernels, in forward and in backward; 0 where PyTorch's operators run."""
    saved_bytes: int
    """What forward keeps for backward besides parameters and the trunk's input. 0 without gradients."""

    def __str__(self) -> str:
        lines = [
            f"{self.name or 'level'}: {self.rows} rows, route {self.route!r}",
            f"  why: {self.reason}",
            f"  backend: {self.backend.name} ({self.backend.reason})",
            *(f"  product: {product}" for product in self.products),
        ]
        if any(self.launches):
            lines.append(f"  launches: {self.launches[0]} forward, {self.launches[1]} backward")
        return "\n".join([*lines, f"  saved for backward: {self.saved_bytes:,} bytes"])


class _Seen(NamedTuple):
    name: str
    route: Route
    asked: Asked
    backend: Choice
    kernels: tuple[str, ...]
    launched: int
    sources: tuple[Tensor, ...]
    result: Tensor


def explain(module: nn.Module, *inputs: Any, file: TextIO | None = None, **keywords: Any) -> list[LevelReport]:
    """Run ``module(*inputs, **keywords)`` once and print, level by level, what it does and why.

    The call is made as it stands: in the mode of the module, with or without gradients, under autocast, on the backend
    that is set. Running statistics and PyTorch's random generators are as before afterwards, and no gradient is left.

    Args:
        module: a trunk, a level, or a model that holds some. Of what ``torch.compile`` returned, the levels are shown
            as they run without it.
        inputs, keywords: what the module takes.
        file: where to print; default the standard output.

    Returns:
        What was printed, one entry for each call of a level, in the order of the calls.

    Raises:
        TypeError: ``module`` is no module.
        ValueError: no level of ``ple_fast`` was called.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a trunk or a model, got {shown(module)} ({type(module).__name__})")
    module = getattr(module, "_orig_mod", module)
    reports: list[LevelReport] = []
    with _undone(module):
        seen, saved = _run(module, inputs, keywords)
        counted = {_storage(t)._cdata for t in _tensors((*module.parameters(), *inputs, *keywords.values()))}
        for number, own in enumerate(seen):
            storages = {s._cdata: s.nbytes() for s in map(_storage, saved.get(number, ()))}
            sizes = {key: size for key, size in storages.items() if key not in counted}
            counted |= sizes.keys()  # what a level before keeps is not kept twice
            reports.append(_report(own, sum(sizes.values())))
    if not reports:
        raise ValueError(f"explain: no level of ple_fast was called by {type(module).__name__}")
    for report in reports:
        print(report, file=sys.stdout if file is None else file)
    return reports


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@contextmanager
def _undone(module: nn.Module) -> Iterator[None]:
    """Buffers and random generators as before in the end."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _run(module: nn.Module, inputs: Any, keywords: Any) -> tuple[list[_Seen], dict[int, list[Tensor]]]:
    """The calls of levels, and what each kept, by its number."""
    seen: list[_Seen] = []
    saved: dict[int, list[Tensor]] = {}
    names = {id(m): name for name, m in module.named_modules() if isinstance(m, ExtractionNetwork)}
    start = 0
    asks: list[tuple[Route, Asked]] = []
    kernels: list[str] = []
    inside = False

    def before(level: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal start, inside
        start, inside = _launches(), True
        kernels.clear()
        asks.clear()

    def after(level: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        nonlocal inside
        inside = False
        backend = last_backend()
        assert backend is not None
        route, asked = asks[-1]
        sources = tuple(t for t in _tensors((*args, *kwargs.values())) if t.requires_grad)
        y = result[0] if isinstance(result, tuple) else result
        seen.append(_Seen(names[id(level)], route, asked, backend, tuple(kernels), _launches() - start, sources, y))

    def keep(tensor: Tensor) -> Tensor:
        if inside:
            saved.setdefault(len(seen), []).append(tensor)
        return tensor

    with ExitStack() as stack:
        for level in module.modules():
            if isinstance(level, ExtractionNetwork):
                hooks = (
                    level.register_forward_pre_hook(before, with_kwargs=True),
                    level.register_forward_hook(after, with_kwargs=True),
                )
                for hook in hooks:
                    stack.callback(hook.remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        stack.enter_context(watching(lambda route, asked: asks.append((route, asked))))
        stack.enter_context(_recorded(kernels))
        module(*inputs, **keywords)
    return seen, saved


def _launches() -> int:
    package = sys.modules.get("ple_fast_kernels")  # triton is optional
    return 0 if package is None else int(package.launches())


@contextmanager
def _recorded(kernels: list[str]) -> Iterator[None]:
    """Names of the kernels launched meanwhile; no call is repeated without deciding anew."""
    try:
        from ple_fast_kernels import recording, without_replay
    except ImportError:
        yield
        return
    with without_replay(), recording(lambda prepared, *_: kernels.append(prepared.kernel.fn.__name__.strip("_"))):
        yield


def _report(seen: _Seen, saved_bytes: int) -> LevelReport:
    asked, route = seen.asked, seen.route
    when = (route.condition.__doc__ or "").strip().splitlines()[0].rstrip(".")
    x = first_of(asked.x)
    backward = 0
    if seen.backend.name == "triton":
        products = _kernels(seen)
        backward = _backward_launches(seen)
    elif route.name == "differentiable":
        products = ("PyTorch's own operators",)
    else:
        products = tuple(_products(asked, x, few_rows=route.name == "few rows"))
    return LevelReport(
        seen.name, x.shape[0], route.name, f"{when}: {route.reason}", seen.backend, products,
        (seen.launched, backward), saved_bytes,
    )  # fmt: skip


def _kernels(seen: _Seen) -> tuple[str, ...]:
    found = [f"{name} x {count}" if count > 1 else name for name, count in Counter(seen.kernels).items()]
    by_library = seen.launched - len(seen.kernels)
    return (*found, f"PyTorch's library x {by_library}") if by_library else tuple(found)


def _backward_launches(seen: _Seen) -> int:
    """By a backward of this level alone."""
    wanted = [
        t for t in (*seen.sources, *flatten(seen.asked.layers, seen.asked.gate)) if t is not None and t.requires_grad
    ]
    if not seen.result.requires_grad or not wanted:
        return 0
    start = _launches()
    ones = torch.ones_like(seen.result)
    torch.autograd.grad(seen.result, wanted, ones, retain_graph=True, allow_unused=True)
    return _launches() - start


def _products(asked: Asked, x: Tensor, *, few_rows: bool) -> Iterator[str]:
    """Forward's products on the torch backend, layer by layer, then the gates'."""
    layers, gate = asked.layers, asked.gate
    is_shared = isinstance(asked.x, Tensor) and x.dim() == 2
    for mlp in asked.plan.mlps():
        what = "gates" if mlp is asked.plan.gate else "experts"
        for i, spec in enumerate(mlp.layers):
            weight = layers[mlp.position + i].weight
            count, units, width = weight.shape
            if i == 0 and is_shared and (not few_rows or uses_wide_product(x)):
                library = said_of("linear", x, 1, count * units, width)
            elif few_rows:
                library = "batched product of PyTorch"
            else:
                library = said_of("grouped" if i else "grouped_rows", x, count, units, width)
            yield f"{what}, layer {i}: {count} x ({width} -> {units}), {spec.activation.name}; {library}"
    if gate.weight is not None:
        rows, width = gate.weight.shape
        library = said_of("linear", x, 1, rows, width)
        yield f"gates' logits: {width} -> {rows}; {library}"

"""The trial run of a site: both forms on private copies and random input, whatever modes are on around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..backend import last_backend, note, use_backend
from .converter import Converter
from .fused_trunk import FusedTrunk, build
from .swap import stand_in
from .trial_copy import calls, private

ROWS = 7
NARROW = (torch.float32, torch.float16, torch.bfloat16)
CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


class _FailsByItself(Exception):
    """The original does not run; the cause says why."""


def try_out(site: nn.Module, trunk: FusedTrunk, converter: Converter) -> None:
    """The fused trunk gives what the original gives, in eval mode on random input.

    Copies of both run in float64, where what is fused and what is not differ by rounding alone, also where products of
    float32 are set to be less exact. Nothing of the site is touched: no mode, no statistics, no hook, no generator.

    Raises:
        ValueError: it does not.
    """
    like = next(trunk.parameters())
    if like.is_meta:
        return
    failure: _FailsByItself | None = None
    # A library that insists on float32, or a device without float64, is tried in its own dtype.
    for dtype in dict.fromkeys((torch.float64, like.dtype)):
        try:
            with quiet(like.device):
                rows = _both(site, converter, dtype, like.device)
        except _FailsByItself as error:
            failure = error
            continue
        _compare(rows, max(1e-9, 200 * torch.finfo(dtype).eps))
        return
    assert failure is not None
    raise ValueError(f"it fails on random input by itself: {failure.__cause__!r}") from failure


@contextmanager
def quiet(device: torch.device) -> Iterator[None]:
    """Without autocast, inference mode, gradients and default device, on PyTorch's operators; generators stay."""
    generators: list[tuple[Callable[[], Tensor], Callable[[Tensor], None]]] = [
        (torch.get_rng_state, torch.set_rng_state)
    ]
    if device.type == "cuda":
        generators.append(
            (lambda: torch.cuda.get_rng_state(device), lambda state: torch.cuda.set_rng_state(state, device))
        )
    states = [read() for read, _ in generators]
    backend = last_backend()
    try:
        with ExitStack() as stack:
            for kind in {"cpu", device.type}:
                if torch.amp.is_autocast_available(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            for context in (torch.inference_mode(False), torch.no_grad(), device, use_backend("torch")):
                stack.enter_context(context)
            yield
    finally:
        if backend is not None:
            note(backend)
        for (read, write), state in zip(generators, states, strict=True):
            if not torch.equal(read(), state):  # only where the model has drawn: other threads may be drawing, too
                write(state)


class _Widened(TorchFunctionMode):
    """A cast to float32 that a library writes out becomes one to the dtype of the trial."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def _wide(self, value: Any) -> Any:
        return self.dtype if isinstance(value, torch.dtype) and value in NARROW else value

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in CASTS:
            return args[0].to(self.dtype)
        return func(*map(self._wide, args), **{name: self._wide(value) for name, value in (kwargs or {}).items()})


def _both(
    site: nn.Module, converter: Converter, dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of what the two forms give.

    Raises:
        _FailsByItself: the original does not run in this dtype.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)  # a stream of its own

    def draw(width: int) -> Tensor:
        rows = torch.randn(ROWS, width, generator=generator, device="cpu", dtype=torch.float64)
        return rows.to(device=device, dtype=dtype)

    pairs: list[tuple[Tensor, Tensor]] = []
    with ExitStack() as stack:
        try:
            theirs = stack.enter_context(private(site, dtype, device))
            if dtype == torch.float64:
                stack.enter_context(_Widened(dtype))
            runs = [(arguments, _outputs(theirs, converter, arguments)) for arguments in converter.trials(theirs, draw)]
        except Exception as error:
            raise _FailsByItself from error
        converter.check_copy(theirs)
        trunk = build(theirs, converter, "original")
        for module in trunk.modules():
            module.training = False
            calls(module, module.forward)
            stack.callback(vars(module).pop, "_compiled_call_impl")  # which holds the module in a circle
        ours = stand_in(theirs, trunk, converter)
        for arguments, expected in runs:
            pairs += zip(expected, _outputs(ours, converter, arguments), strict=False)
    return pairs


def _compare(pairs: list[tuple[Tensor, Tensor]], tolerance: float) -> None:
    for i, (theirs, ours) in enumerate(pairs):
        finite = theirs[theirs.isfinite()]
        scale = float(finite.abs().max()) if finite.numel() else 0.0
        if theirs.shape != ours.shape or not torch.allclose(
            ours.double(), theirs.double(), rtol=0.0, atol=tolerance * scale, equal_nan=True
        ):
            raise ValueError(
                f"on random input its output {i} differs from that of the fused levels: this version of the class "
                "computes something else than the one that ple_fast knows"
            )
    if not pairs:
        raise ValueError("on random input it has no output")


def _outputs(site: nn.Module, converter: Converter, arguments: tuple[Any, ...]) -> list[Tensor]:
    """What a trial run compares: outputs, and what reaches the probes of a private site."""
    reached: list[Tensor] = []
    for probe in converter.probes(site):
        calls(probe, _recording(probe.forward, reached))
    outputs = getattr(type(site), converter.trial_method)(site, *arguments)
    return [*reached, *_flat(outputs)]


def _recording(forward: Callable[..., Any], reached: list[Tensor]) -> Callable[..., Any]:
    def run(*inputs: Any, **named: Any) -> Any:
        reached.extend(x.clone() for x in _flat(inputs))
        return forward(*inputs, **named)

    return run


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value or () for tensor in _flat(item)]

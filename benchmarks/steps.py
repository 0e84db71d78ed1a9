"""A contestant in a mode as one callable, and the gate that it must pass before anything about it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bare_best import BEST_FLOOR, best_products
from benchmarks.bare_gemm import FLOOR, BareGemm
from benchmarks.configs import SEED, Mode, TrunkConfig
from benchmarks.contestants import CONTESTANTS, build
from benchmarks.gradients import INPUT, OUTPUTS, PARAMETER, Places, distances, kinks, usual
from benchmarks.loop import LoopPLE, baseline

OUTPUT_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 2e-3
"""Relative (Frobenius) in float32. A pre-activation within rounding of zero may fall on either side of ReLU's kink,
which moves one sample's gradient by its whole size: a few such samples in a batch of thousands give about 1e-3."""
PARAMETER_TOLERANCE = 2e-2
"""The same of one parameter, which few units may be all of."""
MOST = 0.125
"""Of what the baseline itself is off by under autocast, for one parameter to be excused by another."""


@dataclass(frozen=True)
class Step:
    """One call of a contestant: ``run()`` does the work that is timed; ``trunk`` is None for the bare products."""

    name: str
    mode: Mode
    run: Callable[[], object]
    trunk: nn.Module | None


class WrongResultError(AssertionError):
    """A contestant does not compute what the baseline computes: no figure about it would mean anything."""


def inputs(
    config: TrunkConfig, *, input_grad: bool = True, device: torch.device | str = "cpu"
) -> tuple[Tensor, list[Tensor]]:
    """The batch ``(B, D)`` and the gradients that towers send back, T times ``(B, H)``: seeded, contiguous."""
    generator = torch.Generator().manual_seed(SEED + 1)
    x = torch.randn(config.batch, config.in_features, generator=generator, dtype=config.torch_dtype)
    shape = (config.num_tasks, config.batch, config.out_features)
    grads = torch.randn(*shape, generator=generator, dtype=config.torch_dtype)
    return x.to(device).requires_grad_(input_grad), [grad.contiguous() for grad in grads.to(device).unbind(0)]


def call_of(
    trunk: nn.Module, mode: Mode, x: Tensor, grads: list[Tensor], *, frozen: bool = False, autocast: str = ""
) -> Callable[[], Any]:
    """One call, which returns the outputs: ``train`` resets the gradients (to None), runs forward, and backward from
    ``grads``. ``frozen``: see ``Contestant``; ``autocast``: see ``TrunkConfig``, of forward alone, as is advised."""
    parameters = [*trunk.parameters(), x]
    without_gradients = torch.no_grad if frozen else torch.inference_mode
    forward = _under(autocast, trunk, x) if autocast else lambda: trunk(x)
    low = [grad.to(getattr(torch, autocast)) for grad in grads] if autocast else grads

    def train() -> Any:
        for p in parameters:
            p.grad = None
        outputs = forward()
        torch.autograd.backward(outputs, low if outputs[0].dtype == low[0].dtype else grads)
        return outputs

    def inference() -> Any:
        with without_gradients():
            return forward()

    return {"train": train, "forward": forward, "inference": inference}[mode]


def _under(dtype: str, trunk: nn.Module, x: Tensor) -> Callable[[], Any]:
    def forward() -> Any:
        with torch.autocast(x.device.type, getattr(torch, dtype)):
            return trunk(x)

    return forward


def make_step(name: str, config: TrunkConfig, mode: Mode, *, input_grad: bool = True) -> Step:
    """Build, check and wrap one contestant. ``input_grad``: the batch requires a gradient, as one that comes out of an
    embedding does.

    Raises:
        WrongResultError: the contestant disagrees with the baseline of the same weights.
    """
    if name == FLOOR:
        low = config.with_dtype(config.autocast or config.dtype)
        return Step(name, mode, BareGemm(low, input_grad=input_grad).step(mode), None)
    if name == BEST_FLOOR:
        trunk = build("fast", config).train(mode != "inference")
        x, grads = inputs(config, input_grad=input_grad and mode != "inference")
        return Step(name, mode, best_products(call_of(trunk, mode, x, grads, autocast=config.autocast)), None)
    trunk = build(name, config)
    wrap = CONTESTANTS[name].wrap
    wrap(lambda: check(name, trunk, config, mode, input_grad=input_grad))()
    x, grads = inputs(config, input_grad=input_grad and mode != "inference")
    step = call_of(trunk, mode, x, grads, frozen=CONTESTANTS[name].frozen, autocast=config.autocast)
    return Step(name, mode, wrap(step), trunk.train(mode != "inference"))


def errors(
    name: str, trunk: nn.Module, config: TrunkConfig, mode: Mode, *, input_grad: bool = True
) -> dict[str, float]:
    """Relative errors of a trunk against the baseline: outputs and, unless inference, the gradients of the input and of
    every parameter of the baseline, by its name there, and of all of them together.

    Masks of dropout differ, so trunks that drop are compared in eval mode.
    """
    contestant = CONTESTANTS[name]
    oracle = baseline(config, contestant.make_up)
    results: list[dict[str, Tensor]] = []
    places = None if mode == "inference" else Places(name, config)
    for module in (trunk, oracle):
        module.train(mode != "inference" and not contestant.make_up.dropout)
        buffers = {key: value.clone() for key, value in module.named_buffers()}  # batch norm's running statistics
        x, grads = inputs(config, input_grad=input_grad)
        autocast = "" if module is oracle else config.autocast
        call = call_of(
            module, "inference" if places is None else "train", x, grads, frozen=contestant.frozen, autocast=autocast
        )
        result = {OUTPUTS: torch.stack([y.detach().to(config.torch_dtype) for y in call()])}
        if places is not None:
            if input_grad:
                assert x.grad is not None
                result[INPUT] = x.grad
            gradients = places.of_loop(module) if isinstance(module, LoopPLE) else places.gradients(module)
            result |= {f"{PARAMETER}{key}": gradient.clone() for key, gradient in gradients.items()}
            module.zero_grad(set_to_none=True)
            with torch.no_grad():
                for key, value in module.named_buffers():
                    value.copy_(buffers[key])
        results.append(result)
    return distances(*results)


def check(name: str, trunk: nn.Module, config: TrunkConfig, mode: Mode, *, input_grad: bool = True) -> None:
    """Refuse a contestant whose result differs from the baseline's: under autocast by more than twice as much as the
    baseline's own does there, and what lies at kinks; the gradient of one parameter as far as the one that differs
    most."""
    own: dict[str, float] = {}
    if config.autocast:
        own = errors(name, baseline(config, CONTESTANTS[name].make_up), config, mode, input_grad=input_grad)
    for what, error in errors(name, trunk, config, mode, input_grad=input_grad).items():
        tolerance = OUTPUT_TOLERANCE if what == OUTPUTS else GRADIENT_TOLERANCE
        if what.startswith(PARAMETER):
            tolerance = PARAMETER_TOLERANCE
        if config.autocast:
            least = usual(own, MOST) if what.startswith(PARAMETER) else 0.0
            tolerance = max(tolerance, 2 * max(own[what], least) + kinks(what, config.batch))
        if not error <= tolerance:
            raise WrongResultError(
                f"{name} at {config.name}, {mode}: {what} differ by {error:.1e}, more than {tolerance:.0e}"
            )

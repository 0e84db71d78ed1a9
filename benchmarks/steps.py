"""A contestant in a mode as one callable, and the gate that it must pass before anything about it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.configs import SEED, Mode, TrunkConfig
from benchmarks.contestants import CONTESTANTS, FLOOR, BareGemm, baseline, build
from benchmarks.gradients import INPUT, OUTPUTS, PARAMETER, Places, distances

OUTPUT_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 2e-3
"""Relative (Frobenius) in float32. A pre-activation within rounding of zero may fall on either side of ReLU's kink,
which moves one sample's gradient by its whole size: a few such samples in a batch of thousands give about 1e-3."""
PARAMETER_TOLERANCE = 2e-2
"""The same of one parameter, which few units may be all of."""


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


def make_step(name: str, config: TrunkConfig, mode: Mode, *, input_grad: bool = True) -> Step:
    """Build, check and wrap one contestant.

    ``train`` resets the gradients (to None), runs forward, and backward from given output gradients. ``input_grad``:
    the batch requires a gradient, as the output of an embedding does.

    Raises:
        WrongResultError: the contestant disagrees with the baseline of the same weights.
    """
    if name == FLOOR:
        return Step(name, mode, BareGemm(config, input_grad=input_grad).step(mode), None)
    trunk = build(name, config)
    wrap = CONTESTANTS[name].wrap
    wrap(lambda: check(name, trunk, config, mode, input_grad=input_grad))()
    x, grads = inputs(config, input_grad=input_grad and mode != "inference")
    parameters = [*trunk.parameters(), x]

    def train() -> None:
        for p in parameters:
            p.grad = None
        torch.autograd.backward(trunk(x), grads)

    def forward() -> object:
        return trunk(x)

    def inference() -> object:
        with torch.no_grad() if name == "loop_frozen" else torch.inference_mode():
            return trunk(x)

    step = {"train": train, "forward": forward, "inference": inference}[mode]
    return Step(name, mode, wrap(step), trunk.train(mode != "inference"))


def errors(
    name: str, trunk: nn.Module, config: TrunkConfig, mode: Mode, *, input_grad: bool = True
) -> dict[str, float]:
    """Relative errors of a trunk against the baseline: outputs and, unless inference, the gradients of the input and of
    every parameter of the baseline, by its name there, and of all of them together.

    Masks of dropout differ, so trunks that drop are compared in eval mode.
    """
    contestant = CONTESTANTS[name]
    oracle = baseline(config, norm=contestant.norm, gate_bias=contestant.gate_bias, dropout=contestant.dropout)
    results: list[dict[str, Tensor]] = []
    places = None if mode == "inference" else Places(name, config)
    for module in (trunk, oracle):
        module.train(mode != "inference" and not contestant.dropout)
        buffers = {key: value.clone() for key, value in module.named_buffers()}  # batch norm's running statistics
        x, grads = inputs(config, input_grad=input_grad)
        result = {}
        if mode == "inference":
            with torch.no_grad() if name == "loop_frozen" else torch.inference_mode():
                result[OUTPUTS] = torch.stack(list(module(x)))
        else:
            outputs = list(module(x))
            result[OUTPUTS] = torch.stack(outputs).detach()
            torch.autograd.backward(outputs, grads)
            if input_grad:
                assert x.grad is not None
                result[INPUT] = x.grad
            assert places is not None
            gradients = places.of_loop(module) if module is oracle else places.gradients(module)
            result |= {f"{PARAMETER}{key}": gradient.clone() for key, gradient in gradients.items()}
            module.zero_grad(set_to_none=True)
            with torch.no_grad():
                for key, value in module.named_buffers():
                    value.copy_(buffers[key])
        results.append(result)
    return distances(*results)


def check(name: str, trunk: nn.Module, config: TrunkConfig, mode: Mode, *, input_grad: bool = True) -> None:
    """Refuse a contestant whose result differs from the baseline's."""
    for what, error in errors(name, trunk, config, mode, input_grad=input_grad).items():
        tolerance = OUTPUT_TOLERANCE if what == OUTPUTS else GRADIENT_TOLERANCE
        if what.startswith(PARAMETER):
            tolerance = PARAMETER_TOLERANCE
        if not error <= tolerance:
            raise WrongResultError(
                f"{name} at {config.name}, {mode}: {what} differ by {error:.1e}, more than {tolerance:.0e}"
            )

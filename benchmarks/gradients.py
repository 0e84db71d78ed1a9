"""Gradients of any contestant as gradients of the loop's parameters, so that they are compared one by one, by name.

Where a contestant keeps the loop's weights (stacked, turned, side by side) is not written down anywhere: it is built
once more from a loop whose every weight is a number of its own, and the numbers are looked up.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.configs import TrunkConfig
from benchmarks.contestants import CONTESTANTS
from benchmarks.loop import LoopPLE, baseline

OUTPUTS, INPUT, PARAMETER = "outputs", "the gradient of the input", "the gradient of parameter "
"""What is compared; the last one with the name of a parameter of the loop behind it."""
ALL = "the gradients of all parameters together"
KINKS = {PARAMETER: 1.0, INPUT: 0.1, ALL: 0.1}
"""How far gradients in low precision may be apart besides, in units of 1 / sqrt(batch): a sample whose pre-activation
is within rounding of zero falls on either side of ReLU's kink, and its gradient of that unit is there or not."""
FIRST = 2.0**40
"""The number of the first weight: no weight of any start is as large, and float64 holds all that follow."""


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Relative Frobenius distance in float64; NaN counts as infinite."""
    difference = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30)
    return float(torch.nan_to_num(difference, nan=torch.inf))


def distances(found: dict[str, Tensor], oracle: dict[str, Tensor]) -> dict[str, float]:
    """Relative distances (Frobenius) of every result, and of all gradients of parameters as one vector."""
    apart = {key: relative(value, oracle[key]) for key, value in found.items()}
    norms = {key: float(oracle[key].double().norm()) for key in found if key.startswith(PARAMETER)}
    if norms:
        squares = sum((apart[key] * norm) ** 2 for key, norm in norms.items())
        apart[ALL] = math.sqrt(squares / max(sum(norm**2 for norm in norms.values()), 1e-60))
    return apart


def kinks(key: str, batch: int) -> float:
    """What a result may be off by for ReLU's kink alone, relative (Frobenius)."""
    return KINKS.get(PARAMETER if key.startswith(PARAMETER) else key, 0.0) / math.sqrt(batch)


def usual(own: dict[str, float], most: float) -> float:
    """What the gradient of a parameter is off by in low precision where it is off most, up to ``most``: some parameters
    are few numbers, in which a contestant is exact by luck."""
    return min(max((error for key, error in own.items() if key.startswith(PARAMETER)), default=0.0), most)


def without_gradient(loop: LoopPLE) -> set[str]:
    """Biases in front of a batch norm: the batch's mean takes them out, and what a step leaves there is rounding."""
    found = set()
    for name, module in loop.named_modules():
        if isinstance(module, nn.Sequential):
            layers = list(module.named_children())
            for (child, layer), (_, following) in pairwise(layers):
                if isinstance(layer, nn.Linear) and isinstance(following, nn.BatchNorm1d):
                    found.add(f"{name}.{child}.bias")
    return found


class Places:
    """Where a contestant keeps every parameter of the loop, at one size.

    Raises:
        ValueError: it keeps none of a parameter that has a gradient.
    """

    def __init__(self, name: str, config: TrunkConfig) -> None:
        contestant = CONTESTANTS[name]
        wide = config.with_dtype("float64")
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # libraries build in it, and float32 would round the numbers
        try:
            with torch.random.fork_rng(devices=[]):
                loop = baseline(wide, contestant.make_up)
                self.shapes = {key: p.shape for key, p in loop.named_parameters()}
                ignored = without_gradient(loop)
                start = 0
                with torch.no_grad():
                    for p in loop.parameters():
                        p.copy_(torch.arange(start, start + p.numel()).view(p.shape) + FIRST)
                        start += p.numel()
                trunk = contestant.build(wide, loop).double()
        finally:
            torch.set_default_dtype(before)
        self.size = start
        self.numbers: dict[str, Tensor] = {}
        """By name of the contestant's parameter: the number of each element, ``size`` where it has none."""
        seen = torch.zeros(start + 1, dtype=torch.bool)
        for key, p in trunk.named_parameters():
            numbers = (p.detach() - FIRST).flatten()
            found = (numbers >= 0) & (numbers < start)
            numbers = torch.where(found, numbers, float(start)).long()
            seen[numbers] = True
            if bool(found.any()):
                self.numbers[key] = numbers
        missing = [key for key, part in self._parts(seen[:-1]).items() if key not in ignored and not bool(part.all())]
        if missing:
            raise ValueError(f"{name}: expected it to keep all of the loop's parameters, found no {', '.join(missing)}")
        self.compared = [key for key in self.shapes if key not in ignored]

    def _parts(self, flat: Tensor) -> dict[str, Tensor]:
        """What lies one after the other, by the loop's names."""
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        return {key: part.view(shape) for (key, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def gradients(self, trunk: nn.Module) -> dict[str, Tensor]:
        """The gradients of a contestant by the loop's names, in float32 (float64); 0 where it has none."""
        parameters = dict(trunk.named_parameters())
        like = next(iter(parameters.values()))
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        flat = torch.zeros(self.size + 1, dtype=dtype, device=like.device)
        for key, numbers in self.numbers.items():
            gradient = parameters[key].grad
            if gradient is not None:
                flat.index_add_(0, numbers.to(like.device), gradient.flatten().to(dtype))
        parts = self._parts(flat[:-1])
        return {key: parts[key] for key in self.compared}

    def of_loop(self, loop: nn.Module) -> dict[str, Tensor]:
        """The same of the loop itself, as they are."""
        found = {}
        for key, parameter in loop.named_parameters():
            if key in self.compared:
                found[key] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return found

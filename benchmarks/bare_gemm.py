"""The floor: the matrix products of a step alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.configs import SEED, Mode, TrunkConfig

FLOOR = "bare_gemm"
"""Its name among the contestants."""


class BareGemm:
    """The matrix products of a step alone, by ``torch.mm`` into buffers that exist: the floor of whoever calls that.

    Experts that share an input are one wide product, which measures fastest; biases, activations, softmax, mixing, and
    the sums over experts are left out. Numbers are random: only time and FLOPs mean anything.
    """

    def __init__(self, config: TrunkConfig, *, input_grad: bool = True, device: torch.device | str = "cpu") -> None:
        self.forward_products: list[tuple[Tensor, Tensor, Tensor]] = []
        self.backward_products: list[tuple[Tensor, Tensor, Tensor]] = []
        self._generator = torch.Generator(device).manual_seed(SEED)
        self._device, self._dtype = device, config.torch_dtype
        for level, width in enumerate(config.level_inputs()):
            sizes = config.gate_sizes(level)
            if level == 0:
                slots = [(config.num_experts, sum(sizes))]
            else:
                slots = [(config.task_experts, size) for size in sizes[: config.num_tasks]]
                slots.append((config.shared_experts, sum(sizes[config.num_tasks :])))
            units = config.level_units()[level]
            for experts, logits in slots:
                self._slot(config.batch, width, units, experts, logits, input_grad or level > 0)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=self._dtype, device=self._device)

    def _linear(self, x: Tensor, dx: Tensor | None, out: Tensor, dout: Tensor) -> None:
        """Register ``out = x W^T``, ``dW = dout^T x`` and, unless dx is None, ``dx = dout W``."""
        weight = self._random(out.shape[1], x.shape[1])
        self.forward_products.append((x, weight.mT, out))
        self.backward_products.append((dout.mT, x, torch.empty_like(weight)))
        if dx is not None:
            self.backward_products.append((dout, weight, dx))

    def _slot(
        self, batch: int, width: int, widths: tuple[int, ...], experts: int, logits: int, input_grad: bool
    ) -> None:
        first, *rest = widths
        x = self._random(batch, width)
        dx = torch.empty_like(x) if input_grad else None
        h, dh = self._random(batch, experts * first), self._random(batch, experts * first)
        self._linear(x, dx, h, dh)
        if logits:
            self._linear(x, dx, self._random(batch, logits), self._random(batch, logits))
        for e in range(experts):
            below, dbelow = h[:, e * first : (e + 1) * first], dh[:, e * first : (e + 1) * first]
            for units in rest:
                above, dabove = self._random(batch, units), self._random(batch, units)
                self._linear(below, dbelow, above, dabove)
                below, dbelow = above, dabove

    def products(self, mode: Mode) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(a, b, out) of every product of a step."""
        yield from self.forward_products
        if mode == "train":
            yield from self.backward_products

    def step(self, mode: Mode) -> Callable[[], None]:
        """A callable that runs them."""
        products = list(self.products(mode))

        def run() -> None:
            for a, b, out in products:
                torch.mm(a, b, out=out)

        return run

"""FLOPs and bytes of a step from its shapes alone: what any implementation must do, and the least it could move."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from benchmarks.configs import Mode, TrunkConfig


@dataclass(frozen=True)
class Work:
    """Counts of one step.

    ``product_flops``: two per multiply-add of every matrix product (experts, gates, and their gradients).
    ``mixing_flops``: the weighted sums over experts and their gradients.
    ``least_bytes``: each tensor that enters or leaves the step, once: input, weights and outputs; in training also the
    incoming gradients, the input and the weights again, and the gradients that leave. Activations count as nothing, for
    they could stay in cache. Biases, activation functions and softmax count as no FLOPs.
    """

    product_flops: int
    mixing_flops: int
    least_bytes: int

    @property
    def flops(self) -> int:
        return self.product_flops + self.mixing_flops

    def counts(self) -> dict[str, int]:
        """Of a result file."""
        return {"flops": self.flops, "product_flops": self.product_flops, "least_bytes": self.least_bytes}


def work(config: TrunkConfig, mode: Mode, *, input_grad: bool = True) -> Work:
    """The work of one step of a PLE trunk whose last level has no shared mixture."""
    batch, elements = config.batch, 0
    products, first_input, mixing = 0, 0, 0
    for level, (width, units) in enumerate(zip(config.level_inputs(), config.level_units(), strict=True)):
        logits = sum(config.gate_sizes(level))
        widths = (width, *units)
        macs = config.num_experts * sum(a * b for a, b in pairwise(widths)) + width * logits
        elements += macs + config.num_experts * sum(units) + logits  # weights and biases
        products += 2 * batch * macs
        mixing += 2 * batch * logits * units[-1]
        if level == 0:
            first_input = 2 * batch * width * (config.num_experts * units[0] + logits)
    x = batch * config.in_features
    y = batch * config.num_tasks * config.out_features
    moved = x + elements + y
    if mode == "train":
        products = 3 * products - (0 if input_grad else first_input)
        mixing *= 3
        moved += y + x + elements + elements + (x if input_grad else 0)
    return Work(products, mixing, moved * config.torch_dtype.itemsize)

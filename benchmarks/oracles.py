"""Whether a contestant on a GPU is right: against the loop in float32, within what the loop in its dtype differs."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from benchmarks.configs import Mode, TrunkConfig
from benchmarks.contestants import BASELINE, CONTESTANTS, OURS, Norm, baseline
from benchmarks.gpu_steps import INPUT, OUTPUTS, PARAMETER, Runner, matmul_precision
from benchmarks.gradients import Places
from benchmarks.steps import WrongResultError, inputs, relative

CEILING_ERROR = {"bfloat16": 0.25, "float32": 2e-2}
"""What the loop itself may differ from the loop in float32, relative (Frobenius); by dtype of the trunk."""
SLACK = {"bfloat16": 2**-8, "float32": 1e-4}
"""What may come on top of a parameter's gradient: a few numbers, in which the loop may be exact by luck."""
LEAST = 1e-4
"""The same of tensors with a row per sample."""


class Oracles:
    """Results of the loop in float32 without TF32, and what the loop in the trunk's dtype differs from them."""

    def __init__(self, config: TrunkConfig, mode: Mode, device: torch.device) -> None:
        self.config, self.mode, self.device = config, mode, device
        self._found: dict[tuple[Norm | None, bool], tuple[dict[str, Tensor], dict[str, float]]] = {}

    def of(self, name: str) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The exact results for a contestant, and the distance of the loop from them."""
        norm, gate_bias = CONTESTANTS[name].norm, CONTESTANTS[name].gate_bias
        if (norm, gate_bias) not in self._found:
            results: list[dict[str, Tensor]] = []
            learns = self.mode != "inference"
            x, grads = inputs(self.config, input_grad=False, device=self.device)
            places = Places(name, self.config) if self.mode == "train" else None
            for dtype in (torch.float32, self.config.torch_dtype):
                loop = baseline(self.config, norm=norm, gate_bias=gate_bias).to(self.device, dtype).train(learns)
                own = x.to(dtype, copy=True).requires_grad_(learns)
                runner = Runner(BASELINE, loop, self.mode, own, [g.to(dtype) for g in grads], None)
                with matmul_precision(torch.get_float32_matmul_precision() if results else "highest"):
                    found = runner.results(runner.step())
                if places is not None:
                    assert own.grad is not None
                    found[INPUT] = own.grad.float()
                    parameters = dict(loop.named_parameters())
                    for key in places.compared:
                        gradient = parameters[key].grad
                        found[f"{PARAMETER}{key}"] = (
                            torch.zeros_like(parameters[key]) if gradient is None else gradient
                        ).float()
                results.append(found)
            oracle, low = results
            self._found[norm, gate_bias] = oracle, {key: relative(low[key], oracle[key]) for key in oracle}
        return self._found[norm, gate_bias]

    def check(self, name: str, execution: str, found: dict[str, Tensor]) -> None:
        """Refuse a contestant whose results differ by more than twice what the loop in its dtype does; others' by four
        times that. Of the gradient of a parameter that is at least what the loop's usually differ.

        Raises:
            WrongResultError: which result, and by how much.
        """
        oracle, loop = self.of(name)
        dtype = self.config.dtype
        of_parameters = [error for key, error in loop.items() if key.startswith(PARAMETER)]
        usual = statistics.median(of_parameters) if of_parameters else 0.0
        own = {key: loop[key] for key in (OUTPUTS, INPUT) if key in loop} | {"the gradient of a parameter": usual}
        for key, error in own.items():
            if not error <= CEILING_ERROR[dtype]:
                raise WrongResultError(f"the loop itself is off by {error:.1e} in {dtype}: {key}")
        times = 2 if name in OURS else 4  # other libraries mix experts in low precision
        wrong = []
        for key, value in found.items():
            error = relative(value, oracle[key])
            is_parameter = key.startswith(PARAMETER)
            typical = max(loop[key], usual) if is_parameter else loop[key]
            if not error <= times * typical + (SLACK[dtype] if is_parameter else LEAST):
                wrong.append(f"{key} by {error:.1e}, the loop by {loop[key]:.1e}")
        if wrong:
            rest = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise WrongResultError(
                f"{name}, {execution}, at {self.config.name} in {dtype}, {self.mode}, differs: "
                + "; ".join(wrong[:3])
                + rest
            )

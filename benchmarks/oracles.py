"""Whether a contestant on a GPU is right: against the loop in float32, within what the loop in its dtype differs."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.configs import Mode, TrunkConfig
from benchmarks.contestants import BASELINE, CONTESTANTS, OURS
from benchmarks.gpu_steps import Runner, matmul_precision
from benchmarks.gradients import ALL, INPUT, OUTPUTS, PARAMETER, Places, distances, kinks, usual
from benchmarks.loop import MakeUp, baseline
from benchmarks.steps import WrongResultError, inputs

CEILING_ERROR = {"bfloat16": 0.25, "float32": 2e-2}
"""What the loop itself may differ from the loop in float32, relative (Frobenius); by dtype of the trunk."""
SLACK = 1e-4
"""What may come on top, relative."""


class Oracles:
    """Results of the loop in float32 without TF32, and what the loop in the trunk's dtype differs from them."""

    def __init__(self, config: TrunkConfig, mode: Mode, device: torch.device) -> None:
        self.config, self.mode, self.device = config, mode, device
        self._found: dict[MakeUp, tuple[dict[str, Tensor], dict[str, float]]] = {}

    def of(self, name: str) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The exact results for a contestant, and the distance of the loop from them."""
        make_up = CONTESTANTS[name].make_up
        if make_up not in self._found:
            results: list[dict[str, Tensor]] = []
            learns = self.mode != "inference"
            x, grads = inputs(self.config, input_grad=False, device=self.device)
            places = Places(name, self.config) if self.mode == "train" else None
            for dtype in (torch.float32, self.config.torch_dtype):
                loop = baseline(self.config, make_up).to(self.device, dtype).train(learns)
                own = x.to(dtype, copy=True).requires_grad_(learns)
                runner = Runner(BASELINE, loop, self.mode, own, [g.to(dtype) for g in grads], None)
                with matmul_precision(torch.get_float32_matmul_precision() if results else "highest"):
                    found = runner.results(runner.step())
                if places is not None:
                    assert own.grad is not None
                    found[INPUT] = own.grad.float()
                    gradients = places.of_loop(loop)
                    found |= {f"{PARAMETER}{key}": gradient.float() for key, gradient in gradients.items()}
                results.append(found)
            oracle, low = results
            self._found[make_up] = oracle, distances(low, oracle)
        return self._found[make_up]

    def check(self, name: str, execution: str, found: dict[str, Tensor]) -> None:
        """Refuse a contestant whose results differ by more than twice what the loop in its dtype does; others' by four
        times that. The gradient of one parameter may differ as far as the loop's that differs most, up to half of
        ``CEILING_ERROR``: some are a few numbers, in which the loop is exact by luck.

        Raises:
            WrongResultError: which result, and by how much.
        """
        oracle, loop = self.of(name)
        dtype = self.config.dtype
        floor = usual(loop, CEILING_ERROR[dtype] / 2)
        for key in (OUTPUTS, INPUT, ALL):
            if not loop.get(key, 0.0) <= CEILING_ERROR[dtype]:
                raise WrongResultError(f"the loop itself is off by {loop[key]:.1e} in {dtype}: {key}")
        times = 2 if name in OURS else 4  # other libraries mix experts in low precision

        def most(key: str) -> float:
            own = max(loop[key], floor) if key.startswith(PARAMETER) else loop[key]
            return times * own + SLACK + kinks(key, self.config.batch)

        wrong = [
            f"{key} by {error:.1e}, the loop by {loop[key]:.1e}"
            for key, error in distances(found, oracle).items()
            if not error <= most(key)
        ]
        if wrong:
            rest = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise WrongResultError(
                f"{name}, {execution}, at {self.config.name} in {dtype}, {self.mode}, differs: "
                + "; ".join(wrong[:3])
                + rest
            )

"""The kernel of gates that choose beside PyTorch's operators: ties, NaN, infinities, rows of no whole tile."""

from __future__ import annotations

import pytest
import torch

from ple_fast.plan import LevelPlan, joint_experts
from ple_fast.specs import GateSpec, MLPSpec
from ple_fast.torch_backend.top_k import keep_joint, keep_top_k
from tests.helpers import TOPOLOGIES

pytest.importorskip("triton")

from ple_fast_kernels import keep_joint as joint_in_kernels
from ple_fast_kernels import keep_top_k as in_kernels
from tests.kernel_helpers import guarded, mixtures_of

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_keep_what_pytorch_keeps(k: int, dtype: torch.dtype, device: torch.device) -> None:
    topology = TOPOLOGIES["unordered"]
    mixtures = mixtures_of(topology)
    for rows in (1, 3, 64, 65, 130):
        generator = torch.Generator().manual_seed(rows)
        # Few values, so that many are equal; some are not finite.
        logits = torch.randint(-2, 3, (rows, mixtures.logits), generator=generator).to(dtype)
        logits[torch.rand(logits.shape, generator=generator) < 0.05] = NAN
        logits[torch.rand(logits.shape, generator=generator) < 0.05] = INF
        found = in_kernels(guarded(logits.to(device)), mixtures, k).cpu()
        for first, size in zip(mixtures.logit_first, mixtures.sizes, strict=True):
            if first >= 0:
                part = logits[:, first : first + size]
                expected = keep_top_k(part.unsqueeze(1), k).squeeze(1)
                torch.testing.assert_close(found[:, first : first + size], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
@pytest.mark.parametrize("joint_k", [1, 2])
@pytest.mark.parametrize("name", ["ple-even", "unordered", "mmoe"])
def test_kernels_choose_together_what_pytorch_does(
    name: str, joint_k: int, temperature: float, device: torch.device
) -> None:
    topology = TOPOLOGIES[name]
    plan = LevelPlan.build(
        topology, [(0, topology.num_experts, MLPSpec((4,)))], GateSpec(top_k=2, joint_k=1, temperature=temperature)
    )
    mixtures, experts = mixtures_of(topology), joint_experts(topology)
    joint_k = min(joint_k, len(experts))
    assert joint_k
    for rows in (1, 65, 130):
        generator = torch.Generator().manual_seed(rows)
        logits = torch.randn((rows, mixtures.logits), generator=generator, dtype=torch.float64)
        logits[torch.rand(logits.shape, generator=generator) < 0.02] = NAN
        found = joint_in_kernels(
            guarded(logits.to(device)), mixtures, 2, joint_k, experts, temperature=temperature
        ).cpu()
        padded = torch.constant_pad_nd(logits / temperature, (0, 1), -INF)
        dense = padded[:, list(plan.dense_logit)].view(rows, -1, topology.num_experts)
        expected = keep_joint(dense, 2, joint_k, torch.tensor(experts)).flatten(1)[:, list(plan.logit_entry)]
        # Where no choice is to be made kernels keep what they read.
        sizes = [len(topology.mixture_experts[o]) for o in topology.gated_mixtures]
        chooses = torch.tensor([size > 2 for size in sizes for _ in range(size)])
        expected = torch.where(chooses, expected, logits / temperature) * temperature
        torch.testing.assert_close(found, expected, equal_nan=True)

"""The kernel of gates that choose beside PyTorch's operators: ties, NaN, infinities, rows of no whole tile."""

from __future__ import annotations

import pytest
import torch

from ple_fast.torch_backend.top_k import keep_top_k
from tests.helpers import TOPOLOGIES

pytest.importorskip("triton")

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

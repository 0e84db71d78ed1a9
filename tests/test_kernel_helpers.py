"""The operands that the tests of kernels make: aligned or not, as they say."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import alignments

pytest.importorskip("triton")

from tests import kernel_helpers
from tests.kernel_helpers import DTYPES, guarded


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_guarded_operands_are_aligned_or_not(dtype: torch.dtype, alignment: str, device: torch.device) -> None:
    assert (guarded(torch.ones(3, 2, dtype=dtype, device=device)).data_ptr() % 16 == 0) == (alignment == "aligned")


def test_tests_of_kernels_run_both_ways_on_a_gpu() -> None:
    assert alignments("cuda:1") == ["aligned", "unaligned"]
    assert alignments("cpu") == ["aligned"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_operands_are_at_no_multiple_of_16_bytes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_helpers, "front", kernel_helpers.UNALIGNED)
    assert guarded(torch.ones(3, 2, dtype=dtype)).data_ptr() % 16 != 0

"""The launch path as a GPU would see it: Triton's real launcher over a driver whose launches do nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import stub_driver
from tests.conftest import alignments

pytest.importorskip("triton")

from tests import kernel_helpers
from tests.kernel_helpers import DTYPES, guarded

ROOT = Path(__file__).parents[1]

PROGRAM = """
import ctypes, json, os, sys
from unittest import mock

import torch

from tests import stub_driver

stub_driver.activate(90)
library = ctypes.CDLL(os.environ["TRITON_LIBCUDA_PATH"] + "/libcuda.so.1")
library.stub_launches.restype = ctypes.c_ulonglong

from triton.runtime.jit import JITFunction

import ple_fast.backend
import ple_fast_kernels
from ple_fast import PLE, use_backend
from ple_fast_kernels import _launch, _tiles, grouped_data_grad

mock.patch.object(_tiles, "architecture", return_value=("sm_90", 132)).start()
mock.patch.object(ple_fast.backend, "_why_no_triton", return_value=None).start()
slow = mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run).start()


def count(run):
    before = library.stub_launches(), _launch.launches(), slow.call_count
    run()
    after = library.stub_launches(), _launch.launches(), slow.call_count
    return [b - a for a, b in zip(before, after)]


ple = PLE(64, 2, expert_units=(64, 32), dtype=torch.bfloat16)


def step(batch):
    x = torch.zeros(batch, 64, dtype=torch.bfloat16, requires_grad=True)
    with use_backend("triton"):
        y = ple(x)
        y.backward(torch.zeros_like(y))


base = torch.zeros(33 * 2 * 32 + 1, dtype=torch.bfloat16)
weight = torch.zeros(2, 32, 16, dtype=torch.bfloat16)
aligned, unaligned = (base[i : i + 33 * 64].view(33, 2, 32) for i in (0, 1))
grouped_data_grad(aligned, weight)
found = {
    "first": count(lambda: step(1024)),
    "again": count(lambda: step(1024)),
    "other batch": count(lambda: step(1100)),
    "one row": count(lambda: step(1)),
    "aligned": count(lambda: grouped_data_grad(aligned, weight)),
    "unaligned": count(lambda: grouped_data_grad(unaligned, weight)),
    "unaligned again": count(lambda: grouped_data_grad(unaligned, weight)),
}
print(json.dumps(found))
"""


@pytest.mark.skipif(shutil.which("gcc") is None or sys.platform != "linux", reason="builds a library with gcc")
def test_only_first_launches_go_through_tritons_own_path(tmp_path: Path) -> None:
    folder = tmp_path / "driver"
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= stub_driver.build(folder) | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], env=environment, capture_output=True, text=True, cwd=ROOT,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    # Two levels of two-layer experts: three launches forward, six backward. [driver, ours, Triton's own path]
    assert found["first"][:2] == [18, 18]
    assert found["first"][2] > 0
    for case in ("again", "other batch"):
        assert found[case] == [18, 18, 0], case
    assert found["one row"][:2] == [18, 18]
    assert found["aligned"] == [1, 1, 0]
    assert found["unaligned"] == [1, 1, 1], "an unaligned tensor needs other code, which Triton itself must choose"
    assert found["unaligned again"] == [1, 1, 1]


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

"""Launches of kernels that load by descriptors, by Triton's own launcher on a driver that only takes notes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import stub_driver
from tests.programs import IMPORT_PATH

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]

PROGRAM = """
import ctypes, json, os
from unittest import mock

import torch

from tests import stub_driver

stub_driver.activate(90)
library = ctypes.CDLL(os.environ["TRITON_LIBCUDA_PATH"] + "/libcuda.so.1")
for name in ("stub_word", "stub_size", "stub_step", "stub_launches"):
    getattr(library, name).restype = ctypes.c_ulonglong

from triton.runtime.jit import JITFunction

from ple_fast_kernels import Class, Tile, _tiles, grouped_data_grad, grouped_linear_fwd, replayed, set_table

mock.patch.object(_tiles, "table_of", return_value=("sm_90", 132)).start()
slow = mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run).start()
row = (Class(0, Tile(64, 64, 64, 4, 3)),)
set_table("sm_90", {"persistent_linear/half": row, "persistent_data_grad/half": row})
library.stub_watch(16)
OPERANDS = {"a": 0, "w": 7, "y": 14}  # after a descriptor: three sizes and three steps
found = []


def forward(x, w):
    return grouped_linear_fwd(x, w, None, (1, 0))[:1]


def backward(x, w):
    return grouped_data_grad(x, w)[:1]


for call in (forward, backward):
    for _ in range(4):
        x, w = torch.zeros(100, 2, 64, dtype=torch.bfloat16), torch.zeros(2, 64, 64, dtype=torch.bfloat16)
        before = library.stub_launches(), slow.call_count
        (y,) = replayed(call.__name__, (x, w), lambda: call(x, w))
        addresses = {"a": x.data_ptr(), "w": w.data_ptr(), "y": y.data_ptr()}
        seen = {name: library.stub_word(i) for name, i in OPERANDS.items()}
        sizes, steps = ([get(i) for i in range(n)] for get, n in ((library.stub_size, 3), (library.stub_step, 2)))
        found.append({
            "launches": library.stub_launches() - before[0], "through triton": slow.call_count - before[1],
            "are the operands": seen == addresses, "rows": library.stub_word(15) & 0xFFFFFFFF,
            "weight": [sizes, steps],
        })
        kept = (x, w)  # no address comes again
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Four calls forward, each on tensors of its own: as it is, recorded, and repeated twice; then four backward."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc, which Triton's launcher is compiled with")
    folder = tmp_path_factory.mktemp("stub")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= stub_driver.build(folder) | {"PYTHONPATH": IMPORT_PATH}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    made: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return made


def test_each_launch_is_given_a_descriptor_of_its_own_operands(found: list[dict[str, Any]]) -> None:
    """By value: what a captured graph copies is the descriptor, and not where it was."""
    assert [entry["are the operands"] for entry in found] == [True] * 8
    assert all(entry["rows"] == 100 for entry in found)


def test_triton_is_asked_once_for_each_kernel(found: list[dict[str, Any]]) -> None:
    assert [entry["launches"] for entry in found] == [1] * 8
    assert [entry["through triton"] for entry in found] == [1, 0, 0, 0] * 2


def test_a_descriptor_is_bounded_by_the_tensor(found: list[dict[str, Any]]) -> None:
    """Sizes, innermost first, and the steps in bytes of the outer two, of the weight."""
    assert all(entry["weight"] == [[64, 64, 2], [128, 8192]] for entry in found)

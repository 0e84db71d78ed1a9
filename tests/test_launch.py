"""The launch path as a GPU would see it: Triton's real launcher over a driver whose launches do nothing."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import stub_driver
from tests.programs import IMPORT_PATH

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
launching = importlib.import_module("ple_fast_kernels._launch")
batch_norm = importlib.import_module("ple_fast_kernels.batch_norm")
TILE = batch_norm.MERGE_TILE
CONSTANTS: dict[str, Any] = {
    "WIDTH": 4, "PRODUCTS": True, "SAVE_GRADS": False, "SAVE_MEANS": True, "BLOCK_T": 64, "BLOCK_C": 32,
}  # fmt: skip

CALLS_OF_A_STEP, CALLS_OF_INFERENCE = 1000, 420
"""Functions, built-in ones too, that a step of two levels may call from its third time on: once 2,300 and 680."""

PROGRAM = """
import ctypes, json, os, sys
from functools import _lru_cache_wrapper
from unittest import mock

import torch

from tests import stub_driver

stub_driver.activate(90)
library = ctypes.CDLL(os.environ["TRITON_LIBCUDA_PATH"] + "/libcuda.so.1")
library.stub_launches.restype = ctypes.c_ulonglong

from triton import knobs
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


def infer():
    with use_backend("triton"), torch.inference_mode():
        ple(rows)


def calls(run):
    # Python functions and built-in ones that a run calls. A CPU's backward runs in this thread.
    events = []
    sys.setprofile(lambda frame, event, argument: events.append(event))
    run()
    sys.setprofile(None)
    return sum(event in ("call", "c_call") for event in events)


def decided(run):
    # Sets of constants and tables that were looked for: every function of ours that remembers what it returns.
    modules = [m for name, m in sys.modules.items() if name.startswith(("ple_fast_kernels", "ple_fast.triton_backend"))]
    cached = {id(f): f for m in modules for f in vars(m).values() if isinstance(f, _lru_cache_wrapper)}
    before = sum(f.cache_info().hits + f.cache_info().misses for f in cached.values())
    with mock.patch.object(_launch, "prepare", side_effect=AssertionError):
        run()
    return sum(f.cache_info().hits + f.cache_info().misses for f in cached.values()) - before


rows = torch.zeros(1024, 64, dtype=torch.bfloat16)

base = torch.zeros(33 * 2 * 32 + 1, dtype=torch.bfloat16)
weight = torch.zeros(2, 32, 16, dtype=torch.bfloat16)
aligned, unaligned = (base[i : i + 33 * 64].view(33, 2, 32) for i in (0, 1))
grouped_data_grad(aligned, weight)


def forbidden():
    # A tool that compiles elsewhere: its hook says that Triton need not.
    knobs.runtime.jit_cache_hook = lambda **given: True
    grouped_data_grad(wider, weight_of_one)
    knobs.runtime.jit_cache_hook = None


def inspected(attribute, value):
    before = getattr(knobs.runtime, attribute)
    setattr(knobs.runtime, attribute, value)
    grouped_data_grad(aligned, weight)
    setattr(knobs.runtime, attribute, before)


def watched(run):
    knobs.runtime.launch_enter_hook.add(seen.append)
    run()
    knobs.runtime.launch_enter_hook.remove(seen.append)


seen = []
wider = base[: 33 * 64].view(33, 1, 64)
weight_of_one = torch.zeros(1, 64, 16, dtype=torch.bfloat16)
found = {
    "first": count(lambda: step(1024)),
    "again": count(lambda: step(1024)),
    "repeated": count(lambda: step(1024)),
    "other batch": count(lambda: step(1100)),
    "one row": count(lambda: step(1)),
    "aligned": count(lambda: grouped_data_grad(aligned, weight)),
    "unaligned": count(lambda: grouped_data_grad(unaligned, weight)),
    "unaligned again": count(lambda: grouped_data_grad(unaligned, weight)),
    "compiling forbidden": count(forbidden),
    "compiling allowed": count(lambda: grouped_data_grad(wider, weight_of_one)),
    "allowed again": count(lambda: grouped_data_grad(wider, weight_of_one)),
    "debugged": count(lambda: inspected("debug", True)),
    "stages inspected": count(lambda: inspected("add_stages_inspection_hook", lambda *given: ("key", "hash"))),
    "profiled": count(lambda: watched(lambda: grouped_data_grad(aligned, weight))),
    "after all": count(lambda: grouped_data_grad(aligned, weight)),
    "profiled step": count(lambda: watched(lambda: step(1024))),
    "inference": [count(infer) for _ in range(3)],
    "calls of a step": calls(lambda: step(1024)),
    "calls of inference": calls(infer),
    "decided in a step": decided(lambda: step(1024)),
    "decided in inference": decided(infer),
    "hooks called": [one.get()["name"] for one in seen],
}
print(json.dumps(found))
"""


@pytest.mark.skipif(shutil.which("gcc") is None or sys.platform != "linux", reason="builds a library with gcc")
def test_only_first_launches_go_through_tritons_own_path(tmp_path: Path) -> None:
    folder = tmp_path / "driver"
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= stub_driver.build(folder) | {"PYTHONPATH": IMPORT_PATH}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], env=environment, capture_output=True, text=True, cwd=ROOT,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    # Two levels of two-layer experts: three launches forward, six backward. [driver, ours, Triton's own path]
    assert found["first"][:2] == [18, 18]
    assert found["first"][2] > 0
    for case in ("again", "repeated", "other batch", "profiled step"):
        assert found[case] == [18, 18, 0], case
    assert found["one row"][:2] == [18, 18]
    assert found["aligned"] == [1, 1, 0]
    assert found["unaligned"] == [1, 1, 1], "an unaligned tensor needs other code, which Triton itself must choose"
    assert found["unaligned again"] == [1, 1, 1]
    # A hook that forbids to compile: nothing was launched, and nothing may be remembered.
    assert found["compiling forbidden"] == [0, 1, 1]
    assert found["compiling allowed"] == [1, 1, 1]
    assert found["allowed again"] == [1, 1, 0]
    for case in ("debugged", "stages inspected"):
        assert found[case] == [1, 1, 1], f"{case}: Triton compiles other code, and must be asked"
    assert found["profiled"] == [1, 1, 0]
    assert found["hooks called"][0] == "_grouped_data_grad_kernel"
    assert len(found["hooks called"]) == 1 + 18, "a profiler sees every launch of a step that would be repeated"
    assert [launches[:2] for launches in found["inference"]] == [[2, 2]] * 3
    # Time differs from machine to machine; what a call does, does not. A level of either pass: one table, its device's.
    assert found["decided in a step"] <= 4 and found["decided in inference"] <= 2
    assert found["calls of a step"] < CALLS_OF_A_STEP and found["calls of inference"] < CALLS_OF_INFERENCE
    assert found["after all"] == [1, 1, 0]


@pytest.mark.parametrize(
    ("given", "named"),
    [({"WIDE": 4}, "unknown: WIDE"), ({"WIDTH": None}, "missing: WIDTH"), ({"B": 4}, "unknown: B")],
)
def test_a_constant_that_a_kernel_lacks_or_misses_is_refused(given: dict[str, Any], named: str) -> None:
    constants = {name: value for name, value in (CONSTANTS | given).items() if value is not None}
    with pytest.raises(TypeError, match=named):
        launching.prepare(batch_norm._norm_sums_merge_kernel, TILE, **constants)


def test_arguments_are_taken_by_name_in_any_order() -> None:
    run = launching.prepare(batch_norm._norm_sums_merge_kernel, TILE, **CONSTANTS)
    parts, means = torch.arange(24.0).view(3, 2, 4), torch.empty(2, 4)
    run((1,), parts.device, parts=3, B=2, DWeight=None, DBias=None, Means=means, Parts=parts)
    torch.testing.assert_close(means, parts.sum(0) / 2)
    for given, named in (({}, "missing: Means"), ({"Means": means, "Mean": means}, "unknown: Mean")):
        with pytest.raises(TypeError, match=named):
            run((1,), parts.device, Parts=parts, DWeight=None, DBias=None, B=2, parts=3, **given)


def test_the_key_tells_apart_what_triton_compiles_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor_descriptor = importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor
    x = torch.zeros(8, 64)
    half, doubles = x.bfloat16(), x.double()
    of = ((x, [4, 16]), (x, [8, 16]), (half, [4, 16]))
    blocks = [tensor_descriptor.from_tensor(tensor, block) for tensor, block in of]
    cases = [(x,), (half,), (doubles,), (None,), (1,), (1.0,), (True,), *((block,) for block in blocks)]
    keys = [launching._key(0, case) for case in cases]
    assert None not in keys and len({*keys, launching._key(1, (x,))}) == len(cases) + 1
    assert launching._key(0, (x, 3)) == launching._key(0, (torch.ones(2), 1 << 20))
    for looked_at in (x.view(-1)[1:], 1 << 31, -(1 << 31) - 1):
        assert launching._key(0, (x, looked_at)) is None
    # On ROCm Triton takes 32-bit offsets within storages of up to 2 GiB, whatever part of one the tensor is.
    monkeypatch.setattr(launching, "_is_hip", True)
    small, larger = torch.empty(4, device="meta"), torch.empty(1 << 29, device="meta")[:4]
    assert launching._key(0, (small,)) != launching._key(0, (larger,))
    assert launching._key(0, (small,)) == launching._key(0, (torch.empty(8, device="meta"),))

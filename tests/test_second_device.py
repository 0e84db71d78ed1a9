"""Tensors on one GPU while another one is the current one: as they lie, not as the process has set it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from ple_fast import PLE, use_backend
from tests import stub_driver
from tests.programs import IMPORT_PATH

pytest.importorskip("triton")

from ple_fast_kernels import architecture

ROOT = Path(__file__).parents[1]

CASES = ((0, 0), (0, 1), (0, 0), (0, 1), (1, 1), (1, 0), (0, 2), (1, 2))
"""Numbers of the current device and of that of the tensors; the third is of another architecture."""

PROGRAM = """
import json
from types import SimpleNamespace
from unittest import mock

import torch

from tests import stub_driver

stub_driver.activate(90)
from triton.runtime.jit import JITFunction

from ple_fast_kernels import _tiles, grouped_data_grad, reload_tables

entered = []


class Device:
    def __init__(self, device):
        self.index = device.index

    def __enter__(self):
        entered.append(self.index)
        self.before, stub_driver.current = stub_driver.current, self.index

    def __exit__(self, *raised):
        stub_driver.current = self.before


class OnGPU(torch.Tensor):
    # A tensor of the CPU that says of itself that it lies on a GPU.
    @property
    def device(self):
        return torch.device("cuda", self.index)


def on(index, *shape):
    tensor = zeros(shape, dtype=torch.bfloat16).as_subclass(OnGPU)
    tensor.index = index
    return tensor


def empty(shape, dtype, device):
    made.append(device.index)
    return on(device.index, *shape)


zeros, made = torch.zeros, []
hopper, ampere = (SimpleNamespace(major=major, multi_processor_count=132) for major in (9, 8))
gpus = {0: hopper, 1: hopper, 2: ampere}
for name, value in {
    "device": Device,
    "current_device": lambda: stub_driver.current,
    "get_device_properties": gpus.__getitem__,
    "get_device_name": lambda index: f"Fake {index}",
}.items():
    mock.patch.object(torch.cuda, name, value).start()
mock.patch.object(torch, "empty", empty).start()
slow = mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run).start()
operands = {index: (on(index, 128, 2, 32), on(index, 2, 32, 16)) for index in gpus}
found = []
for current, index in CASES:
    stub_driver.current = current
    for log in (entered, made, stub_driver.streams):
        log.clear()
    before, _tiles.asked = slow.call_count, []
    grouped_data_grad(*operands[index])
    (asked,) = _tiles.asked
    found.append({
        "through triton": slow.call_count - before, "entered": entered[:], "current after": stub_driver.current,
        "streams": sorted({*stub_driver.streams}), "results": made[:], "stages": asked.tile.stages,
    })
print(json.dumps(found))
"""


@pytest.mark.skipif(shutil.which("gcc") is None or sys.platform != "linux", reason="builds a library with gcc")
def test_a_launch_enters_the_device_of_its_tensors_and_compiles_for_each(tmp_path: Path) -> None:
    """Over a driver that does nothing: the device, its stream, its tiles and its compiled kernel."""
    folder = tmp_path / "driver"
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PLE_FAST_TILES")}
    environment |= stub_driver.build(folder) | {"PYTHONPATH": IMPORT_PATH}
    environment |= {"XDG_CACHE_HOME": str(tmp_path)}
    program = f"CASES = {CASES}\n{PROGRAM}"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True, cwd=ROOT,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    for i, ((current, index), one) in enumerate(zip(CASES, found, strict=True)):
        assert one == {
            "through triton": int(i in (0, 1, 6)),  # the first on each device: a compiled kernel is one device's
            "entered": [index] if index != current else [],
            "current after": current,
            "streams": [index],
            "results": [index],
            "stages": 3 if index == 2 else 4,
        }, f"launch {i}"


@pytest.fixture
def gpus(device: torch.device) -> Iterator[list[torch.device]]:
    """Two devices, of which the first is the current one, and stays so."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        count = torch.cuda.device_count() if device.type == "cuda" else 0
        pytest.skip(f"needs two GPUs and --device cuda; there are {count}")
    torch.cuda.set_device(0)
    yield [torch.device("cuda", i) for i in range(2)]
    assert torch.cuda.current_device() == 0


MAKE_UPS: dict[str, dict[str, Any]] = {"plain": {}, "dropout and norm": {"dropout": 0.25, "norm": "batch"}}


def step(ple: PLE, x: Tensor, backend: Literal["triton", "torch"] = "triton") -> list[Tensor]:
    """Outputs, and the gradients of input and parameters."""
    ple.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(3)
    with use_backend(backend):
        y = ple(x)
        y.square().mean().backward()
    return [y.detach(), *(p.grad for p in (x, *ple.parameters()) if p.grad is not None)]


@pytest.mark.parametrize("order", [(0, 1, 0), (1, 0, 1)], ids=str)
@pytest.mark.parametrize("make_up", MAKE_UPS)
def test_training_on_either_device_whatever_ran_before(
    make_up: str, order: tuple[int, ...], gpus: list[torch.device]
) -> None:
    """Kernels that were compiled on the other device, tiles that were chosen for it."""
    for index in order:
        torch.manual_seed(0)
        ple = PLE(64, 2, expert_units=(64, 32), device=gpus[index], **MAKE_UPS[make_up])
        x = torch.randn(300, 64).to(gpus[index])
        ours, again, theirs = step(ple, x), step(ple, x), step(ple, x, "torch")
        for one, two, expected in zip(ours, again, theirs, strict=True):
            assert one.device == gpus[index] and torch.equal(one, two)
            torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-4)


def test_launches_wait_in_the_stream_of_their_own_device(gpus: list[torch.device]) -> None:
    """A side stream of the second device, while the first one is current."""
    ple = PLE(64, 2, expert_units=(64, 32), device=gpus[1])
    old, new = torch.zeros(300, 64, device=gpus[1]), torch.randn(300, 64, device=gpus[1])
    with torch.no_grad(), use_backend("triton"):
        expected = ple(new)
        side = torch.cuda.Stream(gpus[1])
        torch.cuda.synchronize(gpus[1])
        with torch.cuda.stream(side), torch.cuda.device(0):
            with torch.cuda.device(1):
                torch.cuda._sleep(200_000_000)  # what follows in another stream would not wait for the copy
            old.copy_(new)
            y = ple(old)
        side.synchronize()
    assert torch.equal(y, expected)


def test_tiles_are_those_of_the_tensors_device(gpus: list[torch.device]) -> None:
    for gpu in gpus:
        assert architecture(gpu)[1] == torch.cuda.get_device_properties(gpu).multi_processor_count

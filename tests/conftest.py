"""What every test gets: seeds, few threads, and fresh memory of the library that reads as NaN until it is written."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

# Read when torch is loaded: a thread that waits for its partner sleeps, and does not take the time of another process.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch
from hypothesis import register_random, settings
from torch.utils._device import _device_constructors

from tests.missing import SkipMissing
from tests.poison import poison_fresh_memory

# No deadline: the first example of a test pays for warm-up. The rest is hypothesis' own choice (in CI: a fixed seed).
settings.register_profile("ple_fast", parent=settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("ple_fast")


class _TorchGenerator:
    """PyTorch's global generator as hypothesis sees one, so that an example draws the same tensors again."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


TORCH_GENERATOR = _TorchGenerator()  # hypothesis holds it weakly
register_random(TORCH_GENERATOR)

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are decorated, so before triton is imported
    from tests.interpreter import install

    install()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the tests that take the fixture `device`")
    parser.addoption("--only-device", action="store_true", help="only the tests that take the fixture `device`")
    parser.addoption(
        "--skip-missing", action="store_true", help="skip, and do not fail, tests whose package is not installed"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--only-device"):
        without = [item for item in items if "device" not in getattr(item, "fixturenames", ())]
        items[:] = [item for item in items if item not in without]
        config.hook.pytest_deselected(items=without)


def alignments(device: str) -> list[str]:
    """Memory of the operands of the kernels' tests: a GPU compiles other code for each, the interpreter sees none."""
    return ["aligned", "unaligned"] if device.startswith("cuda") else ["aligned"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "alignment" in metafunc.fixturenames:
        metafunc.parametrize("alignment", alignments(str(metafunc.config.getoption("--device"))), indirect=True)


def pytest_configure(config: pytest.Config) -> None:
    from ple_fast.torch_backend import product_files, product_table  # after TRITON_INTERPRET is set

    if config.getoption("--skip-missing"):
        config.pluginmanager.register(SkipMissing())
    # The tensors of the tests are small: more threads only cost, and where another process has the other core, a
    # thread that waits for its partner costs a hundred times the work. A fixed number gives the same sums everywhere.
    torch.set_num_threads(1)
    # Which path a level takes is the same on every processor; by which library its products are is not.
    os.environ["PLE_FAST_PRODUCTS"] = ""
    table_of = product_files.table_of
    limits = product_table.Limits()
    product_files.table_of = lambda processor, threads: table_of(processor, threads)._replace(limits=limits)
    # `with torch.device(...)` looks for torch.empty in a table that it makes once: not of what replaces it in a test.
    _device_constructors()


def pytest_unconfigure() -> None:
    """At the end of the process what was imported is freed as ever: libraries in C++ report what is not."""
    gc.unfreeze()


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test, from ``--device``; a test fails, and is not skipped, where that device is absent."""
    return torch.device(str(request.config.getoption("--device")))


@pytest.fixture
def alignment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test of kernels once with operands of ``guarded`` at multiples of 16 bytes, and on a GPU once without."""
    import tests.kernel_helpers as helpers  # after TRITON_INTERPRET is set

    monkeypatch.setattr(helpers, "front", {"aligned": helpers.ALIGNED, "unaligned": helpers.UNALIGNED}[request.param])
    return str(request.param)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For what must also be right where the work is divided."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _what_was_there_stays() -> None:
    """What the modules before have imported, the compiler say, is most of what is alive: collections of garbage, and
    swaps, which look at all objects, leave it out. To go through it takes most of a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # libraries under comparison draw from the global generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _tables_of_products_of_one_test() -> Iterator[None]:
    yield
    in_use: Any = sys.modules["ple_fast.torch_backend.table_in_use"]
    in_use.reload_tables()


@pytest.fixture(autouse=True)
def _poison_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_fresh_memory(monkeypatch)


@pytest.fixture(autouse=True)
def _compiled_programs_of_one_test() -> Iterator[None]:
    """Dynamo counts programs per code object: those of other tests would be among the few that it allows."""
    yield
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["frames"]["total"]:
        dynamo.reset()
        dynamo.utils.counters.clear()


@pytest.fixture(autouse=True)
def _calls_of_one_test() -> Iterator[None]:
    """What an earlier test recorded would be repeated, where this one has put something in the place of a part."""
    yield
    replay: Any = sys.modules.get("ple_fast_kernels._replay")
    if replay is not None:
        replay.forget()


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both backends in turn, in use; on a CPU the kernels are interpreted, so keep the tensors tiny."""
    from ple_fast import use_backend  # after TRITON_INTERPRET is set

    if request.param == "triton" and not HAS_TRITON:
        pytest.skip("triton is not installed")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def outer_programs(_poison_fresh_memory: None, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For tensors that are too large to be touched: in the interpreter a launch runs its first and its last program."""
    from tests.large_tensors import run_outer_programs  # after TRITON_INTERPRET is set

    if device.type == "cuda":
        yield
        torch.cuda.empty_cache()
    else:
        run_outer_programs(monkeypatch)
        yield


BAND = 64


@pytest.fixture
def guard_bands(_poison_fresh_memory: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the launchers get from ``torch.empty`` lies between bands, and a test that writes into a band fails."""
    allocate = torch.empty
    bands: list[torch.Tensor] = []

    @functools.wraps(allocate)
    def banded(*shape: Any, **kwargs: Any) -> torch.Tensor:
        caller = str(sys._getframe(1).f_globals.get("__name__", "")).partition(".")[0]
        if caller != "ple_fast_kernels":
            return allocate(*shape, **kwargs)
        sizes = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        buffer = torch.full((sizes.numel() + 2 * BAND,), float("nan"), **kwargs)
        buffer[:BAND], buffer[BAND + sizes.numel() :] = 3.0, 3.0
        bands.extend((buffer[:BAND], buffer[BAND + sizes.numel() :]))
        return buffer[BAND : BAND + sizes.numel()].view(sizes)

    monkeypatch.setattr(torch, "empty", banded)
    yield
    assert all(bool((band == 3.0).all()) for band in bands), "a kernel wrote outside of its result"

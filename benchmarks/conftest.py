"""Options of the suite: ``python -m pytest benchmarks --sizes small,paper --contestants loop,fast``."""

from __future__ import annotations

import pytest
import torch

from benchmarks.configs import SUITE_SIZES, THREADS
from benchmarks.contestants import CONTESTANTS, SUITE_CONTESTANTS


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("trunks")
    group.addoption("--sizes", default=",".join(SUITE_SIZES), help="sizes of benchmarks/configs.py, NAME or NAME-BATCH")
    group.addoption("--contestants", default=",".join(SUITE_CONTESTANTS), help="names of benchmarks/contestants.py")


def pytest_configure() -> None:
    torch.set_num_threads(THREADS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "size" in metafunc.fixturenames:
        metafunc.parametrize("size", str(metafunc.config.getoption("--sizes")).split(","))
    if "contestant" in metafunc.fixturenames:
        names = str(metafunc.config.getoption("--contestants")).split(",")
        if unknown := set(names) - set(CONTESTANTS):
            raise pytest.UsageError(f"--contestants: expected names out of {', '.join(CONTESTANTS)}, got {unknown}")
        metafunc.parametrize("contestant", names)

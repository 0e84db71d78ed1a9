"""``--skip-missing``: tests whose package is not installed are skipped with its name, where a machine has no network.

Without the option a missing package is a failure: in CI it would hide that the set-up broke.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
IMPORTED_AS = {"scikit_learn": "sklearn"}
"""Where a package is imported under another name than it is installed."""
WITH_ITS_OWN_INSTALLER = {"torchrec", "fbgemm_gpu"}


def optional() -> set[str]:
    """Import names of all that the extras of ``pyproject.toml`` ask for."""
    _, _, extras = PROJECT.read_text(encoding="utf-8").partition("[project.optional-dependencies]")
    extras, _, _ = extras.partition("\n[tool.")
    names = {re.split(r"[^\w.-]", found)[0].replace("-", "_") for found in re.findall(r'"([^"]+)"', extras)}
    return {IMPORTED_AS.get(name, name) for name in names - {"ple_fast"}} | WITH_ITS_OWN_INSTALLER


def missing_package(error: BaseException | None) -> str | None:
    """The optional package whose absence an error, or its cause, reports; None for every other error."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            name = error.name.partition(".")[0]
            if name in optional() and name not in sys.modules and find_spec(name) is None:
                return name
        error = error.__cause__ or error.__context__
    return None


class _Module(pytest.Module):
    """A test file that is skipped where it cannot be imported for want of a package."""

    def _getobj(self) -> Any:
        try:
            return super()._getobj()  # type: ignore[no-untyped-call]  # untyped in pytest
        except self.CollectError as error:
            if name := missing_package(error):
                pytest.skip(f"{name} is not installed", allow_module_level=True)
            raise


class SkipMissing:
    """The plugin; ``tests/conftest.py`` registers it on request."""

    def pytest_pycollect_makemodule(self, module_path: Path, parent: Any) -> pytest.Module:
        module: pytest.Module = _Module.from_parent(parent, path=module_path)
        return module

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self) -> Generator[None, object, object]:
        return (yield from _skipping())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        return (yield from _skipping())


def _skipping() -> Generator[None, object, object]:
    try:
        return (yield)
    except Exception as error:
        if name := missing_package(error):
            pytest.skip(f"{name} is not installed")
        raise

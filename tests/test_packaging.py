"""The wheel, built from the source distribution and installed into an empty folder: its contents and its imports."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

import ple_fast

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "ple_fast": ROOT / "ple_fast",
    "ple_fast_encoder": ROOT / "encoder" / "ple_fast_encoder",
    "ple_fast_kernels": ROOT / "kernels" / "ple_fast_kernels",
}
RUN_TIME_DEPENDENCIES = ["numpy", "torch>=2.10"]
# Nothing of these may be needed, or loaded, by `import ple_fast`: other platforms' compilers, and extras.
OPTIONAL = ("triton", "matplotlib", "pandas", "pyarrow", "sklearn", "rich")


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Standard output of ``python command...`` run in ``cwd`` with ``path`` first on the import path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the unpacked source distribution as PyPI's users would."""
    folder = tmp_path_factory.mktemp("build")
    run("-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.10.0 to 11, 3.11.0 to 3 have none
        archive.extractall(folder)
    run("-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=folder / sdist.name.removesuffix(".tar.gz"))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", target, wheel)
    run(*pip, cwd=target)
    return target


def test_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    files = [PurePosixPath(name) for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")]
    dist_info = f"ple_fast-{ple_fast.__version__}.dist-info"
    assert {file.parts[0] for file in files} == {*PACKAGES, dist_info}
    for name, source in PACKAGES.items():
        wanted = {
            PurePosixPath(name, file.relative_to(source).as_posix())
            for file in source.rglob("*")
            if file.is_file() and "__pycache__" not in file.parts
        }
        assert PurePosixPath(name, "py.typed") in wanted
        assert {file for file in files if file.parts[0] == name} == wanted


def test_metadata_agrees_with_the_package(installed: Path) -> None:
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    assert distribution.metadata["Name"] == "ple-fast"
    assert distribution.version == ple_fast.__version__
    assert distribution.metadata["Requires-Python"] == ">=3.10"
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    requires = distribution.requires or []
    assert sorted(r for r in requires if "extra ==" not in r) == RUN_TIME_DEPENDENCIES
    assert set(distribution.metadata.get_all("Provides-Extra") or []) == {"viz", "examples", "peers", "bench", "dev"}
    assert distribution.read_text("licenses/LICENSE") == (ROOT / "LICENSE").read_text()


def test_installed_wheel_imports_without_the_optional_packages(installed: Path, tmp_path: Path) -> None:
    program = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL!r}))  # None: importing it raises ModuleNotFoundError
import ple_fast, ple_fast_encoder, importlib.util
import json
kernels = importlib.util.find_spec("ple_fast_kernels").origin  # importing it needs triton
print(json.dumps([ple_fast.__file__, ple_fast_encoder.__file__, kernels, ple_fast.__version__]))
"""
    *files, version = json.loads(run("-c", program, cwd=tmp_path, path=installed))
    assert [Path(file) for file in files] == [installed / name / "__init__.py" for name in PACKAGES]
    assert version == ple_fast.__version__


@pytest.mark.parametrize("copied", [False, True], ids=["installed", "folder-copied"])
def test_the_encoder_stands_alone(installed: Path, tmp_path: Path, copied: bool) -> None:
    """In a process that has NumPy and no torch, out of the wheel or as a folder that somebody copied."""
    program = f"""
import sys
sys.modules.update(dict.fromkeys(("torch", "ple_fast", *{OPTIONAL!r})))  # None: importing it raises ModuleNotFoundError
import numpy as np
import ple_fast_encoder
from ple_fast_encoder import Categorical, Encoder, Hashed, Numeric
columns = [Categorical("a", values=("x", "y")), Hashed("b", 10, pooling="sum", max_length=2), Numeric("c", std=2.0)]
Encoder(columns).save("encoder.json")
encoder = Encoder.load("encoder.json")
codes, numbers = encoder.encode({{"a": ["y", None], "b": [[1], [2, 3, 4]], "c": np.array([1, 3])}})
loaded = [name for name in sys.modules if name.startswith("ple_fast.")]
print(codes[:, 0].tolist(), codes.shape, numbers.tolist(), loaded)
"""
    if copied:
        shutil.copytree(PACKAGES["ple_fast_encoder"], tmp_path / "ple_fast_encoder")
    found = run("-c", program, cwd=tmp_path, path=tmp_path if copied else installed)
    assert found == "[2, 0] (2, 3) [[0.5], [1.5]] []\n"


def test_import_loads_neither_optional_packages_nor_the_reference(installed: Path, tmp_path: Path) -> None:
    program = """
import sys
import torch  # may load what it likes
before = set(sys.modules)
import ple_fast
print(*sorted(set(sys.modules) - before))
"""
    loaded = run("-c", program, cwd=tmp_path, path=installed).split()
    assert "ple_fast" in loaded
    assert not [name for name in loaded if name.partition(".")[0] in OPTIONAL]
    assert "ple_fast.reference" not in loaded


def test_pytest_tests_the_tree_and_not_an_installed_wheel(installed: Path, tmp_path: Path) -> None:
    # Run from elsewhere, so that only `pythonpath` of pyproject.toml can put the tree before the wheel.
    test = tmp_path / "test_where.py"
    test.write_text(
        f"""
import os, importlib.util

def test_where():
    where = [os.path.dirname(importlib.util.find_spec(name).origin) for name in {list(PACKAGES)}]
    assert where == {[str(source) for source in PACKAGES.values()]}
"""
    )
    options = ("-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-p", "no:cacheprovider", "-q", test)
    assert "1 passed" in run("-m", "pytest", *options, cwd=tmp_path, path=installed)


def test_python_m_pytest_collects_from_the_root() -> None:
    collected = run("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", cwd=ROOT)
    assert "tests/test_packaging.py::test_python_m_pytest_collects_from_the_root" in collected.splitlines()

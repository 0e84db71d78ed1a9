"""The rules of CONTRIBUTING.md that a machine can hold: layers, docstrings, banned strings, what the documents name."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ple_fast
import ple_fast_encoder

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels"
ENCODER = ROOT / "encoder"

# The layers of ple_fast, lowest first. A module imports only from rows below its own; a sub-package is one module here.
LAYERS = (
    ("scalars", "references"),
    ("outputs", "home_wiring"),
    ("topology", "specs"),
    ("reference", "checks", "backend", "autocast", "plan", "grads", "slots", "state"),
    ("tensors", "reference_home"),
    ("call",),
    ("saved",),
    ("torch_backend",),
    ("triton_backend",),
    ("autograd", "routes", "slot_scale"),
    ("ops",),
    ("functional",),
    ("modules", "losses", "synthetic", "viz"),
    ("tune_library", "tune_calls", "tune_candidates", "tune_splits", "tune_products"),
    ("tune_table", "tune_trunks"),
    ("model", "convert", "tune_measure", "tune_processor", "warmup", "explain"),
    ("tune_results", "tune_show"),
    ("tune",),
    ("__init__",),
)
RANK = {module: rank for rank, row in enumerate(LAYERS) for module in row}
# What modules may import besides the standard library; what is optional is imported by the function that needs it.
RUN_TIME = {"torch", "numpy", "ple_fast_encoder"}
WITHOUT_TENSORS = ("scalars", "references", "outputs", "home_wiring", "topology", "specs")
KERNEL_DEPENDENCIES = {"torch", "triton"}
ENCODER_DEPENDENCIES = {"numpy"}

OURS = sorted((ROOT / "ple_fast").rglob("*.py"))
ENCODER_FILES = sorted((ENCODER / "ple_fast_encoder").rglob("*.py"))
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(f for d in ("docs", "kernels", "encoder", "examples", "benchmarks") for f in (ROOT / d).rglob("*.md")),
    ]
)
SOURCES = sorted(
    [
        *DOCUMENTS,
        *(ROOT / name for name in ("pyproject.toml", "Makefile", ".pre-commit-config.yaml")),
        *(f for f in (ROOT / ".ci").glob("*") if f.is_file()),  # a copy for a lent machine has none
        *(
            f
            for d in ("ple_fast", "kernels", "encoder", "tests", "benchmarks", "examples", "soak")
            for f in (ROOT / d).rglob("*.py")
        ),
        *(ROOT / "benchmarks").rglob("*.json"),
    ]
)


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def import_statements(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Imports that run, each with whether it waits for a call; what only a type checker reads is left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, lazy
        yield from import_statements(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def imports(file: Path, root: Path) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Absolute dotted names, split, that ``file`` of a package in ``root`` imports, and whether lazily."""
    package = file.relative_to(root).parent.parts
    for statement, lazy in import_statements(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            yield from ((tuple(alias.name.split(".")), lazy) for alias in statement.names)
        else:
            base = package[: len(package) + 1 - statement.level] if statement.level else ()
            prefix = (*base, *(statement.module or "").split(".")) if statement.module else base
            yield from (((*prefix, alias.name), lazy) for alias in statement.names)


def module_of(dotted: tuple[str, ...]) -> str:
    """The entry of ``LAYERS`` that a name inside ple_fast belongs to; what the package defines is ``__init__``'s."""
    name = dotted[1] if len(dotted) > 1 else "__init__"
    folder = ROOT / "ple_fast"
    return name if (folder / f"{name}.py").is_file() or (folder / name).is_dir() else "__init__"


@pytest.mark.parametrize("file", OURS, ids=name_of)
def test_a_module_imports_only_from_the_layers_below_it(file: Path) -> None:
    module = file.relative_to(ROOT / "ple_fast").parts[0].removesuffix(".py")
    assert module in RANK, f"{name_of(file)}: give {module!r} a place in LAYERS"
    used = {module_of(dotted) for dotted, _ in imports(file, ROOT) if dotted[0] == "ple_fast"} - {module}
    assert not (unplaced := used - RANK.keys()), f"{name_of(file)} imports {unplaced}: give it a place in LAYERS"
    upward = {name for name in used if RANK[name] >= RANK[module]}
    assert not upward, f"{name_of(file)} imports {sorted(upward)}, not below {module!r}"
    assert not {"reference", "reference_home"} & used or module == "reference_home", (
        "the reference is the oracle of tests and benchmarks: no part of the library uses it"
    )


PACKAGES = sorted({file.parent for file in (*OURS, *ENCODER_FILES)})


@pytest.mark.parametrize("package", PACKAGES, ids=name_of)
def test_no_modules_of_a_package_import_each_other_in_a_ring(package: Path) -> None:
    """Not even lazily, or for types: what two need of each other has a place of its own, below both."""
    graph: dict[str, set[str]] = {}
    for file in package.glob("*.py"):
        statements = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
        own = [node for node in statements if node.level == 1]
        graph[file.stem] = {name for node in own for name in ([node.module] if node.module else [])}
        graph[file.stem] |= {alias.name for node in own if not node.module for alias in node.names}
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the ring


@pytest.mark.parametrize("file", OURS, ids=name_of)
def test_a_module_needs_only_the_run_time_dependencies_to_be_imported(file: Path) -> None:
    allowed = {"ple_fast_encoder"} if file.stem in WITHOUT_TENSORS else RUN_TIME
    if file.parent.name == "triton_backend":  # itself imported by the function that needs it
        allowed = RUN_TIME | {"ple_fast_kernels"}
    outside = {dotted[0] for dotted, lazy in imports(file, ROOT) if not lazy} - sys.stdlib_module_names - {"ple_fast"}
    assert outside <= allowed


def absolute_imports(file: Path, *, lazy: bool) -> set[str]:
    """Top-level names outside of the standard library that a file imports absolutely."""
    names = {
        name
        for statement, waits in import_statements(ast.parse(file.read_text(encoding="utf-8")))
        for name in (
            [alias.name for alias in statement.names]
            if isinstance(statement, ast.Import)
            else ([] if statement.level else [statement.module or ""])
        )
        if lazy or not waits
    }
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


@pytest.mark.parametrize("file", sorted((KERNELS / "ple_fast_kernels").rglob("*.py")), ids=name_of)
def test_a_kernel_module_imports_relatively_and_never_ple_fast(file: Path) -> None:
    assert absolute_imports(file, lazy=True) <= KERNEL_DEPENDENCIES


@pytest.mark.parametrize("file", ENCODER_FILES, ids=name_of)
def test_a_module_of_the_encoder_imports_relatively_and_needs_numpy_alone(file: Path) -> None:
    assert absolute_imports(file, lazy=False) <= ENCODER_DEPENDENCIES
    assert absolute_imports(file, lazy=True) <= ENCODER_DEPENDENCIES | {"pyarrow"}  # where a column is pyarrow's


def test_the_folders_around_packages_are_no_packages() -> None:
    for folder in (KERNELS / "ple_fast_kernels", ENCODER / "ple_fast_encoder"):
        assert (folder / "__init__.py").is_file()
        assert not (folder.parent / "__init__.py").exists(), "`kernels` is a package on PyPI: ours would shadow it"


def kernels() -> Iterator[tuple[str, ast.FunctionDef]]:
    """What is launched: file and function."""
    for file in sorted((KERNELS / "ple_fast_kernels").glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                yield file.name, node


@pytest.mark.parametrize(("file", "kernel"), list(kernels()), ids=lambda value: getattr(value, "name", value))
def test_the_shape_of_every_tensor_stands_in_the_docstring_of_its_kernel(file: str, kernel: ast.FunctionDef) -> None:
    tensors = {a.arg for a in kernel.args.args if a.annotation is None and a.arg[0].isupper()} - {"B", "CHUNK"}
    assert tensors
    named = set(re.findall(r"\w+", ast.get_docstring(kernel) or ""))
    assert tensors <= named, f"{file}: {sorted(tensors - named)}"


@pytest.mark.parametrize(
    "name",
    [
        name
        for package in (ple_fast, ple_fast_encoder)
        for name in (
            package.__name__,
            *(m.name for m in pkgutil.walk_packages(package.__path__, prefix=f"{package.__name__}.")),
        )
    ],
)
def test_modules_and_their_public_names_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    for public in getattr(module, "__all__", ()):
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isroutine(value):
            # A class inherits no __doc__, but a dataclass is given one that only repeats its signature.
            doc = value.__doc__ or ""
            assert doc, f"{name}.{public} has no docstring"
            assert not doc.startswith(f"{public}("), f"{name}.{public} has no docstring of its own"


# What, in which files, and why or what instead. The classes of one letter keep the patterns from finding themselves.
BANNED = (
    (r"make_block[_]ptr|tl\.advance\b", r"\.py$", "deprecated: plain pointers, or tensor descriptors"),
    (r"\.cuda\(\)", r"^(tests|benchmarks|examples|soak)/", "take the fixture `device`, or an argument"),
    (r"/(work|tmp|root)/", r"", "a path of one machine"),
    (r"\b(TO[D]O|FIX[M]E|XX[X])\b", r"", "do it, or open an issue"),
)


@pytest.mark.parametrize(("pattern", "where", "why"), BANNED, ids=[ban[0] for ban in BANNED])
def test_banned_strings_do_not_occur(pattern: str, where: str, why: str) -> None:
    found = [
        f"{name_of(file)}:{number}: {line.strip()}"
        for file in SOURCES
        if re.search(where, name_of(file))
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, f"{why}:\n" + "\n".join(found)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_of_a_document_lead_to_files(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(<?([^)\s>]+)>?[^)]*\)", text) if not re.match(r"[a-z]+:|#", link)]
    missing = [link for link in links if not (document.parent / link.partition("#")[0]).exists()]
    assert not missing, f"{name_of(document)} links to {missing}"


# Not those that tell of other libraries' files, or of what was.
ABOUT_US = [file for file in DOCUMENTS if "migration" not in file.parts and file.name != "CHANGELOG.md"]


@pytest.mark.parametrize("document", ABOUT_US, ids=name_of)
def test_a_document_names_python_files_that_exist(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    paths = {f"/{name_of(file)}" for file in SOURCES} | {"/kernels/__init__.py"}  # which never exists, the page says
    missing = [name for name in re.findall(r"`([\w./]+\.py)`", text) if not any(p.endswith(f"/{name}") for p in paths)]
    assert not missing, f"{name_of(document)} names {missing}"


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / ".ci" / "run"], ids=name_of)
def test_make_commands_of_a_document_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    text = document.read_text(encoding="utf-8")
    if document.suffix == ".md":  # in prose "make" is a verb: only what is set as code counts
        text = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL)).replace("`", "\n")
    commands = re.findall(r"^\s*(?:\$ )?make((?: [a-z][a-z-]*)+)", text, flags=re.MULTILINE)
    named = {target for command in commands for target in command.split()}
    assert named <= targets, f"{name_of(document)} names {sorted(named - targets)}, the Makefile has {sorted(targets)}"


# Functions of torch that make a tensor (or a generator) out of nothing, and which of them give integers.
FACTORIES = frozenset(
    "arange as_tensor asarray empty empty_strided eye full linspace logspace normal ones rand randint randn randperm "
    "scalar_tensor tensor tril_indices triu_indices zeros Generator".split()
)
WHOLE = frozenset(("arange", "randint", "randperm", "tril_indices", "triu_indices"))


@pytest.mark.parametrize("file", [f for f in OURS if f.stem != "reference"], ids=name_of)
def test_factory_calls_name_their_device_and_dtype(file: Path) -> None:
    """What a user has set as default device or dtype is for the user's own tensors."""
    unnamed = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name = node.func.attr
        if ast.unparse(node.func.value) != "torch" or name not in FACTORIES:
            continue
        given = {keyword.arg for keyword in node.keywords}
        wanted = {"device"} | (set() if name in WHOLE or name == "Generator" else {"dtype"})
        if None not in given and not wanted <= given:  # None: **where, which has both
            unnamed.append(f"{name_of(file)}:{node.lineno}: {ast.unparse(node)}")
    assert not unnamed, "name device and dtype:\n" + "\n".join(unnamed)


@pytest.mark.parametrize("file", sorted((ROOT / "tests").rglob("*.py")), ids=name_of)
def test_programs_of_tests_say_where_they_import_from(file: Path) -> None:
    """In an environment that has the library's dependencies alone only tests/programs.py finds this tree."""
    unsaid = [
        f"{name_of(file)}:{node.lineno}"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).startswith("subprocess.")
        and any("sys.executable" in ast.unparse(argument) for argument in node.args)
        and "env" not in {keyword.arg for keyword in node.keywords}
    ]
    assert not unsaid, "take run_python of tests/programs.py, or name env:\n" + "\n".join(unsaid)


def test_the_readme_names_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make example" in readme
    assert "make test" in readme


@pytest.mark.parametrize("caller", ["ple_fast.torch_backend.level", "ple_fast_kernels"])
def test_fresh_memory_of_the_library_reads_as_nan(caller: str) -> None:
    scope: dict[str, Any] = {"__name__": caller, "torch": torch, "x": torch.zeros(4, 3)}
    exec(
        "fresh = torch.empty(4, 3), torch.empty_like(x), torch.empty_strided((4, 3), (3, 1)), x.new_empty(4, 3)\n"
        "whole = torch.empty(4, dtype=torch.int64)",  # integers have no NaN: they stay as they are
        scope,
    )
    assert all(tensor.isnan().all() for tensor in scope["fresh"])
    assert scope["whole"].dtype is torch.int64

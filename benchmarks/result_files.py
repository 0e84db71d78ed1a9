"""The files of ``benchmarks/results``: what was measured, with what."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.environment import environment

SCHEMA = 1
Result = Mapping[str, Any]


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def put(path: Path, text: str) -> None:
    """A file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.tmp")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write(path: Path, kind: str, content: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> None:
    """One result file: schema, kind and environment (``about``, default this machine's), then ``content``, lists with a
    line per entry."""
    head = {"schema": SCHEMA, "kind": kind, "environment": environment() if about is None else about}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    for key, value in content.items():
        rows = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]" if isinstance(value, list) else json.dumps(value)
        lines.append(f"{json.dumps(key)}: {rows}")
    put(path, "{\n " + ",\n ".join(lines) + "\n}\n")


def read(path: Path, kind: str) -> Result:
    """A result file."""
    content: Result = json.loads(path.read_text(encoding="utf-8"))
    if content.get("schema") != SCHEMA or content.get("kind") != kind:
        raise ValueError(f"{path}: expected schema {SCHEMA} and kind {kind!r}; make it again")
    return content


MACHINE = ("cpu", "cores", "cpu_capability")
"""What the files of a folder have in common."""


def load(folder: Path) -> dict[str, Result]:
    """The result files of a folder by kind."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder of results; python benchmarks/run.py makes one")
    files = {path.stem: read(path, path.stem) for path in sorted(folder.glob("*.json"))}
    if not files:
        raise FileNotFoundError(f"{folder}: holds no result file; python benchmarks/run.py writes them")
    machines = {kind: tuple(content["environment"].get(key) for key in MACHINE) for kind, content in files.items()}
    if len(set(machines.values())) > 1:
        told = "; ".join(f"{kind}.json: {', '.join(map(str, about))}" for kind, about in machines.items())
        raise ValueError(f"{folder}: expected results of one machine with one set of instructions, got {told}")
    return files


SAME = ("gpu", "driver", "packages", "commit", "uncommitted_changes", "tiles")
"""What cases of one GPU's file have in common."""


class GpuResults:
    """The file of a GPU: what it had, if it is of the same make, and what this run adds."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.content: dict[str, list[dict[str, Any]]] = {"results": [], "saved": [], "ceilings": []}
        if not path.is_file():
            return
        old = json.loads(path.read_text(encoding="utf-8"))
        if about["uncommitted_changes"] or any(old["environment"].get(key) != about.get(key) for key in SAME):
            say(f"{path}: its cases are of another GPU, version, table of tiles or code, and are dropped")
            return
        self.content = {part: old.get(part, []) for part in self.content}

    def _find(self, part: str, **named: str) -> dict[str, Any] | None:
        return next((row for row in self.content[part] if all(row[key] == named[key] for key in named)), None)

    def has(self, part: str, **named: str) -> bool:
        return self._find(part, **named) is not None

    def has_contestant(self, size: str, dtype: str, mode: str, name: str) -> bool:
        """Whether it was measured, or why it could not be is known."""
        case = self._find("results", size=size, dtype=dtype, mode=mode)
        return case is not None and any(
            key.partition("/")[0] == name for part in ("contestants", "failed") for key in case[part]
        )

    def add(self, part: str, row: dict[str, Any]) -> None:
        self.content[part].append(row)
        self.write()

    def add_case(
        self, about: dict[str, Any], rows: dict[str, dict[str, Any]], failed: dict[str, str], name: str
    ) -> None:
        """The rows of one contestant, in place of those that were there."""
        case = self._find("results", **{key: about[key] for key in ("size", "dtype", "mode")})
        if case is None:
            case = {**about, "contestants": {}, "failed": {}}
            self.content["results"].append(case)
        for part in ("contestants", "failed"):
            case[part] = {key: row for key, row in case[part].items() if key.partition("/")[0] != name}
        case["contestants"] |= rows
        case["failed"] |= {key: why for key, why in failed.items() if key.partition("/")[0] == name}
        self.write()

    def write(self) -> None:
        write(self.path, "gpu", self.content, self.about)

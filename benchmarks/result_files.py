"""The files of ``benchmarks/results``: what was measured, with what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.environment import environment

SCHEMA = 1


def write(path: Path, kind: str, content: dict[str, Any], about: dict[str, Any] | None = None) -> None:
    """One file, whole or not at all: schema, kind and environment (``about``, default this machine's), then
    ``content``, lists with a line per entry."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"schema": SCHEMA, "kind": kind, "environment": environment() if about is None else about}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    for key, value in content.items():
        rows = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]" if isinstance(value, list) else json.dumps(value)
        lines.append(f"{json.dumps(key)}: {rows}")
    part = path.with_name(f".{path.name}.tmp")
    part.write_text("{\n " + ",\n ".join(lines) + "\n}\n", encoding="utf-8")
    part.replace(path)

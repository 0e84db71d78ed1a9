"""Runs the Python snippets of documents, those of one document one after the other in one namespace."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)
DOCUMENTS = [
    file.relative_to(ROOT).as_posix()
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if SNIPPET.search(file.read_text(encoding="utf-8"))
]


def run_document(name: str) -> tuple[dict[str, Any], list[str]]:
    """What the snippets of a document leave behind, and the lines that they print."""
    torch.manual_seed(0)
    scope: dict[str, Any] = {"__name__": "__snippets__"}
    with redirect_stdout(io.StringIO()) as out:
        for snippet in SNIPPET.findall((ROOT / name).read_text(encoding="utf-8")):
            exec(compile(snippet, name, "exec"), scope)
    return scope, out.getvalue().splitlines()

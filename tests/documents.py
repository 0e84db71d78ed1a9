"""Runs the Python snippets of documents, those of one document one after the other in one namespace."""

from __future__ import annotations

import io
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tests.peers import adatt, fuxictr, libmtl, mtreclib, torcheasyrec

ROOT = Path(__file__).parents[1]
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)
DOCUMENTS = [
    file.relative_to(ROOT).as_posix()
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if SNIPPET.search(file.read_text(encoding="utf-8"))
]
# Libraries that are no packages, as the documents import them.
STAND_INS = {
    "tzrec.modules.extraction_net": torcheasyrec,
    "tzrec.modules.mmoe": torcheasyrec,
    "tzrec.modules.personalized_net": torcheasyrec,
    "src.PLE": fuxictr,
    "src.MMoE": fuxictr,
    "models.ple": mtreclib,
    "models.mmoe": mtreclib,
    "mtl_lib": adatt,
    "LibMTL": libmtl,
}


def _modules() -> dict[str, ModuleType]:
    """``STAND_INS``, with the packages around them."""
    parents = {name.rsplit(".", up)[0] for name in STAND_INS for up in range(1, name.count(".") + 1)}
    return {**{name: ModuleType(name) for name in parents}, **STAND_INS}


def run_document(name: str) -> tuple[dict[str, Any], list[str]]:
    """What the snippets of a document leave behind, and the lines that they print."""
    torch.manual_seed(0)
    scope: dict[str, Any] = {"__name__": "__snippets__"}
    stand_ins = _modules()
    sys.modules.update(stand_ins)
    try:
        with redirect_stdout(io.StringIO()) as out:
            for snippet in SNIPPET.findall((ROOT / name).read_text(encoding="utf-8")):
                exec(compile(snippet, name, "exec"), scope)
    finally:  # these alone: what a snippet imports besides stays imported
        for module in stand_ins:
            del sys.modules[module]
    return scope, out.getvalue().splitlines()

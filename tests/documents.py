"""The Python snippets of the pages in docs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"


def run_snippets(page: str, *, at_least: int) -> dict[str, Any]:
    """Run the snippets of a page, at least so many, one after the other, and return what they define."""
    snippets = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(snippets) >= at_least
    scope: dict[str, Any] = {}
    for snippet in snippets:
        exec(snippet, scope)
    return scope

"""Markdown out of results: numbers, tables, and the blocks of pages that stand between two comments.

A page says ``<!-- benchmark:NAME -->``, then the block, then ``<!-- /benchmark:NAME -->``; a test renders it again.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from benchmarks.result_files import Result

MODE_NAMES = {"train": "forward + backward", "inference": "inference", "forward": "forward"}


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def mebibytes(size: float | None) -> str:
    """Of bytes; nothing of None."""
    return "" if size is None else number(size / 2**20)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """A table whose columns ``left`` are aligned to the left, all others to the right."""
    sides = ["---" if column in left else "---:" for column in range(len(heads))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, sides, *rows))


def software(about: Result) -> str:
    """Versions, commit and date of an environment."""
    versions = ", ".join(f"{name} {version}" for name, version in about["packages"].items() if name != "numpy")
    dirty = " with uncommitted changes" if about["uncommitted_changes"] else ""
    return f"Python {about['python']}, {versions}; commit {about['commit']}{dirty}, {about['date']}"


def _parts(text: str, name: str) -> tuple[str, str, str]:
    begin, end = f"<!-- benchmark:{name} -->", f"<!-- /benchmark:{name} -->"
    found = re.fullmatch(f"(.*{re.escape(begin)}\n)(.*?)({re.escape(end)}.*)", text, re.DOTALL)
    if found is None:
        raise ValueError(f"expected the lines {begin} and {end}, found none")
    return found[1], found[2], found[3]


def quoted(text: str, name: str) -> str:
    """What a page holds between the two comments of a name."""
    return _parts(text, name)[1]


def with_block(text: str, name: str, block: str) -> str:
    """The page with the block between the two comments of a name replaced."""
    before, _, after = _parts(text, name)
    return before + block + after

"""Every Python snippet of every document runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.documents import DOCUMENTS, run_document

SLOW = {"docs/serving.md"}  # compiles C++


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in DOCUMENTS]
)
def test_the_snippets_of_a_document_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_document(name)


def test_what_the_page_on_swapping_says_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope, lines = run_document("docs/accelerate.md")
    assert lines[0] == "replaced cgc_layers.0 (torch-rechub CGC)"
    assert lines[-1].startswith("experts[4].2: Softplus: cannot be packed; pack takes Linear, ")
    biases = [p for name, p in scope["model"].named_parameters() if name.endswith("bias")]
    assert {id(p) for p in biases} <= {id(p) for p in scope["no_decay"]}


def test_what_the_page_on_mixed_precision_says_is_printed() -> None:
    _, lines = run_document("docs/mixed_precision.md")
    assert lines == ["torch.bfloat16 torch.float32 torch.float32"]

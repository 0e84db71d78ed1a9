"""Every Python snippet of every document runs."""

from __future__ import annotations

import functools
import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.documents import DOCUMENTS, run_document
from tests.programs import torchrun

SLOW = {"docs/serving.md", "docs/serving_a_model.md"}  # compile C++
SCALE = "docs/training_at_scale.md"
ON_RANKS = {SCALE, "docs/torchrec.md"}  # run below, and by tests/test_torchrec.py


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in DOCUMENTS if name not in ON_RANKS],
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # docs/serving.md says that there may be some
def test_the_snippets_of_a_document_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_document(name)


def test_the_page_on_scale_runs_on_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler of machine code, which takes most of the time."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    try:
        run_document(SCALE)
        assert not dist.is_initialized()
    finally:
        gc.collect()  # as the page says
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.slow
def test_the_page_on_scale_runs_on_two_ranks(tmp_path: Path) -> None:
    code = f"import gc; from tests.documents import run_document; run_document({SCALE!r}); gc.collect()"
    done = torchrun(2, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_what_the_page_on_swapping_says_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope, lines = run_document("docs/accelerate.md")
    assert lines[0] == "replaced cgc_layers.0 (torch-rechub CGC)"
    assert lines[-1].startswith("experts[4].2: Softplus: cannot be packed; pack takes Linear, ")
    biases = [p for name, p in scope["model"].named_parameters() if name.endswith("bias")]
    assert {id(p) for p in biases} <= {id(p) for p in scope["no_decay"]}


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name.startswith("docs/migration/")])
def test_two_models_of_a_page_share_no_tensor(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise what a page loads into the one is written into the other."""
    monkeypatch.chdir(tmp_path)
    scope, _ = run_document(name)
    tensors = [
        {tensor.untyped_storage().data_ptr() for tensor in (*scope[model].parameters(), *scope[model].buffers())}
        for model in ("model", "serving")
    ]
    assert all(tensors)
    assert not set.intersection(*tensors)


def test_what_the_page_on_mixed_precision_says_is_printed() -> None:
    _, lines = run_document("docs/mixed_precision.md")
    assert lines == ["torch.bfloat16 torch.float32 torch.float32"]

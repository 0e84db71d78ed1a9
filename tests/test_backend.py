"""Choice of the backend: process, thread, call, environment."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from ple_fast import PLE, backend, last_backend, set_backend, use_backend
from tests.programs import IMPORT_PATH


@pytest.fixture(autouse=True)
def _process_default() -> Iterator[None]:
    yield
    set_backend("auto")


def _choice() -> backend.Choice:
    PLE(3, 2, expert_units=(4,))(torch.randn(2, 3))
    choice = last_backend()
    assert choice is not None
    return choice


def test_a_cpu_tensor_runs_in_pytorch_and_the_reason_is_told() -> None:
    assert _choice() == ("torch", "cpu tensors")
    set_backend("torch")
    assert _choice() == ("torch", "asked for")


def test_a_block_wins_over_the_process_and_ends() -> None:
    with use_backend("torch"):
        with use_backend("auto"):
            assert _choice().reason == "cpu tensors"
        assert _choice().reason == "asked for"
    assert _choice().reason == "cpu tensors"
    with pytest.raises(KeyError), use_backend("torch"):
        raise KeyError
    assert _choice().reason == "cpu tensors", "an error ends the block too"


def test_a_call_wins_over_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"):
        assert backend.resolve(torch.device("cpu"), "torch").name == "torch"
        with pytest.raises(RuntimeError, match="triton"):
            backend.resolve(torch.device("cpu"))
    with pytest.raises(ValueError, match="backend: expected one of auto"):
        backend.resolve(torch.device("cpu"), "cuda")


def test_a_block_is_of_one_thread() -> None:
    seen: list[str] = []
    with use_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(_choice().reason))
        thread.start()
        thread.join()
    assert seen == ["cpu tensors"]


@pytest.mark.parametrize(("value", "printed"), [("torch", "torch"), ("cuda", "PLE_FAST_BACKEND")])
def test_the_environment_sets_the_first_choice(value: str, printed: str) -> None:
    code = "import ple_fast.backend as b; print(b._process)"
    environment = {"PLE_FAST_BACKEND": value, "PATH": "", "PYTHONPATH": IMPORT_PATH}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert printed in done.stdout + done.stderr
    assert (done.returncode == 0) == (value == "torch")

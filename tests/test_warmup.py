"""``warm_up``: what is compiled ahead, and that nothing of the user's changes. Kernels run under the interpreter."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from ple_fast import CGC, PLE, MLMMoE, accelerate, use_backend, warm_up
from ple_fast.losses import TaskLoss
from ple_fast.model import MultiTaskModel, Numeric
from tests import stub_driver
from tests.programs import IMPORT_PATH

pytest.importorskip("triton")

from triton.runtime.interpreter import GridExecutor

import ple_fast_kernels

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def where(device: torch.device) -> Iterator[torch.device]:
    """The device under test, with kernels in use there."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off: --device cuda")
    with use_backend("triton"):
        yield device


def tiny(device: torch.device, **options: Any) -> PLE:
    """One level of one-layer experts."""
    return PLE(6, 2, num_levels=1, task_experts=1, shared_experts=1, device=device, **{"expert_units": (4,), **options})


def launched(call: Callable[[], object]) -> set[Any]:
    """What tells the kernels of a call apart: which, and the dtypes and constants of their arguments, not numbers."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("looks at what Triton's interpreter runs")
    found: set[Any] = set()
    before = GridExecutor.__call__

    def noting(self: Any, *arguments: Any, **options: Any) -> Any:
        found.add((self.fn.__name__, *described(arguments), *described(options.values())))
        return before(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", noting)
        call()
    return found


def described(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value.dtype
        elif not isinstance(value, int):
            yield str(value)


def step_on(level: nn.Module, x: torch.Tensor) -> None:
    level(x).sum().backward()


def step(trunk: nn.Module, batch: int, device: torch.device) -> None:
    x = torch.randn(batch, 6, device=device, requires_grad=True)
    y = trunk(x)
    y.backward(torch.randn_like(y))


def serve(trunk: nn.Module, batch: int, device: torch.device) -> None:
    with torch.inference_mode():
        trunk.eval()(torch.randn(batch, 6, device=device))
    trunk.train()


@pytest.mark.parametrize("options", [{}, {"norm": "batch", "dropout": 0.2}, {"recompute": True}], ids=str)
def test_a_step_and_a_call_launch_only_what_was_warm(options: dict[str, Any], where: torch.device) -> None:
    trunk = tiny(where, expert_units=(5, 4), **options)
    warm = launched(lambda: warm_up(trunk, [7, 9]))
    used = launched(lambda: step(trunk, 7, where)) | launched(lambda: serve(trunk, 9, where))
    assert used
    assert used <= warm


def test_training_or_inference_alone(where: torch.device) -> None:
    trunk = tiny(where)
    trained, served = launched(lambda: step(trunk, 7, where)), launched(lambda: serve(trunk, 7, where))
    assert launched(lambda: warm_up(trunk, 7, inference=False)) == trained
    assert launched(lambda: warm_up(trunk, 7, training=False)) == served
    assert trained != served
    assert launched(lambda: warm_up(trunk, 7, training=False, inference=False)) == set()


def test_autocast_is_that_of_the_argument_or_of_the_call(where: torch.device) -> None:
    trunk = tiny(where)
    with torch.autocast(where.type, dtype=torch.bfloat16):
        used = launched(lambda: step(trunk, 7, where))
        assert used <= launched(lambda: warm_up(trunk, 7))
    assert used <= launched(lambda: warm_up(trunk, 7, autocast=torch.bfloat16))
    assert not used & launched(lambda: warm_up(trunk, 7))


def snapshot(module: nn.Module, device: torch.device) -> list[Any]:
    """All that a warm-up must leave alone."""
    tensors = [t.detach().clone() for t in (*module.parameters(), *module.buffers())]
    gradients = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
    versions = [t._version for t in (*module.parameters(), *module.buffers())]
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    flags = [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in module.modules()]
    return [tensors, gradients, versions, states, flags, random.getstate(), str(np.random.get_state())]  # noqa: NPY002


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_nothing_of_the_user_changes(mode: str, where: torch.device) -> None:
    trunk = tiny(where, norm="batch", dropout=0.3)
    step(trunk, 5, where)
    next(trunk.parameters()).requires_grad_(False)
    trunk.train(mode == "train")
    if mode == "mixed":
        next(iter(trunk.levels[0].children())).train()
    before = snapshot(trunk, where)
    calls: list[str] = []
    trunk.register_forward_hook(lambda *_: calls.append("forward"))
    trunk.levels[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    for parameter in trunk.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _: calls.append("gradient"))
    with torch.inference_mode():
        warm_up(trunk, (3, 4))
    with torch.no_grad():
        warm_up(trunk, 3, autocast=torch.bfloat16)
        assert not torch.is_grad_enabled()
    assert same(before, snapshot(trunk, where))
    assert calls == []


def test_what_is_frozen_is_frozen_in_the_warm_up(where: torch.device) -> None:
    trunk = tiny(where)
    for name, parameter in trunk.named_parameters():
        parameter.requires_grad_("gate" in name)
    assert launched(lambda: warm_up(trunk, 7, inference=False)) == launched(lambda: step(trunk, 7, where))
    trunk.requires_grad_(False)
    assert launched(lambda: warm_up(trunk, 7, inference=False)) == launched(lambda: step(trunk, 7, where))
    assert launched(lambda: warm_up(trunk.for_inference(), 7, inference=False)) == set(), "there is nothing to train"


def test_a_trunk_in_eval_mode_is_warmed_for_training_too(where: torch.device) -> None:
    trunk = tiny(where, norm="batch")
    used = launched(lambda: step(trunk, 7, where))
    assert used <= launched(lambda: warm_up(trunk.eval(), 7, inference=False))
    assert not trunk.training
    with pytest.raises(ValueError, match="batch norm"):
        warm_up(trunk, 1)
    warm_up(trunk, 1, training=False)


def test_a_level_is_warm_for_one_input_and_for_one_of_each_slot(where: torch.device) -> None:
    level = CGC(6, 2, task_experts=1, shared_experts=1, expert_units=4, device=where).levels[0]
    warm = launched(lambda: warm_up(level, 5))
    for shape in ((5, 6), (5, 3, 6)):
        x = torch.randn(*shape, device=where, requires_grad=True)
        assert launched(partial(step_on, level, x)) <= warm
    rows = [torch.randn(5, 6, device=where) for _ in range(3)]
    with torch.no_grad():
        assert launched(lambda: level.eval()(rows)) <= warm


def test_a_level_with_gates_on_another_input(where: torch.device) -> None:
    trunk = MLMMoE(6, 2, experts=2, expert_units=(3,), num_levels=2, device=where)
    used = launched(lambda: step(trunk, 5, where))
    assert used <= launched(lambda: warm_up(trunk, 5))
    assert used <= set().union(*(launched(partial(warm_up, level, 5)) for level in trunk.levels))


class Rechub(nn.Module):
    """A model around a trunk."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6)
        self.trunk = trunk


@pytest.mark.parametrize(
    "wrap",
    [lambda m: m, Rechub, lambda m: torch.compile(m, backend="eager")],
    ids=["trunk", "model", "compiled"],
)
def test_trunks_are_found_in_models(wrap: Callable[[nn.Module], nn.Module], where: torch.device) -> None:
    trunk = tiny(where)
    assert launched(lambda: warm_up(wrap(trunk), 5)) == launched(lambda: warm_up(trunk, 5))


def test_the_model_of_this_library(where: torch.device) -> None:
    columns = [Numeric(f"x{i}") for i in range(6)]
    model = MultiTaskModel(
        columns, [TaskLoss("a"), TaskLoss("b")], trunk_options={"expert_units": (4,), "num_levels": 1}
    ).to(where)
    before = snapshot(model, where)
    assert launched(lambda: warm_up(model, 5))
    assert same(before, snapshot(model, where))


def test_a_model_under_ddp(where: torch.device, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        trunk = tiny(where)
        model = nn.parallel.DistributedDataParallel(trunk)
        assert launched(lambda: warm_up(model, 5)) == launched(lambda: warm_up(trunk, 5))
        assert all(parameter.grad is None for parameter in model.parameters())
        step(model, 5, where)
    finally:
        dist.destroy_process_group()


def test_an_accelerated_model(where: torch.device) -> None:
    ple = pytest.importorskip("torch_rechub.models.multi_task.ple")
    site = ple.CGC(1, 1, 2, 1, 1, 6, {"dims": [4], "activation": "relu", "dropout": 0.0}).to(where)
    accelerate(site)
    warm = launched(lambda: warm_up(site, 5))
    x = torch.randn(5, 6, device=where, requires_grad=True)
    assert launched(lambda: torch.stack(site([x] * 3)).sum().backward()) <= warm


def test_another_thread_draws_meanwhile_what_it_would_have_drawn(where: torch.device) -> None:
    trunk = tiny(where, dropout=0.2)
    torch.manual_seed(3)
    expected = [torch.rand(2) for _ in range(100)]
    torch.manual_seed(3)
    found: list[torch.Tensor] = []
    is_over = threading.Event()

    def draw() -> None:
        while not is_over.is_set() and len(found) < 100:
            found.append(torch.rand(2))

    draws = threading.Thread(target=draw)
    draws.start()
    warm_up(trunk, 5)
    is_over.set()
    draws.join()
    found.extend(torch.rand(2) for _ in range(100 - len(found)))
    assert all(map(torch.equal, found, expected))


def test_where_no_kernel_runs_nothing_is_run(device: torch.device) -> None:
    trunk = tiny(device)
    before = ple_fast_kernels.launches()
    with use_backend("torch"):
        warm_up(trunk, 1_000_000_000)
    if device.type == "cpu":
        warm_up(trunk, 1_000_000_000)
    with use_backend("triton"):
        warm_up(trunk.for_inference(plain=True), 1_000_000_000)
    assert ple_fast_kernels.launches() == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.Linear(2, 2), 4), ValueError, "expected a trunk of ple_fast, or a model with one, got Linear"),
        (("trunk", 4), TypeError, "module: expected a trunk"),
        ((None, 0), ValueError, "batches: expected 1 or more, got 0"),
        ((None, [4, 2.5]), TypeError, r"batches\[1\]: expected an int, got 2.5"),
        ((None, []), ValueError, "batches: expected one number of rows or more"),
        ((None, True), TypeError, "batches: expected an int"),
    ],
)
def test_what_is_no_trunk_and_no_batch_is_refused(
    arguments: tuple[Any, Any], error: type[Exception], message: str
) -> None:
    module, batches = arguments
    with pytest.raises(error, match=message):
        warm_up(tiny(torch.device("cpu")) if module is None else module, batches)


def test_options_of_another_type_are_refused() -> None:
    trunk: Any = tiny(torch.device("cpu"))
    for options in ({"training": 1}, {"inference": None}):
        with pytest.raises(TypeError, match="expected a bool"):
            warm_up(trunk, 4, **options)
    for autocast in (True, torch.int8, "bfloat16"):
        with pytest.raises(TypeError, match="autocast: expected a dtype such as"):
            warm_up(trunk, 4, autocast=autocast)  # type: ignore[arg-type]  # that is the test


def test_a_trunk_that_cannot_be_copied_is_an_error_that_names_it(where: torch.device) -> None:
    model = Rechub(tiny(where))
    model.trunk.lock = threading.Lock()  # type: ignore[assignment]  # an attribute of the user's
    with pytest.raises(RuntimeError, match=r"'trunk' \(PLE\) cannot be copied .*before the module is wrapped"):
        warm_up(model, 4)


def test_it_is_refused_within_the_capture_of_a_graph(monkeypatch: pytest.MonkeyPatch, where: torch.device) -> None:
    if where.type != "cuda":
        pytest.skip("--device cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before a CUDA graph is captured"):
        warm_up(tiny(where), 4)


PROGRAM = """
import json
from unittest import mock

import torch
import triton

from tests import stub_driver

stub_driver.activate()

import ple_fast.backend
from ple_fast import MMoE, use_backend, warm_up
from ple_fast_kernels import _tiles

mock.patch.object(_tiles, "architecture", return_value=("sm_90", 132)).start()
mock.patch.object(ple_fast.backend, "_why_no_triton", return_value=None).start()
compiled = []
triton.knobs.runtime.jit_post_compile_hook = lambda **about: compiled.append(about["repr"])
trunk = MMoE(16, 2, experts=2, expert_units=(16,), dtype=torch.bfloat16)


def count(call):
    before = len(compiled)
    with use_backend("triton"):
        call()
    return len(compiled) - before


def step():
    trunk(torch.zeros(96, 16, dtype=torch.bfloat16, requires_grad=True)).sum().backward()


def serve():
    with torch.inference_mode():
        trunk.eval()(torch.zeros(96, 16, dtype=torch.bfloat16))


print(json.dumps([count(lambda: warm_up(trunk, 96)), count(step), count(serve)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None or sys.platform != "linux", reason="builds a library with gcc")
def test_after_it_nothing_is_compiled(tmp_path: Path) -> None:
    folder = tmp_path / "driver"
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= stub_driver.build(folder) | {"PYTHONPATH": IMPORT_PATH}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], env=environment, capture_output=True, text=True, cwd=ROOT,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    warm, stepped, served = json.loads(run.stdout.splitlines()[-1])
    assert warm > 0
    assert (stepped, served) == (0, 0)

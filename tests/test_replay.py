"""Calls that are repeated without deciding anew what to launch: which can be, and what a repeated one does."""

from __future__ import annotations

import gc
import importlib
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.replay_helpers import kind, launching, repeats, replay

pytest.importorskip("triton")
__all__ = ["kind", "repeats"]  # fixtures
batch_norm = importlib.import_module("ple_fast_kernels.batch_norm")


def kernel(parts: Tensor, means: Tensor) -> None:
    """Means over parts ``(n, 2, 4)``, by a kernel."""
    constants = {"WIDTH": 4, "PRODUCTS": True, "SAVE_GRADS": False, "SAVE_MEANS": True, "BLOCK_T": 64, "BLOCK_C": 32}
    run = launching.prepare(batch_norm._norm_sums_merge_kernel, batch_norm.MERGE_TILE, **constants)
    run((1,), parts.device, Parts=parts, DWeight=None, DBias=None, Means=means, B=1, parts=parts.shape[0])


given, outside = torch.ones(3, 2, 4), torch.ones(2, 4)
REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "gives another result each time": lambda x: x * float(x.sum()),
    "gives another result": lambda x: x + torch.rand(3, 2, 4),
    "neither given nor made": lambda x: x + outside,
    "a constant leaves": lambda x: torch.tensor([1.0, 2.0]),
    "may change": lambda x: x.mean() + torch.tensor([1.0, 2.0]).add_(1.0),
    "another dtype": lambda x: x.clone().view(torch.int32),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_repeated_stays_as_it_is(why: str, repeats: list[int]) -> None:
    for _ in range(4):
        x = torch.randn(3, 2, 4)
        torch.manual_seed(0)
        (found,) = replay.replayed("call", (x,), lambda x=x: (REFUSED[why](x),))
        torch.manual_seed(0)
        torch.testing.assert_close(found, REFUSED[why](x), rtol=0, atol=0)
    assert not repeats
    assert [why in str(known) for known in replay._programs.values()] == [True], replay._programs


def test_views_operators_and_constants_are_repeated(kind: str, repeats: list[int]) -> None:
    def call(x: Tensor) -> tuple[Tensor | None, ...]:
        both = torch.empty(2, 2, 4)
        first, second = both.unbind(0)
        kernel(x.transpose(0, 1).contiguous().transpose(0, 1).contiguous(), first)
        kernel(x[1:].mul_(2.0), second)  # its input changes
        index = torch.tensor([1, 0])
        return first, second.index_select(0, index), None, x[0], both.sum(0).view(-1)[2:]

    for _ in range(4):
        ours, theirs = torch.randn(3, 2, 4).repeat(2, 1, 1, 1).unbind(0)
        found, wanted = replay.replayed("call", (ours,), lambda x=ours: call(x)), call(theirs)
        torch.testing.assert_close((*found[:2], *found[3:]), (*wanted[:2], *wanted[3:]), rtol=0, atol=0)
        assert found[2] is None and torch.equal(ours, theirs)
    assert len(repeats) == 3


def test_a_tensor_that_was_two_things_at_once_is_two_tensors_later(repeats: list[int]) -> None:
    for b in (given, torch.zeros(3, 2, 4), given):
        (found,) = replay.replayed("call", (given, b), lambda b=b: (given + 2.0 * b,))
        torch.testing.assert_close(found, given + 2.0 * b)
    assert len(repeats) == 1


def test_a_view_of_memory_that_several_tensors_have_is_of_none_of_them(repeats: list[int]) -> None:
    for apart in (False, True, False):
        memory = torch.randn(4, 4)
        a, b = memory[:3], (torch.randn(4, 4) if apart else memory)[1:]
        (found,) = replay.replayed("call", (a, b), lambda a=a: (a[1:].clone(),))
        torch.testing.assert_close(found, a[1:])
    assert not repeats


def test_memory_that_nobody_reads_any_more_is_free_before_the_next_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    allocate = torch.empty_strided

    def counted(*given: Any, **how: Any) -> Tensor:
        gc.collect()
        alive.append(sum(one() is not None for one in made))
        made.append(weakref.ref(tensor := allocate(*given, **how)))
        return tensor

    def call(x: Tensor) -> tuple[Tensor]:
        for _ in range(4):
            y = torch.empty(2, 4)
            kernel(x, y)
            x = y.view(1, 2, 4)
        return (y,)

    for _ in range(2):
        replay.replayed("call", (given,), lambda: call(given))
    monkeypatch.setattr(torch, "empty_strided", counted)
    replay.replayed("call", (given,), lambda: call(given))
    assert alive == [0, 1, 1, 1]


def test_no_more_forms_are_remembered_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_PROGRAMS", 3)
    for i in (0, 1, 2, 0, 3, 4):
        replay.replayed(i, (given,), lambda: (given,))
    assert [form[0] for form in replay._programs] == [2, 3, 4]


def test_threads_share_what_is_recorded(repeats: list[int]) -> None:
    wrong: list[Tensor] = []

    def serve(i: int) -> None:
        for j in range(50):
            x = torch.full((4,), 10.0 * i + j)
            (y,) = replay.replayed(j % 5, (x,), lambda x=x: (x.clone().mul_(2.0),))
            wrong.extend(y for _ in range(1) if not torch.equal(y, 2.0 * x))

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(repeats) >= 150


def test_a_mode_of_pytorch_sees_every_operator(repeats: list[int]) -> None:
    """A counter of operators, say: under one a call runs as it would without repeating."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    for _ in range(4):
        names: list[str] = []
        with Seen():  # type: ignore[no-untyped-call]  # untyped in torch
            replay.replayed("call", (given,), lambda: (given.clone().view(-1),))
        assert names == ["aten.clone.default", "aten.view.default"]
    assert not repeats


def test_a_descriptor_is_made_anew_of_the_memory_of_each_call(repeats: list[int]) -> None:
    descriptor = importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor
    seen = []

    class Kernel:
        kernel = fn = pre_run_hooks = None
        constants = ()

        def launch(self, grid: Any, device: Any, arguments: tuple[Any, ...]) -> None:
            (one,) = arguments
            seen.append(one)
            if (told := launching._thread.recorder) is not None:
                told(self, grid, device, arguments, None)

    run = Kernel()

    def call(x: Tensor) -> tuple[Tensor]:
        y = torch.empty(8, 16)
        run.launch((1,), y.device, (descriptor.from_tensor(x[4:], [4, 16]),))
        run.launch((1,), y.device, (descriptor.from_tensor(y, [8, 16]),))
        return (y,)

    for _ in range(3):
        x = torch.randn(8, 16)
        (y,) = replay.replayed("call", (x,), partial(call, x))
        assert [one.base.data_ptr() for one in seen[-2:]] == [x[4:].data_ptr(), y.data_ptr()]
    assert len(repeats) == 2
    first, last = seen[0].__dict__, seen[-2].__dict__
    assert {**first, "base": None} == {**last, "base": None}

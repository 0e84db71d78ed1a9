"""What tests of tensors of more than 2**31 elements share: memory that is not touched, and the last programs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ple_fast_kernels import Tile
from tests.helpers import TOPOLOGIES, assert_close
from tests.kernel_helpers import values

HALF = torch.float16
LEVEL = TOPOLOGIES["one-task"]
"""Three experts; two mixtures of all of them."""
SMALL = Tile(32, 32, 32, 4, 2)
ROWS = 2**20 + 5
"""Of the last tile five."""
WIDE = 2064
"""Columns: ROWS of them are more than 2**31."""
SPARSE = 2**26
"""Bytes from which memory on a CPU is taken but not touched."""


def available(device: torch.device) -> int:
    """Bytes that a tensor may take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    overcommit = Path("/proc/sys/vm/overcommit_memory")
    if not overcommit.is_file() or overcommit.read_text(encoding="utf-8").strip() == "2":
        return 0
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))


def needs(device: torch.device, *elements: int, each: int = 2) -> None:
    """Skip where so many elements have no room: on a GPU all together, of memory that nobody touches the largest."""
    torch.cuda.empty_cache()
    sizes = [n * each for n in elements]
    wanted = sum(sizes) + 2**30 if device.type == "cuda" else max(sizes)
    has = available(device)
    if has < wanted:
        pytest.skip(f"needs {wanted / 2**30:.1f} GiB of memory, there are {has / 2**30:.1f} GiB")


def vast(*shape: int, device: torch.device, dtype: torch.dtype = HALF) -> Tensor:
    """Zeros; on a CPU memory that is fresh and untouched, which reads as zeros."""
    return torch.zeros(shape, dtype=dtype, device=device) if device.type == "cuda" else torch.empty(shape, dtype=dtype)


def run_last_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter a launch runs its last program alone, the one with the largest offsets; every address is held
    to the launch's tensors before it is used, and results are zeros where that program writes nothing."""
    import triton.runtime.interpreter as interpreter

    builder: Any = interpreter.InterpreterBuilder
    allocate, call = torch.empty.__wrapped__, interpreter.GridExecutor.__call__  # type: ignore[attr-defined]  # poison
    load, store = builder.create_masked_load, builder.create_masked_store
    grid: list[int] = []
    spans: list[tuple[int, int]] = []

    def empty(*shape: Any, **options: Any) -> Tensor:
        tensor: Tensor = allocate(*shape, **options)
        return tensor if tensor.numel() * tensor.element_size() >= SPARSE else tensor.zero_()

    def call_last(self: Any, *arguments: Any, **named: Any) -> None:
        given = (*arguments, *named.values())
        tensors = [t for t in (getattr(one, "base", one) for one in given) if isinstance(t, Tensor)]  # of descriptors
        grid[:] = (*self.grid, 1, 1)[:3]
        spans[:] = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in (t.untyped_storage() for t in tensors)]
        self.grid = (1,)
        call(self, *arguments, **named)

    def check(pointers: Any, mask: Any) -> None:
        at = pointers.data[mask.data]
        within = np.zeros(at.shape, dtype=bool)
        for first, last in spans:
            within |= (at >= first) & (at < last)
        assert bool(within.all()), "an address outside of the launch's tensors"

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call_last)
    monkeypatch.setattr(builder, "set_grid_dim", lambda self, *whole: setattr(self, "grid_dim", tuple(grid)))
    monkeypatch.setattr(
        builder, "set_grid_idx", lambda self, *index: setattr(self, "grid_idx", tuple(n - 1 for n in grid))
    )
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)


def rows_of(width: int, device: torch.device, rows: int = ROWS, seed: int = 0) -> Tensor:
    """``(rows, width)`` in rows of WIDE elements, the last 64 of them with numbers."""
    whole = vast(rows, WIDE, device=device)
    whole[-64:, :width] = values(64, width, dtype=HALF, device=device, seed=seed)
    return whole[:, :width]


def same(name: str, found: Tensor | None, expected: Tensor) -> None:
    """In half precision."""
    assert found is not None and found.dtype == HALF
    assert_close(name, found.double(), expected, 3e-3)

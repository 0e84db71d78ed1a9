"""How kernels are launched: arguments by name, on the device of the tensors, counted, and with little host time.

``prepare`` binds a kernel to its tile and constants once; what it returns takes the run-time arguments by name.
Triton's own launch looks at every argument and constant again, which takes several times longer than the launch
itself. What it compiles for varies, once the constants are bound, with devices, dtypes and alignment alone: they are
the key of a dictionary of compiled kernels that every ``Prepared`` has.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from ._tiles import Tile

CACHED_VERSIONS = ("3.6", "3.7", "3.8", "3.9")
"""Triton releases whose compiled kernels are known to take their arguments as ``Compiled`` passes them."""
ALIGNMENT = 16
MAX_INT = 2**31 - 1
CACHED = 4096
"""Sets of constants that a launcher remembers."""

_launched = 0
_interprets = os.environ.get("TRITON_INTERPRET") == "1"
_is_known = triton.__version__.rpartition(".")[0] in CACHED_VERSIONS
_is_hip = torch.version.hip is not None


class _Thread(threading.local):
    recorder: Callable[..., None] | None = None


_thread = _Thread()


@contextmanager
def recording(recorder: Callable[..., None]) -> Iterator[None]:
    """Tell ``recorder`` of every launch of this thread: the kernel, grid, device, arguments, and what ran, or None."""
    before, _thread.recorder = _thread.recorder, recorder
    try:
        yield
    finally:
        _thread.recorder = before


class Compiled(NamedTuple):
    """A compiled kernel and what its launch needs."""

    kernel: Any
    run: Any
    function: Any
    metadata: Any


class _Names(NamedTuple):
    """Of a kernel's arguments, in its order."""

    arguments: tuple[str, ...]
    constants: tuple[str, ...]


def launches() -> int:
    """Kernels launched so far by this process, products of the library among them."""
    return _launched


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """Dtype of accumulators, logits and weights of mixtures: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def next_power(n: int) -> int:
    """The smallest power of two from ``n`` on."""
    return 1 << max(0, n - 1).bit_length()


def prefixed(prefix: str, constants: NamedTuple) -> dict[str, Any]:
    """Constants by the names of their fields, with ``prefix`` before each."""
    return {prefix + name: value for name, value in constants._asdict().items()}


def suffixed(constants: NamedTuple, suffix: str) -> dict[str, Any]:
    """Constants by the names of their fields, with ``suffix`` behind each."""
    return {name + suffix: value for name, value in constants._asdict().items()}


@lru_cache(maxsize=256)
def _names_of(function: Callable[..., Any]) -> _Names:
    parameters = inspect.signature(function).parameters
    is_constant = ["constexpr" in str(p.annotation) for p in parameters.values()]
    count = is_constant.index(True) if True in is_constant else len(is_constant)
    assert all(is_constant[count:]), f"{function.__name__}: its constants must stand last"
    names = tuple(parameters)
    return _Names(names[:count], names[count:])


def _check_names(kernel: Any, what: str, wanted: tuple[str, ...], given: dict[str, Any]) -> None:
    missing = [name for name in wanted if name not in given]
    unknown = [name for name in given if name not in wanted]
    if missing or unknown:
        raise TypeError(
            f"{kernel.fn.__name__}: expected the {what} {', '.join(wanted)}; "
            f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
        )


def prepare(kernel: Any, tile: Tile, **constants: Any) -> Prepared:
    """A kernel with its tile's warps and stages and its constants, by name; calling it launches. Made once and kept.

    Raises:
        TypeError: a constant is missing, or the kernel has none of that name.
    """
    names = _names_of(kernel.fn)
    _check_names(kernel, "constants", names.constants, constants)
    return Prepared(kernel, tile, names.arguments, tuple(constants[name] for name in names.constants))


class Prepared:
    """A kernel that lacks nothing but its run-time arguments."""

    __slots__ = ("_compiled", "constants", "kernel", "names", "tile")

    def __init__(self, kernel: Any, tile: Tile, names: tuple[str, ...], constants: tuple[Any, ...]) -> None:
        self.kernel, self.tile, self.names, self.constants = kernel, tile, names, constants
        self._compiled: dict[tuple[Any, ...], Compiled] = {}

    def __call__(self, grid: tuple[int, ...], device: torch.device, /, **arguments: Any) -> None:
        """Launch on ``device``, that of the tensors.

        ``arguments``: tensors, ``TensorDescriptor``, numbers, None; quickest in the order of the kernel's parameters.

        Raises:
            TypeError: an argument is missing, or the kernel has none of that name.
        """
        given = tuple(arguments.values())
        if tuple(arguments) != self.names:
            _check_names(self.kernel, "arguments", self.names, arguments)
            given = tuple(arguments[name] for name in self.names)
        self.launch(grid, device, given)

    def launch(self, grid: tuple[int, ...], device: torch.device, given: tuple[Any, ...]) -> None:
        """The same with the arguments in the order of the kernel."""
        count(1)
        recorder = _thread.recorder
        if recorder is None:
            self._launch_on(device, grid, given)
            return
        with _disable_current_modes():  # operators of the launch itself, an interpreter's say, are no steps
            ran = self._launch_on(device, grid, given)
        recorder(self, grid, device, given, ran)

    def _launch_on(self, device: torch.device, grid: tuple[int, ...], given: tuple[Any, ...]) -> Compiled | None:
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._launch(grid, given)
        return self._launch(grid, given)

    def _launch(self, grid: tuple[int, ...], given: tuple[Any, ...]) -> Compiled | None:
        """Launch on the current device. Returns what may run again for the like of ``given``; None: ask Triton."""
        if _interprets or not _is_known or self.kernel.pre_run_hooks or _compiles_otherwise():
            self._by_triton(grid, given)
            return None
        index, stream = current()
        key = _key(index, given)
        found = None if key is None else self._compiled.get(key)
        if found is None:
            compiled = self._by_triton(grid, given)
            # A hook of Triton's, ``jit_cache_hook``, may forbid to compile: then there is nothing, and nothing ran.
            if key is None or compiled is None:
                return None
            self._check_numbers(given)
            found = Compiled(compiled, compiled.run, compiled.function, compiled.packed_metadata)
            self._compiled[key] = found
            return found
        arguments = (*given, *self.constants)
        runtime = knobs.runtime
        enter, leave, metadata = runtime.launch_enter_hook, runtime.launch_exit_hook, None
        if _is_empty(enter) and _is_empty(leave):
            enter = leave = None
        else:  # a profiler's
            metadata = found.kernel.launch_metadata(grid, stream, *arguments)
        found.run(
            grid[0], grid[1] if len(grid) > 1 else 1, 1, stream, found.function, found.metadata, metadata,
            enter, leave, *arguments,
        )  # fmt: skip
        return found

    def _check_numbers(self, given: tuple[Any, ...]) -> None:
        """Triton compiles anew for a whole number that is 1 or divisible by 16, unless the kernel says otherwise."""
        for value, parameter in zip(given, self.kernel.params, strict=False):
            assert not isinstance(value, int) or parameter.do_not_specialize, (self.kernel, parameter.name)

    def _by_triton(self, grid: tuple[int, ...], given: tuple[Any, ...]) -> Any:
        tile = self.tile
        return self.kernel[grid](*given, *self.constants, num_warps=tile.warps, num_stages=tile.stages)


TAKES_ADDRESSES = not _interprets and _is_known and not _is_hip
"""Whether a launch may be given addresses in the place of tensors: on ROCm Triton also looks at storages."""


def is_watched() -> bool:
    """Whether a tool watches launches, or changes what is compiled."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        return True
    return _compiles_otherwise()


def current() -> tuple[int, int]:
    """Number of the current device, and its current stream."""
    active = driver.active
    index = active.get_current_device()
    return index, active.get_current_stream(index)


def count(launches: int) -> None:
    """Launches made elsewhere: products of the library, repeated ones."""
    global _launched
    _launched += launches


def _is_empty(hook: Any) -> bool:
    """Whether a launch hook does nothing: None, or a chain without calls, which is what Triton sets."""
    return not getattr(hook, "calls", hook)


def _compiles_otherwise() -> bool:
    """Whether a tool has changed what Triton compiles: it must be asked at each launch."""
    runtime = knobs.runtime
    return bool(
        runtime.debug or knobs.compilation.instrumentation_mode or runtime.add_stages_inspection_hook is not None
    )


def _key(device: int, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """All that Triton compiles for besides constants; None where it must look itself: unaligned tensors, large
    numbers."""
    kinds: list[Any] = [device]
    for value in given:
        if value is None:
            kinds.append(None)
        elif isinstance(value, Tensor):
            if value.data_ptr() % ALIGNMENT:
                return None
            kinds.append(value.dtype)
            if _is_hip:  # there Triton takes 32-bit offsets within storages up to 2 GiB
                kinds.append(value.untyped_storage().size() <= MAX_INT)
        elif isinstance(value, TensorDescriptor):
            kinds += (value.base.dtype, tuple(value.block_shape))
        elif isinstance(value, int) and not -MAX_INT <= value <= MAX_INT:
            return None
        else:
            kinds.append(type(value))
    if _is_hip:
        kinds.append(knobs.amd.use_buffer_ops)
    return tuple(kinds)

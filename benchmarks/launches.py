"""What a trunk launches on a GPU that need not be here: launches are recorded, not run.

Needs triton; not under ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
TABLE_OF = {"gfx942": "amd"}
PERSISTENT = "_persistent"
"""How the name of a kernel ends whose programs stay."""
POINTER = {
    torch.int64: "*i64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


@dataclass(frozen=True)
class Request:
    """One compilation: ``signature`` has a type per argument, ``constants`` the values of those that are constant."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int

    def described(self) -> dict[str, Any]:
        """Kernel, widths, tile, warps and stages, for people."""
        c = dict(self.constants)
        return {
            "kernel": self.kernel.strip("_").removesuffix("_kernel"),
            "widths": [c[n] for n in ("DEPTH", "HIDDEN", "UNITS") if n in c],
            "tile": [c[n] for n in c if n.startswith("BLOCK")],
            "warps": self.warps,
            "stages": self.stages,
        }


def request_of(prepared: Any, arguments: Sequence[Any]) -> Request:
    """What a launch would compile."""
    kernel, tile = prepared.kernel, prepared.tile
    signature, constants = [], []
    for parameter, value in zip(kernel.params, (*arguments, *prepared.constants), strict=True):
        if parameter.is_constexpr or value is None:
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
        elif isinstance(value, torch.Tensor):
            signature.append((parameter.name, POINTER[value.dtype]))
        elif hasattr(value, "block_shape"):  # a descriptor
            kind = POINTER[value.base.dtype].removeprefix("*")
            signature.append((parameter.name, f"tensordesc<{kind}[{', '.join(map(str, value.block_shape))}]>"))
        else:
            signature.append((parameter.name, "fp32" if isinstance(value, float) else "i32"))
    return Request(kernel.fn.__name__, tuple(signature), tuple(constants), tile.warps, tile.stages)


@dataclass(frozen=True)
class Launch:
    """A recorded launch."""

    request: Request
    grid: tuple[int, ...]
    numbers: Mapping[str, int]
    """Arguments that are numbers at run time."""
    size: Mapping[str, int]
    """Bytes per element of every tensor,"""
    bytes: Mapping[str, int]
    """and of the whole of it; a tensor that is passed twice counts once."""

    @property
    def kernel(self) -> str:
        return str(self.request.described()["kernel"])

    @property
    def role(self) -> str:
        """The kernel, whether its programs stay or not."""
        return self.kernel.removesuffix(PERSISTENT)

    @property
    def depth(self) -> int:
        """Of its product."""
        return int(dict(self.request.constants).get("DEPTH", self.numbers.get("depth", 0)))

    @property
    def operands(self) -> str:
        """``half`` or ``tf32``, as tile tables have it."""
        kinds = dict(self.request.signature)
        return "half" if {"*bf16", "*fp16"} & set(kinds.values()) else "tf32"


@dataclass(frozen=True)
class LibraryProduct:
    """A recorded product of the library: rows, columns and depth, and the bytes of its operands."""

    shape: tuple[int, int, int]
    bytes: int
    operands: str


class Recorder:
    """Stands in for launches, and for products of the library."""

    def __init__(self) -> None:
        self.launches: list[Launch | LibraryProduct] = []

    def library(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, summand: torch.Tensor | None) -> None:
        """A product of the library, in the place of ``library._product``."""
        tensors = [a, b, out, *([] if summand is None else [summand])]
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        shape = (out.shape[0], out.shape[1], a.shape[1])
        self.launches.append(LibraryProduct(shape, moved, "tf32" if a.dtype == torch.float32 else "half"))

    def __call__(self, prepared: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        assert all(n >= 1 for n in grid), (prepared.kernel, grid)
        named = dict(zip(prepared.names, arguments, strict=True))
        request = request_of(prepared, arguments)
        constants = dict(request.constants)
        numbers = {n: v for n, v in named.items() if n not in constants and isinstance(v, int)}
        memory = {n: getattr(v, "base", v) for n, v in named.items() if n not in ("Split", "Splits")}  # of descriptors
        tensors = {n: v for n, v in memory.items() if isinstance(v, torch.Tensor)}
        seen: dict[int, str] = {}
        for name, tensor in tensors.items():
            seen.setdefault(tensor.data_ptr(), name)
        counted = {name: tensors[name].numel() * tensors[name].element_size() for name in seen.values()}
        sizes = {name: tensor.element_size() for name, tensor in tensors.items()}
        self.launches.append(Launch(request, grid, numbers, sizes, counted))


@contextmanager
def recording(
    architecture: str, precision: str, record: Callable[..., None], library: Callable[..., None] | None
) -> Iterator[None]:
    """Nothing is launched: ``record`` gets what is prepared, grid and arguments, as on an architecture.

    ``library`` gets the operands of products that the library takes; None: it takes none, and no kernel the place of
    those that load by pointers.
    """
    from ple_fast import backend, use_backend
    from ple_fast.triton_backend import fused, inputs

    tiles = importlib.import_module("ple_fast_kernels._tiles")
    table = (TABLE_OF.get(architecture, architecture), PROCESSORS[architecture])
    launch = importlib.import_module("ple_fast_kernels._launch")
    with ExitStack() as stack:
        # A function, not ``record`` itself: it takes the place of a method.
        method = mock.patch.object(
            launch.Prepared, "_launch", lambda prepared, grid, given: record(prepared, grid, given)
        )
        stack.enter_context(method)
        stack.enter_context(mock.patch.object(tiles, "table_of", return_value=table))
        module = importlib.import_module("ple_fast_kernels.library")
        if library is None:
            stack.enter_context(mock.patch.object(module, "takes_library", return_value=False))
            loaded = importlib.import_module("ple_fast_kernels.persistent")
            stack.enter_context(mock.patch.object(loaded, "persistent_tile", return_value=None))
        else:
            stack.enter_context(mock.patch.object(module, "_product", library))
        stack.enter_context(mock.patch.object(backend, "_why_no_triton", return_value=None))
        stack.enter_context(mock.patch.object(inputs, "matmul_precision", return_value=precision))
        stack.enter_context(mock.patch.object(fused, "matmul_precision", return_value=precision))
        stack.enter_context(use_backend("triton"))
        yield

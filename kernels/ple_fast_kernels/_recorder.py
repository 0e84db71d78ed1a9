"""What a call did, as steps that can be repeated on other tensors of the same form: allocations, launches, operators.

Tensors are told apart by the memory they are, not by who holds them. A step names the register of the tensor that owns
the memory, and where in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from triton.tools.tensor_descriptor import TensorDescriptor

from ._launch import Compiled, Prepared


class Part(NamedTuple):
    """Memory of a tensor, as seen from the one that a register holds."""

    register: int
    distance: int
    """Elements from the register's first one to this one's."""
    size: int
    """Bytes of an element."""
    shape: tuple[int, ...] | None
    """None: it is the register's tensor itself."""
    stride: tuple[int, ...]

    def of(self, registers: Sequence[Any]) -> Tensor:
        """The tensor."""
        tensor: Tensor = registers[self.register]
        if self.shape is None:
            return tensor
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.distance)


class Described(NamedTuple):
    """A ``TensorDescriptor`` of a part."""

    part: Part
    fields: dict[str, Any]

    def of(self, registers: Sequence[Any]) -> TensorDescriptor:
        """The descriptor; what its constructor checks is the same as when it was recorded."""
        made = TensorDescriptor.__new__(TensorDescriptor)
        made.__dict__.update(self.fields, base=self.part.of(registers))
        return made


class Allocation(NamedTuple):
    """New memory in a register."""

    register: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Launch(NamedTuple):
    """A kernel; ``given`` are its arguments, parts in the place of tensors."""

    prepared: Prepared
    grid: tuple[int, ...]
    device: torch.device
    given: tuple[Any, ...]
    compiled: Compiled | None
    """What runs on this device; None: Triton is asked at each launch."""


class Operator(NamedTuple):
    """An operator of PyTorch; ``leaves`` are its arguments, flat, parts in the place of tensors."""

    function: Any
    leaves: tuple[Any, ...]
    structure: Any
    registers: tuple[int | None, ...]
    """Of the results; None: a view of what was there."""


Step = Allocation | Launch | Operator


class CannotRepeat(Exception):
    """The steps of a call do not follow from the form of its tensors alone."""


_ALLOCATING = frozenset({"empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like"})


class Recorder(TorchDispatchMode):
    """Sees every operator of one call on ``tensors``, and is told of every launch."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.steps: list[Step] = []
        self.why_not: str | None = None
        """Why the call cannot be repeated."""
        self.count = len(tensors)
        """Registers; the first ones hold the given tensors."""
        self.same: list[tuple[int, int]] = []
        """Given tensors that were one and the same memory: steps name the first of each pair."""
        self.constants: dict[int, Tensor] = {}
        """Tensors made of numbers, such as indices, by register."""
        self._alive: list[Tensor] = []  # no address is used twice
        self._known: dict[Any, int] = {}
        self._owners: dict[int, list[int]] = {}
        self._begins: dict[int, tuple[int, torch.dtype]] = {}
        for i, tensor in enumerate(tensors):
            if tensor is None:
                continue
            before = self._known.get(_geometry(tensor))
            if before is None:
                self._put(i, tensor)
            else:
                self.same.append((before, i))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.why_not is None:
            try:
                self._operator(func, (args, kwargs or {}), result)
            except CannotRepeat as reason:
                self.why_not = str(reason)
        return result

    def launched(
        self,
        prepared: Prepared,
        grid: tuple[int, ...],
        device: torch.device,
        given: tuple[Any, ...],
        compiled: Compiled | None,
    ) -> None:
        """A launch that has just been made."""
        if self.why_not is None:
            try:
                arguments = tuple(map(self._argument, given))
            except CannotRepeat as reason:
                self.why_not = str(reason)
            else:
                self.steps.append(Launch(prepared, grid, device, arguments, compiled))

    def part(self, tensor: Tensor) -> Part:
        """Where the memory of ``tensor`` is.

        Raises:
            CannotRepeat: it was neither given nor made meanwhile; or it is a view of memory that several were given of.
        """
        size, register = tensor.element_size(), self._known.get(_geometry(tensor))
        if register is not None:
            return Part(register, 0, size, None, ())
        owners = self._owners.get(_storage(tensor), [])
        if len(owners) != 1:
            raise CannotRepeat("a tensor is neither given nor made by the call, or a view of one of several")
        begin, dtype = self._begins[owners[0]]
        if dtype != tensor.dtype:
            raise CannotRepeat("memory is read as another dtype")
        distance = int(tensor.storage_offset()) - begin
        return Part(owners[0], distance, size, tuple(tensor.shape), tensor.stride())

    def _put(self, register: int, tensor: Tensor) -> None:
        self._alive.append(tensor)
        self._known[_geometry(tensor)] = register
        self._owners.setdefault(_storage(tensor), []).append(register)
        self._begins[register] = (int(tensor.storage_offset()), tensor.dtype)

    def _new(self, tensor: Tensor) -> int | None:
        """A register of its own, unless it is a view: whoever uses one finds its owner."""
        if _storage(tensor) in self._owners:
            return None
        self._put(self.count, tensor)
        self.count += 1
        return self.count - 1

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.part(value)
        if isinstance(value, TensorDescriptor):
            fields = {name: field for name, field in value.__dict__.items() if name != "base"}
            return Described(self.part(value.base), fields)
        assert value is None or isinstance(value, (int, float)), value
        return value

    def _operator(self, func: Any, given: Any, result: Any) -> None:
        name = func._schema.name.removeprefix("aten::")
        if name in _ALLOCATING:
            register = self._new(result)
            assert register is not None
            form = tuple(result.shape), result.stride(), result.dtype, result.device
            self.steps.append(Allocation(register, *form))
            return
        if name == "_local_scalar_dense" or torch.Tag.nondeterministic_seeded in func.tags:
            raise CannotRepeat(f"{name} gives another result each time")
        if name == "lift_fresh":
            register = self._new(result)
            assert register is not None
            self.constants[register] = result
            return
        leaves, structure = tree_flatten(given)
        parts = tuple(self.part(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        registers = tuple(self._new(t) for t in tree_flatten(result)[0] if isinstance(t, Tensor))
        changes = func._schema.is_mutable
        if changes and any(isinstance(part, Part) and part.register in self.constants for part in parts):
            raise CannotRepeat(f"{name} takes a constant, which it may change")
        if changes or any(register is not None for register in registers):
            self.steps.append(Operator(func, parts, structure, registers))


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return _storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype

"""A call that allocates and launches, recorded once, and repeated without the code that decides what to launch.

Which kernels a level launches, with which tiles, grids and constants, follows from the form of its tensors and from
settings. Deciding it takes the host several times longer than launching. So a call is recorded at the second time that
it comes in the same form, and repeated from the third on: memory is allocated anew, kernels are launched on the new
addresses, nothing is decided again. The recorder sees every operator of PyTorch that runs meanwhile; a call that does
what cannot be repeated stays as it is, and so does any call while a tool watches launches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import _launch, _tiles
from ._recorder import Allocation, CannotRepeat, Described, Launch, Operator, Part, Recorder, Step

Results = Sequence[Tensor | None]

MAX_PROGRAMS = 1024
"""Forms of calls that are remembered; the oldest goes first."""
TIMES = 2
"""A form that comes for so many times is recorded."""
_PLAIN = frozenset({Tensor, nn.Parameter, type(None)})
_ALLOCATE, _LAUNCH, _OPERATE = range(3)
PRODUCTS = frozenset({torch.ops.aten.mm.out, torch.ops.aten.addmm.out})
"""Operators that count as launches: those of ``library.py``."""


class _Program:
    """The steps of a call, and its results.

    Args:
        inputs: number of tensors that are given.

    Raises:
        CannotRepeat: a result is not memory that was given or made.
    """

    def __init__(self, recorder: Recorder, inputs: int, results: Results) -> None:
        self.same = tuple(recorder.same)
        self.results = tuple(None if t is None else recorder.part(t) for t in results)
        launches = [step for step in recorder.steps if isinstance(step, Launch)]
        self.by_kernels = len(launches)
        self.by_library = sum(isinstance(s, Operator) and s.function in PRODUCTS for s in recorder.steps)
        self.kernels = tuple({id(step.prepared.kernel): step.prepared.kernel for step in launches}.values())
        self.by_address = _launch.TAKES_ADDRESSES
        if self.by_address and any(step.compiled is None for step in launches):
            raise CannotRepeat("Triton is asked at each launch: tensors or numbers that it must look at")
        outside = {register for step in launches for register in _touched(step)}
        outside |= {part.register for part in self.results if part is not None}
        if not outside.isdisjoint(recorder.constants):
            raise CannotRepeat("a constant leaves the call, or a kernel, which may change it, takes one")
        self._more = recorder.count - inputs
        self._constants = tuple(recorder.constants.items())
        self._steps = tuple(
            (*self._prepared(step), done)
            for step, done in zip(recorder.steps, _done(recorder.steps, inputs, self.results), strict=True)
        )

    def _prepared(self, step: Step) -> tuple[Any, ...]:
        """A step as plain tuples for ``run``."""
        if isinstance(step, Allocation):
            return _ALLOCATE, step.register, step.shape, step.stride, step.dtype, step.device
        if isinstance(step, Operator):
            return _OPERATE, step.function, step.leaves, step.structure, step.registers, None
        if not self.by_address:
            return _LAUNCH, step.prepared, step.grid, step.device, step.given, None
        grid = step.grid[0], step.grid[1] if len(step.grid) > 1 else 1
        fills = tuple((i, v.register, v.distance * v.size) for i, v in enumerate(step.given) if isinstance(v, Part))
        described = tuple((i, v) for i, v in enumerate(step.given) if isinstance(v, Described))
        return _LAUNCH, step.compiled, grid, [*step.given, *step.prepared.constants], fills, described

    def run(self, tensors: Sequence[Tensor | None], addresses: list[int]) -> Results:
        """The call on other tensors of the same form; ``addresses``: theirs."""
        registers: list[Any] = [*tensors, *[None] * self._more]
        addresses = addresses + [0] * self._more
        for register, tensor in self._constants:
            registers[register] = tensor
        by_address, stream = self.by_address, 0
        _launch.count(self.by_library)  # kernels that are launched one by one count themselves
        if by_address:
            _, stream = _launch.current()
            _launch.count(self.by_kernels)
        for kind, a, b, c, d, e, done in self._steps:
            if kind == _LAUNCH and by_address:
                arguments = c.copy()
                for i, register, distance in d:
                    arguments[i] = addresses[register] + distance
                for i, described in e:
                    arguments[i] = described.of(registers)
                a.run(b[0], b[1], 1, stream, a.function, a.metadata, None, None, None, *arguments)
            elif kind == _ALLOCATE:
                registers[a] = tensor = torch.empty_strided(b, c, dtype=d, device=e)
                addresses[a] = tensor.data_ptr()
            elif kind == _LAUNCH:
                a.launch(b, c, tuple(v.of(registers) if isinstance(v, (Part, Described)) else v for v in d))
            else:
                args, kwargs = tree_unflatten([v.of(registers) if isinstance(v, Part) else v for v in b], c)
                made = [t for t in tree_flatten(a(*args, **kwargs))[0] if isinstance(t, Tensor)]
                for register, tensor in zip(d, made, strict=True):
                    if register is not None:
                        registers[register], addresses[register] = tensor, tensor.data_ptr()
            for register in done:
                registers[register] = None
        return [
            None if part is None else registers[part.register] if part.shape is None else part.of(registers)
            for part in self.results
        ]


def _done(steps: Sequence[Step], inputs: int, results: Sequence[Part | None]) -> list[tuple[int, ...]]:
    """Per step the registers that nobody reads after it: their memory is free for the next allocation."""
    last: dict[int, int] = {}
    for i, step in enumerate(steps):
        last.update(dict.fromkeys(_touched(step), i))
    for part in results:
        if part is not None:
            last.pop(part.register, None)
    return [tuple(r for r, at in last.items() if at == i and r >= inputs) for i in range(len(steps))]


def _touched(step: Step) -> Iterator[int]:
    if isinstance(step, Allocation):
        yield step.register
        return
    if isinstance(step, Operator):
        yield from (register for register in step.registers if register is not None)
    for value in step.given if isinstance(step, Launch) else step.leaves:
        if isinstance(value, (Part, Described)):
            yield (value.part if isinstance(value, Described) else value).register


_programs: dict[Hashable, _Program | int | str] = {}
"""By the form of a call: its program, how often it has come, or why it cannot be repeated."""
_lock = threading.Lock()
_is_off = False


def replayed(key: Hashable, tensors: Sequence[Tensor | None], call: Callable[[], Results]) -> Results:
    """The results of ``call``, which reads ``tensors``, and otherwise nothing but what ``key`` tells.

    ``key`` and the forms of the tensors (dtype, device, shape, strides, alignment) must tell all that it decides by;
    tiles are looked after here. Views of the tensors are found by their memory.
    """
    if (
        _is_off
        or _tiles.asked is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or not _PLAIN.issuperset(map(type, tensors))
    ):
        return call()
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    bits = 0
    for address in addresses:
        bits |= address
    forms = [None if t is None else (t.dtype, t.device, t.shape, t.stride()) for t in tensors]
    device = next(t.device for t in tensors if t is not None)
    form = (key, bits % _launch.ALIGNMENT, _tiles.state_of(device), *forms)
    known = _programs.get(form, 0)
    if isinstance(known, str):
        return call()
    if isinstance(known, int):
        return _first_times(form, known + 1, tensors, call)
    for i, j in known.same:
        if addresses[i] != addresses[j]:
            return call()
    if known.by_address:
        if _launch.is_watched():
            return call()
        for kernel in known.kernels:
            if kernel.pre_run_hooks:
                return call()
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return known.run(tensors, addresses)
    return known.run(tensors, addresses)


def _first_times(form: Hashable, times: int, tensors: Sequence[Tensor | None], call: Callable[[], Results]) -> Results:
    if times < TIMES or _launch.is_watched():
        results, found = call(), times
    else:
        recorder = Recorder(tensors)
        with _launch.recording(recorder.launched), recorder:
            results = call()
        found = _made(recorder, len(tensors), results)
    with _lock:
        if len(_programs) >= MAX_PROGRAMS and form not in _programs:
            del _programs[next(iter(_programs))]
        _programs[form] = found
    return results


def _made(recorder: Recorder, inputs: int, results: Results) -> _Program | str:
    if recorder.why_not is not None:
        return recorder.why_not
    try:
        return _Program(recorder, inputs, results)
    except CannotRepeat as reason:
        return str(reason)


@contextmanager
def without_replay() -> Iterator[None]:
    """Every call decides anew what to launch: for tools that stand in the place of launchers."""
    global _is_off
    before, _is_off = _is_off, True
    try:
        yield
    finally:
        _is_off = before


def forget() -> None:
    """Start anew, with nothing recorded."""
    with _lock:
        _programs.clear()

"""The model behind ``kernel_model.py``: what a launch takes on an H200, from its programs and its bytes.

It is arithmetic with the constants below; **no GPU has measured what it predicts**.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

# What the model assumes. Measured by others on this GPU: the two ceilings. The rest is assumed, or fits the study of
# the machine code (tests/test_kernel_model.py has its figures).
PROCESSORS = 132
PEAK = {"half": 790e12, "tf32": 395e12}
"""Dense products, FLOP/s: bfloat16 measured; tf32 has half of it by design."""
MEMORY = 4.3e12 * 0.85
"""Bytes/s: what a copy reaches, measured, and the share of it that a kernel gets."""
L2 = 7.5e12
"""Bytes/s from L2 to all processors: a tile waits for it more often than for its products."""
LAUNCH = 2.2
"""Microseconds of a launch at least, in a CUDA graph."""
FILL = 1.0
"""Microseconds until the first product of a program; hidden where two programs or more share a processor."""
PERSISTENT_TILE = 0.7
"""Microseconds of a tile that a persistent program does not hide: its accumulators go to shared memory."""
SERIALISED = 0.5
"""Microseconds that a step of 64 in depth waits where each product waits for itself (C75xx): its loads come after."""
LIBRARY = {"half": 700e12, "tf32": 350e12}
"""FLOP/s of one plain product in the library."""
LIBRARY_START = 2.0
"""Microseconds before the library's product."""
NARROW_COPIES = 2.0
"""An operand in float32 that a product wants transposed is copied 4 bytes at a time: so many times as long."""
REGISTERS, SHARED, THREADS = 65_536, 233_472, 2048
"""Of a processor; a block takes 1 KiB of shared memory beside its own."""


class Role(NamedTuple):
    """Programs of a launch that do the same; they stand next to each other in its order."""

    name: str
    programs: int
    steps: int
    flops: float
    """Of a step,"""
    traffic: float
    """and its bytes from L2."""
    result: float
    """Bytes that a program writes in the end."""
    wait: float = 0.0
    """Microseconds of a step that nothing hides,"""
    busy: float = 0.0
    """and those that keep the processor busy beside products and loads."""


class Resources(NamedTuple):
    """What the compiler made of a launch."""

    registers: int
    shared: int
    warps: int
    serialised: bool = False

    @property
    def occupancy(self) -> int:
        """Programs on a processor at a time."""
        by_warp = -(-self.registers * 32 // 256) * 256  # registers are given out by warp, 256 at a time
        return min(
            REGISTERS // (by_warp * self.warps), SHARED // (self.shared + 1024), THREADS // (32 * self.warps), 32
        )


class Prediction(NamedTuple):
    """A launch, in microseconds."""

    total: float
    bound: str
    """What takes most of it: the launch itself, bytes of the memory, L2 or products of a step, and so on."""
    programs: int
    places: int
    """Programs that run at a time."""
    idle: float = 0.0
    """Share of the programs' time in which the places have nothing to do,"""
    extra: float = 0.0
    """and share of a program in which it waits for its first loads, its end, or serialised products."""
    last: str = ""
    """The programs that end last."""

    @property
    def waves(self) -> float:
        """How often the programs fill all places; rounded up it is what they take."""
        return self.programs / self.places


def product(
    name: str, programs: int, tile: tuple[int, int, int], steps: int, size: int = 2, out: int = 2, *, narrow: int = 0
) -> Role:
    """Programs of a tile of rows, columns and depth; ``size``, ``out``: bytes of an element that is read, written.

    ``narrow``: operands, of the two, that are copied 4 bytes at a time.
    """
    rows, columns, depth = tile
    sides = (rows * (NARROW_COPIES if narrow > 1 else 1), columns * (NARROW_COPIES if narrow else 1))
    return Role(name, programs, steps, 2.0 * rows * columns * depth, sum(sides) * depth * size, rows * columns * out)


def step_time(role: Role, operands: str) -> tuple[float, str]:
    """Microseconds of a step where a program is alone on a processor, and what bounds it."""
    products = role.flops / PEAK[operands] * PROCESSORS * 1e6
    loads = role.traffic / L2 * PROCESSORS * 1e6
    return max(products, loads) + role.busy, "products" if products >= loads else "L2"


def predict(
    roles: Sequence[Role], memory_bytes: float, resources: Resources, operands: str, *, persistent: bool = False
) -> Prediction:
    """What a launch of ``roles``, in the order of its programs, takes.

    ``persistent``: a program per processor goes from tile to tile, and loads the next one beside the end of the last.
    """
    programs = sum(role.programs for role in roles)
    occupancy = 1 if persistent else resources.occupancy
    sharing = min(occupancy, -(-programs // PROCESSORS))  # programs that are on a processor together
    free = [0.0] * (PROCESSORS * sharing)
    busy = end = 0.0
    last = ""
    parts = dict.fromkeys(("products", "L2", "column sums", "serialised products", "fill and end"), 0.0)
    for role in roles:
        each, slower = step_time(role, operands)
        serial = SERIALISED if resources.serialised and role.flops else 0.0
        store = role.result / L2 * PROCESSORS * 1e6
        ends = PERSISTENT_TILE if persistent else FILL + store
        lasts = max(role.steps * (each + role.wait + serial) + ends, sharing * (role.steps * each + min(store, ends)))
        parts["column sums" if role.wait else slower] += role.programs * role.steps * (each + role.wait)
        if sharing == 1:  # otherwise the other program goes on meanwhile
            parts["serialised products"] += role.programs * role.steps * serial
            parts["fill and end"] += role.programs * ends
        for _ in range(role.programs):
            done = heapq.heapreplace(free, free[0] + lasts)
            done += lasts
            if done > end:
                end, last = done, role.name
        busy += role.programs * lasts
    end += FILL if persistent else 0.0
    idle = 1.0 - busy / (len(free) * end)
    from_memory = memory_bytes / MEMORY * 1e6
    bound = max(parts, key=parts.__getitem__)
    extra = (parts["fill and end"] + parts["serialised products"]) / sum(parts.values())
    if from_memory > max(end, LAUNCH):
        bound, end = "bytes", from_memory
    elif end < LAUNCH:
        bound, end = "launch", LAUNCH
    return Prediction(end, bound, programs, PROCESSORS * occupancy, idle, extra, last)


def predict_library(flops: float, memory_bytes: float, operands: str) -> float:
    """Microseconds of one plain product in the library."""
    return LIBRARY_START + 1e6 * max(flops / LIBRARY[operands], memory_bytes / MEMORY)

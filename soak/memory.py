"""Many small steps with changing batches, fresh modules and autocast now and then, whose memory does not grow."""

from __future__ import annotations

import functools
import gc
import os
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ple_fast import PLE, AdaTT, MMoE

WARM_UP = 2000
"""Steps before the first measurement: caches fill, allocators settle. Of fewer than twice as many it is half of them,
and resident memory is left out, for oneDNN then still compiles programs for new shapes."""
EVERY = 1000
"""Steps between measurements."""
ROOM = {"objects": 200, "tensors": 20, "cached": 20, "resident_kib": 16 * 1024}
"""How much more there may be than after the warm-up: a leak of one tensor per step is thousands of each."""
BATCHES = (2, 3, 5, 8, 13, 21, 31, 32, 33, 55, 89, 95, 97, 144, 233, 300)
"""No more: oneDNN keeps a program for each of up to 1,024 shapes, a gigabyte in low precision, also PyTorch's own."""
MAKES = (
    lambda: PLE(12, 2, expert_units=(16, 8), norm="batch"),
    lambda: PLE(12, 3, expert_units=(9,), dropout=0.3, recompute=True),
    lambda: MMoE(12, 2, experts=3, expert_units=(8,), gate_units=(5,)),
    lambda: AdaTT(12, 2, expert_units=(8, 8), norm="layer", activation="prelu"),
)


def measure() -> dict[str, int]:
    """What is alive after a collection: objects, tensors, entries of the library's caches, and resident memory."""
    gc.collect()
    objects = gc.get_objects()
    found = {
        "objects": len(objects),
        "tensors": sum(issubclass(type(thing), Tensor) for thing in objects),
        "cached": kept(),
    }
    del objects
    statm = Path("/proc/self/statm")
    if statm.is_file():  # Linux alone tells it
        found["resident_kib"] = int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    return found


def kept() -> int:
    """Entries of every ``lru_cache`` and dictionary that modules of the library keep."""
    modules = [
        module
        for name, module in sorted(sys.modules.items())
        if name.partition(".")[0] in ("ple_fast", "ple_fast_encoder")
    ]
    values = [value for module in modules for name, value in vars(module).items() if not name.startswith("__")]
    entries = 0
    for value in values:
        if isinstance(value, functools._lru_cache_wrapper):
            entries += value.cache_info().currsize
        elif isinstance(value, Mapping):
            entries += len(value)
    return entries


def step(module: nn.Module, optimizer: torch.optim.Optimizer, dice: random.Random) -> None:
    """One training step or one inference."""
    rows = dice.choice(BATCHES)
    x = torch.randn(rows, 12)
    if dice.random() < 0.2:
        with torch.inference_mode():
            module(x, return_gates=dice.random() < 0.5)
        return
    if dice.random() < 0.3:
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
    else:
        y = module(x, return_gates=True)[0] if dice.random() < 0.3 else module(x)
    if dice.random() < 0.9:  # some graphs are thrown away without a backward
        optimizer.zero_grad()
        y.float().square().mean().backward()
        optimizer.step()


def run(seed: int, trials: int, figures: dict[str, Any]) -> Iterator[str | None]:
    """One step per trial."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    made = [make() for make in MAKES]
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.01) for module in made]
    first: dict[str, int] = {}
    for number in range(1, trials + 1):
        at = dice.randrange(len(made))
        if dice.random() < 0.02:
            made[at] = MAKES[at]()
            optimizers[at] = torch.optim.SGD(made[at].parameters(), lr=0.01)
        step(made[at], optimizers[at], dice)
        if number == min(WARM_UP, (trials + 1) // 2):
            for optimizer in optimizers:
                optimizer.zero_grad()
            first = [measure(), measure()][1]  # the first one itself fills caches of Python's
            if number < WARM_UP:
                first.pop("resident_kib", None)
            figures["after_warm_up"] = first
        elif first and (number % EVERY == 0 or number == trials):
            for optimizer in optimizers:
                optimizer.zero_grad()
            now = measure()
            figures["in_the_end"] = now
            grown = [
                f"{name}: {first[name]:,}, then {now[name]:,}" for name in first if now[name] > first[name] + ROOM[name]
            ]
            if grown:
                yield f"after {number:,} steps (seed {seed}) more is alive than after the warm-up: {'; '.join(grown)}"
                continue
        yield None

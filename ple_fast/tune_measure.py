"""Part of ``ple_fast.tune``: the kernels of one trunk with a few candidate tiles, weight gradients in other numbers of
parts, and plain products with the library.

Samples are CUDA graphs of several launches, interleaved; medians count.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from .scalars import check_count, check_number
from .tune_calls import Call, recorded
from .tune_candidates import candidates, has_lost
from .tune_library import STAYING, Compared, plain_of, rows_from, staying_rows
from .tune_splits import Split, in_parts, of_parts, split_candidates
from .tune_table import Entry, Measured, table_of

if TYPE_CHECKING:
    from ple_fast_kernels import Table, Tile

Sampler = Callable[[], float]
"""Seconds of one launch, measured anew at each call."""
Prepare = Callable[[Callable[[], object]], Sampler]
"""Makes a sampler of a launch."""
_Name = TypeVar("_Name")

ROUNDS = 15
REPEATS = 10
"""Launches of a sample: they make up for the clock's resolution."""
TOLERANCE = 2e-2
"""Relative distance of a candidate's result from that of the shipped tile: sums in another order, in low precision."""


def cuda_graph_sampler(call: Callable[[], object]) -> Sampler:
    """Times launches by events around a CUDA graph of several, so that the host's time does not count."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            call()
    graph.replay()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample() -> float:
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3 / REPEATS

    return sample


def _agree(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    for a, b in zip(ours, theirs, strict=True):
        distance = (a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)
        if not float(distance) <= TOLERANCE:
            return False
    return True


class Tuner:
    """Measures calls on one device."""

    def __init__(self, device: torch.device, prepare: Prepare, rounds: int, say: Callable[[str], None]) -> None:
        self.tiles: Any = importlib.import_module("ple_fast_kernels._tiles")
        self.architecture, self.processors = self.tiles.architecture(device)
        self.device, self.prepare, self.rounds, self.say = device, prepare, rounds, say
        self.wrong: list[str] = []
        """Candidates whose results differ from the shipped tile's."""

    def shared_limit(self) -> int:
        """Bytes of shared memory of a block."""
        if self.device.type != "cuda":
            return 1 << 30
        properties = torch.cuda.get_device_properties(self.device)
        limit = getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block
        return int(limit)

    def set_table(self, table: Table, least: int | None = None) -> None:
        """Rows of the table while measuring; ``least``: from how much work on plain products are the library's."""
        self.tiles.set_table(self.architecture, {**rows_from(least), **table})

    def table_of(self, measured: Sequence[Entry]) -> Table:
        """The rows that follow from all that was measured."""
        return table_of(measured, self.tiles.TABLES[self.architecture], self.processors)

    def asked(self, call: Call) -> Any:
        """The request for a tile that a call makes, at the tables of the moment; the call is run."""
        self.tiles.asked = []
        try:
            call.run()
            requests = self.tiles.asked
        finally:
            self.tiles.asked = None
        assert len(requests) == 1, (call.name, requests)
        return requests[0]

    def measure(self, call: Call, choice: Callable[[str], Sequence[Tile]]) -> Measured | None:
        """Seconds of the shipped tile and of every candidate; None where there is none to compare."""
        self.set_table({})
        shipped = self.asked(call)
        expected = call.result(shipped.tile)
        samplers = {shipped.tile: self.prepare(lambda: call.run(shipped.tile))}
        for candidate in choice(shipped.kind):
            if not shipped.fits(candidate):
                continue
            self.set_table({shipped.kind: (self.tiles.Class(0, candidate),)})
            try:
                tile = self.asked(call).tile
                if tile in samplers:  # cut to the same size
                    continue
                if not _agree(call.result(tile), expected):
                    self.wrong.append(f"{call.name} with {tile} differs from {shipped.tile}")
                    self.say(f"  {self.wrong[-1]}: please report it")
                    continue
                samplers[tile] = self.prepare(lambda tile=tile: call.run(tile))  # type: ignore[misc]  # bound now
            except Exception as error:
                if not has_lost(error):
                    raise
                self.say(f"  {shipped.kind}: {candidate} has lost: {type(error).__name__}")
        if len(samplers) < 2:
            return None
        return Measured(shipped.kind, shipped.results, self.medians(samplers), call.launch)

    def stay(self, call: Call, fastest: Tile | None) -> Compared | None:
        """The kernel with its ``fastest`` tile (None: the shipped one), and in programs that stay where these may take
        the product; otherwise None."""
        rows = staying_rows(self.tiles.TABLES[self.architecture])
        if not rows or call.name not in ("grouped_linear_fwd", "grouped_data_grad"):
            return None
        tile = self.asked(call).tile if fastest is None else fastest
        expected = call.result(tile)
        self.set_table(rows)
        self.tiles.asked = []
        try:
            found = call.result()
            staying = [entry for entry in self.tiles.asked if entry.kind in STAYING]
        finally:
            self.tiles.asked = None
        if not staying:
            return None
        (taken,) = staying
        if not _agree(found, expected):
            self.wrong.append(f"{call.name} in programs that stay differs from {tile}")
            self.say(f"  {self.wrong[-1]}: please report it")
            return None
        samplers = {"pointers": self.prepare(lambda: call.run(tile)), "staying": self.prepare(call.run)}
        medians = self.medians(samplers)
        work = taken.results * 128 / self.processors
        return Compared(taken.kind, "", work, medians["pointers"], medians["staying"], call.launch)

    def compare(self, call: Call, fastest: Tile | None) -> Compared | None:
        """The kernel with its ``fastest`` tile (None: the shipped one) and the library, where the product is a plain
        one, or programs that stay, where the engine can load it; otherwise None."""
        self.set_table({})
        plain = plain_of(call.run)
        if plain is None:
            return self.stay(call, fastest)
        tile = self.asked(call).tile if fastest is None else fastest
        expected = call.result(tile)
        samplers = {"kernels": self.prepare(lambda: call.run(tile))}
        self.set_table({}, least=0)
        if not _agree(call.result(), expected):
            self.wrong.append(f"{call.name} by the library differs from {tile}")
            self.say(f"  {self.wrong[-1]}: please report it")
            return None
        samplers["library"] = self.prepare(call.run)
        medians = self.medians(samplers)
        return Compared(plain.kind, plain.product, plain.work, medians["kernels"], medians["library"], call.launch)

    def split(self, call: Call, fastest: Tile | None) -> Split | None:
        """A weight gradient with its ``fastest`` tile in the model's number of parts and in others; None: no other."""
        self.set_table({})
        tile = self.asked(call).tile if fastest is None else fastest
        with of_parts(None) as asked:
            expected = call.result(tile)
        (model,) = asked
        numbers = split_candidates(model)
        samplers: dict[int, Sampler] = {}
        for number in numbers if len(numbers) > 1 else ():
            try:
                with of_parts(number):
                    is_right = _agree(call.result(tile), expected)
                if is_right:
                    samplers[number] = self.prepare(in_parts(lambda: call.run(tile), number))
                else:
                    self.wrong.append(f"{call.name} in {number} parts differs from {model.parts}")
                    self.say(f"  {self.wrong[-1]}: please report it")
            except Exception as error:
                if not has_lost(error):
                    raise
                self.say(f"  {call.name}: {number} parts have lost: {type(error).__name__}")
        if len(samplers) < 2:
            return None
        return Split(*model[:-1], self.medians(samplers), call.launch)

    def all(self, call: Call, choice: Callable[[str], Sequence[Tile]]) -> list[Entry]:
        """A call with every candidate, and the fastest of them beside the library and in other numbers of parts."""
        found: list[Entry] = []
        try:
            tiled = self.measure(call, choice)
            found += [] if tiled is None else [tiled]
            fastest = None if tiled is None else min(tiled.seconds.items(), key=lambda item: item[1])[0]
            beside = self.compare(call, fastest)
            found += [] if beside is None else [beside]
            if call.name == "grouped_weight_grads":
                split = self.split(call, fastest)
                found += [] if split is None else [split]
        except Exception as error:
            if not has_lost(error):
                raise
            self.say(f"  {call.name}: not measured, {type(error).__name__} with the shipped tile or the library")
        return found

    def compile(self, call: Call, choice: Callable[[str], Sequence[Tile]], share: int, shares: int) -> None:
        """Run a share of the candidates, so that other processes find them compiled."""
        self.set_table({})
        shipped = self.asked(call)
        for candidate in list(choice(shipped.kind))[share::shares]:
            if not shipped.fits(candidate):
                continue
            self.set_table({shipped.kind: (self.tiles.Class(0, candidate),)})
            try:
                call.run()
            except Exception as error:
                if not has_lost(error):
                    raise

    def medians(self, samplers: dict[_Name, Sampler]) -> dict[_Name, float]:
        """Seconds of each, interleaved."""
        samples: dict[_Name, list[float]] = {name: [] for name in samplers}
        order = list(samplers)
        for r in range(self.rounds):
            start = r % len(order)
            for name in order[start:] + order[:start]:
                samples[name].append(samplers[name]())
        return {name: statistics.median(taken) for name, taken in samples.items()}


def tune(
    trunk: nn.Module,
    x: Tensor,
    *,
    rounds: int = ROUNDS,
    minutes: float | None = None,
    prepare: Prepare = cuda_graph_sampler,
    choice: Callable[[str], Sequence[Tile]] | None = None,
    say: Callable[[str], None] = lambda text: None,
    known: Collection[str] = (),
    keep: Callable[[list[Entry]], None] = lambda found: None,
) -> tuple[Table, list[Entry]]:
    """Measure the tiles of a trunk at the shape, dtype and device of ``x``.

    Args:
        trunk: ``PLE``, ``CGC``, ``MMoE``, or a level.
        x: its input ``(B, D)``, with ``requires_grad`` if training computes its gradient.
        rounds: samples per tile, interleaved.
        minutes: start no launch after so many; None: measure all.
        prepare: makes a sampler of a launch.
        choice: candidates of a row of the table; default ``candidates``.
        say: is told what happens.
        known: launches (``Measured.launch``) that are not measured again.
        keep: is given what was measured of each launch as soon as it is known.

    Returns:
        The table, to be set with ``ple_fast_kernels.set_table`` or written to a file, and all medians.

    Raises:
        RuntimeError: the kernels cannot run on this device, or two tiles give different results; the latter after
            everything is measured.
    """
    rounds = check_count("rounds", rounds)
    end = float("inf") if minutes is None else time.monotonic() + 60 * check_number("minutes", minutes)
    tuner = Tuner(x.device, prepare, rounds, say)
    chosen = choice or default_choice(tuner, x)
    measured: list[Entry] = []
    seen = set(known)
    try:
        tuner.set_table({})  # a file of an earlier run must not decide what is launched
        calls = recorded(trunk, x)
        for i, call in enumerate(calls):
            if call.launch in seen:
                continue
            if time.monotonic() >= end:
                say(f"time is over: {len(calls) - i} of {len(calls)} launches are not measured")
                break
            seen.add(call.launch)
            found = tuner.all(call, chosen)
            measured += found
            for entry in found:
                say(f"{i + 1}/{len(calls)} {call.name}: {_outcome(entry)}")
            keep(found)
    finally:
        tuner.tiles.set_table(tuner.architecture, None)
    if tuner.wrong:
        raise RuntimeError("; ".join(tuner.wrong) + ": please report it")
    return tuner.table_of(measured), measured


def default_choice(tuner: Tuner, x: Tensor) -> Callable[[str], Sequence[Tile]]:
    """``candidates`` for a tensor's device and dtype."""
    size, limit = x.element_size(), tuner.shared_limit()
    return lambda kind: candidates(kind, tuner.architecture, size, limit)


def _outcome(entry: Entry) -> str:
    if isinstance(entry, Compared):
        other = "library" if entry.product else "programs that stay"
        return f"kernels {entry.kernels * 1e6:.1f} us, {other} {entry.library * 1e6:.1f} us"
    if isinstance(entry, Split):
        (model, first), *_ = entry.seconds.items()
        parts, least = min(entry.seconds.items(), key=lambda item: item[1])
        return f"{model} parts {first * 1e6:.1f} us, best of {len(entry.seconds)} {parts} parts {least * 1e6:.1f} us"
    (shipped, before), *_ = entry.seconds.items()
    tile, after = min(entry.seconds.items(), key=lambda item: item[1])
    return f"{shipped[:-1]} {before * 1e6:.1f} us, best of {len(entry.seconds)} {tile[:-1]} {after * 1e6:.1f} us"

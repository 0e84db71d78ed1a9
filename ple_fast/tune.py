"""Measure tiles for one GPU and one trunk, and keep the fastest where the library finds them.

``python -m ple_fast.tune --in-features 512 --num-tasks 3 --expert-units 256,128 --batch 16384 --dtype bfloat16`` runs a
training step and an inference call of the trunk, and times every kernel of them with a few candidate tiles:
interleaved, medians, each sample a CUDA graph of several launches. The table goes to the file that ``PLE_FAST_TILES``
names, or to ``ple_fast/tiles-GPU.json`` in the cache folder, and is read at the first launch on that GPU. Without a
file the library uses the tiles that it ships, and it never times anything by itself.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import pkgutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .backend import use_backend
from .modules import PLE
from .scalars import check_count
from .tune_library import ROWS, Compared, library_rows, plain_of, rows_from

if TYPE_CHECKING:
    from ple_fast_kernels import Table, Tile

Sampler = Callable[[], float]
"""Seconds of one launch, measured anew at each call."""
Prepare = Callable[[Callable[[], object]], Sampler]
"""Makes a sampler of a launch."""
_Name = TypeVar("_Name")

LAUNCHERS = (
    "fused_level_fwd", "fused_two_layers_fwd", "gate_combine_bwd", "gate_combine_fwd", "grouped_data_grad",
    "grouped_input_grad", "grouped_linear_fwd", "grouped_weight_grads",
)  # fmt: skip
ROUNDS = 15
REPEATS = 10
"""Launches of a sample: they make up for the clock's resolution."""
GAIN = 0.02
"""A candidate must beat the shipped tile by so much: less is noise."""
TOLERANCE = 2e-2
"""Relative distance of a candidate's result from that of the shipped tile: sums in another order, in low precision."""


class _Call(NamedTuple):
    """A launcher and its arguments."""

    launcher: Callable[..., Any]
    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def run(self, tile: Tile | None = None) -> Any:
        with torch.no_grad():  # as in the level: products of the library write into given memory
            return self.launcher(*self.arguments, **self.options, tile=tile)

    def result(self, tile: Tile | None = None) -> list[Tensor]:
        """What one launch on fresh memory makes, copied."""
        if self.name == "grouped_input_grad":  # it may add to what is there
            self.arguments[3].zero_()
        return [tensor.detach().clone() for tensor in _tensors(self.run(tile))]


class Measured(NamedTuple):
    """One launch: the row of the table, the amount of work, and seconds per tile, the shipped tile first."""

    kind: str
    results: int
    seconds: dict[Tile, float]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def candidates(kind: str, architecture: str, operand_bytes: int, shared_limit: int) -> list[Tile]:
    """Tiles worth measuring for a row of the table, without those whose stages do not fit into shared memory."""
    from ple_fast_kernels import Tile

    kernel, _, operands = kind.rpartition("/")
    if kind.startswith("combine"):
        wide = 256 if kind == "combine_grad" else 128
        return [Tile(n // wide, wide, 0, warps, 2) for n, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8))]
    if operands == "double":
        return []
    depth = 64 if operands == "half" else 32
    if kernel in ("fused", "two_layers"):
        shapes = [(64, 64, 4, 3), (64, 64, 8, 3), (64, 32, 8, 3), (128, 32, 8, 3), (128, 64, 8, 3)]
    else:
        shapes = [
            (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 4, 3),
            (128, 128, 8, 3), (128, 128, 8, 4),
        ]  # fmt: skip
        shapes += [(128, 256, 8, 3), (128, 256, 8, 4)] if operands == "half" else [(64, 64, 8, 3)]
    found = []
    for rows, columns, warps, stages in shapes:
        tile = Tile(rows, columns, depth, warps, min(stages, 2) if architecture == "amd" else stages)
        if tile.stages * (rows + columns) * depth * operand_bytes <= shared_limit and tile not in found:
            found.append(tile)
    return found


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


@contextmanager
def _recording(calls: list[_Call]) -> Iterator[None]:
    """Keep every call of a launcher that a level makes, layers of weight gradients one by one."""
    modules = [importlib.import_module(f"ple_fast.triton_backend.{name}") for name in _backend_modules()]
    before = [
        (module, name, getattr(module, name)) for module in modules for name in LAUNCHERS if hasattr(module, name)
    ]
    assert {name for _, name, _ in before} == set(LAUNCHERS)

    def keeping(name: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
        def keep(*arguments: Any, **options: Any) -> Any:
            tile = options.pop("tile", None)
            if tile is not None:  # what it writes into was cut for this tile
                return launcher(*arguments, **options, tile=tile)
            if name == "grouped_weight_grads":
                layers, *rest = arguments
                calls.extend(_Call(launcher, name, ([layer], *rest), options) for layer in layers)
            else:
                calls.append(_Call(launcher, name, arguments, options))
            return launcher(*arguments, **options)

        return keep

    for module, name, launcher in before:
        setattr(module, name, keeping(name, launcher))
    try:
        yield
    finally:
        for module, name, launcher in before:
            setattr(module, name, launcher)


def _backend_modules() -> list[str]:
    package = importlib.import_module("ple_fast.triton_backend")
    return [module.name for module in pkgutil.iter_modules(package.__path__)]


def _recorded(trunk: nn.Module, x: Tensor) -> list[_Call]:
    """What a training step and an inference call launch."""
    from ple_fast_kernels import without_replay

    calls: list[_Call] = []
    with _recording(calls), use_backend("triton"), without_replay():
        y = trunk(x)
        y.backward(torch.randn_like(y))
        with torch.inference_mode():
            trunk(x)
    return calls


def _agree(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    for a, b in zip(ours, theirs, strict=True):
        distance = (a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)
        if not float(distance) <= TOLERANCE:
            return False
    return True


class _Tuner:
    """Measures calls on one device."""

    def __init__(self, device: torch.device, prepare: Prepare, rounds: int, say: Callable[[str], None]) -> None:
        self.tiles: Any = importlib.import_module("ple_fast_kernels._tiles")
        self.architecture, self.processors = self.tiles.architecture(device)
        self.device, self.prepare, self.rounds, self.say = device, prepare, rounds, say

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

    def asked(self, call: _Call) -> Any:
        """The request for a tile that a call makes, at the tables of the moment; the call is run."""
        self.tiles.asked = []
        try:
            call.run()
            requests = self.tiles.asked
        finally:
            self.tiles.asked = None
        assert len(requests) == 1, (call.name, requests)
        return requests[0]

    def measure(self, call: _Call, choice: Callable[[str], Sequence[Tile]]) -> Measured | None:
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
                    raise RuntimeError(f"{call.name} with {tile} differs from {shipped.tile}: please report it")
                samplers[tile] = self.prepare(lambda tile=tile: call.run(tile))  # type: ignore[misc]  # bound now
            except _out_of_resources():
                self.say(f"  {shipped.kind}: {candidate} does not fit")
        if len(samplers) < 2:
            return None
        return Measured(shipped.kind, shipped.results, self.medians(samplers))

    def compare(self, call: _Call, fastest: Tile | None) -> Compared | None:
        """The kernel with its ``fastest`` tile (None: the shipped one) and the library, where the product is a plain
        one; otherwise None."""
        self.set_table({})
        plain = plain_of(call.run)
        if plain is None:
            return None
        tile = self.asked(call).tile if fastest is None else fastest
        expected = call.result(tile)
        samplers = {"kernels": self.prepare(lambda: call.run(tile))}
        self.set_table({}, least=0)
        if not _agree(call.result(), expected):
            raise RuntimeError(f"{call.name} by the library differs from {tile}: please report it")
        samplers["library"] = self.prepare(call.run)
        medians = self.medians(samplers)
        return Compared(plain.kind, plain.product, plain.work, medians["kernels"], medians["library"])

    def medians(self, samplers: dict[_Name, Sampler]) -> dict[_Name, float]:
        """Seconds of each, interleaved."""
        samples: dict[_Name, list[float]] = {name: [] for name in samplers}
        order = list(samplers)
        for r in range(self.rounds):
            start = r % len(order)
            for name in order[start:] + order[:start]:
                samples[name].append(samplers[name]())
        return {name: statistics.median(taken) for name, taken in samples.items()}


def _out_of_resources() -> tuple[type[Exception], ...]:
    from triton.runtime.errors import OutOfResources

    return (OutOfResources,)


def best_table(measured: Sequence[Measured], processors: int) -> Table:
    """The fastest tiles as a table: per row and amount of work the tile with the least time in sum, from that amount
    on. The shipped tile stays unless another is faster by ``GAIN``."""
    from ple_fast_kernels import Class

    groups: dict[str, dict[int, list[Measured]]] = {}
    for entry in measured:
        # By the work that a table tells apart, in which an entry begins.
        groups.setdefault(entry.kind, {}).setdefault(entry.results * 128 // processors, []).append(entry)
    table: Table = {}
    for kind, by_work in groups.items():
        classes: list[Class] = []
        for work, entries in sorted(by_work.items()):
            common = [t for t in entries[0].seconds if all(t in entry.seconds for entry in entries)]
            if not common:  # each was cut to another size
                continue
            total = {t: sum(entry.seconds[t] for entry in entries) for t in common}
            shipped = next(iter(entries[0].seconds))
            tile = min(total, key=lambda t: total[t])
            if shipped in total and total[tile] > (1 - GAIN) * total[shipped]:
                tile = shipped
            if not classes or classes[-1].tile != tile:
                classes.append(Class(work if classes else 0, tile))
        if classes:
            table[kind] = tuple(classes)
    return table


def tune(
    trunk: nn.Module,
    x: Tensor,
    *,
    rounds: int = ROUNDS,
    prepare: Prepare = cuda_graph_sampler,
    choice: Callable[[str], Sequence[Tile]] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Table, list[Measured | Compared]]:
    """Measure the tiles of a trunk at the shape, dtype and device of ``x``.

    Args:
        trunk: ``PLE``, ``CGC``, ``MMoE``, or a level.
        x: its input ``(B, D)``, with ``requires_grad`` if training computes its gradient.
        rounds: samples per tile, interleaved.
        prepare: makes a sampler of a launch.
        choice: candidates of a row of the table; default ``candidates``.
        say: is told what happens.

    Returns:
        The table, to be set with ``ple_fast_kernels.set_table`` or written to a file, and all medians.

    Raises:
        RuntimeError: the kernels cannot run on this device, or two tiles give different results.
    """
    rounds = check_count("rounds", rounds)
    tuner = _Tuner(x.device, prepare, rounds, say)
    size, limit = x.element_size(), tuner.shared_limit()
    chosen = choice or (lambda kind: candidates(kind, tuner.architecture, size, limit))
    tiled: list[Measured] = []
    compared: list[Compared] = []
    try:
        calls = _recorded(trunk, x)
        for i, call in enumerate(calls):
            found = tuner.measure(call, chosen)
            fastest = None if found is None else min(found.seconds.items(), key=lambda item: item[1])[0]
            beside = tuner.compare(call, fastest)
            if beside is not None:
                compared.append(beside)
                say(
                    f"{i + 1}/{len(calls)} {call.name}: kernels {beside.kernels * 1e6:.1f} us, library "
                    f"{beside.library * 1e6:.1f} us"
                )
            if found is None:
                continue
            tiled.append(found)
            (shipped, before), *_ = found.seconds.items()
            tile, after = min(found.seconds.items(), key=lambda item: item[1])
            say(
                f"{i + 1}/{len(calls)} {call.name}: {shipped[:-1]} {before * 1e6:.1f} us, best of {len(found.seconds)} "
                f"{tile[:-1]} {after * 1e6:.1f} us"
            )
    finally:
        tuner.tiles.set_table(tuner.architecture, None)
    rows = {k: r for k, r in tuner.tiles.TABLES[tuner.architecture].items() if k in ROWS}
    table = {**best_table(tiled, tuner.processors), **library_rows(compared, rows, GAIN)}
    return table, [*tiled, *compared]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _microseconds(seconds: float) -> float:
    return float(f"{seconds * 1e6:.4g}")


def save(
    path: Path, table: Table, measured: Sequence[Measured | Compared], device: torch.device, about: dict[str, Any]
) -> None:
    """Write a table with what it was measured with; processes that start later use it."""
    files = importlib.import_module("ple_fast_kernels._tile_files")
    tiles = importlib.import_module("ple_fast_kernels._tiles")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    rows = [
        [m.kind, m.results, [[list(tile), _microseconds(seconds)] for tile, seconds in m.seconds.items()]]
        for m in measured
        if isinstance(m, Measured)
    ]
    plain = [
        [m.kind, m.product, m.work, _microseconds(m.kernels), _microseconds(m.library)]
        for m in measured
        if isinstance(m, Compared)
    ]
    head = {
        "gpu": gpu,
        "triton": _version("triton"),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        **about,
        "measured_us": rows,
        "kernels_library_us": plain,
    }
    files.write_table(path, table, tiles.architecture(device)[0], head)
    tiles.reload_tables()


def _widths(text: str) -> tuple[int, ...]:
    return tuple(int(width) for width in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ple_fast.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--in-features", type=int, required=True)
    parser.add_argument("--num-tasks", type=int, required=True)
    parser.add_argument("--num-levels", type=int, default=2)
    parser.add_argument("--task-experts", type=int, default=2)
    parser.add_argument("--shared-experts", type=int, default=2)
    parser.add_argument(
        "--expert-units", type=_widths, default=(256, 128), help="widths of an expert's layers, at every level"
    )
    parser.add_argument("--activation", default="relu")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument(
        "--tf32", action="store_true", help='float32 products as with set_float32_matmul_precision("high")'
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, help="default: where the library looks for it")
    return parser


def main(arguments: list[str] | None = None, *, prepare: Prepare = cuda_graph_sampler) -> None:
    """The command."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("ple_fast.tune measures on a GPU, and PyTorch sees none here")
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    files = importlib.import_module("ple_fast_kernels._tile_files")
    shape = {
        name: getattr(options, name)
        for name in ("in_features", "num_tasks", "num_levels", "task_experts", "shared_experts", "expert_units")
    }
    dtype = getattr(torch, options.dtype)
    trunk = PLE(**shape, activation=options.activation, device=device, dtype=dtype)
    x = torch.randn(options.batch, options.in_features, device=device, dtype=dtype, requires_grad=True)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    table, measured = tune(trunk, x, rounds=options.rounds, prepare=prepare, say=say)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    path = options.out or files.tiles_path(gpu)
    save(path, table, measured, device, {"trunk": {**shape, "batch": options.batch, "dtype": options.dtype}})
    print(f"wrote {path}: tiles of {', '.join(table) or 'no kernel'}")


if __name__ == "__main__":
    main()

"""The trunks that are timed: a row per name, all doing the same work with the same weights.

A contestant maps ``x (B, D)`` to T tensors ``(B, H)``, as towers read them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.bare_best import BEST_FLOOR
from benchmarks.bare_gemm import FLOOR
from benchmarks.configs import MODES, Mode, TrunkConfig
from benchmarks.loop import PLAIN, LoopPLE, MakeUp, baseline
from benchmarks.ours import fast, packed, packed_rechub, reference
from benchmarks.peers import BmmPLE, DeepctrTrunk, RechubTrunk, batch_linear, compiled


def _as_it_is(run: Callable[[], Any]) -> Callable[[], Any]:
    return run


def _without_onednn(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` with PyTorch's switch of oneDNN off, which leaves ``mm`` and ``bmm``. By the setter that the public
    context manager calls, because that one takes as long as a tenth of a call on one row."""

    def wrapped() -> Any:
        before = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            return run()
        finally:
            torch._C._set_mkldnn_enabled(before)

    return wrapped


@dataclass(frozen=True)
class Contestant:
    """One way to compute the trunk."""

    name: str
    build: Callable[[TrunkConfig, LoopPLE], nn.Module]
    """From a configuration and the loop of its make-up, whose weights it takes over."""
    note: str
    make_up: MakeUp = PLAIN
    """Of the loop that it must agree with."""
    requires: str | None = None
    """The package that it needs."""
    modes: tuple[Mode, ...] = MODES
    same_widths: bool = False
    """It knows no widths that change from level to level."""
    compiled: bool = False
    """It runs under ``torch.compile``,"""
    frozen: bool = False
    """with weights that are constants, and without gradients by ``no_grad``,"""
    self_graphed: bool = False
    """in CUDA graphs of its own."""
    wrap: Callable[[Callable[[], Any]], Callable[[], Any]] = _as_it_is
    """Makes the step that is run out of the plain one."""

    def available(self) -> bool:
        """Whether the package that it needs is installed."""
        return self.requires is None or importlib.util.find_spec(self.requires) is not None

    def supports(self, config: TrunkConfig) -> bool:
        """Whether it can be built at this size."""
        return not (self.same_widths and len(set(config.level_units())) > 1)


def _loop(config: TrunkConfig, loop: LoopPLE) -> nn.Module:
    return loop


_RECHUB: Any = {"make_up": MakeUp("batch"), "requires": "torch_rechub", "same_widths": True}
_DEEPCTR: Any = {"make_up": MakeUp(gate_bias=False), "requires": "deepctr_torch", "same_widths": True}
_LAYER_NORM, _DROPOUT = MakeUp("layer"), MakeUp(dropout=0.1)
_ROWS = (
    Contestant("loop", _loop, "plain per-expert loop, eager"),
    Contestant("loop_compiled", compiled, "the same loop under torch.compile", compiled=True),
    Contestant(
        "loop_max_autotune", partial(compiled, mode="max-autotune"),
        "the same loop under torch.compile(mode='max-autotune'), which times products and uses CUDA graphs",
        compiled=True, self_graphed=True,
    ),
    Contestant(
        "loop_batch_linear", batch_linear,
        "the same loop under torch.compile with Inductor's pre-grad fusion of linear layers into batched products",
        compiled=True,
    ),
    Contestant(
        "loop_frozen", partial(compiled, options={"freezing": True}),
        "the same loop under torch.compile with constant (frozen) weights",
        modes=("inference",), compiled=True, frozen=True,
    ),
    Contestant("bmm", BmmPLE, "naive stacking: one batched product per layer"),
    Contestant(
        "rechub", RechubTrunk,
        "torch-rechub 0.9.0, its CGC layers (batch norm in experts and gates, cannot be turned off)", **_RECHUB,
    ),
    Contestant(
        "deepctr", DeepctrTrunk,
        "DeepCTR-Torch 0.3.0, its levels (gates without bias; computes an unread last shared mixture)", **_DEEPCTR,
    ),
    Contestant("reference", reference, "ple_fast.reference, the oracle of the tests"),
    Contestant("fast", fast, "ple_fast.PLE"),
    Contestant(
        "fast_recompute", partial(fast, recompute=True), "ple_fast.PLE(recompute=True)", modes=("forward", "train")
    ),
    Contestant(
        "fast_mm", fast,
        "ple_fast.PLE with oneDNN switched off: every product is PyTorch's `mm` or `bmm`, as the peers' are",
        wrap=_without_onednn,
    ),
    Contestant("fast_rechub", packed_rechub, "`pack` of torch-rechub's own CGC layers", **_RECHUB),
    Contestant("loop_layer_norm", _loop, "`loop` with layer norm in the experts", _LAYER_NORM),
    Contestant("fast_layer_norm", packed, "`pack` of `loop_layer_norm`", _LAYER_NORM),
    Contestant("loop_dropout", _loop, "`loop` with dropout 0.1 in the experts", _DROPOUT),
    Contestant("fast_dropout", packed, "`pack` of `loop_dropout`", _DROPOUT),
)  # fmt: skip
CONTESTANTS: dict[str, Contestant] = {row.name: row for row in _ROWS}
BASELINE = "loop"
OURS = ("fast", "fast_recompute", "fast_mm")
PEERS = ("loop", "loop_compiled", "loop_frozen", "rechub", "deepctr", "bmm")
"""Those that ``fast`` is held against: every contestant of the head to head that is not ours."""
FLOORS = (FLOOR, BEST_FLOOR)
"""The products of a step alone."""
HEAD_TO_HEAD = (*OURS, *PEERS, *FLOORS)
QUICK_HEAD_TO_HEAD = ("fast", BASELINE, *FLOORS)
NORM_PAIRS = (("rechub", "fast_rechub"), ("loop_layer_norm", "fast_layer_norm"), ("loop_dropout", "fast_dropout"))
"""A peer with norms or dropout, and ours of the same modules."""
SUITE_CONTESTANTS = ("loop", "bmm", "reference", "rechub", "deepctr", "fast", "fast_recompute")
"""Of the suite of pytest-benchmark. The compiled loops are left to the head-to-head: each size and mode would compile
for half a minute."""
GPU_CONTESTANTS = (
    "fast", "fast_recompute", "loop", "loop_compiled", "loop_max_autotune", "loop_batch_linear", "bmm", "rechub",
    "deepctr",
)  # fmt: skip
GPU_EAGER_PEERS = ("loop", "rechub", "deepctr")
"""Per-expert code, which the targets on a GPU are about, as agreed; the report has lines of their own for ``bmm``."""


def missing(names: Iterable[str]) -> list[str]:
    """Packages that contestants need and that are not installed."""
    absent = (CONTESTANTS[name] for name in names if name not in FLOORS and not CONTESTANTS[name].available())
    return sorted({str(contestant.requires) for contestant in absent})


def build(name: str, config: TrunkConfig, device: torch.device | str = "cpu") -> nn.Module:
    """A contestant with the baseline's seeded weights."""
    contestant = CONTESTANTS[name]
    if not contestant.supports(config):
        raise ValueError(f"{name}: gives every level the same widths, and {config.name} has {config.level_units()}")
    with torch.random.fork_rng(devices=[]):  # deepctr-torch seeds the global generator
        return contestant.build(config, baseline(config, contestant.make_up)).to(device, config.torch_dtype)

"""AdaTT's CrossStitch, whose matrices our levels keep in another form."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..topology import Topology
from .adatt_common import AdaTTLibrary, made, offset, stacks
from .converter import LevelSource
from .library import PlainLevel


def _forward(self: Any, input: Tensor) -> Tensor:
    for level, stitch in zip(self.ple_fast.levels, self.stitchs, strict=True):
        input = stitch(level(input).transpose(1, 2)).transpose(1, 2)
    return input


class CrossStitchConverter(AdaTTLibrary):
    """``mtl_lib.CrossStitch``: an expert per task and level, and a matrix behind each level, which stays.

    Our levels keep a weight ``a`` as ``a - 1``. That is rounded, and a swap changes no bit: in one it is the library's
    own layer that mixes what the fused experts give.
    """

    class_name = "CrossStitch"
    gates = "stitchs"
    children = ("experts",)
    methods = (("forward", _forward),)

    def read(self, site: Any) -> list[LevelSource]:
        found = []
        for experts in site.experts:
            tasks = tuple(range(len(experts)))
            kinds = Topology.cross_stitch(len(experts)).mixture_kind
            alone = Topology(tasks, tasks, tuple((t,) for t in tasks), mixture_kind=kinds)
            found.append(LevelSource(alone, stacks(experts), [None] * len(tasks)))
        return found

    def sources(self, model: nn.Module) -> list[LevelSource]:
        """The levels with the matrices in them, as ``from_adatt`` gives them."""
        found, (site,) = super().sources(model), self.sites(model)
        for source, stitch in zip(found, cast(Any, site).stitchs, strict=True):
            source.topology = Topology.cross_stitch(len(source.experts))
            source.gates = [offset((True,) * len(row), row - 1, stitch.weight.requires_grad) for row in stitch.weight]
        return found

    def write(self, levels: list[PlainLevel]) -> nn.Module:
        stitches = []
        for level in levels:
            if level.level.topology != Topology.cross_stitch(len(level.experts)):
                self.cannot("every task weighs the experts of all tasks, with learned scalars and no gate")
            offsets = [gate.offset.weight for gate in level.gates if gate.offset is not None]
            stitch = nn.Linear(len(offsets), len(offsets), bias=False, device="meta", dtype=offsets[0].dtype)
            stitch.weight = nn.Parameter(torch.stack([row.detach() for row in offsets]) + 1)
            stitches.append(stitch.requires_grad_(offsets[0].requires_grad))
        return made({"experts": self.experts(levels), "stitchs": stitches}, num_tasks=len(levels[0].gates))

"""HoME (Wang et al., KDD 2025) in plain loops, one owner's experts at a time: slow, short, obviously right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .reference import ExtractionNetworkReference, PLEReference


class HoMEReference(PLEReference):
    """Both levels of ``HoME``, and its feature gates, whose projections are those of ``ExtractionNetworkReference``.

    Args:
        levels: the meta and the task level.
        feature_gates: what stands before each; none.
        groups: the tasks of each group.
        readers: per level of each feature gate the slot that it reads.
    """

    def __init__(
        self,
        levels: list[ExtractionNetworkReference],
        feature_gates: list[ExtractionNetworkReference],
        groups: tuple[tuple[int, ...], ...],
        readers: list[tuple[int, ...]],
    ) -> None:
        super().__init__(levels, sum(map(len, groups)))
        self.feature_gates = nn.ModuleList(feature_gates)
        self.groups, self.readers = groups, readers

    def _scaled(self, number: int, v: list[Tensor], readers: tuple[int, ...]) -> list[Tensor]:
        """Of each reader its slot, element by element times twice a mixture of sigmoids."""
        if not self.feature_gates:
            return [v[slot] for slot in readers]
        network = self.feature_gates[number]
        assert isinstance(network, ExtractionNetworkReference)
        scale = network(v)
        return [2 * v[slot] * scale[:, reader] for reader, slot in enumerate(readers)]

    def forward(self, x: Any, *, return_gates: bool = False) -> Any:
        """``x``: ``(B, D)``. Returns ``(B, T, H)``, and all weights on request."""
        meta, task = self.levels
        shared = len(self.groups)
        first, second = self.readers or [(0,) * (shared + 1), tuple(range(shared + 1))]
        y, weights = meta(self._scaled(0, [x], first), x, return_gates=True)
        z = list(y.unbind(1))
        beside = [torch.cat((z[slot], z[shared]), dim=1) for slot in second]
        out, last = task(self._scaled(1, z, second), beside, return_gates=True)
        return (out, [weights, last]) if return_gates else out

    @classmethod
    def like(cls, module: Any) -> HoMEReference:
        """The reference of a ``HoME``, weights copied."""
        levels = [ExtractionNetworkReference.like(level) for level in module.levels]
        gates = [ExtractionNetworkReference.like(own.network) for own in module.feature_gates]
        readers = [own.slots for own in module.feature_gates]
        return cls(levels, gates, module.groups, readers).train(module.training)

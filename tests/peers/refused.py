"""Stand-ins for classes that are called PLE and compute something else: their structure alone."""

from __future__ import annotations

from torch import nn


class CGCBlock(nn.Module):
    """A level of Merlin."""


class PLEBlock(nn.Module):
    """NVIDIA-Merlin/models, ``merlin.models.torch`` (commit eb1e541): levels in ``values``."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.values = nn.ModuleList(CGCBlock() for _ in range(depth))


class ResNetEncoder(nn.Module):
    """Five stages, and gates on flattened images."""

    def __init__(self) -> None:
        super().__init__()
        self.specific_layer = nn.ModuleDict({"0": nn.ModuleDict({"a": nn.ModuleList([nn.Conv2d(3, 4, 3)])})})
        self.shared_layer = nn.ModuleDict({"0": nn.ModuleList([nn.Conv2d(3, 4, 3)])})
        self.gate_specific = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(48, 2)])})


class PLE(nn.Module):
    """LibMTL (commit 4336804)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ResNetEncoder()

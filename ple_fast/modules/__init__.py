"""What users hold: parameters and their initialisation. The arithmetic is one call into ``functional``."""

from .adatt import AdaTT, CrossStitch
from .mmoe import MLMMoE, MMoE
from .network import ExtractionNetwork
from .ple import CGC, PLE
from .sharing import AsymmetricSharing, CustomizedSharing, HardSharing, SingleTask

__all__ = [
    "CGC",
    "PLE",
    "AdaTT",
    "AsymmetricSharing",
    "CrossStitch",
    "CustomizedSharing",
    "ExtractionNetwork",
    "HardSharing",
    "MLMMoE",
    "MMoE",
    "SingleTask",
]

"""What users hold: parameters and their initialisation. The arithmetic is one call into ``functional``."""

from .gated import CGC, PLE, AdaTT, MLMMoE, MMoE
from .home import HoME
from .network import ExtractionNetwork
from .stem import STEM
from .ungated import AsymmetricSharing, CrossStitch, CustomizedSharing, HardSharing, SingleTask

__all__ = [
    "CGC",
    "PLE",
    "STEM",
    "AdaTT",
    "AsymmetricSharing",
    "CrossStitch",
    "CustomizedSharing",
    "ExtractionNetwork",
    "HardSharing",
    "HoME",
    "MLMMoE",
    "MMoE",
    "SingleTask",
]

"""What users hold: parameters and their initialisation. The arithmetic is one call into ``functional``."""

from .gated import CGC, PLE, AdaTT, MLMMoE, MMoE
from .home import HoME
from .network import ExtractionNetwork
from .pepnet import EPNet, GateNU, PPNet
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
    "EPNet",
    "ExtractionNetwork",
    "GateNU",
    "HardSharing",
    "HoME",
    "MLMMoE",
    "MMoE",
    "PPNet",
    "SingleTask",
]

"""What users hold: parameters and their initialisation. The arithmetic is one call into ``functional``."""

from .network import ExtractionNetwork
from .ple import CGC, PLE, MMoE

__all__ = ["CGC", "PLE", "ExtractionNetwork", "MMoE"]

"""From ordinary modules to fused ones, and what the way back needs beside ``torch.nn``."""

from ..modules.plain import Dice, Temperature, WeightOffset
from .pack import pack

__all__ = ["Dice", "Temperature", "WeightOffset", "pack"]

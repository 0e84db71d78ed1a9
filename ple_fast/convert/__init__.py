"""From ordinary modules and other libraries' models to fused ones, and back.

Importing the module of a library registers the classes that it knows.
"""

from ..modules.plain import Dice, Temperature, WeightOffset
from .accelerate import Left, Replaced, Report, accelerate, restore
from .deepctr_torch import from_deepctr_torch, to_deepctr_torch
from .moves import Move
from .pack import pack
from .pieces import LevelSource
from .registry import Converter, refuse_class, register
from .torch_rechub import from_torch_rechub, to_torch_rechub

__all__ = [
    "Converter",
    "Dice",
    "Left",
    "LevelSource",
    "Move",
    "Replaced",
    "Report",
    "Temperature",
    "WeightOffset",
    "accelerate",
    "from_deepctr_torch",
    "from_torch_rechub",
    "pack",
    "refuse_class",
    "register",
    "restore",
    "to_deepctr_torch",
    "to_torch_rechub",
]

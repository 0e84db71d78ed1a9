"""From ordinary modules and other libraries' models to fused ones, and back."""

from ..modules.plain import Dice, Temperature, WeightOffset
from .accelerate import Left, Replaced, Report, accelerate, restore
from .moves import Move
from .pack import pack
from .pieces import LevelSource
from .registry import Converter, refuse_class, register

# Each module of a library also registers the classes that it knows.
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
    "from_torch_rechub",
    "pack",
    "refuse_class",
    "register",
    "restore",
    "to_torch_rechub",
]

"""From ordinary modules and other libraries' models to fused ones, and back.

Importing the module of a library registers the classes that it knows.
"""

from ..modules.plain import Dice, RowDice, Temperature, TopK, WeightOffset
from ..modules.unpack import Move
from . import refused as refused
from . import torcheasyrec_pepnet as torcheasyrec_pepnet
from .accelerate import accelerate, restore
from .adatt import from_adatt, to_adatt
from .converter import Converter, LevelSource, refuse_class, register
from .deepctr_torch import from_deepctr_torch, to_deepctr_torch
from .fuxictr import from_fuxictr, to_fuxictr
from .libmtl import from_libmtl, to_libmtl
from .library import mixtures
from .mtreclib import from_mtreclib, to_mtreclib
from .pack import pack
from .report import Left, Replaced, Report
from .torch_rechub import from_torch_rechub, to_torch_rechub
from .torcheasyrec import from_torcheasyrec, to_torcheasyrec

__all__ = [
    "Converter",
    "Dice",
    "Left",
    "LevelSource",
    "Move",
    "Replaced",
    "Report",
    "RowDice",
    "Temperature",
    "TopK",
    "WeightOffset",
    "accelerate",
    "from_adatt",
    "from_deepctr_torch",
    "from_fuxictr",
    "from_libmtl",
    "from_mtreclib",
    "from_torch_rechub",
    "from_torcheasyrec",
    "mixtures",
    "pack",
    "refuse_class",
    "register",
    "restore",
    "to_adatt",
    "to_deepctr_torch",
    "to_fuxictr",
    "to_libmtl",
    "to_mtreclib",
    "to_torch_rechub",
    "to_torcheasyrec",
]
